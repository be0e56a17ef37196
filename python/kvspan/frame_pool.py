"""The free list alone, for engines that keep block tables themselves."""

from __future__ import annotations

from kvspan import _native
from kvspan._check import integer
from kvspan.stats import FrameCounts


class FramePool(_native.FramePoolHandle):
    """Which of ``n_frames`` blocks are free, and how often each of the others is referenced.

    It deals in numbers, 0 to ``n_frames - 1``, and holds no memory: block `i` is whatever the
    engine keeps at place `i` of its own tensors. What others call allocate and free is `take` and
    `give` here; both want a buffer of the caller's, so that a block table can be filled in place
    and no list is made::

        blocks = kvspan.FramePool(65536)
        table = torch.zeros(256, 2048, dtype=torch.int32)  # a row a request
        rows = table.numpy()  # the same memory
        blocks.take(rows[0, :16])  # 16 blocks for the request in row 0
        blocks.share(rows[0, :8])  # another one begins with the same 8
        rows[1, :8] = rows[0, :8]
        blocks.give(rows[0, :16])  # 8 come free

    Buffers are whatever has the buffer protocol: arrays of NumPy, ``array.array("I")``, ``ctypes``.

    Every id is checked, always: to give back what is free, or was never taken, raises
    `RefusedError` and harms nobody. A second `give` that comes after someone else took the frame
    cannot be told from a rightful one.

    Parameters
    ----------
    n_frames
        How many there are: 1 to 2^28 - 1. They cost some 4 bytes each, once they are taken.

    Raises
    ------
    InvalidArgument
        `n_frames` is out of range.

    Notes
    -----
    Threads may share a pool: it is lock-free. A call keeps the GIL, since it is over sooner than
    the GIL would be handed on. A child of fork(2) has a copy of its own.
    """

    def __init__(self, n_frames: int) -> None:
        self.n_frames = integer(n_frames, "n_frames", 1)
        super().__init__(self.n_frames)

    def counts(self) -> FrameCounts:
        """Return how many frames are fresh, free and in use, at one moment."""
        return FrameCounts(*super().counts())

    def __repr__(self) -> str:
        counts = self.counts()
        return f"<kvspan.FramePool: {counts.in_use} of {self.n_frames} frames in use>"
