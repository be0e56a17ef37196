"""From a tensor back to the cache whose memory it shows."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvspan.cache import KVCache

# By the address of a plane. A cache that is gone takes its entries along; one that is closed has
# none.
_caches: weakref.WeakValueDictionary[int, KVCache] = weakref.WeakValueDictionary()


def remember(plane: torch.Tensor, cache: KVCache) -> None:
    """Note that all tensors that share the plane's storage show this cache."""
    _caches[plane.untyped_storage().data_ptr()] = cache


def forget(plane: torch.Tensor) -> None:
    """Undo `remember`."""
    _caches.pop(plane.untyped_storage().data_ptr(), None)


def writable_positions(tensor: torch.Tensor, rows: Sequence[int] | None = None) -> list[int] | None:
    """Return how many positions of rows of a cache's tensor may be written.

    That is the length of the sequence in the row's slot, less what the tensor leaves out at the
    front, and 0 where there is no sequence: memory behind it may be there, but nobody promises it.

    Parameters
    ----------
    tensor
        What `KVCache.layer` or `Batch.layer` returned, or a slice of its slots or positions.
    rows
        Which of its rows; all by default.

    Returns
    -------
    list of int, or None
        One for each of these rows; None if the tensor shows no open cache of kvspan.
    """
    base = tensor.untyped_storage().data_ptr()
    cache = _caches.get(base)
    if cache is None:
        return None
    lengths = cache._native.lengths()
    slot_stride, position_stride = tensor.stride(0), tensor.stride(1)
    first, rest = divmod((tensor.data_ptr() - base) // tensor.element_size(), slot_stride)
    skipped = rest // position_stride
    n_positions = tensor.shape[1]
    asked = range(tensor.shape[0]) if rows is None else rows
    return [max(0, min(lengths[first + row] - skipped, n_positions)) for row in asked]
