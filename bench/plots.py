"""Pictures of results: bars of one quantity, grouped, a panel each problem; lines over time."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness import BenchError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = Mapping[str, Mapping[str, float]]  # group of bars -> bar -> value


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --plot."""
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the result there (PNG, SVG)"
    )


def bars(path: Path, title: str, unit: str, panels: Mapping[str, Panel]) -> None:
    """Draw; a bar that a group lacks is left out."""
    n_columns = min(len(panels), 2)
    n_rows = -(-len(panels) // n_columns)
    figure = _figure(6.4 * n_columns, 3.2 * n_rows + 0.8)
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).flat
    of_all = (bar for groups in panels.values() for bars in groups.values() for bar in bars)
    names = list(dict.fromkeys(of_all))
    width = 0.85 / len(names)
    for axis, (name, groups) in zip(axes, panels.items(), strict=False):
        for i, bar in enumerate(names):
            at = [group + (i - (len(names) - 1) / 2) * width for group in range(len(groups))]
            heights = [of.get(bar, 0.0) for of in groups.values()]
            axis.bar(at, heights, width, color=f"C{i}", label=bar)
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(len(groups)), list(groups))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.set_ylabel(unit)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        frameon=False,
    )
    figure.savefig(path, dpi=110)


def lines(path: Path, title: str, x: str, y: str, values: Mapping[str, Sequence[float]]) -> None:
    """Draw a line each, one value a unit of `x`, over a logarithmic `y`."""
    figure = _figure(9, 5)
    axis = figure.subplots()
    for name, of in values.items():
        axis.plot(range(len(of)), of, linewidth=1.2, label=name)
    axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=12)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError("--plot needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")
