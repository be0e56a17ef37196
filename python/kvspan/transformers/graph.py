"""A cache inside of a compiled graph (``torch.compile``), which must not depend on how long it is.

There, lengths are tensors that operators return as the graph runs, keys and values are whole rows
of address space, whose shapes stay, and new tokens are written by index. The operator that says
where to write is what maps the pages, in the first layer of a step.

All operators declare that they change `Rows.state`, a tensor that only names the rows: that keeps
their order, whatever the compiler does with it.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch

from kvspan import InvalidArgument

if TYPE_CHECKING:
    from kvspan.transformers.rows import Rows

_ROWS: weakref.WeakValueDictionary[int, Rows] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def state_of(rows: Rows) -> torch.Tensor:
    """Return a tensor that names these rows, which a graph takes in their place."""
    number = next(_NUMBERS)
    _ROWS[number] = rows
    with torch.inference_mode(False):
        return torch.tensor(number)


def seen_tokens(rows: Rows, layer: int) -> torch.Tensor:
    """Return how many tokens a layer has seen when the graph comes here: int64, no dimensions."""
    seen: torch.Tensor = _seen_tokens(rows.state, layer)
    return seen


def append(
    rows: Rows, layer: int, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write new tokens, and return ``[rows, heads, positions, dim]``: all there ever are."""
    all_keys, all_values = rows.planes(layer)
    positions = _new_positions(rows.state, layer, keys.shape[2], keys.device)
    all_keys[:, :, positions] = keys.detach()
    all_values[:, :, positions] = values.detach()
    return all_keys, all_values


def left_padding(mask: torch.Tensor) -> torch.Tensor:
    """Return the first token of each row of a mask ``[rows, tokens]``, int32; raise for holes."""
    begins: torch.Tensor = _left_padding(mask)
    return begins


@torch.library.custom_op("kvspan::seen_tokens", mutates_args=("state",))
def _seen_tokens(state: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.tensor(_ROWS[int(state)].lengths[layer])


@_seen_tokens.register_fake
def _(state: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("kvspan::new_positions", mutates_args=("state",))
def _new_positions(
    state: torch.Tensor, layer: int, n_tokens: int, device: torch.device
) -> torch.Tensor:
    begin, end = _ROWS[int(state)].grow(layer, n_tokens)
    return torch.arange(begin, end, device=device)


@_new_positions.register_fake
def _(state: torch.Tensor, layer: int, n_tokens: int, device: torch.device) -> torch.Tensor:
    return torch.empty((n_tokens,), dtype=torch.int64, device=device)


@torch.library.custom_op("kvspan::left_padding", mutates_args=())
def _left_padding(mask: torch.Tensor) -> torch.Tensor:
    begins = mask.int().argmax(-1)
    if bool((mask.sum(-1) != mask.shape[-1] - begins).any()):
        raise InvalidArgument(
            "a compiled graph takes an attention_mask with padding on the left only, and no row "
            'without tokens; compile with attn_implementation="sdpa" for others'
        )
    return begins.int()


@_left_padding.register_fake
def _(mask: torch.Tensor) -> torch.Tensor:
    return torch.empty((mask.shape[0],), dtype=torch.int32, device=mask.device)
