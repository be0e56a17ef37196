"""Compiled models over a SpanCache: one graph for all lengths, and the same tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_models import make, prompt
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import kvspan
from kvspan.transformers import EncoderDecoderSpanCache, SpanCache


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graphs of other tests."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def n_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def decode(step: Callable[..., Any], cache: SpanCache, name: str, n_steps: int) -> torch.Tensor:
    """Return greedy tokens ``[rows, n_steps]``; the prompt's are computed without a graph."""
    model = make(name, "kvspan")
    tokens = []
    with torch.no_grad(), cache:
        last = model(prompt(2, 20), past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(n_steps):
            last = step(last, past_key_values=cache).logits[:, -1:].argmax(-1)
            tokens.append(last)
        assert cache.get_seq_length() == 20 + n_steps
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3", "gpt2"])
def test_steps_of_all_lengths_and_caches_are_one_graph(name: str, pool: kvspan.Pool) -> None:
    model = make(name, "kvspan")
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    expected = decode(model, SpanCache(model.config, pool=pool), name, 100)
    for _ in range(2):
        assert torch.equal(decode(step, SpanCache(model.config, pool=pool), name, 100), expected)
    assert n_graphs() == 1


@pytest.mark.parametrize("attention", ["kvspan", "sdpa"])
def test_generated_code_writes_in_place(attention: str, pool: kvspan.Pool) -> None:
    model, longest = make("llama", attention), 77_777
    expected = decode(model, SpanCache(model.config, pool=pool), "llama", 5)
    step = torch.compile(model.forward, fullgraph=True)
    cache = SpanCache(model.config, pool=pool, max_len=longest)
    tokens, code = run_and_get_code(decode, step, cache, "llama", 5)
    assert torch.equal(tokens, expected)
    assert n_graphs() == 1
    copies = [line for line in "".join(code).splitlines() if "= empty_strided" in line]
    assert copies
    if attention == "kvspan":  # torch's own kernel wants a mask of the rows' whole length
        assert not any(str(longest) in line for line in copies)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_padding_is_the_same(beams: int, pool: kvspan.Pool) -> None:
    model = copy.deepcopy(make("mistral", "kvspan"))
    ids = prompt(3, 21)
    seen = torch.ones_like(ids)
    for row, n_padding in enumerate((0, 3, 20)):
        ids[row, :n_padding], seen[row, :n_padding] = 0, 0

    def generate() -> torch.Tensor:
        with SpanCache(model.config, pool=pool) as cache:
            cache.early_initialization(3 * beams, 2, 16, torch.float32, torch.device("cpu"))
            tokens: torch.Tensor = model.generate(
                ids, attention_mask=seen, past_key_values=cache, num_beams=beams,
                max_new_tokens=40, min_new_tokens=40, do_sample=False,
            )  # fmt: skip
        return tokens

    expected = generate()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(generate(), expected)
    assert n_graphs() == 2  # the prompt, and every step: the mask is known to grow by then
    assert torch.equal(generate(), expected)
    assert n_graphs() == 2


def test_without_memory_at_first_there_are_more_graphs(pool: kvspan.Pool) -> None:
    model = make("llama", "kvspan")
    with torch.no_grad(), SpanCache(model.config, pool=pool) as cache:
        step = torch.compile(model.forward, fullgraph=True, backend="eager")
        with pytest.raises(torch._dynamo.exc.Unsupported, match="early_initialization"):
            step(prompt(2, 20), past_key_values=cache)
        torch._dynamo.reset()
        step = torch.compile(model.forward, backend="eager")
        logits = step(prompt(2, 20), past_key_values=cache).logits
        torch.testing.assert_close(logits, model(prompt(2, 20)).logits)
        assert cache.get_seq_length() == 20


def test_memory_that_runs_out_in_a_graph_changes_nothing() -> None:
    model = make("llama", "kvspan")
    with kvspan.Pool(capacity="512KiB", page_size="64KiB") as pool:
        step = torch.compile(model.forward, fullgraph=True, backend="eager")
        with torch.no_grad(), SpanCache(model.config, pool=pool, max_batch=2) as cache:
            model(prompt(2, 20), past_key_values=cache)
            token = prompt(2, 1)

            def run_out() -> None:
                for _ in range(10_000):
                    step(token, past_key_values=cache)

            with pytest.raises(kvspan.OutOfMemory):
                run_out()
            reached = cache.get_seq_length()
            assert reached > 20
            assert {cache.get_seq_length(i) for i in range(len(cache.layers))} == {reached}
            cache.crop(-100)
            after = step(token, past_key_values=cache).logits
            cache.crop(-1)
            torch.testing.assert_close(after, model(token, past_key_values=cache).logits)


def test_what_a_graph_cannot_do_is_refused(pool: kvspan.Pool) -> None:
    model = make("llama", "kvspan")
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    seen = torch.ones(2, 21, dtype=torch.int64)
    seen[1, 4] = 0
    with torch.no_grad(), SpanCache(model.config, pool=pool) as cache:
        model(prompt(2, 20), past_key_values=cache)
        with pytest.raises(kvspan.InvalidArgument, match="padding on the left only"):
            step(prompt(2, 1), past_key_values=cache, attention_mask=seen)
        assert cache.get_seq_length() == 20

        with pytest.raises(torch._dynamo.exc.Unsupported, match="the cache holds 2 rows"):
            step(prompt(1, 1), past_key_values=cache)
        assert cache.get_seq_length() == 20

    t5 = copy.deepcopy(make("t5", "kvspan"))
    t5.forward = torch.compile(t5.forward, backend="eager")
    with (
        EncoderDecoderSpanCache(t5.config, pool=pool) as caches,
        pytest.raises(kvspan.InvalidArgument, match="biases of positions"),
    ):
        t5.generate(prompt(2, 9), past_key_values=caches, max_new_tokens=5)
