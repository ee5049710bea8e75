"""Trials that take no training, for the tests of the search.

A trial leaves a line in `started.log` beside the runs, so that a test can count what ran. Nothing
here imports torch: a worker process starts at once.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECONDS = 0.1  # of a trial that works


def betas_of(request: Mapping[str, Any]) -> list[int]:
    return [int(beta) for beta in request["config"]["model_options"]["betas"].split("-")]


def note_start(request: Mapping[str, Any]) -> int:
    """Write down that a trial was started; how often this one was before."""
    folder = Path(request["runs_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "started.log"
    text = request["config"]["model_options"]["betas"]
    before = log.read_text().splitlines().count(text) if log.exists() else 0
    with open(log, "a", encoding="utf-8") as handle:
        handle.write(text + "\n")
    return before


def works(request: Mapping[str, Any]) -> dict[str, float]:
    note_start(request)
    time.sleep(SECONDS)
    return {"AP": sum(betas_of(request)) / 10, "seconds": SECONDS}


def tells_of_its_process(request: Mapping[str, Any]) -> dict[str, float]:
    """Whether it must compute on the processor, and whether it may start processes."""
    alone = multiprocessing.current_process().daemon
    return {"AP": float("ACCELERATE_USE_CPU" in os.environ), "seconds": float(not alone)}


def fails_with_its_process(request: Mapping[str, Any]) -> dict[str, float]:
    raise ArithmeticError(f"in process {os.getpid()}")


def dies_once(request: Mapping[str, Any]) -> dict[str, float]:
    if note_start(request) == 0:
        os._exit(9)
    return {"AP": 1.0, "seconds": 0.0}


def dies(request: Mapping[str, Any]) -> dict[str, float]:
    note_start(request)
    os._exit(9)


def diverges_at_20(request: Mapping[str, Any]) -> dict[str, float]:
    """Fail wherever block 1 has the largest beta."""
    note_start(request)
    if betas_of(request)[0] == 20:
        raise ArithmeticError("the loss of step 3 is not finite")
    return {"AP": 1.0, "seconds": 0.0}


def hangs(request: Mapping[str, Any]) -> dict[str, float]:
    note_start(request)
    time.sleep(3600)
    return {"AP": math.nan, "seconds": 0.0}
