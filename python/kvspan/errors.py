"""What can go wrong, by type: each also derives from the builtin that one would expect.

Whatever raises one of these has left all state as it was before the call; `RefusedError` is the
exception.
"""


class Error(Exception):
    """Base class of kvspan's errors."""


class OutOfMemory(Error, MemoryError):  # noqa: N818 (torch and CUDA say it so)
    """Physical memory is short: an answer, not a crash.

    Release, truncate or trim something and try again, or wait.

    Attributes
    ----------
    requested, free, reclaimable
        In bytes: what was asked for, what the pool still has, and what `KVCache.trim` would add.
        Of a `FramePool`, in frames, and nothing is reclaimable.
    """

    requested: int
    free: int
    reclaimable: int


class InvalidArgument(Error, ValueError):  # noqa: N818
    """An argument that can never work, whatever the state."""


class CapacityError(Error, RuntimeError):
    """A limit other than memory is reached: slots, positions, mappings, address space."""


class DriverError(Error, OSError):
    """The operating system or the driver refused a call that should have worked.

    Attributes
    ----------
    call, code
        The driver's names of the call ("mmap") and of the error ("ENOMEM").
    """

    call: str
    code: str


class ReleasedError(Error, RuntimeError):
    """The object was released or closed, or belongs to the parent of a fork(2)."""


class BusyError(Error, RuntimeError):
    """Another thread is inside a call on the same sequence."""


class RefusedError(Error, ValueError):
    """Some of the frames that were given back or shared are not in use, or not of the pool.

    A frame that was given back twice, say. These were left alone, and **the others were given back
    (or shared)**.

    Attributes
    ----------
    n_refused
        How many.
    """

    n_refused: int
