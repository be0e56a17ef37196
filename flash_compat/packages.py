"""The flash-attn packages that may be installed, by generation, for tensors on a GPU.

FlashAttention-3 (``flash_attn_interface``) is preferred where it runs and knows every argument that
was given, then FlashAttention-2 (``flash_attn``). Without either, torch's own kernels serve.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

# What FlashAttention-3's functions call differently. What they lack, their signatures say.
_FA3_RENAMED = {"block_table": "page_table"}


@functools.cache
def _function(module: str, name: str) -> Callable[..., Any] | None:
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return function if callable(function) else None


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def find(name: str, device: torch.device, options: dict[str, Any]) -> Callable[..., Any] | None:
    """Return a package's function of that name for a GPU, or None: it is then torch's turn.

    `options` are the keyword arguments of the call; those at their defaults are left out, so that a
    package which lacks one is only passed over when it is used.
    """
    fa3 = _function("flash_attn_interface", name) if _is_hopper(device) else None
    renamed = {_FA3_RENAMED.get(key, key): value for key, value in options.items()}
    if fa3 is not None and renamed.keys() <= inspect.signature(fa3).parameters.keys():
        return functools.partial(fa3, **renamed)
    fa2 = _function("flash_attn", name)
    return None if fa2 is None else functools.partial(fa2, **options)
