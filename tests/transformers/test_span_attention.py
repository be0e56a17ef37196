"""attn_implementation="kvspan" computes what sdpa computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from small_models import ALL, make, prompt  # noqa: E402

import kvspan  # noqa: E402
from kvspan.transformers import EncoderDecoderSpanCache, SpanCache, attention  # noqa: E402


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that flash_compat was given."""
    shapes: list[tuple[int, ...]] = []

    def count(name: str) -> None:
        attend = getattr(attention, name)

        def counted(q: torch.Tensor, *others: Any, **options: Any) -> Any:
            shapes.append(tuple(q.shape))
            return attend(q, *others, **options)

        monkeypatch.setattr(attention, name, counted)

    count("flash_attn_func")
    count("flash_attn_with_kvcache")
    return shapes


def run(name: str, attention: str, ids: torch.Tensor, pool: kvspan.Pool, **how: Any) -> Any:
    model = make(name, attention)
    of = EncoderDecoderSpanCache if name == "t5" else SpanCache
    with of(model.config, pool=pool) as cache:
        return model.generate(
            ids,
            past_key_values=cache,
            **{
                "max_new_tokens": 40,
                "min_new_tokens": 40,
                "do_sample": False,
                "attention_mask": torch.ones_like(ids),
                "output_logits": True,
                "return_dict_in_generate": True,
                **how,
            },
        )


def assert_alike(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
@pytest.mark.parametrize("name", ALL)
def test_generation_is_the_same(
    name: str, how: dict[str, Any], pool: kvspan.Pool, native_calls: list[Any]
) -> None:
    ids = prompt(1, 25)
    ours = run(name, "kvspan", ids, pool, **how)
    assert_alike(ours, run(name, "sdpa", ids, pool, **how))
    assert bool(native_calls) or name == "t5"  # whose bias of positions flash_compat has not


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_left_padding_is_read_past_in_one_call(
    name: str, pool: kvspan.Pool, native_calls: list[Any]
) -> None:
    ids = prompt(4, 21)
    seen = torch.ones_like(ids)
    for row, n_padding in enumerate((0, 3, 20, 9)):
        ids[row, :n_padding], seen[row, :n_padding] = 0, 0
    ours = run(name, "kvspan", ids, pool, attention_mask=seen)
    n_steps = ours.sequences.shape[1] - ids.shape[1] - 1  # the first token is the prompt's
    assert len(native_calls) == n_steps * make(name).config.get_text_config().num_hidden_layers
    assert {shape[:2] for shape in native_calls} == {(4, 1)}
    assert_alike(ours, run(name, "sdpa", ids, pool, attention_mask=seen))


@pytest.mark.parametrize("hole", [(2, 5), (20, 21)])
def test_a_mask_with_holes_is_honoured(hole: tuple[int, int], pool: kvspan.Pool) -> None:
    ids = prompt(2, 21)
    seen = torch.ones_like(ids)
    seen[1, slice(*hole)] = 0
    ours = run("llama", "kvspan", ids, pool, attention_mask=seen)
    assert_alike(ours, run("llama", "sdpa", ids, pool, attention_mask=seen))


def test_a_few_queries_behind_a_prompt_are_causal(
    pool: kvspan.Pool, native_calls: list[Any]
) -> None:
    logits = []
    for attn in ("sdpa", "kvspan"):
        model = make("llama", attn)
        with torch.no_grad(), SpanCache(model.config, pool=pool) as cache:
            model(prompt(2, 30), past_key_values=cache)
            logits.append([model(prompt(2, n), past_key_values=cache).logits for n in (16, 2, 17)])
    for a, b in zip(*logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
    assert {shape[1] for shape in native_calls} == {16, 2}


def test_a_static_cache_may_be_used_with_it() -> None:
    ids = prompt(2, 12)
    tokens = [
        make("llama", attn).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            cache_implementation="static",
            max_new_tokens=12,
            do_sample=False,
            disable_compile=True,
        )
        for attn in ("sdpa", "kvspan")
    ]
    assert torch.equal(*tokens)


def test_softcap_is_computed_or_refused(native_calls: list[Any]) -> None:
    module = torch.nn.Module()
    q, k, v = (torch.randn(2, h, n, 16) for h, n in ((4, 20), (2, 20), (2, 20)))
    out, _ = attention.attention_forward(module, q, k, v, None, softcap=5.0)
    scores = q.unflatten(1, (2, 2)) @ k[:, :, None].mT / 4
    scores = 5 * torch.tanh(scores / 5) + torch.full((20, 20), -torch.inf).triu(1)
    expected = (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    with pytest.raises(kvspan.InvalidArgument, match="softcap"):
        attention.attention_forward(module, q, k, v, mask, softcap=5.0)
    with pytest.raises(kvspan.InvalidArgument, match="sinks"):
        attention.attention_forward(module, q, k, v, None, s_aux=torch.zeros(4))
