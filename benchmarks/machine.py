"""What the processor can do, and what share of it a training step reaches, on one thread."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from benchmarks.models import CLASSES, PRECISIONS, Setting, our_step
from benchmarks.pairs import time_in_turn
from benchmarks.record import Figure
from effspinenet_lib import create_model, measure_cost

SIDE = 2048  # of the matrices: large enough for the highest rate
COPIED = 2**28  # bytes, more than the caches that belong to a core
STEP = Setting(512, 2)
FORWARD_AND_BACKWARD = 3  # multi-adds of a training step over those of a forward pass


def machine(rounds: int, quick: bool) -> Iterator[Figure]:
    """Matrix products, copies, and a training step of Eff-SpineNet-D0."""
    del quick
    source = torch.randn(COPIED // 4)
    target = torch.empty_like(source)
    copy = _median(time_in_turn({"copy": lambda: target.copy_(source)}, rounds), "copy")
    yield Figure("machine", "copying, read and written", "", 2 * COPIED / copy / 1e9, "GB/s")
    cost = measure_cost(create_model("eff_spinenet_d0", num_classes=CLASSES), STEP.size)
    work = FORWARD_AND_BACKWARD * STEP.batch * cost.multi_adds
    for precision, dtype in PRECISIONS.items():
        left, right = (torch.randn(SIDE, SIDE, dtype=dtype) for _ in range(2))
        works = {
            "product": lambda left=left, right=right: left @ right,
            "step": our_step(STEP, precision),
        }
        times = time_in_turn(works, rounds)
        rate = SIDE**3 / _median(times, "product")
        yield Figure(
            "machine", "matrix product", f"{precision}, {SIDE}x{SIDE}", rate / 1e9, "GMAC/s"
        )
        share = 100 * work / _median(times, "step") / rate
        what = "share of the matrix product's rate that training Eff-SpineNet-D0 reaches"
        yield Figure("machine", what, f"{precision}, {STEP}", share, "percent")


def _median(times: dict[str, list[float]], name: str) -> float:
    return statistics.median(times[name])
