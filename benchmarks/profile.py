"""Where the time of a training step goes, before and after what this library does for speed.

Each of the two is a process of its own, since one of them keeps the memory that it frees.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.models import PRECISIONS, Setting, our_step, plain_step
from benchmarks.record import Figure
from effspinenet_lib.training.device import disable_malloc_trim

STEP = Setting(512, 2)
BEFORE, AFTER = "before", "after"
WARMUPS = 2
# Part of a step -> beginnings of the names of torch's operations.
PARTS = {
    "convolutions, forward": (
        "aten::mkldnn_convolution",
        "aten::_slow_conv2d_forward",
        "aten::addmm",
        "aten::mm",
    ),
    "convolutions, backward": ("aten::convolution_backward", "aten::_slow_conv2d_backward"),
    "norms": ("aten::native_batch_norm",),
    "activations": ("aten::silu", "aten::sigmoid"),
    "sums and products": ("aten::mul", "aten::add", "aten::sum", "aten::div", "aten::sub"),
    "casts and copies": ("aten::copy_", "aten::fill_", "aten::zero_", "aten::cat"),
    "resampling": ("aten::pixel_", "aten::max_pool", "aten::upsample"),
}
REST = "the rest"
SYSTEM = "of it the system's, clearing memory"


def profiles(rounds: int, quick: bool) -> Iterator[Figure]:
    """Milliseconds of a step by kind of operation; the shares are the profiler's."""
    del rounds, quick
    for precision in PRECISIONS:
        for state in (BEFORE, AFTER):
            command = [sys.executable, "-m", "benchmarks.profile", precision, state]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            for figure in json.loads(done.stdout.splitlines()[-1]):
                yield replace(Figure(**figure), settings=f"{precision}, {STEP}, {state}")


def _profile(precision: str, state: str) -> list[dict[str, object]]:
    if state == AFTER:
        disable_malloc_trim()
    step = (our_step if state == AFTER else plain_step)(STEP, precision)
    for _ in range(WARMUPS):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    total = after.ru_utime - before.ru_utime + system
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    shares = dict.fromkeys((*PARTS, REST), 0.0)
    for event in found.key_averages():
        shares[_part(event.key)] += event.self_cpu_time_total
    scale = total / sum(shares.values())
    rows = {**{part: value * scale for part, value in shares.items()}, SYSTEM: system}
    return [
        {"benchmark": "profile", "what": part, "settings": "", "value": 1e3 * value, "unit": "ms"}
        for part, value in rows.items()
    ]


def _part(name: str) -> str:
    return next((part for part, starts in PARTS.items() if name.startswith(starts)), REST)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_profile(*sys.argv[1:])))
