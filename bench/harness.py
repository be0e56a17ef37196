"""What every benchmark shares: timing, statistics, the machine's description, printing and JSON.

A benchmark is a file `bench_*.py` here. The first line of its docstring is the question that it
answers; `NAME` is what `run.py` calls it; `run(args) -> Result` does the work, and
`add_arguments(parser)`, if there is one, declares its own options. What is compared is timed
interleaved, in one process, and its results are checked equal before (`interleave`). Programs
of bench/cpp are run by `cpp_programs.cpp_benchmark`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import machine, versions

MIN_REPEATS = 7


class BenchError(Exception):
    """The benchmark cannot be run; the message says why."""


# ---- measurements ----


@dataclass(frozen=True)
class Series:
    """Every sample of one quantity."""

    samples: tuple[float, ...]
    unit: str = "s"

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("a series needs at least one sample")

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quartiles(self) -> tuple[float, float]:
        """First and third quartile; both the sample itself when there is only one."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        q = statistics.quantiles(self.samples, n=4, method="inclusive")
        return q[0], q[2]

    def as_dict(self) -> dict[str, Any]:
        q1, q3 = self.quartiles()
        return {
            "unit": self.unit,
            "n": len(self.samples),
            "median": self.median,
            "min": min(self.samples),
            "q1": q1,
            "q3": q3,
            "max": max(self.samples),
            "samples": list(self.samples),
        }


@dataclass(frozen=True)
class Expectation:
    """A bound that the project has promised: `value` against `limit`."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        return f"{self.what}: {self.value:.4g} {sign} {self.limit:.4g}: {verdict}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "value": self.value,
            "limit": self.limit,
            "at_least": self.at_least,
            "holds": self.holds,
        }


@dataclass
class Result:
    """What a benchmark hands back.

    `baseline` names the measurement that the others are divided by. `parameters` are the sizes and
    settings that it ran with, whatever JSON can hold. With `columns` (heading: quantity) names are
    "case: quantity", and a person is shown a row for each case; the rest is in the JSON.
    """

    measurements: dict[str, Series]
    baseline: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    expectations: list[Expectation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.baseline is not None and self.baseline not in self.measurements:
            raise ValueError(f"the baseline {self.baseline!r} was not measured")

    def ratio(self, name: str) -> float:
        """Median of `name` over the baseline's."""
        if self.baseline is None:
            raise ValueError("there is no baseline")
        return self.measurements[name].median / self.measurements[self.baseline].median


def interleave(
    cases: Mapping[str, Callable[[], object]],
    repeats: int = 9,
    *,
    calls: int = 1,
    equal: Callable[[Any, Any], bool] | None = None,
    clock: Callable[[], int] | None = None,
) -> dict[str, Series]:
    """Time several callables in turn, so that what disturbs one disturbs all.

    Each is called once beforehand, untimed; with `equal`, what the first one returned then must
    equal what each of the others did. Every round times each case, and rounds start with another
    case each time.

    Parameters
    ----------
    cases
        What to time, by name.
    repeats
        Samples of each, at least 7.
    calls
        Calls in a sample, for what is too short for the clock. A sample is the time of one.
    equal
        Compares two results. Without it they are not compared.
    clock
        In nanoseconds; by default the wall's. Where others use the machine, CPU time says more of
        what one thread does.

    Returns
    -------
    dict
        Seconds a call, by name.
    """
    if repeats < MIN_REPEATS:
        raise ValueError(f"{repeats} repeats are too few to say anything: {MIN_REPEATS} at least")
    if calls < 1:
        raise ValueError(f"calls must be positive, not {calls}")
    clock = clock or time.perf_counter_ns
    names = list(cases)
    first: object = None
    for i, name in enumerate(names):
        value = cases[name]()
        if i == 0:
            first = value
        elif equal is not None and not equal(first, value):
            raise BenchError(f"{name!r} and {names[0]!r} give different results: nothing to time")
    del first

    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(repeats):
        shift = round_number % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            call = cases[name]
            start = clock()
            for _ in range(calls):
                call()
            samples[name].append((clock() - start) / calls * 1e-9)
    return {name: Series(tuple(values)) for name, values in samples.items()}


# ---- the record of a run ----


def document(name: str, question: str, result: Result, load_before: float) -> dict[str, Any]:
    """Everything about one run, as it goes into the JSON file."""
    measurements = {key: series.as_dict() for key, series in result.measurements.items()}
    if result.baseline is not None:
        for key in measurements:
            measurements[key]["ratio"] = result.ratio(key)
    return {
        "name": name,
        "question": question,
        "command": shlex.join(["python", *sys.argv]),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        # One-minute load averages: figures of a busy machine are ratios at best.
        "load": {"before": load_before, "after": os.getloadavg()[0]},
        "versions": versions(),
        "parameters": result.parameters,
        "baseline": result.baseline,
        "measurements": measurements,
        "expectations": [e.as_dict() for e in result.expectations],
        "notes": result.notes,
        "columns": result.columns,
    }


def write_json(path: Path, doc: Mapping[str, Any]) -> None:
    """Write a document, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(doc, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


# ---- what a person reads ----


def table(doc: Mapping[str, Any]) -> str:
    """Render a document as text."""
    caches = ", ".join(f"{level} {size}" for level, size in doc["machine"]["caches"].items())
    huge = doc["machine"]["transparent_hugepage"]
    v = doc["versions"]
    lines = [
        f"{doc['name']}: {doc['question']}",
        f"  machine   {doc['machine']['cpu']}, {doc['machine']['cores']} cores ({caches}), "
        f"Linux {doc['machine']['kernel']}, huge pages {huge['enabled']}/{huge['shmem_enabled']}, "
        f"load {doc['load']['before']:.1f}",
        f"  gpu       {doc['machine']['gpu'] or 'none'}",
        f"  versions  kvspan {v['kvspan']} ({(v['commit'] or '?')[:12]}), torch {v['torch']}, "
        f"Python {v['python']}, {v['compiler']}",
        f"  command   {doc['command']}",
    ]
    if doc["parameters"]:
        lines.append("  with      " + ", ".join(f"{k}={x}" for k, x in doc["parameters"].items()))
    lines += ["", *(_grid(doc) if doc["columns"] else _statistics(doc))]
    lines += ["", *doc["notes"]] if doc["notes"] else []
    if doc["expectations"]:
        lines.append("")
        lines += [
            str(Expectation(e["what"], e["value"], e["limit"], e["at_least"]))
            for e in doc["expectations"]
        ]
    return "\n".join(lines)


def _statistics(doc: Mapping[str, Any]) -> list[str]:
    """Lay out a row for each measurement."""
    rows = [["", "median", "min", "q1", "q3", "max", "n", "ratio"]]
    for name, m in doc["measurements"].items():
        figures = [_show(m[key], m["unit"]) for key in ("median", "min", "q1", "q3", "max")]
        ratio = f"{m['ratio']:.3f}" if "ratio" in m else ""
        mark = " (baseline)" if name == doc["baseline"] else ""
        rows.append([name + mark, *figures, str(m["n"]), ratio])
    return _aligned(rows)


def _grid(doc: Mapping[str, Any]) -> list[str]:
    """Lay out a row for each case, of the medians of some of its quantities."""
    cases: dict[str, dict[str, str]] = {}
    for name, m in doc["measurements"].items():
        case, _, quantity = name.partition(": ")
        cases.setdefault(case, {})[quantity] = _show(m["median"], m["unit"])
    columns = doc["columns"]
    rows = [["", *columns]]
    rows += [[case, *(found.get(q, "") for q in columns.values())] for case, found in cases.items()]
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align all columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that every benchmark has."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    parser.add_argument(
        "--repeats", type=int, default=9, help="samples of each case, at least 7 (default: 9)"
    )


def _show(value: float, unit: str) -> str:
    if unit == "s":
        for factor, name in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
            if abs(value) * factor >= 1:
                return f"{value * factor:.4g} {name}"
        return f"{value * 1e9:.4g} ns"
    return f"{value:.4g} {unit}".rstrip()
