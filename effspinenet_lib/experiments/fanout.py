"""Many runs at once, each in a process of its own.

A process that dies takes no other with it, and its run goes on from its last checkpoint when
it is asked for again. Asked to stop, or left alone by the process that started it, it saves its
state first. Run as a program with the path of a configuration's JSON and the runs folder, this
module is one such process.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from effspinenet_lib.errors import UserError
from effspinenet_lib.experiments.parameters import usable_cores
from effspinenet_lib.files import ensure_folder, read_json, write_json
from effspinenet_lib.results import CURVE_FILE
from effspinenet_lib.training.devices import CPU, THREAD_VARIABLES
from effspinenet_lib.training.run import (
    LOG,
    REQUEST,
    RunConfig,
    RunResult,
    read_result,
    train_run,
)
from effspinenet_lib.training.stopping import stop_requests

POLL_SECONDS = 0.5
STOP_SECONDS = 120.0  # our choice: for a step and its checkpoint, before a run is ended regardless


@dataclass
class _Worker:
    """A process and what it runs."""

    config: RunConfig
    folder: Path
    log: Path
    process: subprocess.Popen[bytes]


def run_all(
    configs: Sequence[RunConfig],
    runs_dir: str | os.PathLike[str],
    processes: int,
    device: str = CPU,
    force: bool = False,
    progress: bool = True,
    micro_batch: int | None = None,
) -> Iterator[RunResult]:
    """Run configurations, `processes` at a time, and yield each result as it is finished.

    On a CPU the cores are shared out: with as many processes as cores each computes on one
    thread, which trains more in all than one process on every core.

    Args:
        configs: what to run, each once.
        runs_dir: one folder a run is made in it; `worker.log` in it holds what the run said.
        processes: at a time.
        device: `cpu`, or the accelerator that the runs use.
        force: run anew what is finished.
        progress: show one bar over the steps of all runs.
        micro_batch: images that a run computes at once; None: the batch.

    Raises:
        UserError: runs failed; those that did not were yielded first. Names each log.
        Preempted: a signal asked to stop; the runs have saved their state.
    """
    waiting, failed = list(configs), []
    threads = max(1, usable_cores() // max(1, min(processes, len(waiting))))
    options = ["--force"] if force else []
    options += [] if micro_batch is None else ["--micro-batch", str(micro_batch)]
    with stop_requests(), _workers() as running, _bar(configs, progress) as bar:
        while waiting or running:
            while waiting and len(running) < processes:
                config = waiting.pop(0)
                running.append(_start(config, Path(runs_dir), threads, device, options))
            time.sleep(POLL_SECONDS)
            for worker in [w for w in running if w.process.poll() is not None]:
                running.remove(worker)
                result = read_result(worker.folder) if worker.process.returncode == 0 else None
                if result is None:
                    failed.append(worker)
                else:
                    bar.finished += worker.config.recipe.steps
                    yield result
            bar.show(sum(_last_step(worker.folder / CURVE_FILE) for worker in running))
    if failed:
        first = failed[0]
        raise UserError(
            f"{len(failed)} of {len(configs)} runs failed; the first, {first.config.model} seed "
            f"{first.config.seed}, said {_last_line(first.log)!r} (log: {first.log}); run the "
            "same again to go on from the checkpoints"
        )


def _start(
    config: RunConfig, runs_dir: Path, threads: int, device: str, options: Sequence[str]
) -> _Worker:
    folder = ensure_folder(runs_dir / config.key)
    request, log = folder / REQUEST, folder / LOG
    write_json(request, config.to_dict())
    environment = dict(os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)))
    if device == CPU:
        environment["ACCELERATE_USE_CPU"] = "true"
    program = [sys.executable, "-m", "effspinenet_lib.experiments.fanout"]
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [*program, str(request), str(runs_dir), *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    return _Worker(config, folder, log, process)


@contextmanager
def _workers() -> Iterator[list[_Worker]]:
    """A list of workers; whatever still runs when the block is left is stopped."""
    running: list[_Worker] = []
    try:
        yield running
    finally:
        for worker in running:
            worker.process.terminate()
        for worker in running:
            worker.process.wait()


class _Bar:
    """One progress bar over the steps of all runs."""

    def __init__(self, configs: Sequence[RunConfig], progress: bool) -> None:
        self.finished = 0
        self._bar = tqdm(
            total=sum(config.recipe.steps for config in configs),
            desc=f"{len(configs)} runs",
            unit="step",
            disable=None if progress and configs else True,
        )

    def show(self, running: int) -> None:
        """Set the bar to the steps done, of finished and running runs."""
        self._bar.n = self.finished + running
        self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@contextmanager
def _bar(configs: Sequence[RunConfig], progress: bool) -> Iterator[_Bar]:
    bar = _Bar(configs, progress)
    try:
        yield bar
    finally:
        bar.close()


def _last_step(curve: Path) -> int:
    """The step of the last whole row of a training curve; 0 before the first."""
    if not curve.exists():
        return 0
    lines = curve.read_text(encoding="utf-8").split("\n")[:-1]
    return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing"


def _stop_with_parent() -> None:
    """Stop this process when the one that started it is gone, so that no run is left behind."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os._exit(1)


def main(arguments: Sequence[str]) -> int:
    """Run one configuration: the path of its JSON, the runs folder, options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("request")
    parser.add_argument("runs_dir")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--micro-batch", type=int)
    given = parser.parse_args(arguments)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    config = RunConfig.from_dict(read_json(given.request))
    try:
        train_run(
            config,
            given.runs_dir,
            force=given.force,
            progress=False,
            micro_batch=given.micro_batch,
        )
    except UserError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
