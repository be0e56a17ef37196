"""One layer's keys and values, as transformers asks for them: tokens are written where they stay.

What `update` returns, and `keys` and `values`, are views ``[batch, heads, length, dim]`` of the
cache's memory, valid until the rows are reordered, cropped or released. Nothing is concatenated.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvspan import CapacityError, InvalidArgument
from kvspan.transformers import graph
from kvspan.transformers.rows import Rows
from kvspan.transformers.sizes import Sizes


class SpanLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not read by mypy
    """A layer that attends to all tokens; what DynamicLayer is to DynamicCache.

    Parameters
    ----------
    rows
        Shared with the layers that grow together with this one. None: rows of its own.
    index
        The layer's place among them.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, rows: Rows | None = None, index: int = 0) -> None:
        # Not the base class's: keys and values are views, made when asked for.
        self.rows = Rows([None], Sizes()) if rows is None else rows
        self.index = index

    @property
    def length(self) -> int:
        """How many tokens the layer has seen."""
        return self.rows.lengths[self.index]

    @property
    def is_initialized(self) -> bool:
        """Whether the layer has memory to write to."""
        return self.rows.is_bound

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys that the next token may attend to, ``[batch, heads, length, dim]``."""
        return self._view(0)

    @property
    def values(self) -> torch.Tensor | None:
        """The values that the next token may attend to, ``[batch, heads, length, dim]``."""
        return self._view(1)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take slots for as many rows as the states have.

        Raises
        ------
        CapacityError, InvalidArgument
            As `Rows.bind`.
        """
        self.rows.bind(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write states ``[batch, heads, tokens, dim]`` behind the layer's tokens.

        Returns
        -------
        tuple of torch.Tensor
            All keys and values that the new tokens may attend to. Where gradients are recorded, a
            copy, through which they reach the new states (those of earlier calls are constants).

        Raises
        ------
        OutOfMemory, CapacityError
            There is no memory for them, or they are more than max_len. Nothing has changed.
        InvalidArgument
            States of another shape, dtype or device than the cache has.
        """
        rows = self.rows
        is_compiling = torch.compiler.is_compiling()
        if not (rows.is_bound or is_compiling):
            rows.bind(key_states, value_states)
        keys, values = rows.planes(self.index)
        _check_alike(keys, key_states)
        _check_alike(values, value_states)
        if is_compiling:
            return graph.append(rows, self.index, key_states, value_states)
        begin, end = rows.grow(self.index, key_states.shape[2])
        keys[:, :, begin:end].copy_(key_states.detach())
        values[:, :, begin:end].copy_(value_states.detach())
        first = self._first_visible(begin)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return (
                torch.cat([keys[:, :, first:begin], key_states], dim=2),
                torch.cat([values[:, :, first:begin], value_states], dim=2),
            )
        return keys[:, :, first:end], values[:, :, first:end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys `update` would return for so many tokens, and the first's place."""
        if torch.compiler.is_compiling():
            return self.rows.planes(self.index)[0].shape[2], 0
        first = self._first_visible(self.length)
        return self.length + query_length - first, first

    def get_seq_length(self) -> int | torch.Tensor:
        """Return how many tokens the layer has seen; in a compiled graph, a tensor."""
        if torch.compiler.is_compiling():
            return graph.seen_tokens(self.rows, self.index)
        return self.length

    def get_max_length(self) -> int:
        """Return -1, as DynamicLayer does: address space is no limit to plan by."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; at most all are forgotten.

        Raises
        ------
        InvalidArgument
            A positive number.
        """
        if tokens_to_remove > 0:
            raise InvalidArgument(
                f"crop takes how many tokens to remove as a negative number, not {tokens_to_remove}"
            )
        if self.is_initialized:
            self.rows.cut(self.index, max(0, self.length + tokens_to_remove))

    def reset(self) -> None:
        """Forget all tokens, and give the slots of all layers that share the rows back."""
        self.rows.release()

    def _first_visible(self, begin: int) -> int:
        """Return the first position that a token at `begin` may attend to."""
        return 0

    def _view(self, plane: int) -> torch.Tensor | None:
        if not self.is_initialized:
            return None
        first = self._first_visible(self.length)
        return self.rows.planes(self.index)[plane][:, :, first : self.length]


class SpanSlidingLayer(SpanLayer):
    """A layer that attends to a window of last tokens; what DynamicSlidingWindowLayer is.

    Pages that the window has left are given back when the rows grow, a page at a time.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, rows: Rows | None = None, index: int = 0) -> None:
        super().__init__(Rows([sliding_window], Sizes()) if rows is None else rows, index)
        self.sliding_window = sliding_window

    @property
    def record_past(self) -> bool:
        """Whether `crop` may go back to tokens that the window has left."""
        return self.rows.records_past

    def activate_past_recording(self) -> None:
        """Keep what the window leaves until the next `crop`."""
        self.rows.records_past = True

    def get_max_length(self) -> int:
        """Return the window."""
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises
        ------
        InvalidArgument
            A positive number.
        CapacityError
            The window has left tokens that would have to come back: `activate_past_recording`
            keeps them.
        """
        if tokens_to_remove < 0 and self.length >= self.sliding_window and not self.record_past:
            raise CapacityError(
                f"the window of {self.sliding_window} tokens has left tokens that crop would need; "
                "call activate_past_recording() before they are written"
            )
        super().crop(tokens_to_remove)

    def _first_visible(self, begin: int) -> int:
        return max(0, begin + 1 - self.sliding_window)


class SpanChunkedLayer(SpanSlidingLayer):
    """A layer that attends within chunks: like a window, it keeps a chunk's worth of tokens."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return what `SpanLayer.get_mask_sizes` does.

        Raises
        ------
        InvalidArgument
            In a compiled graph, which is not told where chunks begin.
        """
        if torch.compiler.is_compiling():
            raise InvalidArgument("layers that attend within chunks cannot be compiled")
        return super().get_mask_sizes(query_length)


def _check_alike(plane: torch.Tensor, new: torch.Tensor) -> None:
    rows, heads, _, dim = plane.shape
    n_rows, n_heads, _, n_dim = new.shape
    if (
        n_rows != rows
        or n_heads != heads
        or n_dim != dim
        or new.dtype != plane.dtype
        or new.device != plane.device
    ):
        raise InvalidArgument(
            f"the cache holds {rows} rows of {heads} heads of {dim} {plane.dtype} on "
            f"{plane.device}, and was given {list(new.shape)} {new.dtype} on {new.device}"
        )
