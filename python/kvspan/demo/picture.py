"""The demo's picture: memory over time for the three stores, and a map of pages.

Above, one panel per store with the same axes: bytes that hold tokens, and what else is mapped.
Below, kvspan at the moment of most live tokens, seen twice: as kernels see it (each slot a
contiguous run of pages) and as memory holds it (frames, in the order of their ids). A request has
the same colour in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvspan import PageMapEntry

from .errors import require
from .trace import Sample, StoreResult, TraceResult

_USED, _PARTIAL, _AHEAD, _KEPT = "#2a6f97", "#f4a259", "#e76f51", "#c9ada7"
_PALETTE = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#edc948", "#76b7b2", "#9c755f",
    "#1b4965", "#ff9da7", "#8cd17d", "#86bcb6", "#d37295", "#b6992d", "#a0cbe8", "#79706e",
)  # fmt: skip
_PARTS = (
    ("used", "holds tokens", _USED),
    ("partial", "rest of a partly filled page or block", _PARTIAL),
    ("ahead", "mapped for tokens to come", _AHEAD),
    ("kept", "mapped for requests to come", _KEPT),
)


def draw(result: TraceResult, folder: Path, title: str) -> list[Path]:
    """Write ``kvspan-demo.png`` and ``kvspan-demo.svg`` into a folder, made if missing.

    Raises
    ------
    DemoError
        If matplotlib is missing.
    """
    require("matplotlib", "to draw the picture")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(14, 9), layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    grid = figure.add_gridspec(2, 6, height_ratios=[1, 1.05])
    first: Any = None
    for n, store in enumerate(result.stores):
        axes = figure.add_subplot(grid[0, 2 * n : 2 * n + 2], sharex=first, sharey=first)
        first = first or axes
        _draw_memory(axes, store, show_labels=n == 0)
    first.axvline(result.pages_at_s, color="#444444", linewidth=1, linestyle=":")
    figure.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=colour) for _, _, colour in _PARTS],
        labels=[label for _, label, _ in _PARTS],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    slots = sorted(result.row_requests)
    colours = {slot: _PALETTE[n % len(_PALETTE)] for n, slot in enumerate(slots)}
    _draw_virtual(figure.add_subplot(grid[1, 0:3]), result, colours)
    _draw_frames(figure.add_subplot(grid[1, 3:6]), result, colours)

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"kvspan-demo.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=120)
    plt.close(figure)
    return paths


def _draw_memory(axes: Any, store: StoreResult, show_labels: bool) -> None:
    """Stacked bytes over the trace's time."""
    times, stacks = step_curves(store.samples)
    axes.stackplot(times, stacks, colors=[colour for _, _, colour in _PARTS], linewidth=0)
    axes.set_title(f"{store.name}: {store.waste:.1%} wasted", fontsize=12)
    axes.set_xlabel("time in the trace, s")
    axes.tick_params(labelleft=show_labels)
    if show_labels:
        axes.set_ylabel("KV memory mapped, MiB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0)


def step_curves(samples: Sequence[Sample]) -> tuple[list[float], list[list[float]]]:
    """Corner points of the memory's step functions: times, and MiB of each part at those times."""
    times = [t for s in samples for t in (s.start_s, s.start_s + s.duration_s)]
    stacks = [
        [getattr(s.memory, part) / 2**20 for s in samples for _ in range(2)]
        for part, _, _ in _PARTS
    ]
    return times, stacks


def virtual_map(
    pages: Sequence[PageMapEntry],
) -> tuple[list[list[int]], list[int], int]:
    """Arrange the page map as kernels see it.

    Parameters
    ----------
    pages : sequence of PageMapEntry
        What ``KVCache.page_map()`` returned.

    Returns
    -------
    rows : list of list of int
        One row per slot and lane, one column per page: the slot, or -1 where nothing is mapped.
    slots : list of int
        The slots shown, top down.
    n_lanes : int
        Rows per slot.
    """
    slots = sorted({p.slot for p in pages})
    n_lanes = 1 + max((p.lane for p in pages), default=0)
    n_pages = 1 + max((p.page for p in pages), default=0)
    place = {slot: n for n, slot in enumerate(slots)}
    rows = [[-1] * n_pages for _ in range(len(slots) * n_lanes)]
    for p in pages:
        rows[place[p.slot] * n_lanes + p.lane][p.page] = p.slot
    return rows, slots, n_lanes


def frame_map(pages: Sequence[PageMapEntry], n_columns: int) -> list[list[int]]:
    """Arrange the page map as memory holds it: in the order of frames, row by row.

    A cell is the slot that maps it, or -1 behind the last one.
    """
    cells = [p.slot for p in sorted(pages, key=lambda p: (p.frame_id, p))]
    cells += [-1] * (-len(cells) % n_columns)
    return [cells[i : i + n_columns] for i in range(0, len(cells), n_columns)]


def _draw_virtual(axes: Any, result: TraceResult, colours: dict[int, Any]) -> None:
    """Slots, each a contiguous run of pages."""
    rows, slots, n_lanes = virtual_map(result.pages)
    _show_cells(axes, rows, colours)
    axes.set_title(
        f"What the kernel sees (at {result.pages_at_s:.1f} s): every row contiguous", fontsize=12
    )
    axes.set_xlabel("page of the slot's reservation (the reservation goes on to the right)")
    axes.set_ylabel("slot")
    axes.set_yticks([n * n_lanes + (n_lanes - 1) / 2 for n in range(len(slots))], slots)
    for n in range(1, len(slots)):
        axes.axhline(n * n_lanes - 0.5, color="white", linewidth=2)


def _draw_frames(axes: Any, result: TraceResult, colours: dict[int, Any]) -> None:
    """Frames in the order of their ids."""
    n_columns = max(8, round((2 * len(result.pages)) ** 0.5))
    rows = frame_map(result.pages, n_columns)
    _show_cells(axes, rows, colours)
    axes.set_title("What memory holds: the same pages in the order of their frames", fontsize=12)
    axes.set_xlabel("frames by id, row by row; colour: request, grey: kept for the next one")
    axes.set_xticks([])
    axes.set_yticks([])


def _show_cells(axes: Any, rows: list[list[int]], colours: dict[int, Any]) -> None:
    """Paint a grid of slots, white where there is none and grey where a slot has no request."""
    from matplotlib.colors import to_rgba

    def paint(slot: int) -> Any:
        return to_rgba("white") if slot < 0 else to_rgba(colours.get(slot, "#bbbbbb"))

    axes.imshow(
        [[paint(slot) for slot in row] for row in rows], aspect="auto", interpolation="nearest"
    )
    n_rows, n_columns = len(rows), len(rows[0]) if rows else 0
    if n_rows * n_columns <= 4000:  # lines between cells, as long as cells are larger than lines
        for x in range(1, n_columns):
            axes.axvline(x - 0.5, color="white", linewidth=0.6)
        for y in range(1, n_rows):
            axes.axhline(y - 0.5, color="white", linewidth=0.6)
    axes.spines[:].set_color("#cccccc")
