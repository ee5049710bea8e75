"""Two processes with a thread each against one, and against one with two threads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from benchmarks.models import PROXY_BATCH, PROXY_CLASSES, PROXY_SIZE, Setting, our_training
from benchmarks.pairs import compare
from benchmarks.record import Figure, ratio_figure
from effspinenet_lib.recipes import get_recipe

SETTING = Setting(PROXY_SIZE, PROXY_BATCH)  # for each process
STEPS, QUICK_STEPS = 10, 3
PAIRS = 3


def scaling(rounds: int, quick: bool) -> Iterator[Figure]:
    """Images a second of processes that train one model together, by the clock on the wall."""
    steps = QUICK_STEPS if quick else STEPS
    pairs = [
        (_seconds(1, 1, steps), _seconds(2, 1, steps), _seconds(1, 2, steps))
        for _ in range(min(rounds, PAIRS))
    ]
    one, two, threads = (list(column) for column in zip(*pairs, strict=True))
    settings = f"bfloat16, {SETTING} a process"
    yield ratio_figure(
        "scaling",
        "images of two processes against one process",
        settings,
        compare([seconds / 2 for seconds in two], one),
    )
    yield ratio_figure(
        "scaling",
        "images of two processes against one with two threads",
        settings,
        compare([seconds / 2 for seconds in two], threads),
    )


def _seconds(processes: int, threads: int, steps: int) -> float:
    """Seconds a step, as the first process measures it."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={processes}", "-m", "benchmarks.scaling", str(steps)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def _train(steps: int) -> None:
    recipe = get_recipe("proxy_detection").with_(precision="bfloat16")
    step = our_training("eff_spinenet_m0", SETTING, recipe, PROXY_CLASSES)
    step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if Accelerator(cpu=True).is_main_process:
        print((time.perf_counter() - start) / steps)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    _train(int(sys.argv[1]))
