"""Trials that take no training, for the tests of the search, and what these ask of a record.

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
from typing import TYPE_CHECKING, Any

from effspinenet_lib.errors import (
    CheckpointError,
    DataError,
    Preempted,
    TrainingError,
    UnknownName,
    UserError,
)
from effspinenet_lib.search.engines import Engine
from effspinenet_lib.search.trials import Trial, TrialFailed

if TYPE_CHECKING:
    from effspinenet_lib.results import ResultsStore


class MissingError(DataError):
    """An error that is made of other things than its message."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(f"{name}: not found in {folder}")


SECONDS = 0.01  # of a trial that works
TROUBLE = "trouble"  # beside the runs: which of these errors trials raise while the file is there
ERRORS: dict[str, Exception] = {
    "disk": UserError("cannot write run.json: No space left on device"),
    "data": DataError("instances.json: no such file"),
    "images": MissingError("a.jpg", Path("images")),
    "checkpoint": CheckpointError("checkpoint-3.pt: is of another run"),
    "name": UnknownName("model", "eff", ["eff_spinenet_m0"]),
    "stopped": Preempted("stopped by SIGTERM"),
    "system": OSError(28, "No space left on device"),
    "diverged": TrainingError("the loss of step 3 is not finite"),
}
LET_GO = "let_go"  # beside the runs: how many trials may end


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


def in_trouble(request: Mapping[str, Any]) -> dict[str, float]:
    """Raise what the file says, while there is one."""
    note_start(request)
    trouble = Path(request["runs_dir"]) / TROUBLE
    if trouble.exists():
        raise ERRORS[trouble.read_text()]
    return {"AP": 1.0, "seconds": 0.0}


def is_held(request: Mapping[str, Any]) -> dict[str, float]:
    """End when it is let go; never where the search that asked for it was killed meanwhile."""
    note_start(request)
    folder = Path(request["runs_dir"])
    search = multiprocessing.parent_process()
    while not (search and search.is_alive() and take_leave(folder)):
        time.sleep(0.01)
    return {"AP": sum(betas_of(request)) / 10, "seconds": 0.0}


def take_leave(folder: Path) -> bool:
    for number in range(int((folder / LET_GO).read_text() or 0)):
        try:
            (folder / f"{LET_GO}-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return True
    return False


def computes_in_bfloat16(request: Mapping[str, Any]) -> dict[str, Any]:
    note_start(request)
    return {"AP": 1.0, "seconds": 0.0, "precision": "bfloat16"}


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


class Here(Engine):
    """An engine without processes, where a test needs none."""

    def __init__(self, trial: Trial = works) -> None:
        super().__init__(trial, workers=1, timeout=0)

    def attempt(self, request):
        try:
            return self.trial(request)
        except ArithmeticError as error:
            raise TrialFailed(str(error)) from error


def started(store: ResultsStore) -> list[str]:
    log = store.runs_folder / "started.log"
    return log.read_text().splitlines() if log.exists() else []


def record(store: ResultsStore) -> list[tuple[object, ...]]:
    columns = ["method", "trial", "step", "betas", "AP", "reward", "entropy", "run", "parameters"]
    return [tuple(row) for row in store.trials()[columns].fillna(-1).to_numpy().tolist()]


def import_path() -> str:
    """With the fakes: processes import a trial by its name."""
    return os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
