"""Arguments as users write them, checked and converted; every error says what is allowed."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

import torch

from kvspan.errors import InvalidArgument

TokenIds = Sequence[int] | torch.Tensor

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def size_bytes(value: int | str, name: str, least: int = 0) -> int:
    """Return `value`, a number of bytes or a string such as "512MiB", in bytes."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is not None and match[2] in _UNITS:
        n = int(float(match[1]) * _UNITS[match[2]])
    else:
        try:
            n = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise InvalidArgument(
                f'{name} must be a number of bytes or a size such as "512MiB" or "4GiB" '
                f"(units {', '.join(u for u in _UNITS if u)}), not {value!r}"
            ) from None
    if not least <= n < 1 << 63:
        raise InvalidArgument(f"{name} must be between {least} and 2^63 - 1 bytes, not {value!r}")
    return n


def integer(value: Any, name: str, least: int | None = None, most: int = (1 << 31) - 1) -> int:
    """Return `value` as an int; what is merely truncatable to one (1.5, "3") is refused."""
    try:
        n = operator.index(value)
    except TypeError:
        raise InvalidArgument(f"{name} must be an integer, not {value!r}") from None
    if least is not None and not least <= n <= most:
        raise InvalidArgument(f"{name} must be between {least} and {most}, not {n}")
    return n


def tokens(value: Any, name: str) -> int:
    """Return a number of tokens that fits the native calls, which check it against the state."""
    n = integer(value, name)
    if not -(1 << 62) < n < 1 << 62:
        raise InvalidArgument(f"{name} is out of range (lengths are int32, at most 2^31 - 1): {n}")
    return n


def int32_ids(value: TokenIds) -> torch.Tensor:
    """Return token ids as a contiguous int32 tensor on the CPU."""
    try:
        wide = torch.as_tensor(value)
        if wide.numel() == 0:
            wide = wide.to(torch.int32)
        if wide.is_floating_point() or wide.is_complex() or wide.dtype == torch.bool:
            raise TypeError
        if wide.dim() != 1:
            raise ValueError
    except (TypeError, ValueError, RuntimeError):
        shown = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise InvalidArgument(
            f"token_ids must be integers, a list or a tensor of one dimension, not {shown[:60]}"
        ) from None
    ids = wide.to(device="cpu", dtype=torch.int32).contiguous()
    if wide.dtype == torch.int64 and not torch.equal(ids.long(), wide.cpu()):
        raise InvalidArgument("token_ids must fit int32")
    return ids


def choice(value: str, name: str, allowed: tuple[str, ...]) -> str:
    """Return `value` if it is one of `allowed`."""
    if value not in allowed:
        quoted = ", ".join(f'"{a}"' for a in allowed)
        raise InvalidArgument(f"{name} must be one of {quoted}, not {value!r}")
    return value


def size_text(n: int) -> str:
    """Return a number of bytes as people write it."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
