"""How much mapped memory is wasted over a real trace, and how often is the driver called?

`bench/cpp/replay` replays every request of the trace in virtual time and without a model: through
the real cache, over a backend that counts calls instead of making them, and through the policies of
others as they describe them, all under one scheduler (engine.hpp says which). Driver calls take
what others measured on GPUs (memory.hpp), so who makes them waits, and a background that is too
slow is late. None of this is a measurement of a GPU. What is measured is how fast the cache's own
code is ("pages mapped a second of its own time").

Waste is 1 - live token bytes / mapped bytes, time-weighted, all terms shown. "saturated": 60 GiB,
and all requests wait from the beginning. "arriving": they come when the trace says, and memory is
ample. Calls are counted as a GPU's, one for each frame, or as a host's ("host"), one for each run
of frames; frames are up to 128 MiB, and each takes a GPU's time.

"host@10", "emulator@10": the same in real time, ten times as fast as the requests came, the pool's
own thread beside the engine. On the host with real memory, all 32 times smaller; on the driver
emulator with calls that last as long as a GPU's. What a step or a piece of a prompt waits is then
how long its call took.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import tempfile
from pathlib import Path

import kvspan
import plots
from cpp_programs import build, cpp_benchmark
from emulator import NOT_A_GPU
from harness import BenchError, Expectation, Result

NAME = "replay"

EXCERPT = Path(kvspan.__file__).parent / "data" / "azure_conv_2023_excerpt.csv"
MODELS = ("Llama-3-8B", "70B/TP8", "Yi-34B/TP2", "Qwen2.5-7B", "MLA")
OURS = ("auto", "host")
LAYOUTS = ("per-layer", "split")
OTHERS = (
    *("slots", "naive", "handle-pool", "kvcached", "kvcached-split"),
    *("vattention", "vattention-sync", "vattention-layers"),
)
SHOWN = {
    "waste": "waste",
    "concurrency": "concurrency",
    "calls/request": "calls a request",
    "driver/request": "driver time a request",
    "step p99.9": "wait of a step, p99.9",
    "step max": "wait of a step, max",
    "prompt p99": "wait of a piece of a prompt, p99",
    "worst second in background": "of it in the background",
    "speed": "speed",
    "late steps": "steps that began without room",
}
REAL_TIME = ("emulator@1", "emulator@10", "host@1", "host@100")
REAL_TIME_QUICK = ("emulator@10", "host@100")
DRAWN = ("blocks", "auto", "per-layer", "kvcached", "vattention", *REAL_TIME)
REAL_TIME_FULL = ("emulator@3", "emulator@30", "emulator@100", "host@3", "host@10", "host@30")
PAGES_KIB = (4096, 8192, 16384)  # beside 2 MiB, the least that a GPU has
FRAMES = (0, 3)  # largest classes, beside the usual 6: 2 MiB, 16 MiB, 128 MiB
HOST_DEFAULT = (2048, 0)  # a host's pool has frames of one page unless it is told otherwise
QUICK_REQUESTS = 64
# A trace that has fewer is repeated: hundreds of them fit at once.
MANY_REQUESTS, FEW_REQUESTS = 8192, 2048
LONG_PROMPT = 4096  # mean tokens from which a trace is one of long prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this benchmark's options."""
    parser.add_argument(
        "--trace",
        type=Path,
        default=EXCERPT,
        help="a CSV, plain or gzipped, with columns t_s, prompt, output (default: the excerpt of "
        "the Azure conversation trace that comes with kvspan)",
    )
    plots.add_argument(parser)
    parser.add_argument("--full", action="store_true", help="all policies for all models")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"only the first {QUICK_REQUESTS} requests, and one model",
    )


def read_trace(path: Path) -> list[tuple[float, int, int]]:
    """Return (arrival in s, prompt tokens, output tokens), in order of arrival."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    rows = csv.DictReader(text.splitlines())
    requests = sorted((float(r["t_s"]), int(r["prompt"]), int(r["output"])) for r in rows)
    if not requests:
        raise BenchError(f"{path} has no requests")
    return requests


def cases(full: bool, quick: bool) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """Return model, policy, how requests come, and the size of pages (KiB) and frames (class)."""
    found: list[tuple[str, str, str, tuple[int, ...]]] = []
    # Of the first requests the other models hold all at once.
    for model in MODELS[: 1 if quick else None]:
        is_first = model == MODELS[0]
        found += [(model, memory, "saturated", ()) for memory in ("blocks", *OURS)]
        found.append((model, "auto", "arriving", ()))
        if is_first or full:
            found += [(model, memory, "saturated", ()) for memory in (*OTHERS, *LAYOUTS)]
            found += [(model, "auto", "saturated", (kib,)) for kib in PAGES_KIB]
            found += [(model, "auto", "saturated", (2048, largest)) for largest in FRAMES]
    if quick:
        # Without a beginning that takes its time.
        return [*found, *((MODELS[0], memory, "arriving", ()) for memory in REAL_TIME_QUICK)]
    real_time = (*REAL_TIME, *(REAL_TIME_FULL if full else ()))
    found += [(MODELS[0], memory, "saturated", ()) for memory in real_time]
    hosts = [memory for memory in real_time if memory.startswith("host")]
    return [*found, *((MODELS[0], memory, "saturated", HOST_DEFAULT) for memory in hosts)]


def label(model: str, memory: str, mode: str, sizes: tuple[int, ...]) -> str:
    """Name a case."""
    words = [model, memory]
    if len(sizes) == 1:
        words.append(f"pages of {sizes[0] >> 10} MiB")
    if len(sizes) == 2:
        words.append(f"frames to {sizes[0] << sizes[1] >> 10} MiB")
    return ", ".join([*words, mode])


def run(args: argparse.Namespace) -> Result:
    """Replay the trace under every policy."""
    requests = read_trace(args.trace)[: QUICK_REQUESTS if args.quick else None]
    mean_prompt = sum(prompt for _, prompt, _ in requests) / len(requests)
    result = Result(
        {},
        parameters={
            "trace": args.trace.name,
            "requests": len(requests),
            "mean prompt": round(mean_prompt),
        },
        columns=SHOWN,
    )
    build("kvspan_bench_replay")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as trace:
        n_times = -(-(FEW_REQUESTS if args.quick else MANY_REQUESTS) // len(requests))
        lasts = requests[-1][0] * (1 + 1 / len(requests))
        trace.writelines(
            f"{t + i * lasts} {prompt} {output}\n"
            for i in range(n_times)
            for t, prompt, output in requests
        )
        trace.flush()
        for case in cases(args.full, args.quick):
            model, memory, mode, sizes = case
            run_of_it = cpp_benchmark(
                "kvspan_bench_replay", [trace.name, mode, model, memory, *map(str, sizes)]
            )
            for name, series in run_of_it.measurements.items():
                result.measurements[f"{label(*case)}: {name}"] = series
    result.notes += [NOT_A_GPU, "waits, counts and what was wasted how, in full: --json FILE"]
    if args.plot:
        draw(args.plot, result)
    if not args.quick:
        result.expectations = expectations(result, long_prompts=mean_prompt > LONG_PROMPT)
    return result


def draw(path: Path, result: Result) -> None:
    """Draw the first model's waste, where all requests wait."""
    names = {
        memory: f"{label(MODELS[0], memory, 'saturated', ())}: waste over time" for memory in DRAWN
    }
    found = result.measurements
    lines = {memory: found[name].samples for memory, name in names.items() if name in found}
    plots.lines(path, f"{MODELS[0]} in 60 GiB", "s of the trace", "% of waste", lines)


def expectations(result: Result, *, long_prompts: bool) -> list[Expectation]:
    """Return what the project has promised of a whole trace."""

    def value(model: str, memory: str, mode: str, name: str) -> float:
        return result.measurements[f"{label(model, memory, mode, ())}: {name}"].median

    found: list[Expectation] = []
    for model in MODELS:
        ours = (model, "auto", "saturated")
        concurrency = [value(model, memory, "saturated", "concurrency") for memory in OURS]
        blocks = value(model, "blocks", "saturated", "concurrency")
        found += [
            Expectation(f"% of waste, {model}", value(*ours, "waste"), 1 if long_prompts else 2),
            Expectation(
                f"concurrency over blocks of 16 tokens, {model}",
                min(concurrency) / blocks, .98, at_least=True,
            ),
            *(
                Expectation(
                    f"driver calls a request, {memory}, {model}",
                    value(model, memory, "saturated", "calls a request"),
                    180 if long_prompts else 14,
                )
                for memory in OURS
            ),
            Expectation(
                f"driver calls a request, memory to spare, {model}",
                value(model, "auto", "arriving", "calls a request"), 1,
            ),
            Expectation(
                f"s of driver in a step, p99.9, {model}", value(*ours, "wait of a step, p99.9"), 0
            ),
            Expectation(
                f"% of the worst second's mapping in the background, {model}",
                value(*ours, "of it in the background"), 90, at_least=True,
            ),
        ]  # fmt: skip
    return found
