"""Kills at random moments of everything that is meant to survive them.

    python -m benchmarks.chaos --minutes 30    # adds a row a round to results/robustness/chaos.csv

A round takes a job, starts its command in a folder of its own, strikes once at a random moment, and
gives the command again until it ends by itself. What it leaves then must be what an undisturbed one
left: weights bit-equal, no row lost, none twice. A process that is not killed outright must say in
one line why it ended.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from safetensors.torch import load_file

from effspinenet_lib.results.paper import RESULTS_DIR
from effspinenet_lib.results.tables import read_table, upsert

CHAOS = RESULTS_DIR / "robustness" / "chaos.csv"
MOST_COMMANDS = 5  # a job that has not ended by then has failed
DATA = "--data shapescenes --images 24 --image-size 64"


def _weights(folder: Path) -> str:
    """A digest of the tensors of every run in a folder, and of its curve's losses."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("**/runs/*/model.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        curve = pd.read_csv(path.with_name("curve.csv"))
        digest.update(curve[["step", "loss"]].to_csv().encode())
    return digest.hexdigest()


def _rows(pattern: str, *columns: str) -> Callable[[Path], str]:
    """A digest of columns of a CSV file, all rows in order: one that is twice there changes it."""

    def digest(folder: Path) -> str:
        (path,) = folder.glob(pattern)
        frame = pd.read_csv(path)[list(columns)].sort_values(list(columns))
        return frame.to_csv(index=False)

    return digest


@dataclass(frozen=True)
class Job:
    """A command and what it leaves.

    Attributes:
        command: arguments of `effspinenet`, run in the job's folder.
        left: digests of what must be the same in the end.
    """

    command: str
    left: tuple[Callable[[Path], str], ...]


JOBS = {
    **{
        f"train {task}": Job(
            f"train {DATA} --task {task} --recipe smoke_detection --steps 40",
            (_weights, _rows("runs/runs.csv", "run", "state")),
        )
        for task in ("detection", "instances", "classification", "segmentation")
    },
    "evaluate": Job(
        f"evaluate {DATA} --weights ../start/model.safetensors --record found.csv --output found",
        (_rows("found.csv", "metric", "value"),),
    ),
    "search": Job(
        "search --method ppo --trials 4 --results-dir .",
        (_weights, _rows("smoke/search_trials.csv", "method", "trial", "betas", "AP")),
    ),
    "reproduce": Job(
        "reproduce table-08 --results-dir .",
        (
            _weights,
            _rows("smoke/table-08.csv", "row", "metric", "source", "seed", "value"),
            _rows("smoke/runs.csv", "run", "state"),
        ),
    ),
}


def _kill(process: psutil.Process, draws: random.Random) -> None:
    for one in [process, *process.children(recursive=True)]:
        one.kill()


def _terminate(process: psutil.Process, draws: random.Random) -> None:
    process.terminate()


def _interrupt(process: psutil.Process, draws: random.Random) -> None:
    for one in [process, *process.children(recursive=True)]:  # as a terminal does
        one.send_signal(signal.SIGINT)


def _kill_one(process: psutil.Process, draws: random.Random) -> None:
    draws.choice([*process.children(recursive=True), process]).kill()


def _fill_disk(process: psutil.Process, draws: random.Random) -> None:
    """Let every further byte that is written fail, as on a full disk."""
    for one in [process, *process.children(recursive=True)]:
        resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (0, 0))


STRIKES: dict[str, Callable[[psutil.Process, random.Random], None]] = {
    "SIGKILL to all": _kill,
    "SIGTERM": _terminate,
    "Ctrl-C": _interrupt,
    "SIGKILL to one process": _kill_one,
    "full disk": _fill_disk,
}


def _start(job: Job, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "effspinenet_lib", *job.command.split()]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a process that was started in the background ignores the keyboard
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def _left(job: Job, folder: Path) -> list[str]:
    return [digest(folder) for digest in job.left]


def rounds(minutes: float, seed: int, place: Path) -> Iterator[dict[str, Any]]:
    """Rounds for so many minutes; what each did and found."""
    draws = random.Random(seed)
    start = place / "start"
    start.mkdir()
    trained = JOBS["train detection"]
    _start(trained, start).wait()
    shutil.copy(next(start.glob("runs/*/model.safetensors")), start)
    expected: dict[str, tuple[list[str], float]] = {}
    end = time.monotonic() + 60 * minutes
    number = 0
    while time.monotonic() < end:
        name, strike = draws.choice(list(JOBS)), draws.choice(list(STRIKES))
        job = JOBS[name]
        if name not in expected:
            (place / name).mkdir()
            began = time.monotonic()
            assert _start(job, place / name).wait() == 0, name
            expected[name] = _left(job, place / name), time.monotonic() - began
        wanted, seconds = expected[name]
        folder = place / f"round-{number}"
        folder.mkdir()
        moment = draws.uniform(0, seconds)
        process = _start(job, folder)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            STRIKES[strike](psutil.Process(process.pid), draws)
        said = process.communicate()[1]
        code, commands = process.returncode, 1
        last = process.returncode
        while last != 0 and commands < MOST_COMMANDS:
            again = _start(job, folder)
            again.communicate()
            last, commands = again.returncode, commands + 1
        equal = last == 0 and _left(job, folder) == wanted
        yield {
            "job": name,
            "strike": strike,
            "moment": round(moment, 1),
            "exit_code": code,
            "said": (said.strip().splitlines() or [""])[-1][:200] if code > 0 else "",
            "traceback": "yes" if "Traceback" in said else "no",
            "commands": commands,
            "equal": "yes" if equal else "no",
        }
        if equal:
            shutil.rmtree(folder)
        number += 1


def main() -> None:
    """Run rounds and record each as soon as it has ended."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    known = read_table(CHAOS, "chaos")["round"] if CHAOS.exists() else pd.Series([-1])
    for number, row in enumerate(rounds(given.minutes, given.seed, place), known.max() + 1):
        upsert(CHAOS, "chaos", [{"round": number, **row}], f"round {number}")
        print(f"{number}: {row}", flush=True)


if __name__ == "__main__":
    main()
