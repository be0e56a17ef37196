"""The three KV stores: the model sees the same keys and values through each."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from kvspan.demo.model import Llama, LlamaConfig
from kvspan.demo.schedule import Request, live_lengths, plan
from kvspan.demo.stores import BlockTableKV, Memory, PreallocKV, RowStore, SpanKV
from kvspan.demo.trace import run_trace

CONFIG = LlamaConfig(
    n_layers=3, n_heads=6, n_kv_heads=2, head_dim=16, hidden_size=96, ffn_size=128,
    vocab_size=97, max_positions=256, rope_base=10000.0, norm_eps=1e-5,
)  # fmt: skip
MAX_ROWS, MAX_TOKENS = 6, 160


def tiny_model(seed: int) -> Llama:
    """A random model whose logits are far apart."""
    generator = torch.Generator().manual_seed(seed)
    kv_size = CONFIG.n_kv_heads * CONFIG.head_dim
    shapes = {"embed": (CONFIG.vocab_size, CONFIG.hidden_size), "norm": (CONFIG.hidden_size,)}
    for i in range(CONFIG.n_layers):
        shapes |= {
            f"{i}.attn_norm": (CONFIG.hidden_size,),
            f"{i}.qkv": (CONFIG.hidden_size + 2 * kv_size, CONFIG.hidden_size),
            f"{i}.out": (CONFIG.hidden_size, CONFIG.hidden_size),
            f"{i}.ffn_norm": (CONFIG.hidden_size,),
            f"{i}.gate_up": (2 * CONFIG.ffn_size, CONFIG.hidden_size),
            f"{i}.down": (CONFIG.hidden_size, CONFIG.ffn_size),
        }
    return Llama(CONFIG, {k: torch.randn(s, generator=generator) * 0.2 for k, s in shapes.items()})


def make_span() -> SpanKV:
    return SpanKV(CONFIG, MAX_ROWS, MAX_TOKENS, capacity_bytes=64 << 20, preallocate_bytes=0)


STORES: dict[str, Callable[[], RowStore]] = {
    "span": make_span,
    "block table": lambda: BlockTableKV(CONFIG, MAX_ROWS, n_blocks=MAX_ROWS * MAX_TOKENS // 16),
    "preallocation": lambda: PreallocKV(CONFIG, MAX_ROWS, MAX_TOKENS),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest):
    made = STORES[request.param]()
    yield made
    made.close()


def fill(store: RowStore, row: int, values: torch.Tensor) -> None:
    """Append tokens given by `values`, ``[layers, 2, n, heads, dim]``."""
    store.begin([row], values.shape[2])
    for layer in range(CONFIG.n_layers):
        store.write(layer, values[layer, 0][None], values[layer, 1][None])


@pytest.mark.parametrize("seed", range(3))
def test_store_shows_what_was_written(store: RowStore, seed: int) -> None:
    """Random admissions, prompts, steps and releases against plain lists."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (CONFIG.n_layers, 2, -1, CONFIG.n_kv_heads, CONFIG.head_dim)
    expected: dict[int, torch.Tensor] = {}

    def new_tokens(n: int) -> torch.Tensor:
        return torch.randn(shape[0], 2, n, *shape[3:], generator=generator)

    for _ in range(60):
        action = rng.random()
        if action < 0.3 and len(expected) < MAX_ROWS:
            n = rng.randint(1, 60)
            row = store.admit(n)
            assert row not in expected
            expected[row] = new_tokens(n)
            fill(store, row, expected[row])
        elif action < 0.45 and expected:
            row = rng.choice(list(expected))
            del expected[row]
            store.release(row)
        elif expected:
            rows = rng.sample(list(expected), rng.randint(1, len(expected)))
            if max(expected[r].shape[2] for r in rows) + 1 > MAX_TOKENS:
                continue
            new = {r: new_tokens(1) for r in rows}
            starts = store.begin(rows, 1)
            assert starts.tolist() == [expected[r].shape[2] for r in rows]
            expected |= {r: torch.cat([expected[r], new[r]], dim=2) for r in rows}
            for layer in range(CONFIG.n_layers):
                k, v = (torch.stack([new[r][layer, plane] for r in rows]) for plane in (0, 1))
                store.write(layer, k, v)
                for r, views in zip(rows, store.views(layer), strict=True):
                    for plane in (0, 1):
                        assert torch.equal(views[plane], expected[r][layer, plane])
        memory = store.memory()
        n_tokens = sum(tokens.shape[2] for tokens in expected.values())
        assert memory.used == n_tokens * CONFIG.kv_bytes_per_token
        assert memory.mapped >= memory.used


@pytest.mark.parametrize("seed", range(3))
def test_three_stores_choose_the_same_tokens(seed: int) -> None:
    """A random forced schedule over a tiny model; `run_trace` raises on any difference."""
    rng = random.Random(seed)
    arrivals = sorted(rng.uniform(0, 0.5) for _ in range(14))
    requests = [Request(t, rng.randint(1, 90), rng.randint(1, 40)) for t in arrivals]
    steps = plan(requests, MAX_ROWS, max_prefill_tokens=100)
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        torch.randint(0, CONFIG.vocab_size, (r.prompt_tokens,), generator=generator)
        for r in requests
    ]
    stores = [make() for make in STORES.values()]
    result = run_trace(tiny_model(seed), stores, requests, steps, prompts, lambda tokens, at: None)
    for made in stores:
        made.close()

    assert result.n_compared == sum(r.output_tokens for r in requests)
    assert result.n_near_ties < result.n_compared // 10
    used = {s.name: [x.memory.used for x in s.samples] for s in result.stores}
    assert used["span"] == used["block table"] == used["preallocation"]
    span = result.stores[0]
    assert span.work is not None
    assert span.work.maps > 0
    assert result.pages
    assert set(result.row_requests.values()) <= set(range(len(requests)))


def test_span_views_are_the_cache_itself() -> None:
    """No copy between the cache and the kernel: a view's address lies in the cache's tensor."""
    store = make_span()
    row = store.admit(20)
    store.begin([row], 20)
    keys, values = store.cache.layer(1)
    (k, v), *_ = store.views(1)
    assert k.data_ptr() == keys[row].data_ptr()
    assert v.data_ptr() == values[row].data_ptr()
    assert k.stride() == keys.stride()[1:]
    store.close()


def test_forked_row_starts_equal_and_goes_its_own_way() -> None:
    """A fork shows the same tokens; what either writes afterwards the other does not see."""
    store = make_span()
    generator = torch.Generator().manual_seed(0)
    prompt, left, right = (
        torch.randn(CONFIG.n_layers, 2, n, CONFIG.n_kv_heads, CONFIG.head_dim, generator=generator)
        for n in (50, 5, 5)
    )
    parent = store.admit(50)
    fill(store, parent, prompt)
    child = store.fork(parent)
    fill(store, parent, left)
    fill(store, child, right)
    for row, tail in ((parent, left), (child, right)):
        keys, values = store.cache.layer(2)
        assert torch.equal(keys[row, :55], torch.cat([prompt, tail], dim=2)[2, 0])
        assert torch.equal(values[row, :55], torch.cat([prompt, tail], dim=2)[2, 1])
    store.close()


def test_block_table_counts_whole_blocks() -> None:
    store = BlockTableKV(CONFIG, MAX_ROWS, n_blocks=40)
    for n_tokens in (1, 16, 17):
        store.begin([store.admit(n_tokens)], n_tokens)
    per_token = CONFIG.kv_bytes_per_token
    assert store.memory() == Memory(used=34 * per_token, partial=(4 * 16 - 34) * per_token)


def test_preallocation_counts_whole_slots() -> None:
    store = PreallocKV(CONFIG, MAX_ROWS, MAX_TOKENS)
    rows = [store.admit(10), store.admit(20)]
    store.begin(rows[:1], 10)
    per_token = CONFIG.kv_bytes_per_token
    assert store.memory() == Memory(used=10 * per_token, ahead=(2 * MAX_TOKENS - 10) * per_token)
    store.release(rows[1])
    assert store.memory().mapped == MAX_TOKENS * per_token


def test_live_lengths_follow_the_stores() -> None:
    """The plan's own count of stored tokens is what a store holds at the end of each request."""
    requests = [Request(0.0, 7, 3), Request(0.0, 5, 1), Request(0.2, 4, 6)]
    steps = plan(requests, max_rows=2)
    at_end: dict[int, int] = {}
    for step, lengths in zip(steps, live_lengths(requests, steps), strict=True):
        at_end |= {i: lengths[i] for i in step.finished}
    assert at_end == {i: r.stored_tokens for i, r in enumerate(requests)}
