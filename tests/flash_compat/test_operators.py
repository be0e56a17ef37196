"""The operators behind the functions, in graphs of torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import flash_compat
import kvspan

N_LAYERS, N_HEADS, N_KV_HEADS, DIM = 2, 4, 2, 32
Layers = list[tuple[torch.Tensor, torch.Tensor]]


def decode_step(
    x: torch.Tensor, layers: Layers, lengths: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Append and attend in every layer, with some arithmetic around: [rows, 1, heads, dim]."""
    for k_cache, v_cache in layers:
        k = x[:, :, :N_KV_HEADS] * 0.5
        out = flash_compat.flash_attn_with_kvcache(
            x * 1.5,
            k_cache,
            v_cache,
            k,
            k + 1,
            cache_seqlens=lengths,
            cache_batch_idx=slots,
            causal=True,
        )
        x = torch.nn.functional.silu(out) + x
    return x


def append_only(
    x: torch.Tensor, layers: Layers, lengths: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Append, and make nothing of what attention says."""
    decode_step(x, layers, lengths, slots)
    return x + 1


class Rows:
    """Three sequences in a cache that is mostly not mapped: nobody can copy it and back."""

    def __init__(self, pool: kvspan.Pool) -> None:
        cache = kvspan.KVCache(
            pool, N_LAYERS, N_KV_HEADS, DIM, torch.float32, max_seqs=8, max_seq_len=1 << 20
        )
        cache.sequence()  # so that rows are not slots
        self.sequences = [cache.sequence() for _ in range(3)]
        self.batch = cache.batch(self.sequences)
        self.layers = [cache.layer(i) for i in range(N_LAYERS)]

    def live(self) -> torch.Tensor:
        """[layers, 2, sequences, tokens, heads, dim]."""
        n = self.sequences[0].length
        slots = [sequence.slot for sequence in self.sequences]
        return torch.stack(
            [torch.stack([plane[slots, :n] for plane in layer]) for layer in self.layers]
        )


def counted(function: Callable[..., object], backend: str) -> tuple[Callable[..., object], object]:
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", [decode_step, append_only])
def test_a_step_is_one_graph_and_appends_in_place(
    backend: str, function: Callable[..., torch.Tensor]
) -> None:
    torch.manual_seed(0)
    pool = kvspan.Pool(capacity="64MiB")
    ours, eager = Rows(pool), Rows(pool)
    compiled, counter = counted(function, backend)
    for _ in range(20):
        x = torch.randn(3, 1, N_HEADS, DIM)
        results = [
            step(x, rows.layers, rows.batch.step(), rows.batch.slots)
            for step, rows in ((compiled, ours), (function, eager))
        ]
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1
    torch.testing.assert_close(ours.live(), eager.live())


def test_errors_pass_through_a_graph() -> None:
    rows = Rows(kvspan.Pool(capacity="64MiB"))
    compiled, _ = counted(decode_step, "aot_eager")
    x = torch.zeros(3, 1, N_HEADS, DIM)
    lengths = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(kvspan.InvalidArgument, match="extend it"):
        compiled(x, rows.layers, lengths, rows.batch.slots)


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("n_queries", [1, 40])
def test_other_functions_are_one_graph(with_lse: bool, n_queries: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, n_queries, N_HEADS, DIM)
    k, v = torch.randn(2, 2, 50, N_KV_HEADS, DIM)
    at_q, at_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (n_queries, 50))

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        dense = flash_compat.flash_attn_func(q, k, v, causal=True, return_attn_probs=with_lse)
        runs = flash_compat.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)),
            at_q,
            at_k,
            n_queries,
            50,
            causal=True,
            return_attn_probs=with_lse,
        )
        return [*dense[:2], *runs[:2]] if with_lse else [dense, runs]

    compiled, counter = counted(function, "inductor")
    torch.testing.assert_close(compiled(q, k, v), function(q, k, v))
    assert counter.frame_count == 1


def test_operators_keep_torchs_rules() -> None:
    q = torch.randn(2, 3, N_HEADS, DIM)
    k, v = torch.randn(2, 2, 9, N_KV_HEADS, DIM)
    lengths = torch.tensor([9, 4], dtype=torch.int32)
    score = (0.2, None, 0, 0.0, None)
    ops = torch.ops.flash_compat
    for with_lse in (False, True):
        nothing_new = (None,) * 7
        torch.library.opcheck(
            ops.append_and_attend.default,
            (q, k, v, lengths, *nothing_new, True, *score, with_lse),
        )
        runs = [x.flatten(0, 1) for x in (q, k, v)]
        begins = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (3, 9)]
        torch.library.opcheck(ops.attend_runs.default, (*runs, *begins, None, *score, with_lse))
