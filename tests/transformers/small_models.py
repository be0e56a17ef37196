"""Small models of random weights, fp32: one of each kind of cache that transformers has."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHAPE = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
WINDOW = 16
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


@functools.cache
def make(name: str, attention: str = "sdpa") -> Any:
    """Return the model of that name, always with the same weights."""
    torch.manual_seed(7)
    config, model = _CONFIGS[name]()
    config._attn_implementation = attention
    made = model(config).eval()
    for parameter in made.parameters():  # as initialized, all logits would be nearly alike
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    made.generation_config.eos_token_id = None
    return made


def prompt(rows: int, length: int) -> torch.Tensor:
    """Return token ids ``[rows, length]``, always the same."""
    return torch.randint(1, 199, (rows, length), generator=torch.Generator().manual_seed(3))


def _llama() -> tuple[Any, type]:
    config = transformers.LlamaConfig(**SHAPE, **NO_SPECIAL_TOKENS)
    return config, transformers.LlamaForCausalLM


def _qwen3() -> tuple[Any, type]:
    config = transformers.Qwen3Config(**SHAPE, **NO_SPECIAL_TOKENS)
    return config, transformers.Qwen3ForCausalLM


def _mistral() -> tuple[Any, type]:
    config = transformers.MistralConfig(**SHAPE, **NO_SPECIAL_TOKENS, sliding_window=WINDOW)
    return config, transformers.MistralForCausalLM


def _gemma3() -> tuple[Any, type]:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma3TextConfig(
        **SHAPE, **NO_SPECIAL_TOKENS, sliding_window=WINDOW, layer_types=kinds
    )
    return config, transformers.Gemma3ForCausalLM


def _gpt2() -> tuple[Any, type]:
    config = transformers.GPT2Config(
        vocab_size=199, n_embd=64, n_layer=3, n_head=4, n_positions=512, **NO_SPECIAL_TOKENS
    )
    return config, transformers.GPT2LMHeadModel


def _t5() -> tuple[Any, type]:
    config = transformers.T5Config(
        vocab_size=199,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return config, transformers.T5ForConditionalGeneration


_CONFIGS = {
    "llama": _llama,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "t5": _t5,
}
DECODERS = ("llama", "qwen3", "mistral", "gemma3", "gpt2")
ALL = (*DECODERS, "t5")
