"""Sequences that decode together."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any

import torch

from kvspan import _native
from kvspan._check import integer, tokens
from kvspan.errors import InvalidArgument
from kvspan.sequence import Sequence

if TYPE_CHECKING:
    from kvspan.cache import KVCache


class Batch:
    """Rows of sequences; made by `KVCache.batch`.

    `lengths` and `slots` are int32 tensors at fixed addresses (``cache_seqlens`` and
    ``cache_batch_idx`` of FlashAttention); they change in place. On a GPU they are updated on the
    stream of the call that changes them, so captured graphs see them.
    """

    def __init__(
        self, cache: KVCache, native: _native.BatchHandle, sequences: list[Sequence]
    ) -> None:
        self._cache = cache
        self._native = native
        self._sequences = sequences
        self._make_tensors()

    def _make_tensors(self) -> None:
        self._before = self._cache._tensor(self._native.before_view())
        self._lengths = self._cache._tensor(self._native.lengths_view())
        self._slots = self._cache._tensor(self._native.slots_view())

    def step(self, n_tokens: int = 1, *, stream: Any = None) -> torch.Tensor:
        """Extend every row by `n_tokens` in one native call.

        Returns
        -------
        torch.Tensor
            int32 ``[rows]``: the lengths *before* the step, which is where the new tokens go. The
            same tensor each time, written in place.

        Raises
        ------
        CapacityError, OutOfMemory, ReleasedError, BusyError
            As `Sequence.extend`; no row has grown then.
        """
        self._native.step(tokens(n_tokens, "n_tokens"), self._cache._stream(stream))
        return self._before

    @property
    def lengths(self) -> torch.Tensor:
        """int32 ``[rows]``: the lengths now, also if rows were extended by themselves."""
        self._native.refresh(self._cache._stream(None))
        return self._lengths

    @property
    def slots(self) -> torch.Tensor:
        """int32 ``[rows]``: the slot of each row."""
        return self._slots

    @property
    def sequences(self) -> list[Sequence]:
        """The rows, in order."""
        return list(self._sequences)

    def __len__(self) -> int:
        return len(self._sequences)

    def layer(self, index: int) -> tuple[torch.Tensor, ...]:
        """Return the rows of each plane of a layer, ``[rows, positions, heads, dim]``; no copy.

        Raises
        ------
        InvalidArgument
            The rows are not in adjacent slots: the batch was not made with ``cache.batch(n)``.
        """
        first = self._native.first_slot
        if first is None:
            raise InvalidArgument(
                "rows side by side need adjacent slots: make the batch with cache.batch(n), or "
                "index cache.layer(i) by batch.slots"
            )
        return tuple(plane[first : first + len(self)] for plane in self._cache.layer(index))

    def select(self, rows: Items[int] | torch.Tensor, *, stream: Any = None) -> None:
        """Make row i what row ``rows[i]`` was, by remapping pages: no KV history is copied.

        Rows permute, repeat (sharing whole pages, copying the partly filled last one) and drop
        (their sequences are released). Sequences move with their rows. At most as many rows as the
        batch was made with.

        Raises
        ------
        InvalidArgument
            The batch is not of adjacent slots, or a row is out of range.
        OutOfMemory, CapacityError
            Nothing has changed.
        """
        try:
            given = list(rows.tolist() if isinstance(rows, torch.Tensor) else rows)
        except TypeError:
            raise InvalidArgument(f"rows is a list of row numbers, not {rows!r}") from None
        wanted = [integer(row, "a row") for row in given]
        if any(not 0 <= row < len(self) for row in wanted):
            raise InvalidArgument(f"select takes rows 0 to {len(self) - 1}, not {wanted}")
        self._native.select(wanted, self._cache._stream(stream))
        known = {id(s._native): s for s in self._sequences}
        self._sequences = [
            # Not `or`: an empty sequence is false.
            known[id(native)] if id(native) in known else Sequence(self._cache, native)
            for native in self._native.rows
        ]
        self._make_tensors()

    def fork(self, *, stream: Any = None) -> Batch:
        """Return a batch in adjacent slots of its own whose rows have the same tokens.

        As `Sequence.fork` for each row, all or none. It may grow to as many rows as this one.

        Raises
        ------
        InvalidArgument
            The batch is not of adjacent slots.
        CapacityError
            There are not so many adjacent free slots.
        OutOfMemory
            There are no frames for the copied pages. Nothing has changed.
        """
        native = self._native.fork(self._cache._stream(stream))
        return Batch(self._cache, native, [Sequence(self._cache, row) for row in native.rows])

    def __repr__(self) -> str:
        first = self._native.first_slot
        where = "any slots" if first is None else f"adjacent slots from {first}"
        return f"<kvspan.Batch of {len(self)} rows in {where}>"
