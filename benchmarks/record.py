"""What the benchmarks write down: one row a figure, of the schema `speed`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator

from benchmarks.pairs import Ratio
from effspinenet_lib.results import current_commit, today
from effspinenet_lib.results.tables import Row, to_row
from effspinenet_lib.training.device import describe_hardware

SHOWN_DIGITS = 4


@dataclass(frozen=True)
class Figure:
    """One thing that was measured; the fields are columns of the schema `speed`."""

    benchmark: str
    what: str
    settings: str
    value: float
    unit: str
    goal: float | None = None
    ours: float | None = None
    peer: float | None = None
    lowest: float | None = None
    highest: float | None = None
    pairs: int | None = None


def ratio_figure(
    benchmark: str, what: str, settings: str, ratio: Ratio, goal: float | None = None
) -> Figure:
    """A figure of paired times."""
    return Figure(
        benchmark,
        what,
        settings,
        ratio.ratio,
        "ratio",
        goal,
        ratio.ours * 1e3,
        ratio.peer * 1e3,
        ratio.lowest,
        ratio.highest,
        ratio.pairs,
    )


def to_rows(figures: Iterable[Figure]) -> list[Row]:
    """The rows of a file, with the machine, its load and the code beside each figure."""
    around = {
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "hardware": describe_hardware(Accelerator(cpu=True)),
        "torch": torch.__version__,
        "commit": current_commit(),
        "date": today(),
    }
    return [
        to_row({**_rounded(figure), **around}, "speed", f"the figure {figure.what!r}")
        for figure in figures
    ]


def _rounded(figure: Figure) -> dict[str, object]:
    return {
        name: float(f"{value:.{SHOWN_DIGITS}g}") if isinstance(value, float) else value
        for name, value in asdict(figure).items()
    }
