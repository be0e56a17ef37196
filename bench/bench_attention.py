"""Does unmodified attention run as fast over span tensors as over plain memory with the same strides?

One pass is a decode step's attention in all layers (`scaled_dot_product_attention`, every K and V read
once) over at least 8 times the last-level cache. Both memories are in huge pages, which is checked.
Beside them a second plain copy, which shows how much is noise, and dense layouts. Ratios are taken in
each round and over several placements of the memory.
"""

from __future__ import annotations

import argparse

import torch

import kvspan
from attention_cases import (
    Shape,
    add_arguments,
    attend,
    dense_store,
    fill,
    gigabytes_per_s,
    identical,
    joined,
    paired_ratio,
    plain_copy,
    queries,
    read_arguments,
    require_huge,
    span_store,
    times,
)
from harness import BenchError, Expectation, Result, Series

NAME = "attention"

__all__ = ["NAME", "add_arguments", "run"]

SHAPES = (
    Shape("SmolLM2-135M", n_layers=30, q_heads=9, kv_heads=3, dim=64),
    Shape("Llama-3-8B, 8 layers", n_layers=8, q_heads=32, kv_heads=8, dim=128),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _placement(
    shape: Shape, dtype: torch.dtype, rows: int, tokens: int, repeats: int, check_huge: bool
) -> tuple[dict[str, Series], float]:
    """Allocate everything, check, time; return the samples and the least share of huge pages."""
    n_bytes = rows * tokens * shape.token_bytes(dtype)
    page = 2 << 20
    capacity = -(-n_bytes // page) * page + rows * page
    with kvspan.Pool(capacity=capacity, page_size=page) as pool:
        span, cache = span_store(pool, shape, dtype, rows, tokens, "auto")
        with cache:
            plain, plain_memory = plain_copy(span)
            again, again_memory = plain_copy(span)
            dense, dense_memory = dense_store(shape, dtype, rows, tokens, is_head_major=False)
            head_major, head_memory = dense_store(shape, dtype, rows, tokens, is_head_major=True)
            stores = {
                "span": span,
                "plain": plain,
                "plain, another copy": again,
                "dense [B,L,H,D]": dense,
                "dense [B,H,L,D]": head_major,
            }
            fill(list(stores.values()))
            share = 1.0
            if check_huge:
                first = span[0][0].data_ptr()
                share = require_huge("span", first, cache.stats().mapped_bytes)
                for memory in (plain_memory, again_memory, dense_memory, head_memory):
                    one = require_huge("plain", memory.bytes.data_ptr(), memory.bytes.numel())
                    share = min(share, one)
            q = queries(shape, dtype, rows)
            if not identical(attend(q, span), attend(q, plain)):
                raise BenchError(f"{shape.name}: span and plain memory give different bits")
            return times(q, stores, repeats), share


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    working_set = read_arguments(args)
    result = Result(
        {},
        parameters={
            "threads": torch.get_num_threads(),
            "tokens": args.tokens,
            "placements": args.placements,
            "least_working_set_bytes": working_set,
        },
    )
    for shape in SHAPES:
        for dtype_name, dtype in DTYPES.items():
            rows = shape.rows(dtype, args.tokens, working_set)
            label = f"{shape.name} {dtype_name}"
            placed = [
                _placement(shape, dtype, rows, args.tokens, args.repeats, not args.quick)
                for _ in range(args.placements)
            ]
            series = {name: joined([one[name] for one, _ in placed]) for name in placed[0][0]}
            for name, one in series.items():
                result.measurements[f"{label}: {name}"] = one
            speed = paired_ratio(series["plain"], series["span"])
            noise = paired_ratio(series["plain"], series["plain, another copy"])
            result.measurements[f"{label}: speed of span over plain"] = speed
            result.measurements[f"{label}: of another plain copy over plain"] = noise
            n_bytes = rows * args.tokens * shape.token_bytes(dtype)
            result.notes.append(
                f"{label}: {rows} rows, {n_bytes >> 20} MiB a pass, "
                f"{min(share for _, share in placed):.0%} in huge pages; GB/s "
                + ", ".join(f"{k} {gigabytes_per_s(n_bytes, s):.1f}" for k, s in series.items())
            )
            if not args.quick:
                result.expectations.append(
                    Expectation(f"{label}: span's speed over plain's", speed.median, 0.97, True)
                )
    return result
