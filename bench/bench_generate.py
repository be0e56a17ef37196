"""How fast does transformers decode over a SpanCache, beside its own caches?

A small Llama of random weights (512 wide, 8 layers, 8 query and 4 KV heads of 64), or any model.
Every cache gets the same keys and values, layer by layer, and the next tokens' logits are compared
before decode steps are timed in turn; each step grows every cache by a token. "kvspan" and "sdpa"
are the attention's implementation: the first is flash_compat's kernel, which reads rows as they
lie; the second is what transformers uses by itself. StaticCache has exactly the size that it needs;
QuantizedCache (4 bits, of optimum-quanto, if it is installed) gives other logits.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from typing import Any

import torch

from cached_models import OURS, cases, fill, load, step
from decode_attention import speed
from harness import BenchError, Expectation, Result, Series, interleave

NAME = "generate"
# The kernel's time beats theirs by at least so much: DynamicCache at 8 rows of 8k in bfloat16,
# StaticCache in the geometric mean of all cells, and in each.
OVER_DYNAMIC, OVER_STATIC, OVER_STATIC_WORST = 5.0, 1.3, 0.97
# Of logits, to the largest. The layers of a large model make anything of bfloat16's rounding when
# its keys and values are random: there, the cells in float32 and generated tokens are compared.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 6e-2}
TOLERANCE_OF_LARGE = {torch.float32: 2e-3, torch.bfloat16: math.inf}


def measure(
    model: Any, rows: int, tokens: int, dtype: torch.dtype, repeats: int, compiled: bool
) -> dict[str, Series]:
    """Compare logits, and time a step of each in turn."""
    caches, steps = [], {}
    tolerance = TOLERANCE if model.config.num_hidden_layers <= 8 else TOLERANCE_OF_LARGE
    for name, (with_attention, make) in cases(model, rows, tokens, repeats + 2, dtype).items():
        cache = make()
        fill(cache, model.config, rows, tokens, dtype)
        caches.append(cache)
        runs = with_attention
        if compiled and name in (OURS, "StaticCache, sdpa"):
            runs = torch.compile(with_attention, fullgraph=True)
        steps[name] = functools.partial(step, runs, cache, rows)
    first = steps[OURS]().float()
    apart = tolerance[dtype] * max(1.0, first.abs().max().item())
    for name, one in steps.items():
        if name == OURS or name.startswith("QuantizedCache"):
            continue
        difference = (one().float() - first).abs().max().item()
        if difference > apart:
            raise BenchError(
                f"{rows} rows of {tokens}, {dtype}: {name} gives other logits, by {difference:.3g}"
            )
    series = interleave(steps, repeats)
    for cache in caches:
        if hasattr(cache, "release"):
            cache.release()
    return series


def same_tokens(where: str) -> str:
    """Generate greedily in fp32 over both caches; return what was compared, or raise."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvspan.transformers import SpanCache

    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(where)
    prompts = [
        "Explain to a child how a computer remembers things.",
        "Write a short poem about the sea, and say what each line means.",
        "What is the difference between a process and a thread?",
    ]
    n_tokens = 0
    for text in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        options = {"max_new_tokens": 100, "do_sample": False}
        model.set_attn_implementation("sdpa")
        expected = model.generate(**inputs, **options)
        for attention in ("sdpa", "kvspan"):
            model.set_attn_implementation(attention)
            with SpanCache(model.config) as cache:
                tokens = model.generate(**inputs, **options, past_key_values=cache)
            if not torch.equal(tokens, expected):
                raise BenchError(f"other tokens than DynamicCache's, {attention}: {text}")
        n_tokens += expected.shape[1] - inputs["input_ids"].shape[1]
    return f"{n_tokens} greedy tokens of {len(prompts)} prompts in fp32 are DynamicCache's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes."""
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--model", help="a folder or name for from_pretrained; its tokens, too")
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile the cases that can be: ours, static"
    )
    parser.add_argument("--quick", action="store_true", help="short, nothing checked but logits")


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    torch.set_num_threads(args.threads)
    model = load(args.model)
    result = Result({}, parameters={"threads": args.threads, "model": args.model or "small Llama"})
    if args.model is not None:
        result.notes.append(same_tokens(args.model))
    over_static = []
    for name in args.dtypes:
        dtype = getattr(torch, name)
        for rows in args.batches:
            for tokens in [64] if args.quick else args.contexts:
                series = measure(model, rows, tokens, dtype, args.repeats, args.compiled)
                cell = f"{name}, {rows} x {tokens}"
                result.measurements |= {f"{cell}: {case}": one for case, one in series.items()}
                rates = ", ".join(f"{n} {rows / one.median:.0f}" for n, one in series.items())
                result.notes.append(f"{cell}, tokens/s: {rates}")
                if args.quick:
                    continue
                ratio = speed(series[OURS], series["StaticCache, sdpa"]).median
                over_static.append(ratio)
                result.expectations.append(
                    Expectation(f"{cell}: over StaticCache", ratio, OVER_STATIC_WORST, True)
                )
                if (dtype, rows, tokens) == (torch.bfloat16, 8, 8192):
                    ratio = speed(series[OURS], series["DynamicCache, sdpa"]).median
                    result.expectations.append(
                        Expectation(f"{cell}: over DynamicCache", ratio, OVER_DYNAMIC, True)
                    )
    if over_static:
        mean = statistics.geometric_mean(over_static)
        result.expectations.append(
            Expectation("over StaticCache, geometric mean", mean, OVER_STATIC, True)
        )
    return result
