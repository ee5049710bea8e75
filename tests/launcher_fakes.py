"""Runs that take no training, for the tests of the launcher and of the search.

A process of the launcher calls one of them in place of the training. Each leaves a line in
`started.log` beside the runs, so that a test can count what ran. Nothing here imports torch: a
process starts at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from effspinenet_lib.errors import (
    CheckpointError,
    DataError,
    Preempted,
    TrainingError,
    UnknownName,
    UserError,
)

TROUBLE = "trouble"  # beside the runs: which of these errors the runs raise while it is there
ERRORS: dict[str, BaseException] = {
    "disk": UserError("cannot write run.json: No space left on device"),
    "data": DataError("a.jpg: not found in images"),
    "checkpoint": CheckpointError("checkpoint-3.pt: is of another run"),
    "name": UnknownName("model", "eff", ["eff_spinenet_m0"]),
    "stopped": Preempted("stopped by SIGTERM"),
    "diverged": TrainingError("the loss of step 3 is not finite"),
    "bug": ArithmeticError("division by zero"),
}
LET_GO = "let_go"  # beside the runs: how many runs may end


def is_running(pid: str) -> bool:
    """Whether a process runs: one that ended and was not waited for yet does not."""
    try:
        return bool(psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def note_start(config: dict[str, Any], runs_dir: str) -> int:
    """Write down that a run was started; how often this one was before."""
    log, text = Path(runs_dir) / "started.log", json.dumps(config, sort_keys=True)
    before = log.read_text().splitlines().count(text) if log.exists() else 0
    # first, so that a test that has seen the start knows the process
    with open(Path(runs_dir) / "processes.log", "a", encoding="utf-8") as handle:
        handle.write(f"{os.getpid()}\n")
    with open(log, "a", encoding="utf-8") as handle:
        handle.write(text + "\n")
    return before


def leave(ap: float) -> None:
    """Leave what a finished run leaves, in the folder that this process was started for."""
    folder = Path(sys.argv[1]).parent
    (folder / "model.safetensors").touch()
    (folder / "metrics.json").write_text(json.dumps({"AP": ap}))
    environment = sorted(name for name in os.environ if name.startswith(("ACCELERATE", "OMP")))
    record = {"run": folder.name, "steps": 1, "images": 1, "precision": "float32"}
    speed = {"wall_seconds": 0.5, "images_per_second": 2.0, "environment": environment}
    (folder / "run.json").write_text(json.dumps({**record, **speed}))


def ap_of(config: dict[str, Any]) -> float:
    return sum(map(int, config["model_options"]["betas"].split("-"))) / 10


def works(config: dict[str, Any], runs_dir: str, **options: Any) -> None:
    note_start(config, runs_dir)
    leave(ap_of(config))


def in_trouble(config: dict[str, Any], runs_dir: str, **options: Any) -> None:
    note_start(config, runs_dir)
    trouble = Path(runs_dir) / TROUBLE
    if trouble.exists():
        raise ERRORS[trouble.read_text()]
    leave(1.0)


def is_held(config: dict[str, Any], runs_dir: str, **options: Any) -> None:
    """End when it is let go; a process whose parent is killed is told to stop."""
    note_start(config, runs_dir)
    while not _take_leave(Path(runs_dir)):
        time.sleep(0.01)
    leave(ap_of(config))


def _take_leave(folder: Path) -> bool:
    for number in range(int((folder / LET_GO).read_text() or 0)):
        try:
            (folder / f"{LET_GO}-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return True
    return False


def dies_once(config: dict[str, Any], runs_dir: str, **options: Any) -> None:
    if note_start(config, runs_dir) == 0:
        os._exit(9)
    leave(0.0 if options["force"] else 1.0)  # forced, it would not have resumed


def dies(config: dict[str, Any], runs_dir: str, **options: Any) -> None:
    note_start(config, runs_dir)
    os._exit(9)


def hangs(config: dict[str, Any], runs_dir: str, **options: Any) -> None:
    note_start(config, runs_dir)
    time.sleep(3600)


def search(results_dir: str, trials: str, fake: str, engine: str) -> None:
    """A search in this process, which a test can kill: `python launcher_fakes.py ...`."""
    from functools import partial

    from effspinenet_lib.experiments.launcher import open_pool, run_many
    from effspinenet_lib.results import ResultsStore
    from effspinenet_lib.search.search import Search, get_search, run_search

    store = ResultsStore(results_dir, "smoke")
    with open_pool(engine, 2, "cpu") as pool:
        runner = partial(
            run_many,
            runs_dir=store.runs_folder,
            pool=pool,
            progress=False,
            function=f"launcher_fakes:{fake}",
        )
        run_search(Search(get_search("smoke"), store, "ppo", 0, int(trials)), runner, False)


if __name__ == "__main__":
    search(*sys.argv[1:])
