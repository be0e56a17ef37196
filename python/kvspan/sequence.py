"""One request's tokens."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import torch

from kvspan import _native
from kvspan._check import TokenIds, int32_ids, integer, tokens
from kvspan.errors import ReleasedError

if TYPE_CHECKING:
    from kvspan.cache import KVCache


class Sequence:
    """A growing run of tokens in one slot of a cache; made by `KVCache.sequence`.

    Every change happens whole or not at all. A sequence is one thread's at a time: a second thread
    inside a call gets BusyError. Dropping the last reference releases it, after which its tensors
    must not be written.

    On a GPU every change takes effect on a stream: `stream` may be a ``torch.cuda.Stream``, an
    object with ``__cuda_stream__``, a handle, or None for torch's current stream. Kernels queued
    there before still see what was, kernels queued there later what is; nothing waits for the
    device as a whole. A stream must outlive the sequences and batches that were last worked on
    there, since dropping them looks at it; torch's streams do.
    """

    def __init__(self, cache: KVCache, native: _native.SequenceHandle) -> None:
        self._cache = cache
        self._native = native

    def extend(self, n_tokens: int, *, stream: Any = None) -> None:
        """Make `n_tokens` more positions, ``[length, length + n_tokens)``, readable and writable.

        What the new positions hold before they are written is not defined, but finite for float
        dtypes unless NaN was written there before.

        Raises
        ------
        InvalidArgument
            `n_tokens` is less than 1.
        CapacityError
            The sequence would pass max_seq_len, or the process its limit of mappings.
        OutOfMemory
            The pool has too few frames, also after reclaiming what is kept. The sequence is as it
            was: release or truncate others and try again.
        ReleasedError, BusyError
        """
        self._native.extend(tokens(n_tokens, "n_tokens"), self._cache._stream(stream))

    def truncate(self, length: int, *, stream: Any = None) -> None:
        """Forget the tokens from position `length` on (0 <= length <= the present one)."""
        self._native.truncate(tokens(length, "length"), self._cache._stream(stream))

    def drop_before(self, position: int, *, stream: Any = None) -> None:
        """Give up positions before `position` in the layers that have a sliding window.

        Pages that lie whole before it are unmapped and read as zeros. Layers without a window are
        not touched.

        Raises
        ------
        InvalidArgument
            No layer has a window, or `position` is one that the next token still attends to.
        """
        self._native.drop_before(tokens(position, "position"), self._cache._stream(stream))

    @overload
    def fork(self, n: None = ..., *, length: int | None = ..., stream: Any = ...) -> Sequence: ...
    @overload
    def fork(self, n: int, *, length: int | None = ..., stream: Any = ...) -> list[Sequence]: ...
    def fork(
        self, n: int | None = None, *, length: int | None = None, stream: Any = None
    ) -> Sequence | list[Sequence]:
        """Return a new sequence that begins with the same tokens, or `n` of them in a list.

        Whole pages are shared; the partly filled last page is copied, ordered after what is queued
        on the stream, so all may go on writing.

        Parameters
        ----------
        n
            How many. None: one, not in a list.
        length
            How many of the tokens they begin with; by default all.

        Raises
        ------
        InvalidArgument
            `n` is less than 1, or `length` is not between 0 (or what was dropped) and the present
            one.
        CapacityError
            Not so many slots are free.
        OutOfMemory
            There is no frame for the copied pages. Nothing has changed.
        """
        children = self._native.fork(
            1 if n is None else integer(n, "n", 1),
            None if length is None else tokens(length, "length"),
            self._cache._stream(stream),
        )
        made = [Sequence(self._cache, child) for child in children]
        return made[0] if n is None else made

    def commit(self, token_ids: TokenIds, *, merge: bool | None = None, stream: Any = None) -> int:
        """Let other sequences begin with these tokens: the full pages of `token_ids`.

        Call it when the keys and values of so many first tokens have been written, or are queued on
        the stream to be. `KVCache.sequence` with ``token_ids`` finds them from then on, also when
        this sequence is gone, until memory runs short. The pages must not be written any more;
        growing after a `truncate` into one copies it first.

        Parameters
        ----------
        token_ids
            All of the sequence's tokens from the first on, or fewer: ints, or an integer tensor.
        merge
            Whether pages that were known already take the place of this sequence's own, which are
            then free. On a GPU that waits for the stream, and is only done when asked for.

        Returns
        -------
        int
            How many tokens others can begin with now: those in full pages.

        Raises
        ------
        InvalidArgument
            More tokens than the sequence has, or ids that are not integers of 32 bits.
        """
        ids = int32_ids(token_ids)
        merges = self._cache.pool.device == "cpu" if merge is None else merge
        return self._native.commit(ids.data_ptr(), len(ids), merges, self._cache._stream(stream))

    def release(self, *, stream: Any = None) -> None:
        """Free the slot. Does nothing the second time.

        Work that is queued on `stream` may still read the pages: they serve others only when it is
        done.
        """
        self._native.release(self._cache._stream(stream))

    @property
    def length(self) -> int:
        """How many tokens the sequence has."""
        return self._native.length

    def __len__(self) -> int:
        return self._native.length

    @property
    def slot(self) -> int:
        """The index in the tensors' first dimension (``cache_batch_idx``)."""
        return self._native.slot

    @property
    def is_released(self) -> bool:
        """Whether the sequence was released, or its cache closed."""
        return self._native.is_released

    def layer(self, index: int) -> tuple[torch.Tensor, ...]:
        """Return this sequence's part of each plane of a layer, ``[length, heads, dim]``; no copy.

        Raises
        ------
        ReleasedError
            The sequence was released: its slot may belong to somebody else.
        """
        if self.is_released:
            raise ReleasedError("this sequence was released; its slot may be another's now")
        slot, length = self.slot, self.length
        return tuple(plane[slot, :length] for plane in self._cache.layer(index))

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        if self.is_released:
            return "<kvspan.Sequence, released>"
        return f"<kvspan.Sequence in slot {self.slot}: {self.length} tokens>"
