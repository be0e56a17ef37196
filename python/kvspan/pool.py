"""The physical memory of one device."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Sequence as Items
from types import TracebackType

import torch

from kvspan import _native
from kvspan._check import integer, size_bytes, size_text
from kvspan.errors import InvalidArgument, ReleasedError
from kvspan.stats import PoolStats, call_counts

# The share of the capacity that the background keeps created and unused.
READY_ONE_IN = 16
HUGETLB = ("hugetlb", "auto")


class Pool:
    """Frames of physical memory on one device, under one budget, for any number of caches.

    Parameters
    ----------
    device
        ``"cpu"``: frames are extents of an anonymous file (memfd). ``"cuda:0"``: frames are
        physical allocations of that GPU, by the driver's virtual memory management.
    capacity
        The most memory that the frames may take: bytes, or a string such as ``"4GiB"``. A multiple
        of the page size. Nothing is allocated before it is needed.
    page_size
        A power of two: from 64 KiB to 64 MiB on a host (from 2 MiB on, pages are huge where the
        kernel allows it), a multiple of the driver's granularity (2 MiB) on a GPU.
    max_frame_size
        The largest frame: the page size times a power of two. The default is what the device likes
        best: one page on a host, as mapping a run of frames is one call anyway; up to 128 MiB on a
        GPU, where every frame costs a call, whatever its size.
    preallocate
        Memory to create now, so that no request waits for it (see `preallocate`).
    background
        Whether a thread creates frames and maps pages before they are needed, so that decoding does
        not call the driver. Default: on a GPU, not on a host.
    ready
        How much memory the background keeps created and unused. Default: a sixteenth of the
        capacity, of which 64 single pages and two frames of each larger size are made at most.
    huge_pages
        On a host: what pages of the machine the memory is made of. True: huge pages that the kernel
        puts together; where it refuses, small ones, and `stats` says so. False: small ones.
        ``"hugetlb"``: the huge pages of 2 MiB that the administrator has set aside
        (``vm.nr_hugepages``), and no others: pages of the pool are at least that large, and
        ``reserve`` does not apply. ``"auto"``: those, if as many as the capacity are free now, else
        as True. Once they are chosen, whatever others take of them is missing here.
    numa_node
        On a host: the NUMA node that all of the memory comes from. Default: the kernel's choice,
        which is the node of the thread that needs it.
    reserve
        Memory of the device to leave to others. Default: 5% of a host's, and at least 256 MiB; on a
        GPU 256 MiB.
    peers
        On a GPU: other devices (ordinals) that may read and write the memory.
    shareable
        On a GPU: whether frames may be exported to other processes.

    Raises
    ------
    InvalidArgument
        A size that cannot be, or a capacity larger than the machine; no such device or NUMA node.
    OutOfMemory
        ``preallocate`` asks for more than is free.
    CapacityError, DriverError
        A limit of the machine (such as RLIMIT_FSIZE, or fewer hugetlb pages than the capacity), or
        the kernel or the GPU's driver, refuses; there is no driver, or it is too old.

    Notes
    -----
    Threads may share a pool. `close` ends its API; its memory lives until the last cache and the
    last tensor over it are gone.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        capacity: int | str = "1GiB",
        page_size: int | str = "2MiB",
        max_frame_size: int | str | None = None,
        preallocate: int | str = 0,
        background: bool | None = None,
        ready: int | str | None = None,
        huge_pages: bool | str = True,
        numa_node: int | None = None,
        reserve: int | str | None = None,
        peers: Items[int] = (),
        shareable: bool = False,
    ) -> None:
        ordinal = _cuda_ordinal(device)
        n_bytes = size_bytes(capacity, "capacity", 1)
        page = size_bytes(page_size, "page_size", 1)
        # 0 stands for "the default" in the native call, so a given 0 is refused here.
        frame = 0 if max_frame_size is None else size_bytes(max_frame_size, "max_frame_size", 1)
        held_back = 0 if reserve is None else size_bytes(reserve, "reserve", 1)
        kept_ready = n_bytes // READY_ONE_IN if ready is None else size_bytes(ready, "ready")
        ahead = size_bytes(preallocate, "preallocate")
        pages = _huge_pages(huge_pages)
        self._numa_node = None if numa_node is None else integer(numa_node, "numa_node", 0)
        self._lock = threading.Lock()  # guards _store
        self._store: _native.PoolHandle | None
        if ordinal is None:
            if peers or shareable:
                raise InvalidArgument(
                    'peers and shareable are for GPUs; leave them out with device="cpu"'
                )
            self._store = _native.make_host_pool(
                n_bytes, page, frame, pages, self._numa_node, held_back, kept_ready
            )
        else:
            if pages in HUGETLB or numa_node is not None:
                raise InvalidArgument(
                    "hugetlb pages and numa_node are for a host's memory; leave them out on a GPU"
                )
            others = [integer(peer, "a peer", 0) for peer in peers]
            self._store = _native.make_cuda_pool(
                ordinal, n_bytes, page, frame, others, bool(shareable), held_back, kept_ready
            )
        self.device: str = self._store.device
        self.page_size: int = self._store.page_size
        self.capacity: int = self._store.figures()["capacity_bytes"]
        if ahead:
            self.preallocate(ahead)
        if background if background is not None else ordinal is not None:
            self._store.start_background()
            # At exit, too: the thread must be gone before the driver is.
            weakref.finalize(self, self._store.stop_background)

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
            hugetlb_bytes=f["hugetlb_bytes"],
            numa_node=self._numa_node,
            n_failures=f["n_failures"],
            n_mappings=f["n_mappings"],
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


def _huge_pages(value: bool | str) -> str:
    """Return what the native call has for it."""
    if isinstance(value, str) and value in HUGETLB:
        return value
    if isinstance(value, str):
        raise InvalidArgument(f'huge_pages must be True, False, "hugetlb" or "auto", not {value!r}')
    return "transparent" if value else "none"


def _cuda_ordinal(device: str | torch.device) -> int | None:
    """Return N of "cuda:N", or None for "cpu"."""
    name = str(device) if isinstance(device, torch.device) else device
    match = re.fullmatch(r"(cpu)|cuda(?::(\d{1,4}))?", name) if isinstance(name, str) else None
    if match is None:
        raise InvalidArgument(f'device must be "cpu", "cuda" or "cuda:N", not {device!r}')
    return None if match[1] else int(match[2] or 0)
