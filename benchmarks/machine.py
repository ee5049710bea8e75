"""What the CPU can do, and what share of it a training step reaches, on one thread."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.models import CLASSES, PRECISIONS, Setting, our_step
from benchmarks.pairs import time_in_turn
from benchmarks.profile import PARTS
from benchmarks.record import Figure
from effspinenet_lib import create_model, measure_cost
from effspinenet_lib.training.export import inference_copy

PRODUCT = "matrix product"
CONVOLUTION_SHARE = "share of the time of Eff-SpineNet-D0's inference that convolutions take"
SIDE = 2048  # of the matrices: large enough for the highest rate
COPIED = 2**28  # bytes, more than the caches that belong to a core
STEP = Setting(512, 2)
ONE = Setting(512, 1)
FORWARD_AND_BACKWARD = 3  # multi-adds of a training step over those of a forward pass
# Beginnings of what torch calls convolutions, those with activations in them included.
CONVOLVING = (*PARTS["convolutions, forward"], "mkldnn::_convolution_pointwise", "aten::baddbmm")


def machine(rounds: int, quick: bool) -> Iterator[Figure]:
    """Rates of matrix products and copies, and what share of the first Eff-SpineNet-D0 reaches."""
    del quick
    source = torch.randn(COPIED // 4)
    target = torch.empty_like(source)
    times = time_in_turn({"copy": lambda: target.copy_(source)}, rounds)
    copied = 2 * COPIED / _median(times, "copy")
    yield Figure("machine", "copying, read and written", "", copied / 1e9, "GB/s")
    cost = measure_cost(create_model("eff_spinenet_d0", num_classes=CLASSES), STEP.size)
    work = FORWARD_AND_BACKWARD * STEP.batch * cost.multi_adds
    for precision, dtype in PRECISIONS.items():
        left, right = (torch.randn(SIDE, SIDE, dtype=dtype) for _ in range(2))
        step = our_step(STEP, precision)
        works = {"product": lambda left=left, right=right: left @ right, "step": step}
        times = time_in_turn(works, rounds)
        rate = SIDE**3 / _median(times, "product")
        yield Figure("machine", PRODUCT, f"{precision}, {SIDE}x{SIDE}", rate / 1e9, "GMAC/s")
        share = work / _median(times, "step") / rate
        what = "share of the matrix product's rate that training Eff-SpineNet-D0 reaches"
        yield Figure("machine", what, f"{precision}, {STEP}", 100 * share, "percent")
    share = _share_of_convolutions(rounds)
    yield Figure("machine", CONVOLUTION_SHARE, f"float32, {ONE}", 100 * share, "percent")


def _median(times: dict[str, list[float]], name: str) -> float:
    return statistics.median(times[name])


@torch.inference_mode()
def _share_of_convolutions(rounds: int) -> float:
    """Of the time of a network's operations, as the profiler has them; the median of rounds."""
    network = inference_copy(create_model("eff_spinenet_d0", num_classes=CLASSES)).network
    images = ONE.images()
    network(images)
    shares = []
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            network(images)
        times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
        convolving = sum(time for name, time in times.items() if name.startswith(CONVOLVING))
        shares.append(convolving / sum(times.values()))
    return statistics.median(shares)
