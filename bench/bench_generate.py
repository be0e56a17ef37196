"""How fast does transformers decode over a SpanCache, beside its own caches?

A Llama of random weights (512 wide, 8 layers, 8 query and 4 KV heads of 64). Every cache gets the
same keys and values, layer by layer, and the next tokens' logits are compared before decode steps
are timed in turn; each step grows every cache by a token. "kvspan" and "sdpa" are the attention's
implementation: the first is flash_compat's kernel, which reads rows as they lie; the second is what
transformers uses by itself. StaticCache has exactly the size that it needs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from decode_attention import speed
from harness import BenchError, Expectation, Result, Series, interleave

NAME = "generate"
LAYERS, HEADS, KV_HEADS, DIM = 8, 8, 4, 64
PIECE = 2048  # tokens that are written at once
OURS = "SpanCache, kvspan"
# The kernel's time beats theirs by at least so much: DynamicCache at 8 rows of 8k in bfloat16,
# StaticCache in the geometric mean of all cells, and in each.
OVER_DYNAMIC, OVER_STATIC, OVER_STATIC_WORST = 5.0, 1.3, 0.97
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 6e-2}


def model_of(dtype: torch.dtype, attention: str) -> Any:
    """Return the model; the same weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1376, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM,
        max_position_embeddings=32768, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def write(cache: Any, rows: int, tokens: int, dtype: torch.dtype) -> None:
    """Write random keys and values of so many tokens, the same ones each time."""
    generator = torch.Generator().manual_seed(1)
    for begin in range(0, tokens, PIECE):
        n = min(PIECE, tokens - begin)
        for layer in range(LAYERS):
            k, v = torch.randn(2, rows, KV_HEADS, n, DIM, generator=generator).to(dtype)
            cache.update(k, v, layer)


def cases(rows: int, tokens: int, steps: int, dtype: torch.dtype) -> dict[str, tuple[Any, Any]]:
    """Return models and filled caches."""
    from transformers import DynamicCache, StaticCache

    from kvspan.transformers import SpanCache

    sdpa, kvspan = model_of(dtype, "sdpa"), model_of(dtype, "kvspan")
    # One set of weights: the processor's cache would hold what two of three cases share.
    kvspan.load_state_dict(sdpa.state_dict(), assign=True)
    found = {
        OURS: (kvspan, SpanCache(kvspan.config, max_batch=rows)),
        "SpanCache, sdpa": (sdpa, SpanCache(sdpa.config, max_batch=rows)),
        "DynamicCache, sdpa": (sdpa, DynamicCache(config=sdpa.config)),
        "StaticCache, sdpa": (sdpa, StaticCache(config=sdpa.config, max_cache_len=tokens + steps)),
    }
    for _, cache in found.values():
        write(cache, rows, tokens, dtype)
    return found


def measure(rows: int, tokens: int, dtype: torch.dtype, repeats: int) -> dict[str, Series]:
    """Compare logits, and time a step of each in turn."""
    found = cases(rows, tokens, repeats + 2, dtype)
    ids = torch.arange(rows)[:, None] + 7

    def step(model: Any, cache: Any) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.inference_mode():
                n = cache.get_seq_length()
                logits: torch.Tensor = model(
                    ids, past_key_values=cache, position_ids=torch.full((rows, 1), int(n))
                ).logits
            return logits

        return run

    steps = {name: step(*one) for name, one in found.items()}
    first = steps[OURS]()
    for name, one in steps.items():
        if name != OURS and not torch.allclose(
            one().float(), first.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        ):
            raise BenchError(f"{rows} rows of {tokens}, {dtype}: {name} gives other logits")
    series = interleave(steps, repeats)
    for _, cache in found.values():
        if hasattr(cache, "release"):
            cache.release()
    return series


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes."""
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--quick", action="store_true", help="short, nothing checked but logits")


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    try:
        import transformers
    except ImportError as error:
        raise BenchError("pip install kvspan[hf]") from error
    torch.set_num_threads(args.threads)
    result = Result(
        {}, parameters={"threads": args.threads, "transformers": transformers.__version__}
    )
    over_static = []
    for name in args.dtypes:
        dtype = getattr(torch, name)
        for rows in args.batches:
            for tokens in [64] if args.quick else args.contexts:
                series = measure(rows, tokens, dtype, args.repeats)
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
