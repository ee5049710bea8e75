"""Two processes with a thread each against one, and against one with two threads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator

from benchmarks.models import PROXY_BATCH, PROXY_SIZE, Setting, proxy_step
from benchmarks.pairs import compare
from benchmarks.record import Figure, ratio_figure
from effspinenet_lib.training import device

SETTING = Setting(PROXY_SIZE, PROXY_BATCH)  # for each process
STEPS, QUICK_STEPS = 10, 3
PAIRS = 3
SHARED, OWN, MESSAGES = "shared", "own", "messages"  # norms' statistics, and the messages alone
MESSAGE, SENT = 256, 200  # numbers a message, about what a norm sends, and messages


def scaling(rounds: int, quick: bool) -> Iterator[Figure]:
    """Images a second of processes that train one model together, by the clock on the wall.

    With norms that share their statistics, as the library trains, and with norms of each process's
    own; and how long a message between the processes takes, of which a norm sends two a step.
    """
    steps = str(QUICK_STEPS if quick else STEPS)
    pairs = [
        (
            _seconds(1, 1, OWN, steps),
            _seconds(1, 2, OWN, steps),
            _seconds(2, 1, SHARED, steps),
            _seconds(2, 1, OWN, steps),
        )
        for _ in range(min(rounds, PAIRS))
    ]
    one, threads, *twos = (list(column) for column in zip(*pairs, strict=True))
    for what, two in zip((SHARED, OWN), twos, strict=True):
        for name, other in (("one process", one), ("one with two threads", threads)):
            yield ratio_figure(
                "scaling",
                f"images of two processes against {name}",
                f"{what} norms, bfloat16, {SETTING} a process",
                compare([seconds / 2 for seconds in two], other),
            )
    yield Figure(
        "scaling",
        "a message between two processes",
        f"all-reduce of {MESSAGE} numbers",
        1000 * _seconds(2, 1, MESSAGES, str(MESSAGE)),
        "ms",
    )


def _seconds(processes: int, threads: int, *arguments: str) -> float:
    """What the first process prints."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={processes}", "-m", "benchmarks.scaling", *arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def _time(work: Callable[[], object], times: int) -> float:
    """Seconds of each of so many, after one that is not counted."""
    work()
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def _train(norms: str, steps: int) -> float:
    if norms == OWN:
        device.synchronise_norms = lambda model, _: model
    return _time(proxy_step(SETTING), steps)


def _send(numbers: int) -> float:
    values = torch.zeros(numbers)
    return _time(lambda: torch.distributed.all_reduce(values), SENT)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    accelerator = Accelerator(cpu=True)
    asked, count = sys.argv[1], int(sys.argv[2])
    seconds = _send(count) if asked == MESSAGES else _train(asked, count)
    if accelerator.is_main_process:
        print(seconds)
