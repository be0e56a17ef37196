"""
The native part of kvspan; use the kvspan package.
"""
from __future__ import annotations
import collections.abc
import typing
__all__: list[str] = ['BatchHandle', 'CacheHandle', 'FramePoolHandle', 'PoolHandle', 'SequenceHandle', 'TensorView', 'make_cache', 'make_cuda_pool', 'make_host_pool']
class TensorView:
    """
    Memory on its way into a tensor, by the DLPack protocol.
    """
    def __dlpack__(self, *, stream: typing.Any = None, max_version: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex] | None = None, dl_device: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex] | None = None, copy: bool | None = None) -> typing.Any:
        ...
    def __dlpack_device__(self) -> tuple[int, int]:
        ...
    @property
    def address(self) -> int:
        ...
class PoolHandle:
    def create_ahead(self, size: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def figures(self) -> dict[str, typing.Any]:
        ...
    def start_background(self) -> None:
        ...
    def stop_background(self) -> None:
        ...
    def trim(self) -> int:
        ...
    def work_ahead(self) -> int:
        ...
    @property
    def device(self) -> str:
        ...
    @property
    def page_size(self) -> int:
        ...
class FramePoolHandle:
    def __init__(self, n_frames: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def counts(self) -> tuple[int, int, int]:
        ...
    def give(self, frames: typing.Any) -> int:
        """
        Take a reference from each frame; those without one left are free.
        
        Parameters
        ----------
        frames
            A contiguous buffer of 32-bit integers: those of one request or of many, in any order.
        
        Returns
        -------
        int
            How many came free: all, unless some are shared.
        
        Raises
        ------
        RefusedError
            Some are free already, so this is a second `give`, or not of this pool. They are left alone,
            and **the others are given back**.
        InvalidArgument
            `frames` is no such buffer.
        """
    def references(self, frame: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Return how many hold the frame; 0 when it is free or foreign.
        """
    def share(self, frames: typing.Any) -> None:
        """
        Add a reference to each frame, so that one more `give` of it is needed.
        
        Parameters
        ----------
        frames
            A contiguous buffer of 32-bit integers. Whoever calls holds them, so that nobody frees them
            meanwhile. A frame that stands there twice gets two.
        
        Raises
        ------
        RefusedError
            Some are not in use, or not of this pool. **The others are shared.**
        InvalidArgument
            `frames` is no such buffer.
        """
    def take(self, out: typing.Any) -> None:
        """
        Fill `out` with frames that nobody else has.
        
        All or nothing. Each has one reference. Adjacent frames where there are some, and frames that were
        given back before ones that were never taken.
        
        Parameters
        ----------
        out
            A contiguous writable buffer of 32-bit integers, signed or not, of any shape.
        
        Raises
        ------
        OutOfMemory
            Fewer are available. Nothing was taken and `out` is as it was; ``requested`` and ``free`` are
            in frames.
        InvalidArgument
            `out` is no such buffer.
        """
class SequenceHandle:
    def commit(self, tokens: typing.SupportsInt | typing.SupportsIndex, n_tokens: typing.SupportsInt | typing.SupportsIndex, merges: bool, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
        ...
    def drop_before(self, position: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        ...
    def extend(self, n_tokens: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        ...
    def fork(self, n: typing.SupportsInt | typing.SupportsIndex, length: typing.SupportsInt | typing.SupportsIndex | None, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> list[SequenceHandle]:
        ...
    def release(self, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        ...
    def truncate(self, length: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        ...
    @property
    def dropped(self) -> int:
        ...
    @property
    def is_released(self) -> bool:
        ...
    @property
    def length(self) -> int:
        ...
    @property
    def slot(self) -> int:
        ...
class BatchHandle:
    def before_view(self) -> TensorView:
        ...
    def fork(self, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> BatchHandle:
        ...
    def lengths_view(self) -> TensorView:
        ...
    def refresh(self, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        ...
    def select(self, rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], stream: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        ...
    def slots_view(self) -> TensorView:
        ...
    def step(self, n_tokens: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        ...
    @property
    def first_slot(self) -> int | None:
        ...
    @property
    def rows(self) -> list[SequenceHandle]:
        ...
    @property
    def size(self) -> int:
        ...
class CacheHandle:
    def adjacent_batch(self, n: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> BatchHandle:
        ...
    def batch(self, sequences: collections.abc.Sequence[SequenceHandle], stream: typing.SupportsInt | typing.SupportsIndex = 0) -> BatchHandle:
        ...
    def close(self) -> None:
        ...
    def figures(self) -> dict[str, typing.Any]:
        ...
    def layout(self) -> dict[str, typing.Any]:
        ...
    def lengths(self) -> list[int]:
        ...
    def mapper_events(self) -> list[tuple[float, str, int, int, int]]:
        ...
    def page_map(self) -> list[tuple[int, int, int, int, int]]:
        ...
    def plane_view(self, layer: typing.SupportsInt | typing.SupportsIndex, plane: typing.SupportsInt | typing.SupportsIndex) -> TensorView:
        ...
    def reorder(self, sequences: collections.abc.Sequence[SequenceHandle], parents: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], stream: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        ...
    def sequence(self, n_tokens: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> SequenceHandle:
        ...
    def sequence_of(self, tokens: typing.SupportsInt | typing.SupportsIndex, n_tokens: typing.SupportsInt | typing.SupportsIndex, salt: str, expected: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> SequenceHandle:
        ...
    def trim(self) -> int:
        ...
def make_cache(store: PoolHandle, layers: collections.abc.Sequence[tuple[collections.abc.Sequence[tuple[str, str, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]], typing.SupportsInt | typing.SupportsIndex | None]], max_seqs: typing.SupportsInt | typing.SupportsIndex, max_seq_len: typing.SupportsInt | typing.SupportsIndex, layers_per_page: typing.SupportsInt | typing.SupportsIndex, split_planes: bool, overread_tokens: typing.SupportsInt | typing.SupportsIndex | None, zero_unmapped: bool, static_len: typing.SupportsInt | typing.SupportsIndex | None, scrub_reuse: bool, keep: typing.SupportsInt | typing.SupportsIndex | None) -> CacheHandle:
    ...
def make_cuda_pool(ordinal: typing.SupportsInt | typing.SupportsIndex, capacity: typing.SupportsInt | typing.SupportsIndex, page_size: typing.SupportsInt | typing.SupportsIndex, max_frame_size: typing.SupportsInt | typing.SupportsIndex, peers: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], shareable: bool, reserve: typing.SupportsInt | typing.SupportsIndex, ready: typing.SupportsInt | typing.SupportsIndex) -> PoolHandle:
    ...
def make_host_pool(capacity: typing.SupportsInt | typing.SupportsIndex, page_size: typing.SupportsInt | typing.SupportsIndex, max_frame_size: typing.SupportsInt | typing.SupportsIndex, huge_pages: str, numa_node: typing.SupportsInt | typing.SupportsIndex | None, reserve: typing.SupportsInt | typing.SupportsIndex, ready: typing.SupportsInt | typing.SupportsIndex) -> PoolHandle:
    ...
