"""The physical memory of one device."""

from __future__ import annotations

import threading
from types import TracebackType

from kvspan import _native
from kvspan._check import size_bytes, size_text
from kvspan.errors import InvalidArgument, ReleasedError
from kvspan.stats import PoolStats, call_counts


class Pool:
    """Frames of physical memory on one device, under one budget, for any number of caches.

    Parameters
    ----------
    device
        ``"cpu"``: frames are extents of an anonymous file (memfd).
    capacity
        The most memory that the frames may take: bytes, or a string such as ``"4GiB"``. A multiple
        of the page size. Nothing is allocated before it is needed.
    page_size
        A power of two from 64 KiB to 64 MiB. With 2 MiB and more, pages are huge where the kernel
        allows it.
    max_frame_size
        The largest frame: the page size times a power of two. The default is what the device likes
        best, which on a host is one page, as mapping a run of frames is one call anyway.
    preallocate
        Memory to create now, so that no request waits for it (see `preallocate`).
    huge_pages
        Whether to ask the kernel for huge pages. It may refuse; `stats` says so.
    reserve
        Memory of the machine to leave to others; by default 5%, and at least 256 MiB.

    Raises
    ------
    InvalidArgument
        A size that cannot be, or a capacity larger than the machine.
    OutOfMemory
        ``preallocate`` asks for more than is free.
    CapacityError, DriverError
        A limit of the machine (such as RLIMIT_FSIZE), or the kernel, refuses.

    Notes
    -----
    Threads may share a pool. `close` ends its API; its memory lives until the last cache and the
    last tensor over it are gone.
    """

    def __init__(
        self,
        device: str = "cpu",
        capacity: int | str = "1GiB",
        page_size: int | str = "2MiB",
        max_frame_size: int | str | None = None,
        preallocate: int | str = 0,
        huge_pages: bool = True,
        reserve: int | str | None = None,
    ) -> None:
        if device != "cpu":
            raise InvalidArgument(f'device must be "cpu" in this version, not {device!r}')
        # 0 stands for "the default" in the native call, so a given 0 is refused here.
        frame = 0 if max_frame_size is None else size_bytes(max_frame_size, "max_frame_size", 1)
        held_back = 0 if reserve is None else size_bytes(reserve, "reserve", 1)
        ahead = size_bytes(preallocate, "preallocate")
        self._lock = threading.Lock()  # guards _store
        self._store: _native.PoolHandle | None = _native.make_host_pool(
            size_bytes(capacity, "capacity", 1),
            size_bytes(page_size, "page_size", 1),
            frame,
            bool(huge_pages),
            held_back,
        )
        self.device: str = self._store.device
        self.page_size: int = self._store.page_size
        self.capacity: int = self._store.figures()["capacity_bytes"]
        if ahead:
            self.preallocate(ahead)

    @property
    def _native(self) -> _native.PoolHandle:
        store = self._store
        if store is None:
            raise ReleasedError("this pool was closed; make a new one with Pool(...)")
        return store

    def preallocate(self, n_bytes: int | str) -> None:
        """Create frames until this many bytes of free ones exist, so that taking them is quick.

        Raises
        ------
        OutOfMemory
            The capacity or the machine has less; what was created stays, as free frames.
        """
        self._native.create_ahead(size_bytes(n_bytes, "n_bytes"))

    def trim(self) -> int:
        """Give the memory of free frames back to the machine; return how many bytes that was."""
        return self._native.trim()

    def stats(self) -> PoolStats:
        """Return what the pool holds, and its driver calls by name."""
        f = self._native.figures()
        return PoolStats(
            capacity_bytes=f["capacity_bytes"],
            in_use_bytes=f["in_use_bytes"],
            free_bytes=f["created_bytes"] - f["in_use_bytes"],
            fresh_bytes=f["capacity_bytes"] - f["created_bytes"],
            huge_bytes=f["huge_bytes"],
            small_bytes=f["small_bytes"],
            huge_refusal=f["huge_refusal"],
            n_failures=f["n_failures"],
            calls=call_counts(f),
        )

    def close(self) -> None:
        """End the API of the pool. Caches and tensors over it stay valid; may be called again."""
        with self._lock:
            self._store = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._store is None:
            return "<kvspan.Pool, closed>"
        s = self.stats()
        return (
            f"<kvspan.Pool on {self.device}: {size_text(s.in_use_bytes)} in use, "
            f"{size_text(s.free_bytes)} free, {size_text(s.fresh_bytes)} not created, "
            f"pages of {size_text(self.page_size)}>"
        )
