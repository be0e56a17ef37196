"""`SpanCache`: what transformers' `generate` takes for a DynamicCache, over a KVCache."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    get_layer_types_and_kwargs,
)

from kvspan import InvalidArgument, KVCache, Pool
from kvspan.transformers.layer import SpanChunkedLayer, SpanLayer, SpanSlidingLayer
from kvspan.transformers.rows import Rows
from kvspan.transformers.sizes import LEAST_MAX_LEN, Sizes


class SpanCache(DynamicCache):  # type: ignore[misc]  # transformers is not read by mypy
    """A cache whose tokens are appended in place, and whose rows move by remapping pages.

    It may be given wherever transformers takes a DynamicCache::

        cache = SpanCache(model.config)
        model.generate(**inputs, past_key_values=cache)

    Parameters
    ----------
    source
        The configuration of the model, for a cache of its own, whose KVCache is made when the first
        tokens say how many rows there are, of what dtype, on what device. Or a `KVCache`, of which
        slots are taken for a call and given back by `release`, so that many calls share it. None:
        layers are made as they come, each with pages of its own.
    pool
        Where the memory of a cache of its own comes from; several may share one.
    capacity
        The most memory of a pool of its own, such as ``"4GiB"``. By default nearly all of the
        device's: memory is taken as tokens come.
    max_len
        Tokens of a row. Address space, not memory; by default what the model can take, and at least
        32,768.
    token_ids
        With a `KVCache`: the prompts of the call, ``[rows, tokens]``, not padded. The rows begin
        with as many of their tokens as earlier calls have committed of all of them (`commit`);
        ``get_seq_length()`` says how many, and `generate` computes the rest.
    salt
        Calls of different salts share nothing.
    max_batch
        Rows that `batch_repeat_interleave` may lead to; by default four times those of the first
        call, and at least 16. With a `KVCache`: those of the first call.

    Raises
    ------
    InvalidArgument
        Sizes for a `KVCache`, which has its own, or layers that are not keys and values.

    Notes
    -----
    What a layer returns are views of the cache's memory. After `reorder_cache`, `crop`, a selection
    of rows, `reset` and `release` they show something else.

    `copy.deepcopy` forks: the copy shares all whole pages, so that a prompt that was computed once
    serves many calls.

    Layers of other kinds than full, sliding-window and chunked attention are those of transformers.
    """

    def __init__(
        self,
        source: PreTrainedConfig | KVCache | None = None,
        *,
        pool: Pool | None = None,
        capacity: int | str | None = None,
        max_len: int | None = None,
        max_batch: int | None = None,
        token_ids: torch.Tensor | None = None,
        salt: str = "",
    ) -> None:
        if isinstance(source, KVCache):
            if not (pool is None and capacity is None and max_len is None):
                raise InvalidArgument("a KVCache has a pool and a max_seq_len of its own")
            layers = _layers_in(source, max_batch)
            if token_ids is not None:
                if token_ids.dim() != 2 or len(token_ids) == 0:
                    shape = tuple(token_ids.shape)
                    raise InvalidArgument(f"token_ids must be [rows, tokens], not {shape}")
                layers[0].rows.begin_with(token_ids, salt)
            Cache.__init__(self, layers=layers)
            return
        if token_ids is not None or salt:
            raise InvalidArgument("token_ids and salt go with a KVCache, which outlives the call")
        if not (source is None or isinstance(source, PreTrainedConfig)):
            raise InvalidArgument(
                f"SpanCache takes a model's config or a KVCache, not {type(source).__name__}"
            )
        config = None if source is None else source.get_text_config(decoder=True)
        if max_len is None:
            trained = getattr(config, "max_position_embeddings", None)
            max_len = max(LEAST_MAX_LEN, trained or 0)
        sizes = Sizes(pool, capacity, max_len, max_batch)
        if config is None:
            Cache.__init__(self, layer_class_to_replicate=lambda: SpanLayer(Rows([None], sizes)))
        else:
            Cache.__init__(self, layers=_layers_of(config, sizes))

    @property
    def kv_caches(self) -> list[KVCache]:
        """The KVCaches that hold the tokens: one for each kind of layer, once it was written to."""
        return [rows.cache for rows in self._rows() if rows.cache is not None]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i what row ``beam_idx[i]`` was. No history is copied: pages are remapped.

        Raises
        ------
        OutOfMemory
            There is no frame for the partly filled page of a row that is repeated.
        """
        self._select(beam_idx.tolist(), lambda layer: layer.reorder_cache(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put each row `repeats` times in a row. Whole pages are shared.

        Raises
        ------
        CapacityError
            More rows than max_batch.
        OutOfMemory
            As `reorder_cache`.
        """
        rows = [row for row in range(self._n_rows()) for _ in range(repeats)]
        self._select(rows, lambda layer: layer.batch_repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; `indices` is what may index a tensor of rows."""
        rows = torch.arange(self._n_rows())[indices, ...].tolist()
        self._select(rows, lambda layer: layer.batch_select_indices(indices))

    def commit(self, token_ids: torch.Tensor) -> None:
        """Let later calls begin with these tokens (`SpanCache` with ``token_ids``).

        Parameters
        ----------
        token_ids
            ``[rows, tokens]``: all tokens of every row, prompt first, such as `generate` returns.
            Those whose keys and values the cache does not hold yet are left out.
        """
        for rows in self._rows():
            rows.commit(token_ids)

    def release(self) -> None:
        """Give the slots back, and the memory of a cache of its own. The cache is empty then.

        Tensors that it returned must not be used any more. It may be written to again. Also done
        when the cache is dropped, or left as a context manager.
        """
        self.reset()
        for rows in self._rows():
            rows.close()

    def __enter__(self) -> SpanCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<SpanCache of {len(self)} layers: {self._n_rows()} rows in {self.kv_caches}>"

    def _rows(self) -> list[Rows]:
        found = {id(x.rows): x.rows for x in self.layers if isinstance(x, SpanLayer)}
        return list(found.values())

    def _n_rows(self) -> int:
        return max((len(rows) for rows in self._rows()), default=0)

    def _select(self, rows: list[int], other: Callable[[Any], None]) -> None:
        for shared in self._rows():
            shared.select(rows)
        for layer in self.layers:
            if not isinstance(layer, SpanLayer):
                other(layer)


class EncoderDecoderSpanCache(EncoderDecoderCache):  # type: ignore[misc]
    """`SpanCache` for models with an encoder: one for the decoder, one for what it crosses to.

    Parameters
    ----------
    config
        The configuration of the model.
    pool, capacity, max_len, max_batch
        As for `SpanCache`.
    """

    def __init__(self, config: PreTrainedConfig, **sizes: Any) -> None:
        super().__init__(SpanCache(config, **sizes), SpanCache(config, **sizes))

    def release(self) -> None:
        """Give slots and memory of both back; see `SpanCache.release`."""
        self.reset()
        self.self_attention_cache.release()
        self.cross_attention_cache.release()

    def __enter__(self) -> EncoderDecoderSpanCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class _Kind(NamedTuple):
    """What layers that share rows have in common."""

    name: str
    window: int | None
    is_crossing: bool


def _layers_of(config: PreTrainedConfig, sizes: Sizes) -> list[Any]:
    """Return the layers of a model. Those of one kind are alike, and share rows."""
    kinds, options = get_layer_types_and_kwargs(config)
    crossing = getattr(config, "cross_attention_layers", None) or ()  # to images, of other lengths
    alike = [
        _Kind(kind, given.get("sliding_window"), i in crossing)
        for i, (kind, given) in enumerate(zip(kinds, options, strict=True))
    ]
    shared = {one: Rows([one.window] * alike.count(one), sizes) for one in alike}
    of_text = [rows for one, rows in shared.items() if not one.is_crossing]
    for rows in of_text:
        rows.grow_with(of_text)
    return [
        _layer(one.window, shared[one], alike[:i].count(one), one.name)
        if one.name in ("full_attention", "sliding_attention", "chunked_attention")
        else DYNAMIC_LAYER_TYPE_MAPPING[one.name](**options[i])
        for i, one in enumerate(alike)
    ]


def _layers_in(cache: KVCache, max_batch: int | None) -> list[SpanLayer]:
    """Return the layers of a KVCache, which all share rows."""
    for index, spec in enumerate(cache.layers):
        if len(spec.planes) != 2:
            names = ", ".join(plane.name for plane in spec.planes)
            raise InvalidArgument(
                f"transformers caches keys and values; layer {index} has the planes {names}"
            )
    windows = [spec.window for spec in cache.layers]
    rows = Rows(windows, Sizes(max_batch=max_batch), cache)
    return [_layer(window, rows, index) for index, window in enumerate(windows)]


def _layer(window: int | None, rows: Rows, index: int, kind: str = "") -> SpanLayer:
    if window is None:
        return SpanLayer(rows, index)
    sliding = SpanChunkedLayer if kind == "chunked_attention" else SpanSlidingLayer
    return sliding(window, rows, index)
