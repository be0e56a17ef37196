"""What the demo says: the growing answers of act one and the table of act two."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .chat import Answer, ChatResult
from .errors import require
from .stores import BlockTableKV, RowStore, SpanKV
from .trace import NEAR_TIE, StoreResult, TraceResult

MIB = 2**20
_PLAIN_WIDTH = 140  # columns when the output is not a terminal


def open_console() -> Any:
    """Open a rich console: the terminal's own width, or a fixed one for files and pipes."""
    require("rich", "to draw on the screen")
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


@contextmanager
def answers_display(console: Any, answers: Sequence[Answer]) -> Iterator[Any]:
    """Show growing answers; yields a function to call after each change.

    On a terminal all answers grow at once in a grid, which gives way to their full texts at the
    end. Elsewhere each answer is printed when it is complete.
    """
    from rich.live import Live
    from rich.markup import escape

    def print_answer(answer: Answer) -> None:
        console.print(
            f"[bold cyan]{escape(answer.question)}[/]\n  {escape(' '.join(answer.text.split()))}"
        )

    if console.is_terminal:
        with Live(console=console, refresh_per_second=12, transient=True) as live:
            yield lambda: live.update(_grid(console, answers))
        for answer in answers:
            print_answer(answer)
        return

    printed: set[int] = set()

    def show_finished() -> None:
        for i, answer in enumerate(answers):
            if answer.is_done and i not in printed:
                printed.add(i)
                print_answer(answer)

    yield show_finished


@contextmanager
def progress(console: Any, label: str, total: int) -> Iterator[Any]:
    """Show progress in tokens; yields a function of (tokens done in this step, virtual seconds)."""
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if console.is_terminal:
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
            TextColumn("trace time {task.fields[at]:.1f} s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(label, total=total, at=0.0)
            yield lambda tokens, at: bar.update(task, advance=tokens, at=at)
        return

    done = reported = 0

    def report(tokens: int, at: float) -> None:
        nonlocal done, reported
        done += tokens
        if done * 5 // total > reported:
            reported = done * 5 // total
            console.print(f"  {done:,} of {total:,} tokens, trace time {at:.1f} s")

    yield report


def chat_summary(result: ChatResult, n_questions: int) -> str:
    """One paragraph on act one."""
    return (
        f"{n_questions} answers, {result.n_output_tokens:,} tokens: prompts {result.prefill_s:.1f} "
        f"s, decoding {result.decode_s:.1f} s ({result.n_output_tokens / result.decode_s:.0f} "
        f"tokens/s). The system prompt's {result.n_system_tokens} tokens were computed once and "
        f"forked {n_questions} times: {result.mapped_bytes / MIB:.0f} MiB mapped, of which "
        f"{result.shared_bytes / MIB:.0f} MiB are second mappings of shared pages. Driver calls "
        f"made inside {result.n_steps} decode steps: {result.calls_in_steps}."
    )


def trace_table(result: TraceResult) -> Any:
    """Make the table of act two, a rich renderable."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title="The same requests, weights, kernel and schedule over three KV stores",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    headings = (
        "KV store",
        "tokens/s",
        "decode\nstep ms",
        "mapped\npeak MiB",
        "mapped\nmean MiB",
        "used\nmean MiB",
        "wasted\nmean MiB",
        "waste",
        "page maps\n/1k tok",
        "driver\ncalls\n/1k tok",
        "driver\ncalls in\nsteps",
    )
    for n, heading in enumerate(headings):
        table.add_column(heading, justify="left" if n == 0 else "right", no_wrap=True)
    for store in result.stores:
        table.add_row(*_cells(store, result.n_output_tokens))
    return table


def trace_notes(result: TraceResult, stores: Sequence[RowStore], scale: float) -> list[str]:
    """Say what has to be known to read the table."""
    span_store = next(store for store in stores if isinstance(store, SpanKV))
    gathered_bytes = sum(s.gathered_bytes for s in stores if isinstance(s, BlockTableKV))
    page_tokens = min(span_store.cache.tokens_per_page)
    span, *baselines = result.stores
    notes = [
        f"Tokens are output tokens ({result.n_output_tokens:,} of them, behind "
        f"{result.n_prompt_tokens:,} prompt tokens); tokens/s counts prompts, steps, admission "
        "and release, not loading. MiB and waste are weighted by the trace's time; waste = 1 - "
        "used / mapped.",
        f"{result.n_compared:,} tokens compared, all equal; {result.n_near_ties:,} near ties "
        f"(best two logits within {NEAR_TIE:g}) compared by logits; largest logit difference "
        f"anywhere {result.max_logit_difference:.2g}.",
        "Baselines count memory only while a request holds it; span counts all that is mapped. A "
        f"page of {span_store.pool.page_size // MIB} MiB holds {page_tokens:.1f} tokens of this "
        f"model, a block {BlockTableKV.block_tokens}.",
        f"The block table copied {gathered_bytes / 2**30:.1f} GiB of keys and values to make rows "
        "contiguous.",
    ]
    if span.decode_s:
        ratios = [
            f"{paired_ratio(span.decode_s, store.decode_s):.3f} of the {store.name}'s"
            for store in baselines
        ]
        notes.append(
            f"A decode step over span took {' and '.join(ratios)} time (median of step-by-step "
            "ratios; the stores take turns within each step). Its batch.step() took "
            f"{statistics.median(span_store.step_s) * 1e6:.1f} µs; {span.steps_with_calls} of "
            f"{len(span.decode_s)} called the driver."
        )
    if scale != 1:
        notes.append(
            f"Lengths are {scale:g} of the trace's while pages are as large as ever, so a partly "
            f"filled last page weighs about {1 / scale:.3g} times what it does at scale 1."
        )
    return notes


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of ratios of measurements taken side by side."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _cells(store: StoreResult, n_tokens: int) -> list[str]:
    """One store's row of the table."""
    wasted = store.mean_mapped - store.mean_used
    memory = (store.peak_mapped, store.mean_mapped, store.mean_used, wasted)
    cells = [
        store.name,
        f"{n_tokens / store.total_s:.1f}",
        f"{statistics.median(store.decode_s) * 1e3:.1f}" if store.decode_s else "-",
        *(f"{n_bytes / MIB:.1f}" for n_bytes in memory),
        f"{store.waste:.1%}",
    ]
    if store.work is None:
        return [*cells, "-", "-", "-"]
    per_1000 = 1000 / n_tokens
    return [
        *cells,
        f"{store.work.maps * per_1000:.1f}",
        f"{store.work.calls * per_1000:.1f}",
        f"{store.calls_in_steps}",
    ]


def _grid(console: Any, answers: Sequence[Answer]) -> Any:
    """All answers side by side, each showing its last lines, in as many columns as fit."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    n_columns = max(1, min(4, console.width // 36))
    n_lines = -(-len(answers) // n_columns)
    text_height = max(1, (console.height - 1) // n_lines - 2)
    text_width = console.width // n_columns - 4
    grid = Table.grid(expand=True)
    panels = []
    for answer in answers:
        lines = Text(" ".join(answer.text.split())).wrap(console, text_width)
        panels.append(
            Panel(
                Text("\n").join(lines[-text_height:]),
                title=Text(answer.question, style="bold cyan", overflow="ellipsis"),
                height=text_height + 2,
                border_style="green" if answer.is_done else "dim",
            )
        )
    for _ in range(n_columns):
        grid.add_column(ratio=1)
    for n in range(0, len(panels), n_columns):
        grid.add_row(*panels[n : n + n_columns])
    return grid
