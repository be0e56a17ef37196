"""The rows of one call, in one KVCache: what all layers that grow together share.

transformers asks layer by layer; lengths belong to rows. The first layer that needs a length makes
the rows reach it, in one native call, and the others find it reached.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence as Items
from typing import Any

import torch

from kvspan import Batch, CapacityError, InvalidArgument, KVCache, OutOfMemory
from kvspan.transformers import graph
from kvspan.transformers.sizes import Sizes


class Rows:
    """Rows of equal length in adjacent slots; none before `bind`.

    Parameters
    ----------
    windows
        Of each layer, in order; None: it attends to all.
    sizes
        Of the cache to make, and of the batch.
    cache
        The cache to take slots of, instead of a new one.
    """

    def __init__(
        self, windows: Items[int | None], sizes: Sizes, cache: KVCache | None = None
    ) -> None:
        self._windows = tuple(windows)
        self._window = max((w for w in windows if w is not None), default=None)
        self._sizes = sizes
        self._given = cache
        self._cache = cache
        self._batch: Batch | None = None
        self._n_slots = 0
        self._planes: list[tuple[torch.Tensor, ...]] = []
        self._dropped = 0  # positions before it, in layers with windows
        self._shared_below = 0  # positions before it may be several rows', in all layers
        self.length = 0
        self.lengths = [0] * len(self._windows)
        """What each layer has seen: less than `length` until it has had its turn in a step."""
        self.state = graph.state_of(self)
        """What a compiled graph takes in place of these rows."""
        self._together: list[weakref.ref[Rows]] = []  # no circles: memory is freed at once
        self.records_past = False
        """Whether windows keep all that they left, since `cut` may go back to it."""

    def grow_with(self, others: Items[Rows]) -> None:
        """Let the same rows in layers of other kinds reach the same lengths, or none."""
        self._together = [weakref.ref(rows) for rows in others if rows is not self]

    @property
    def cache(self) -> KVCache | None:
        """Where the rows are; None before the first `bind` of a cache of their own."""
        return self._cache

    @property
    def is_bound(self) -> bool:
        """Whether the rows have slots."""
        return self._batch is not None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def bind(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take slots for as many rows as these ``[rows, heads, tokens, dim]`` have.

        Raises
        ------
        CapacityError
            There are not so many adjacent free slots.
        InvalidArgument
            More rows than max_batch.
        """
        if self._batch is not None:
            return
        if self._cache is None:
            self._cache = self._sizes.cache(self._windows, keys, values)
        self._take_slots(keys.shape[0])

    def begin_with(self, token_ids: torch.Tensor, salt: str) -> None:
        """Take slots for rows that begin with what is known of prompts ``[rows, tokens]``.

        As many tokens as are known of all of them. Takes one slot more for a moment.
        """
        self._take_slots(len(token_ids))
        rows = self._bound.sequences
        for row, ids in zip(rows, token_ids, strict=True):
            with self._in.sequence(token_ids=ids, salt=salt) as known:
                self._in.reorder([row, known], [1, 0])  # into the row's slot
        self.length = min(len(row) for row in rows)
        for row in rows:
            row.truncate(self.length)
        self.lengths = [self.length] * len(self.lengths)

    def _take_slots(self, n_rows: int) -> None:
        n_slots = self._sizes.n_slots(n_rows, spare=self._given is None)
        batch = self._in.batch(n_slots)
        if n_slots > n_rows:  # the others stay reserved, for rows that are repeated
            batch.select(range(n_rows))
        self._batch, self._n_slots = batch, n_slots
        self._planes = self._views()

    def commit(self, token_ids: torch.Tensor) -> None:
        """Let others begin with the tokens ``[rows, at least length]`` of these rows."""
        held = min(self.lengths)
        for sequence, ids in zip(self._bound.sequences, token_ids, strict=True):
            sequence.commit(ids[:held])

    def __len__(self) -> int:
        return 0 if self._batch is None else len(self._batch)

    def planes(self, layer: int) -> tuple[torch.Tensor, ...]:
        """Return the layer's keys and values, ``[rows, heads, positions, dim]``: views."""
        if not self._planes:
            raise InvalidArgument(
                "the cache has no memory yet; before a compiled call, run the prompt without "
                "compiling, or call early_initialization"
            )
        return self._planes[layer]

    def grow(self, layer: int, n_tokens: int) -> tuple[int, int]:
        """Make room for a layer's next tokens; return the first position and one past the last.

        Raises
        ------
        InvalidArgument
            The layer is shorter than others were when rows were repeated or copied: it would write
            where rows share memory.
        CapacityError, OutOfMemory
            As `reach`.
        """
        begin = self.lengths[layer]
        end = begin + n_tokens
        if begin < self._shared_below:
            raise InvalidArgument(
                f"a layer holds {begin} tokens a row, and others held {self._shared_below} when "
                "rows were repeated or copied; where layers differ in length, use SpanCache(), "
                "without a config: each has pages of its own"
            )
        self.reach(end)
        self.lengths[layer] = end
        return begin, end

    def reach(self, length: int) -> None:
        """Make positions up to `length` writable in all rows, or raise with nothing changed.

        Rows that `grow_with` these and were as long reach it too, or none do.

        Raises
        ------
        CapacityError
            `length` is more than the cache's max_seq_len.
        OutOfMemory
            The pool is too small.
        """
        if length <= self.length:
            return
        was = self.length
        grown: list[Rows] = []
        try:
            self._step_to(length)
            grown.append(self)
            for rows in (ref() for ref in self._together):
                if rows is not None and rows.is_bound and rows.length == was:
                    rows._step_to(length)
                    grown.append(rows)
        except (CapacityError, OutOfMemory):
            for rows in grown:
                rows._truncate(was)
            raise

    def _step_to(self, length: int) -> None:
        if length > (longest := self._in.max_seq_len):
            raise CapacityError(
                f"the cache holds {longest} tokens a row, not {length}; make it with a larger "
                "max_len (of a KVCache: max_seq_len), which costs address space only"
            )
        if not self.records_past:
            self._leave_windows()
        self._bound.step(length - self.length)
        self.length = length

    def _truncate(self, length: int) -> None:
        for sequence in self._bound.sequences:
            sequence.truncate(length)
        self.length = length
        self._shared_below = min(self._shared_below, length)

    def cut(self, layer: int, length: int) -> None:
        """Forget what a layer has behind `length`, and, once no layer has more, the pages.

        Raises
        ------
        CapacityError
            Windows have left what the next token would attend to.
        """
        if length < self.length:
            if self._window is not None and max(0, length + 1 - self._window) < self._dropped:
                raise CapacityError(
                    f"cannot go back to {length} tokens: a window of {self._window} has left "
                    f"positions before {self._dropped}"
                )
            self.lengths[layer] = length
            if max(self.lengths) < self.length:
                self._truncate(max(self.lengths))
        if self.records_past and min(self.lengths) == self.length:  # it was the last layer's turn
            self._leave_windows()

    def select(self, rows: Items[int]) -> None:
        """Make row i what row ``rows[i]`` was, by remapping pages."""
        if self._batch is None or list(rows) == list(range(len(self))):
            return
        if len(rows) > self._n_slots:
            raise CapacityError(
                f"{len(rows)} rows are more than the {self._n_slots} slots that were taken for "
                f"this cache; give it max_batch={len(rows)} or more"
            )
        was = len(self)
        self._batch.select(rows)
        if len(set(rows)) < len(rows):
            self._shared_below = self.length
        if len(self) != was:
            self._planes = self._views()

    def release(self) -> None:
        """Give the slots back; a cache of their own is kept for the next rows."""
        if self._batch is not None:
            for sequence in self._batch.sequences:  # a traceback may hold the batch
                sequence.release()
        self._batch = None
        self._planes = []
        self._dropped = self._shared_below = self.length = 0
        self.lengths = [0] * len(self.lengths)

    def close(self) -> None:
        """Give the slots back, and a cache of their own too."""
        self.release()
        self._cache = self._given

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        """Return rows with the same tokens, as forks: pages are shared, not copied."""
        other = copy.copy(self)
        other.lengths = list(self.lengths)
        other.state = graph.state_of(other)
        if self._batch is not None:
            other._batch = self._batch.fork()
            self._shared_below = other._shared_below = self.length
            other._planes = other._views()
        memo[id(self)] = other
        there = [rows for ref in self._together if (rows := ref()) is not None]
        other._together = [weakref.ref(copy.deepcopy(rows, memo)) for rows in there]
        return other

    def _views(self) -> list[tuple[torch.Tensor, ...]]:
        """Return each layer's planes of the rows that there are now."""
        batch = self._bound
        # A tensor that is made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            return [
                tuple(plane.transpose(1, 2) for plane in batch.layer(layer))
                for layer in range(len(self.lengths))
            ]

    def _leave_windows(self) -> None:
        """Give up what no window reaches any more, a page's worth of tokens at a time."""
        if self._window is None or self._batch is None:
            return
        position = self.length + 1 - self._window
        if position - self._dropped < min(self._in.tokens_per_page):
            return
        for sequence in self._batch.sequences:
            sequence.drop_before(position)
        self._dropped = position

    @property
    def _in(self) -> KVCache:
        if self._cache is None:
            raise InvalidArgument("nothing was written to this cache yet")
        return self._cache

    @property
    def _bound(self) -> Batch:
        if self._batch is None:
            raise InvalidArgument("nothing was written to this cache yet")
        return self._batch
