"""Streams as users have them, turned into the handle that the driver knows."""

from __future__ import annotations

import operator
from typing import Any

import torch

from kvspan.errors import InvalidArgument


def stream_handle(stream: Any, device: str) -> int:
    """Return the driver's handle of a stream on `device`.

    Parameters
    ----------
    stream
        A ``torch.cuda.Stream``, an object with ``__cuda_stream__`` (cuda.core), a handle as an int,
        or None: torch's current stream on that device; the legacy default stream (0) if torch does
        not use CUDA in this process.
    device
        The pool's device.

    Raises
    ------
    InvalidArgument
        It is none of these, or the device has no streams.
    """
    if device == "cpu":
        if stream is None:
            return 0
        raise InvalidArgument(f"the host has no streams; leave stream out, instead of {stream!r}")
    if stream is None:
        if not torch.cuda.is_initialized():
            return 0
        return int(torch.cuda.current_stream(torch.device(device)).cuda_stream)
    if hasattr(stream, "__cuda_stream__"):
        _version, handle = stream.__cuda_stream__()
        return int(handle)
    if hasattr(stream, "cuda_stream"):
        return int(stream.cuda_stream)
    try:
        handle = operator.index(stream)
    except TypeError:
        handle = -1
    if handle < 0:
        raise InvalidArgument(
            "stream must be a torch.cuda.Stream, an object with __cuda_stream__, a stream's handle "
            f"or None, not {stream!r}"
        )
    return handle
