"""A decode step of transformers' continuous batching on a CPU, in one layer, without the model.

All that runs is transformers' own, made as ContinuousBatchingManager makes it for a Llama whose
attention is "sdpa", the default on a CPU (5.23.0, generation/continuous_batching/continuous_api.py,
lines 358-374, 709-732 and 1164-1173). `sdpa_attention_forward` (integrations/sdpa_attention.py)
does a layer's step: PagedAttentionCache.update writes the new tokens and gathers those of all
requests into one row by index (cache_allocators/full_attention.py, lines 195-227), each KV head is
repeated for its query heads, and every query attends to the whole row through a mask that keeps
the requests apart. What ContinuousBatchingIOs makes once a step for all layers, the indices and
the mask, is made when the lengths change. The scheduler is left out: it would choose this batch.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

VERSION = "5.23.0"
FOLDER = Path(__file__).resolve().parents[2] / "build" / f"transformers-{VERSION}"


class NotInstalledError(Exception):
    """There is no transformers, or another one."""


def install() -> None:
    """Download transformers and what it needs (280 MB on disk) beside the build folders.

    Torch is not among it; psutil is, without which transformers finds no memory for its cache.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(FOLDER)]
    subprocess.run([*command, f"transformers=={VERSION}", "psutil"], check=True)


def load() -> None:
    """Make transformers importable; raises NotInstalledError if it cannot be."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # last: it shadows nothing
    how = f"pip install transformers=={VERSION} psutil, or transformers_paged.install()"
    try:
        import transformers
    except ImportError as error:
        raise NotInstalledError(f"no transformers ({error}): {how}") from error
    if transformers.__version__ != VERSION:
        raise NotInstalledError(f"transformers is {transformers.__version__}: {how}")
    if find_spec("psutil") is None:
        raise NotInstalledError(f"no psutil, which transformers sizes its cache with: {how}")


class PagedCache:
    """One layer's K and V in pages of 256 tokens (transformers' default), shuffled."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, n_heads: int) -> None:
        """Fill from ``[batch, positions, kv_heads, dim]``; new tokens come from there, too."""
        load()
        from transformers import ContinuousBatchingConfig, LlamaConfig, LogitsProcessorList
        from transformers.generation.continuous_batching.cache import PagedAttentionCache
        from transformers.generation.continuous_batching.cb_logits_processors import (
            ContinuousBatchingLogitsProcessorList,
        )
        from transformers.generation.continuous_batching.distributed import DistributedHelper
        from transformers.generation.continuous_batching.initialization import (
            resolve_continuous_batching_config,
        )
        from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
        from transformers.generation.continuous_batching.requests import RequestState
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        batch, positions, n_kv_heads, dim = k.shape
        config = LlamaConfig(
            num_hidden_layers=1,
            hidden_size=n_heads * dim,
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            head_dim=dim,
            attn_implementation="sdpa",
        )
        settings = ContinuousBatchingConfig(max_batch_tokens=batch, max_requests_per_batch=batch)
        settings.num_blocks = batch * -(-positions // settings.page_size)
        settings = resolve_continuous_batching_config(config, settings, None, False, k.device)
        cache = PagedAttentionCache(
            config, settings, k.device, DistributedHelper(None, None), k.dtype
        )
        # As in a pool that has been used for a while.
        free = cache.pool.free_sectors
        cache.pool.free_sectors = [free[i] for i in torch.randperm(len(free)).tolist()]
        self._processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList())
        self._io = ContinuousBatchingIOs(
            cache, config, settings, k.device, k.dtype, self._processors
        )
        self._requests = [RequestState(str(row), [0] * positions) for row in range(batch)]
        for row, request in enumerate(self._requests):
            if not cache.can_store_request_tokens(request, positions):
                raise MemoryError(f"row {row} does not fit into transformers' cache")
            places: list[list[int]] = [[]]
            cache.extend_read_and_write_indices(request.request_id, 0, positions, None, places)
            nothing = torch.empty(0, dtype=torch.int64)
            cache.layer_to_allocator[0].update(k[row], v[row], 0, nothing, torch.tensor(places[0]))
        self._k, self._v = k, v
        self._layer = SimpleNamespace(layer_idx=0, num_key_value_groups=n_heads // n_kv_heads)
        self._forward = sdpa_attention_forward
        self._lengths = torch.empty(0, dtype=torch.int32)
        self._step: dict[str, Any] = {}

    def attend(self, q: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Write each row's last token and decode: ``q [batch, heads, dim]``, one query a row.

        `lengths` counts the new tokens, from 1 to the positions filled, or else ValueError.
        """
        if not torch.equal(lengths, self._lengths):
            self._prepare(lengths)
        queries, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, self._new_k, self._new_v))
        out: torch.Tensor = self._forward(
            self._layer, queries, k, v, scaling=q.shape[-1] ** -0.5, **self._step
        )[0]
        return out[0]

    def _prepare(self, lengths: torch.Tensor) -> None:
        """Do what is done once a step, for all layers."""
        from transformers.generation.continuous_batching.requests import FutureRequestState

        batch, positions = self._k.shape[:2]
        if len(lengths) != batch or not bool(((lengths >= 1) & (lengths <= positions)).all()):
            raise ValueError(
                f"{batch} lengths of 1 to {positions} are needed, not {lengths.tolist()}"
            )
        for request, length in zip(self._requests, lengths.tolist(), strict=True):
            request.position_offset = length - 1
            request.tokens_to_process = [0]
        self._io.prepare_batch_tensors(
            [FutureRequestState(request, True, {}, 1) for request in self._requests],
            self._processors,
            use_decode_fast_path=False,  # only with FlashAttention
            num_q_tokens=batch,
            max_kv_read=int(lengths.sum()) - batch,
            use_padding=False,  # only when compiled or in a CUDA graph
        )
        self._step = self._io.get_model_kwargs()
        last = torch.arange(batch), lengths.long() - 1
        self._new_k, self._new_v = self._k[last], self._v[last]
        self._lengths = lengths.clone()
