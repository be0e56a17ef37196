"""What the layers of a cache are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvspan._check import integer
from kvspan.errors import InvalidArgument

DTYPES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
    torch.int8: "int8",
}

NativePlane = tuple[str, str, int, int]
NativeLayer = tuple[list[NativePlane], int | None]


@dataclass(frozen=True)
class Plane:
    """One tensor of a layer, ``[slots, positions, heads, dim]``.

    Parameters
    ----------
    name
        ``"k"``, ``"v"``, ``"k_scale"``, ``"latent"``, ...
    heads, dim
        What one token holds.
    dtype
        float32, float16, bfloat16, float8_e4m3fn, float8_e5m2 or int8.
    """

    name: str
    heads: int
    dim: int
    dtype: torch.dtype = torch.bfloat16

    def to_native(self) -> NativePlane:
        """Return the plane as the native code takes it; raise InvalidArgument."""
        if not isinstance(self.dtype, torch.dtype) or self.dtype not in DTYPES:
            allowed = ", ".join(DTYPES.values())
            raise InvalidArgument(f"dtype must be one of {allowed}, not {self.dtype}")
        heads = integer(self.heads, f"plane '{self.name}': heads", 1, 1 << 20)
        dim = integer(self.dim, f"plane '{self.name}': dim", 1, 1 << 20)
        return (str(self.name), DTYPES[self.dtype], heads, dim)


@dataclass(frozen=True)
class LayerSpec:
    """The planes of one layer, and its sliding window.

    Parameters
    ----------
    n_kv_heads, head_dim, dtype
        The shorthand: planes ``k`` and ``v`` of this shape.
    planes
        Planes of any number and kind, instead of the shorthand: ``[Plane("latent", 1, 576)]``.
    window
        How many last tokens the layer attends to; None: all. Layers with a window give up pages
        that `Sequence.drop_before` frees.
    """

    n_kv_heads: int | None = None
    head_dim: int | None = None
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    planes: tuple[Plane, ...] = field(default=())

    def __post_init__(self) -> None:
        given = self.planes
        if not isinstance(given, (tuple, list)) or not all(isinstance(p, Plane) for p in given):
            raise InvalidArgument(f"planes is a tuple of Plane, not {given!r}")
        object.__setattr__(self, "planes", tuple(given))
        if bool(self.planes) == (self.n_kv_heads is not None or self.head_dim is not None):
            raise InvalidArgument("a LayerSpec takes either n_kv_heads and head_dim, or planes")
        if not self.planes:
            if self.n_kv_heads is None or self.head_dim is None:
                raise InvalidArgument("a LayerSpec without planes needs n_kv_heads and head_dim")
            shape = (self.n_kv_heads, self.head_dim, self.dtype)
            object.__setattr__(self, "planes", (Plane("k", *shape), Plane("v", *shape)))

    def to_native(self) -> NativeLayer:
        """Return the layer as the native code takes it; raise InvalidArgument."""
        window = None if self.window is None else integer(self.window, "window, if not None,", 1)
        return ([plane.to_native() for plane in self.planes], window)
