"""Does prefilling through flash_compat keep the speed of torch's attention called directly?

One prompt, causal, Llama-3-8B's heads, over the tensors of a kvspan cache. "direct" calls
scaled_dot_product_attention; what writes the prompt into the cache first, is compared with writing
it by hand and the same call. Results are bit for bit the same.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import flash_compat
from decode_attention import batches, span_layers, speed
from decode_problem import LLAMA
from harness import Expectation, Result, Series, interleave

NAME = "prefill"
LEAST_SPEED = 0.97


def measure(dtype: torch.dtype, n: int, repeats: int) -> dict[str, Series]:
    """Compare, and time in turn, one layer's attention of a prompt of n tokens."""
    shape = replace(LLAMA, dtype=dtype, rows=1, tokens=n)
    cache, layers = span_layers(shape, 1)
    k_cache, v_cache = layers[0]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, heads, shape.dim, generator=generator).to(dtype)
        for heads in (shape.heads * shape.group, shape.heads, shape.heads)
    )
    k_cache.copy_(k)
    v_cache.copy_(v)
    nothing = torch.zeros(1, dtype=torch.int32)

    def direct() -> Tensor:
        return scaled_dot_product_attention(
            q.transpose(1, 2),
            k_cache.transpose(1, 2),
            v_cache.transpose(1, 2),
            is_causal=True,
            enable_gqa=True,
        ).transpose(1, 2)

    def write_and_direct() -> Tensor:
        k_cache[:, :n] = k
        v_cache[:, :n] = v
        return direct()

    def with_kvcache() -> Tensor:
        out: Tensor = flash_compat.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=nothing, causal=True
        )
        return out

    def func() -> Tensor:
        out: Tensor = flash_compat.flash_attn_func(q, k_cache, v_cache, causal=True)
        return out

    cases = {
        "direct": direct,
        "flash_attn_func": func,
        "write, direct": write_and_direct,
        "flash_attn_with_kvcache": with_kvcache,
    }
    with cache:
        series = interleave(cases, repeats, equal=torch.equal)
        batches.clear()
    return series


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes."""
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], metavar="TOKENS"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a short prompt, nothing checked but results"
    )


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    torch.set_num_threads(args.threads)
    result = Result({}, parameters={"threads": args.threads})
    for dtype in (torch.bfloat16, torch.float32):
        for n in [64] if args.quick else args.prompts:
            series = measure(dtype, n, args.repeats)
            name = f"{str(dtype).removeprefix('torch.')}, {n} tokens"
            result.measurements |= {f"{name}: {case}": one for case, one in series.items()}
            for case, of in (
                ("flash_attn_func", "direct"),
                ("flash_attn_with_kvcache", "write, direct"),
            ):
                ratio = speed(series[case], series[of])
                result.measurements[f"{name}: speed of {case}"] = ratio
                if not args.quick:
                    what = f"{name}: {case}, speed over torch's"
                    result.expectations.append(Expectation(what, ratio.median, LEAST_SPEED, True))
    return result
