"""The decoder against formulas written another way: rotary embedding, attention, row order."""

from __future__ import annotations

import os

import pytest
import torch

from kvspan.demo.model import Llama, LlamaConfig, apply_rope, attend_prompt, attend_step, rope_table
from kvspan.demo.threads import choose_threads
from kvspan.demo.weights import random_checkpoint, unpermute_rope_rows

HEAD_DIM, POSITIONS, BASE = 8, 32, 500.0
CONFIG = LlamaConfig(
    n_layers=1, n_heads=6, n_kv_heads=2, head_dim=HEAD_DIM, hidden_size=24, ffn_size=32,
    vocab_size=10, max_positions=POSITIONS, rope_base=BASE, norm_eps=1e-5,
)  # fmt: skip


def complex_rope(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoFormer's own formula: neighbours are a complex number, turned by m * base^(-2i/d).

    `x` is ``[tokens, heads, head_dim]``, as llama.cpp computes with its row order.
    """
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    frequency = BASE ** (-2 * torch.arange(HEAD_DIM // 2, dtype=torch.float64) / HEAD_DIM)
    turn = torch.polar(torch.ones(()).double(), positions[:, None, None] * frequency)
    return torch.view_as_real(pairs * turn).flatten(-2)


def test_unpermuted_rows_with_half_rotation_equal_gguf_rows_with_pair_rotation() -> None:
    """Scores of every pair of positions agree, for weights in llama.cpp's order."""
    generator = torch.Generator().manual_seed(0)
    wq = torch.randn(6 * HEAD_DIM, 24, generator=generator)
    wk = torch.randn(6 * HEAD_DIM, 24, generator=generator)
    x = torch.randn(POSITIONS, 24, generator=generator)
    positions = torch.arange(POSITIONS)

    def gguf(w: torch.Tensor) -> torch.Tensor:
        return complex_rope((x @ w.T).unflatten(-1, (6, -1)), positions)

    cos, sin = rope_table(CONFIG)

    def ours(w: torch.Tensor) -> torch.Tensor:
        heads = (x @ unpermute_rope_rows(w, 6).T).unflatten(-1, (6, -1))
        return apply_rope(heads[None], cos[None, :, None], sin[None, :, None])[0].double()

    expected = torch.einsum("shd,thd->hst", gguf(wq), gguf(wk))
    actual = torch.einsum("shd,thd->hst", ours(wq), ours(wk))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_unpermute_inverts_llama_cpp_permute() -> None:
    """llama.cpp's converter: reshape (heads, 2, d/2, in), swap axes 1 and 2."""
    weight = torch.arange(4 * HEAD_DIM * 3, dtype=torch.float32).view(4 * HEAD_DIM, 3)
    permuted = weight.reshape(4, 2, HEAD_DIM // 2, 3).swapaxes(1, 2).reshape(weight.shape)
    assert not torch.equal(permuted, weight)
    assert torch.equal(unpermute_rope_rows(permuted, 4), weight)


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention head by head in fp64; `q`'s tokens are the last of `k`'s."""
    n, length = len(q), len(k)
    out = []
    for h in range(q.shape[1]):
        kv = h * k.shape[1] // q.shape[1]
        scores = q[:, h].double() @ k[:, kv].double().T / q.shape[2] ** 0.5
        hidden = torch.arange(length)[None] > torch.arange(length - n, length)[:, None]
        scores = scores.masked_fill(hidden, float("-inf"))
        out.append(scores.softmax(-1) @ v[:, kv].double())
    return torch.stack(out, dim=1).flatten(1)


@pytest.mark.parametrize(("n_tokens", "length"), [(9, 9), (5, 23), (1, 17), (1, 1)])
@pytest.mark.parametrize("stride", [1, 5])
def test_attention_is_causal_grouped_attention(n_tokens: int, length: int, stride: int) -> None:
    """Prompts (behind a prefix too) and steps, over dense keys and keys with a stride."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(n_tokens, 6, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, length * stride, 2, HEAD_DIM, generator=generator)[:, ::stride]
    expected = plain_attention(q, k, v).float()
    if n_tokens == 1:
        torch.testing.assert_close(attend_step(q[0], k, v), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attend_prompt(q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_chosen_threads_are_set_and_within_the_machine() -> None:
    checkpoint = random_checkpoint(0)
    before = torch.get_num_threads()
    try:
        chosen = choose_threads(Llama(checkpoint.config, checkpoint.tensors))
        assert 1 <= chosen <= len(os.sched_getaffinity(0))
        assert torch.get_num_threads() == chosen
    finally:
        torch.set_num_threads(before)


def test_random_checkpoint_is_seeded() -> None:
    one, same, other = (random_checkpoint(seed) for seed in (3, 3, 4))
    assert all(torch.equal(one.tensors[name], same.tensors[name]) for name in one.tensors)
    assert not torch.equal(one.tensors["embed"], other.tensors["embed"])
