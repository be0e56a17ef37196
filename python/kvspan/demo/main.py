"""The command ``kvspan demo``: options, the two acts one after the other, exit status."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DemoError

if TYPE_CHECKING:
    from .model import Llama, LlamaConfig
    from .schedule import Request, Step
    from .stores import RowStore
    from .tokenizer import Tokenizer

MAX_ROWS = 16
_GIB = 2**30
_PAGE_BYTES = 2 << 20  # kvspan's default


def main(argv: Sequence[str]) -> int:
    """Run the demo.

    Parameters
    ----------
    argv : sequence of str
        The words behind ``kvspan demo``.

    Returns
    -------
    int
        0 if everything ran and the stores agreed on every token, 1 with a message on stderr if not.

    Raises
    ------
    SystemExit
        With status 2 when an option is wrong, 0 after ``--help``.
    """
    options = _parser().parse_args(argv)
    if options.small:
        options.requests, options.scale = min(options.requests, 12), min(options.scale, 0.12)
    try:
        _run(options)
    except (DemoError, OSError) as error:
        print(f"kvspan demo: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvspan demo",
        description="A real model over kvspan: questions answered together, then requests of a "
        "real trace over kvspan, a block table and preallocation, with the same weights, "
        "kernel and schedule.",
    )
    parser.add_argument(
        "--requests", type=int, default=40, metavar="N", help="requests of the trace (default: 40)"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=0.25,
        metavar="F",
        help="multiply lengths and arrival times by F (default: 0.25)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="for prompts and random weights (default: 0)"
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="a small random Llama instead of SmolLM2: no model package, no network",
    )
    parser.add_argument("--small", action="store_true", help="a size for CI, well below a minute")
    parser.add_argument("--no-chat", action="store_true", help="leave out act one, the questions")
    parser.add_argument("--no-trace", action="store_true", help="leave out act two, the trace")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="DIR",
        help="where the picture goes (default: ./out)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="torch threads (default: as many as are fastest)",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    """Load the model and run the acts that were asked for."""
    import torch

    from .model import Llama
    from .report import open_console
    from .threads import choose_threads
    from .tokenizer import BpeTokenizer, SyllableTokenizer
    from .weights import load_smollm2, random_checkpoint

    console = open_console()
    if options.threads < 0:
        raise DemoError("--threads must be positive")
    began = time.perf_counter()
    if options.random_weights:
        checkpoint = random_checkpoint(options.seed)
        tokenizer: Tokenizer = SyllableTokenizer()
    else:
        checkpoint = load_smollm2(lambda text: console.print(f"[dim]{text}[/]"))
        tokenizer = BpeTokenizer(checkpoint)
    model = Llama(checkpoint.config, checkpoint.tensors)
    if options.threads:
        torch.set_num_threads(options.threads)
    else:
        choose_threads(model)
    console.print(
        f"[bold]{checkpoint.name}[/], "
        f"{sum(t.numel() for t in checkpoint.tensors.values()) / 1e6:.0f}M parameters, fp32, "
        f"{torch.get_num_threads()} of {len(os.sched_getaffinity(0))} threads, ready in "
        f"{time.perf_counter() - began:.1f} s"
    )
    if not options.no_chat:
        _chat(console, model, tokenizer, options)
    if not options.no_trace:
        _trace(console, model, tokenizer, checkpoint.name, options)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB
    console.print(
        f"[dim]{time.perf_counter() - began:.0f} s in all; largest resident memory {peak_gib:.1f} "
        "GiB[/]"
    )


def _chat(console: Any, model: Llama, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """Act one."""
    from .chat import QUESTIONS, SYSTEM_PROMPT, Answer, run_chat
    from .report import answers_display, chat_summary
    from .stores import SpanKV

    questions = QUESTIONS[:4] if options.small else QUESTIONS
    max_new_tokens = 24 if options.small else 80
    answers = [Answer(question) for question in questions]
    longest = len(tokenizer.encode(SYSTEM_PROMPT + max(questions, key=len))) + max_new_tokens + 64
    console.rule("Act 1: questions behind one system prompt, over span tensors")
    n_rows = len(questions) + 1
    budget = _capacity(model.config, n_rows, longest)
    store = SpanKV(model.config, n_rows, longest, budget, preallocate_bytes=0)
    try:
        with answers_display(console, answers) as show:
            result = run_chat(model, tokenizer, store, answers, max_new_tokens, show)
    finally:
        store.close()
    console.print(chat_summary(result, len(questions)))


def _trace(
    console: Any, model: Llama, tokenizer: Tokenizer, model_name: str, options: argparse.Namespace
) -> None:
    """Act two."""
    from . import schedule
    from .picture import draw
    from .prompts import make_prompts
    from .report import progress, trace_notes, trace_table
    from .trace import run_trace

    requests = schedule.load_excerpt(options.requests, options.scale)
    steps = schedule.plan(requests, MAX_ROWS)
    lengths = [r.prompt_tokens for r in requests]
    prompts, origin = make_prompts(lengths, tokenizer, model.config.vocab_size, options.seed)
    console.rule(
        f"Act 2: {len(requests)} requests of the Azure conversation trace over three KV stores"
    )
    console.print(
        "Real order of arrival and lengths (Azure LLM inference trace 2023, CC-BY-4.0, Splitwise, "
        f"ISCA'24), lengths and arrival times x {options.scale:g}; "
        f"{schedule.PREFILL_TOKENS_PER_S:,.0f} prompt tokens/s and {schedule.DECODE_STEPS_PER_S:g} "
        f"steps/s of trace time; prompts are {origin}; answers have the trace's lengths, whatever "
        f"the model would end. {len(steps):,} steps, up to {max(len(s.decoding) for s in steps)} "
        "rows decoding."
    )
    stores = _make_stores(model.config, requests, steps)
    try:
        total = sum(r.stored_tokens for r in requests)
        with progress(console, "three stores, in turns", total) as advance:
            result = run_trace(model, stores, requests, steps, prompts, advance)
        notes = trace_notes(result, stores, options.scale)
    finally:
        for store in stores:
            store.close()
    console.print(trace_table(result))
    for note in notes:
        console.print(f"- {note}")
    title = f"{model_name}: {len(requests)} requests of the Azure conversation trace"
    title += f", lengths x {options.scale:g}"
    for path in draw(result, options.out, title):
        console.print(f"Picture written to {path}")


def _make_stores(
    config: LlamaConfig, requests: Sequence[Request], steps: Sequence[Step]
) -> list[RowStore]:
    """Make the three stores, reference last, each large enough for the whole schedule.

    Raises
    ------
    DemoError
        If a request is longer than the model's context, or all three do not fit into this machine's
        memory.
    """
    from .schedule import live_lengths
    from .stores import BlockTableKV, PreallocKV, SpanKV

    size = BlockTableKV.block_tokens
    longest = max(r.stored_tokens for r in requests)
    if longest > config.max_positions:
        raise DemoError(
            f"a request would have {longest:,} tokens and the model's context has "
            f"{config.max_positions:,}: choose a smaller --scale"
        )
    per_token = config.kv_bytes_per_token
    live = [list(lengths.values()) for lengths in live_lengths(requests, steps)]
    n_rows = max(len(lengths) for lengths in live)
    # Both pools are sized for the fullest moment, in their own units.
    n_blocks = max(sum(-(-n // size) for n in lengths) for lengths in live)
    n_pages = max(sum(-(-n * per_token // _PAGE_BYTES) for n in lengths) for lengths in live)
    block_bytes = n_blocks * size * per_token
    budget = _capacity(config, n_rows, longest)
    needed = 2 * budget + block_bytes
    if needed > _available_bytes():
        raise DemoError(
            f"the three stores need up to {needed / _GIB:.1f} GiB and this machine has "
            f"{_available_bytes() / _GIB:.1f} GiB: choose a smaller --scale or --requests"
        )
    return [
        SpanKV(config, n_rows, longest, budget, preallocate_bytes=n_pages * _PAGE_BYTES),
        BlockTableKV(config, n_rows, n_blocks),
        PreallocKV(config, n_rows, longest),
    ]


def _capacity(config: LlamaConfig, n_rows: int, n_tokens: int) -> int:
    """Bytes of `n_rows` rows of `n_tokens` tokens in whole pages, and one page more per row."""
    return n_rows * (-(-n_tokens * config.kv_bytes_per_token // _PAGE_BYTES) + 1) * _PAGE_BYTES


def _available_bytes() -> int:
    """Memory that can be had without swapping, as /proc/meminfo counts it."""
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":") for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
