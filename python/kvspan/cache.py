"""The KV tensors of one model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence as Items
from types import TracebackType
from typing import Any

import torch

from kvspan import _native
from kvspan._check import TokenIds, choice, int32_ids, integer, size_bytes, size_text, tokens
from kvspan._stream import stream_handle
from kvspan.batch import Batch
from kvspan.errors import InvalidArgument, ReleasedError
from kvspan.layers import LayerSpec
from kvspan.lookup import forget, remember
from kvspan.pool import Pool
from kvspan.sequence import Sequence
from kvspan.stats import CacheStats, MapperEvent, PageMapEntry, PrefixStats, call_counts


class KVCache:
    """Tensors ``[slots, positions, kv_heads, head_dim]`` whose pages are mapped as tokens arrive.

    Parameters
    ----------
    pool
        Where the memory comes from. Caches of several models may share one.
    n_layers, n_kv_heads, head_dim, dtype
        The shorthand for layers that are all alike, with planes K and V.
    max_seqs
        The number of slots: sequences that live at the same time.
    max_seq_len
        Positions in a slot. Address space, not memory: be generous.
    layers
        One `LayerSpec` a layer, instead of the shorthand.
    layers_per_page
        How many layers' planes lie side by side in a page: 1, any divisor of the number of layers,
        or all. ``"auto"`` chooses, and `layout` says why.
    split_planes
        Put K and V into pages of their own.
    overread_tokens
        How far past a length pages stay mapped, for kernels that read in tiles. ``"auto"``: 0
        where all of a slot reads as zeros, else 128, FlashAttention's largest tile.
    unmapped
        What a kernel reads where no page is: ``"zero"`` (zeros; the default on a host), or
        ``"fault"`` (a trap; the default on a GPU). Writing there always traps.
    static_len
        With ``unmapped="zero"``: how many positions of a slot a kernel may read whatever the
        sequence's length is. On a host always all of them. A GPU has to be told, for there zeros
        take mappings, and a page that takes their place waits for the work queued on the stream of
        the call, so that nothing in the window is mapped ahead. There, only slots of live sequences
        may be read so, on the streams on which those sequences are worked on.
    scrub
        ``"cross"``: pages that last held another cache's or dtype's bytes are zeroed. ``"reuse"``:
        also what another sequence of this cache left behind (tenants that must not see each other).
    keep
        The most memory that stays mapped without holding a token: what free slots keep for their
        next sequence, and live ones after a truncate. ``"auto"``: everything while half of the pool
        is unused, then 0.1% of what is mapped, or two pages a lane. While it is everything,
        sequences that were not forked also grow in strides of an eighth of themselves, or of the
        prompt that was announced, as far as frames are that large.

    Raises
    ------
    InvalidArgument, CapacityError
        A parameter that cannot be; address space that is not to be had.
    """

    def __init__(
        self,
        pool: Pool,
        n_layers: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        *,
        max_seqs: int,
        max_seq_len: int,
        layers: Items[LayerSpec] | None = None,
        layers_per_page: int | str = "auto",
        split_planes: bool = False,
        overread_tokens: int | str = "auto",
        unmapped: str | None = None,
        static_len: int | None = None,
        scrub: str = "cross",
        keep: int | str = "auto",
    ) -> None:
        if not isinstance(pool, Pool):
            raise InvalidArgument(f"pool must be a kvspan.Pool, not {type(pool).__name__}")
        specs = _layer_specs(n_layers, n_kv_heads, head_dim, dtype, layers)
        default = "zero" if pool.device == "cpu" else "fault"
        self._native = _native.make_cache(
            pool._native,
            [spec.to_native() for spec in specs],
            integer(max_seqs, "max_seqs", 1, 1 << 20),
            tokens(max_seq_len, "max_seq_len"),
            0
            if layers_per_page == "auto"
            else integer(layers_per_page, _or_auto("layers_per_page"), 1),
            bool(split_planes),
            None
            if overread_tokens == "auto"
            else tokens(overread_tokens, _or_auto("overread_tokens")),
            choice(unmapped or default, "unmapped", ("zero", "fault")) == "zero",
            None if static_len is None else tokens(static_len, "static_len"),
            choice(scrub, "scrub", ("cross", "reuse")) == "reuse",
            None if keep == "auto" else size_bytes(keep, _or_auto("keep")),
        )
        layout = self._native.layout()
        if layout["offset_warning"]:
            warnings.warn(layout["offset_warning"], stacklevel=2)
        self.pool = pool
        self.layers: tuple[LayerSpec, ...] = tuple(specs)
        self.max_seqs = int(max_seqs)
        self.max_seq_len = int(max_seq_len)
        self.layers_per_page: int = layout["layers_per_page"]
        self.bytes_per_token: int = layout["bytes_per_token"]
        self.overread_tokens: int = layout["overread_tokens"]
        lanes: list[int] = layout["lane_token_bytes"]
        self.tokens_per_page: tuple[float, ...] = tuple(pool.page_size / n for n in lanes)
        self.layout: str = (
            f"{self.layers_per_page} of {len(specs)} layers per page, {len(lanes)} "
            f"lane{'s' * (len(lanes) > 1)}, {min(self.tokens_per_page):.1f} tokens a page "
            f"({layout['explanation']})"
        )
        self._planes: dict[int, tuple[torch.Tensor, ...]] = {}
        self._is_closed = False

    def layer(self, index: int) -> tuple[torch.Tensor, ...]:
        """Return the planes of a layer, usually ``(k, v)``.

        Returns
        -------
        tuple of torch.Tensor
            Strided views ``[slots, positions, kv_heads, head_dim]`` of the cache's memory: no copy,
            always the same addresses. They keep the memory alive, also after `close`.

        Raises
        ------
        InvalidArgument
            There is no such layer.
        ReleasedError
            The cache was closed.
        """
        planes = self._planes.get(index) if type(index) is int else None
        if planes is None:
            i = integer(index, "the layer's index")
            if not 0 <= i < len(self.layers):
                raise InvalidArgument(f"the layers are 0 to {len(self.layers) - 1}, not {i}")
            planes = tuple(
                self._tensor(self._native.plane_view(i, p))
                for p in range(len(self.layers[i].planes))
            )
            for plane in planes:
                remember(plane, self)
            self._planes[i] = planes
        return planes

    def view(self, index: int, plane: int) -> _native.TensorView:
        """Return one plane for other consumers of DLPack: ``numpy.from_dlpack(cache.view(0, 0))``.

        NumPy has no bfloat16 and no float8, and refuses those.
        """
        i, p = integer(index, "the layer's index"), integer(plane, "the plane's index")
        if not 0 <= i < len(self.layers):
            raise InvalidArgument(f"the layers are 0 to {len(self.layers) - 1}, not {i}")
        if not 0 <= p < len(self.layers[i].planes):
            raise InvalidArgument(
                f"the planes of layer {i} are 0 to {len(self.layers[i].planes) - 1}, not {p}"
            )
        return self._native.plane_view(i, p)

    def sequence(
        self,
        n_tokens: int = 0,
        *,
        token_ids: TokenIds | None = None,
        salt: str = "",
        stream: Any = None,
    ) -> Sequence:
        """Take a slot for a new sequence: an empty one, or one that begins with known tokens.

        Parameters
        ----------
        n_tokens
            How long its prompt is: the free slot whose pages fit best is taken, and the background
            maps the missing ones piece by piece, before `Sequence.extend` asks for them. Only a
            hint; 0 when it is not known, or when `token_ids` tells it.
        token_ids
            The prompt: ints, or an integer tensor. The sequence begins with the longest part of it
            that sequences of the same salt have committed (`Sequence.commit`), to the token: whole
            pages are shared, the rest of the last one is copied. Its `length` says how many tokens
            that saves; it is at most one less than there are, for the last one's output is wanted.
        salt
            Sequences of different salts share nothing: a tenant, an adapter, an image's hash.
        stream
            On a GPU: where the sequence is worked on. What is queued there from now on comes after
            the work of the slot's last sequence. See `Sequence`.

        Raises
        ------
        InvalidArgument
            `token_ids` are not integers of 32 bits.
        CapacityError
            All slots are taken.
        OutOfMemory
            There is no frame for the copied page. Nothing has changed.
        """
        n = tokens(n_tokens, "n_tokens")
        if not isinstance(salt, str):
            raise InvalidArgument(f"salt must be a string, not {salt!r}")
        ids = int32_ids(() if token_ids is None else token_ids)
        native = self._native.sequence_of(ids.data_ptr(), len(ids), salt, n, self._stream(stream))
        return Sequence(self, native)

    def reorder(
        self, sequences: Items[Sequence], parents: Items[int], *, stream: Any = None
    ) -> None:
        """Let sequence i become what sequence ``parents[i]`` was: a step of beam search.

        Slots and objects stay; pages are remapped. Of a parent that is named several times whole
        pages are shared and the partly filled last one is copied, so all may go on writing; one
        that nobody names is gone. On a GPU this waits for the stream.

        Raises
        ------
        InvalidArgument
            No parent for each sequence, one that there is not, or a sequence twice or of another
            cache.
        OutOfMemory
            There is no frame for the copied pages. Nothing has changed.
        """
        for sequence in sequences:
            if not isinstance(sequence, Sequence):
                raise InvalidArgument(f"reorder takes sequences, not {sequence!r}")
        self._native.reorder(
            [sequence._native for sequence in sequences],
            [integer(parent, "a parent", 0) for parent in parents],
            self._stream(stream),
        )

    def batch(self, rows: int | Items[Sequence], *, stream: Any = None) -> Batch:
        """Return a batch of the given sequences, or of so many new ones in adjacent slots.

        Raises
        ------
        InvalidArgument
            No rows, a row twice, or a sequence of another cache.
        CapacityError
            There are not so many adjacent free slots.
        """
        if isinstance(rows, Items) and not isinstance(rows, str):
            for row in rows:
                if not isinstance(row, Sequence):
                    raise InvalidArgument(f"a batch is made of sequences, not {row!r}")
            handles = [row._native for row in rows]
            return Batch(self, self._native.batch(handles, self._stream(stream)), list(rows))
        n_rows = integer(rows, "rows, if not a list of sequences,", 1)
        native = self._native.adjacent_batch(n_rows, self._stream(stream))
        return Batch(self, native, [Sequence(self, row) for row in native.rows])

    def _stream(self, stream: Any) -> int:
        return stream_handle(stream, self.pool.device)

    def _tensor(self, view: _native.TensorView) -> torch.Tensor:
        if self.pool.device != "cpu" and not torch.backends.cuda.is_built():
            raise InvalidArgument(
                f"this torch ({torch.__version__}) is built without CUDA and has no tensors on "
                f"{self.pool.device}: install one with CUDA, or give cache.view(layer, plane) to "
                "another consumer of DLPack"
            )
        return torch.from_dlpack(view)

    def trim(self) -> int:
        """Unmap every page that holds no live token; return how many bytes that freed.

        The frames go back to the pool, not to the machine: see `Pool.trim`.
        """
        return self._native.trim()

    def stats(self) -> CacheStats:
        """Return what the cache maps, and its driver calls by name."""
        f = self._native.figures()
        calls = call_counts(f)
        del f["calls"]
        prefixes = PrefixStats(**f.pop("prefixes"))
        return CacheStats(**f, prefixes=prefixes, calls=calls)

    def page_map(self) -> list[PageMapEntry]:
        """Return every mapped page, ordered by slot, lane and page."""
        return [PageMapEntry(*entry) for entry in self._native.page_map()]

    def mapper_events(self) -> list[MapperEvent]:
        """Return the last 1,024 decisions of the background mapper, from the oldest on.

        They tell why a step had to wait for the driver, or why pages are mapped that nobody uses.
        """
        return [MapperEvent(*event) for event in self._native.mapper_events()]

    def close(self) -> None:
        """End the API of the cache and of its sequences, which waits for calls under way.

        The memory lives until the last tensor over it is gone. May be called again.
        """
        self._native.close()
        for planes in self._planes.values():
            for plane in planes:
                forget(plane)
        self._planes.clear()
        self._is_closed = True

    def __enter__(self) -> KVCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._is_closed:
            return "<kvspan.KVCache, closed>"
        try:
            s = self.stats()
        except ReleasedError:
            return "<kvspan.KVCache of a forked process's parent>"
        return (
            f"<kvspan.KVCache: {s.n_sequences} of {s.n_slots} slots of {self.max_seq_len} "
            f"positions, {size_text(s.used_bytes)} used of {size_text(s.mapped_bytes)} mapped; "
            f"{self.layout}>"
        )


def _or_auto(name: str) -> str:
    return f'{name}, if not "auto",'


def _layer_specs(
    n_layers: int | None,
    n_kv_heads: int | None,
    head_dim: int | None,
    dtype: torch.dtype,
    layers: Items[LayerSpec] | None,
) -> list[LayerSpec]:
    if layers is not None:
        if not (n_layers is None and n_kv_heads is None and head_dim is None):
            raise InvalidArgument(
                "give either layers=[...] or n_layers, n_kv_heads and head_dim, not both"
            )
        if not isinstance(layers, Items):
            raise InvalidArgument(f"layers is a list of LayerSpec, one a layer, not {layers!r}")
        for layer in layers:
            if not isinstance(layer, LayerSpec):
                raise InvalidArgument(
                    f"layers is a list of LayerSpec, one a layer, not of {layer!r}"
                )
        return list(layers)
    if n_layers is None or n_kv_heads is None or head_dim is None:
        raise InvalidArgument("a cache needs n_layers, n_kv_heads and head_dim, or layers=[...]")
    spec = LayerSpec(n_kv_heads, head_dim, dtype)
    return [spec] * integer(n_layers, "n_layers", 1, 1 << 16)
