"""Models of transformers and the caches that they decode over, filled alike, for benchmarks."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch

from harness import BenchError

OURS = "SpanCache, kvspan"


def small_llama() -> Any:
    """Return a Llama of random weights, 512 wide: 8 layers, 8 query and 4 KV heads of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=32768,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def load(where: str | None) -> Any:
    """Return the model of that folder or name; without one, a small one."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise BenchError("pip install kvspan[hf]") from error
    if where is None:
        return small_llama()
    return AutoModelForCausalLM.from_pretrained(where)


def with_attention(model: Any, attention: str, dtype: torch.dtype) -> Any:
    """Return the model with that implementation of attention; the weights are shared."""
    config = copy.deepcopy(model.config)
    other = type(model)._from_config(config, attn_implementation=attention, dtype=dtype)
    # One set of weights: the processor's cache would hold what most cases share.
    other.load_state_dict(model.to(dtype).state_dict(), assign=True)
    other.tie_weights()
    return other.eval()


def cases(model: Any, rows: int, tokens: int, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return functions that make each cache for so many tokens, and the model that reads it."""
    from transformers import DynamicCache, QuantizedCache, StaticCache

    from kvspan.transformers import SpanCache

    sdpa, kvspan = (with_attention(model, name, dtype) for name in ("sdpa", "kvspan"))
    config = sdpa.config
    found = {
        OURS: (kvspan, lambda: SpanCache(kvspan.config, max_batch=rows)),
        "SpanCache, sdpa": (sdpa, lambda: SpanCache(config, max_batch=rows)),
        "DynamicCache, sdpa": (sdpa, lambda: DynamicCache(config=config)),
        "StaticCache, sdpa": (
            sdpa, lambda: StaticCache(config=config, max_cache_len=tokens + steps)
        ),
    }  # fmt: skip
    if importlib.util.find_spec("optimum") is None:
        return found
    return found | {"QuantizedCache, sdpa": (sdpa, lambda: QuantizedCache("quanto", config))}


def kv_bytes(config: Any, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Return what keys and values of so many tokens take."""
    layers, heads, dim = shape_of(config)
    return 2 * layers * heads * dim * dtype.itemsize * rows * tokens


def shape_of(config: Any) -> tuple[int, int, int]:
    """Return layers, KV heads, head_dim."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, dim


def fill(
    cache: Any, config: Any, rows: int, tokens: int, dtype: torch.dtype, *, piece: int = 2048
) -> None:
    """Write random keys and values of so many tokens, the same each time, `piece` at once."""
    layers, heads, dim = shape_of(config)
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        for begin in range(0, tokens, piece):
            n = min(piece, tokens - begin)
            for layer in range(layers):
                k, v = torch.randn(2, rows, heads, n, dim, generator=generator).to(dtype)
                cache.update(k, v, layer)


def step(model: Any, cache: Any, rows: int) -> torch.Tensor:
    """Decode a token of each row; the cache grows by it."""
    with torch.inference_mode():
        at = torch.full((rows, 1), int(cache.get_seq_length()))
        ids = torch.arange(rows)[:, None] + 7
        logits: torch.Tensor = model(ids, past_key_values=cache, position_ids=at).logits
    return logits
