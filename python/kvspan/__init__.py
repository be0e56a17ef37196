"""KV caches that look contiguous and are paged underneath.

A `Pool` holds the physical memory of one device, a `KVCache` over it the KV tensors of one model, a
`Sequence` one request's tokens in a slot of the cache, a `Batch` sequences that decode together.
A `FramePool` is for engines that keep block tables: it gives out the numbers of blocks.
"""

from importlib.metadata import version

from kvspan.batch import Batch
from kvspan.cache import KVCache
from kvspan.errors import (
    BusyError,
    CapacityError,
    DriverError,
    Error,
    InvalidArgument,
    OutOfMemory,
    RefusedError,
    ReleasedError,
)
from kvspan.frame_pool import FramePool
from kvspan.layers import LayerSpec, Plane
from kvspan.lookup import writable_positions
from kvspan.pool import Pool
from kvspan.sequence import Sequence
from kvspan.stats import (
    CacheStats,
    CallCount,
    FrameCounts,
    MapperEvent,
    PageMapEntry,
    PoolStats,
    PrefixStats,
)

__version__ = version("kvspan")

__all__ = [
    "Batch",
    "BusyError",
    "CacheStats",
    "CallCount",
    "CapacityError",
    "DriverError",
    "Error",
    "FrameCounts",
    "FramePool",
    "InvalidArgument",
    "KVCache",
    "LayerSpec",
    "MapperEvent",
    "OutOfMemory",
    "PageMapEntry",
    "Plane",
    "Pool",
    "PoolStats",
    "PrefixStats",
    "RefusedError",
    "ReleasedError",
    "Sequence",
    "__version__",
    "writable_positions",
]
