"""What does a fork ask of a GPU's driver, beside copying the same keys and values?

A sequence of Llama-3-8B on the driver emulator: handles by call, and the virtual time of the calls.
The sequence came as one prompt, whose frames are large, or was decoded token by token: in strides
of an eighth of itself while memory is ample, in short ones where it is in demand. A copy needs as
many pages, new ones or those of a slot that was released, and then reads and writes everything at
the memory's published bandwidth. Not a GPU result.

On a card a copy can be faster than a fork. What a fork saves there is memory.
"""

from __future__ import annotations

import argparse

import torch

import kvspan
from bench_fork import DIM, HEADS, LAYERS, TOKEN_BYTES
from emulator import NOT_A_GPU, Emulator
from harness import BenchError, Result, Series

NAME = "fork-driver"
BANDWIDTH = 2039e9  # bytes a second: NVIDIA A100 80GB SXM data sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes."""
    parser.add_argument("--tokens", type=int, default=32768, help="of the sequence that is forked")


def run(args: argparse.Namespace) -> Result:
    """Model."""
    emulator = Emulator()
    copied_bytes = args.tokens * TOKEN_BYTES
    copying_us = 2 * copied_bytes / BANDWIDTH * 1e6
    result = Result({}, parameters={"tokens": args.tokens})
    result.notes = [
        NOT_A_GPU,
        f"{copied_bytes >> 20} MiB; reading and writing them: {copying_us:.0f} us",
    ]

    def show(what: str, us: float, handles: dict[str, int], new_bytes: int) -> None:
        result.measurements[what] = Series((us * 1e-6,))
        listed = ", ".join(f"{name} {n}" for name, n in handles.items() if n) or "none"
        result.notes.append(f"{what}: {us:.0f} us, {new_bytes >> 20} MiB more; handles: {listed}")

    for name, is_prompt, keep in (
        ("one prompt", True, "auto"),
        ("decoded", False, "auto"),
        ("decoded, memory in demand", False, 2 << 20),
    ):
        emulator.restart("64GiB")
        pool = kvspan.Pool(device="cuda:0", capacity="32GiB", background=False)
        cache = kvspan.KVCache(
            pool,
            LAYERS,
            HEADS,
            DIM,
            torch.bfloat16,
            max_seqs=4,
            max_seq_len=args.tokens + 1024,
            keep=keep,
        )

        parent = cache.sequence(args.tokens if is_prompt else 0)
        for n in [args.tokens] if is_prompt else [1] * args.tokens:
            parent.extend(n)
        for what in ("copy, new frames", "copy, mapped already", "fork"):
            if what == "copy, mapped already" and keep != "auto":
                continue  # nothing stays mapped then
            emulator.compute(1e6)  # what was queued is done
            handles, us = emulator.handles(), emulator.call_us()
            in_use = pool.stats().in_use_bytes
            if what == "fork":
                other = parent.fork()
            else:
                other = cache.sequence(args.tokens)
                other.extend(args.tokens)
            if len(other) != args.tokens:
                raise BenchError(f"{what}: {len(other)} tokens")
            us = emulator.call_us() - us + (0 if what == "fork" else copying_us)
            more = pool.stats().in_use_bytes - in_use
            show(f"{name}: {what}", us, emulator.handles() - handles, more)
            other.release()
        parent.release()
        cache.close()
        pool.close()
        del parent, other, cache, pool
    return result
