"""Many runs at once, each in a process of its own, on this machine or on a Ray cluster.

Tables and searches start their runs here. A process that dies takes no other with it, and its run
is resumed from its last checkpoint. A process that is told to stop, or whose parent died, saves
the state of its run first.

`python -m effspinenet_lib.experiments.launcher REQUEST.json PARENT` is one such process, PARENT the
id of the process that started it. It imports torch
only with the function that it calls, so this module does not.
"""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from effspinenet_lib.errors import (
    CheckpointError,
    DataError,
    Preempted,
    TrainingError,
    UserError,
)
from effspinenet_lib.files import ensure_folder, write_json

if TYPE_CHECKING:
    from effspinenet_lib.training.run import RunConfig, RunResult

LOCAL, RAY = "local", "ray"
ENGINES = (LOCAL, RAY)
RAY_ADDRESS = "RAY_ADDRESS"  # Ray's own variable
GPUS = "CUDA_VISIBLE_DEVICES"  # the driver's own, and AMD's
ATTEMPTS = 2  # a process that died or hung is started once more
POLL_SECONDS = 0.2
STOP_SECONDS = 120.0  # our choice: for a step and its checkpoint, before a process is killed
TRAIN = "effspinenet_lib.experiments.launcher:train"
HUNG = -1000  # in place of an exit code; those of signals are small negative numbers
TOLD = "error: "  # opens the line in which a process says what is wrong
ERRORS = {
    kind.exit_code: kind
    for kind in (UserError, DataError, CheckpointError, TrainingError, Preempted)
}


@dataclass
class Job:
    """A run and the process that computes it."""

    config: RunConfig
    folder: Path
    request: Path
    log: Path
    attempts: int = 0
    place: int = 0  # among those that run at once
    handle: Any = None  # of the pool's process


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        config: what was run.
        attempts: processes that were started for it.
        log: what they printed.
        result: what it gave; None where it failed.
        error: why it failed. A `TrainingError` where the run itself is at fault: it diverged, or
            its process died or hung every time. The class of the process's own error otherwise.
    """

    config: RunConfig
    attempts: int
    log: Path
    result: RunResult | None = None
    error: UserError | Preempted | None = None


class Pool:
    """Processes on this machine.

    Args:
        processes: at the same time; at least 1.
        device: `cpu`, or the kind of accelerator that they use.
        workers: processes that load images, for each run.
        timeout: seconds after which a process counts as hung and is killed; None: no limit.
    """

    def __init__(self, processes: int, device: str, workers: int, timeout: float | None) -> None:
        self.processes, self.device, self.workers = processes, device, workers
        self.timeout = timeout
        self.gpus = _gpus() if device == "gpu" and processes > 1 else []

    def threads(self, runs: int) -> int:
        """Threads of each process: the free cores shared out over those that run at once."""
        return max(1, free_cores() // max(1, min(self.processes, runs)))

    def start(self, job: Job, environment: dict[str, str]) -> Any:
        """Start the process of a job; returns a handle for `poll` and `stop`.

        Where runs at once have several GPUs, each sees one.
        """
        if self.gpus:
            environment = {**environment, GPUS: self.gpus[job.place % len(self.gpus)]}
        process = _start(str(job.request), str(job.log), environment)
        return process, time.monotonic() + (self.timeout or float("inf"))

    def poll(self, handle: Any) -> int | None:
        """The exit code of a process; None while it runs."""
        process, deadline = handle
        if process.poll() is None and time.monotonic() > deadline:
            process.kill()
            process.wait()
            return HUNG
        return process.returncode

    def stop(self, handles: Sequence[Any]) -> None:
        """Let processes save the state of their runs and end."""
        for process, _ in handles:
            process.terminate()
        for process, _ in handles:
            _wait(process)

    def close(self) -> None:
        """Nothing to release on this machine."""


class RayPool(Pool):
    """Ray tasks: on the cluster at `RAY_ADDRESS`, or on one that is started on this machine.

    A cluster's machines share the folders of data and results. A run asks for one core for itself
    and one for each process that loads its images, and for one accelerator if it uses one. The
    time limit starts with the run, not while it waits for its place.

    Args:
        processes: runs at the same time; 0: as many as the cluster has room for.
        device: `auto` takes an accelerator where the cluster has one.
        workers: processes that load images, for each run.
        timeout: seconds after which a run counts as hung; None: no limit.

    Raises:
        UserError: Ray is not installed, there is no cluster, or it has no room for a run.
    """

    def __init__(self, processes: int, device: str, workers: int, timeout: float | None) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError("the engine ray is not installed: pip install -e '.[ray]'") from error
        self._ray: Any = ray
        address = os.environ.get(RAY_ADDRESS)
        # without an address Ray would join any cluster that it finds on this machine
        cores = processes * (1 + workers) or None
        where: dict[str, Any] = {} if address else {"address": LOCAL, "num_cpus": cores}
        try:
            ray.init(**where, include_dashboard=False, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise UserError(f"there is no Ray cluster at {address}: {error}") from error
        there = ray.cluster_resources()
        if device == "auto":
            device = "gpu" if there.get("GPU") else "tpu" if there.get("TPU") else "cpu"
        needed = ray_resources(device, workers)
        room = min(int(there.get(name, 0) // amount) for name, amount in needed.items())
        if room == 0:
            ray.shutdown()
            raise UserError(f"a run needs {needed} of the Ray cluster, which has {there}")
        super().__init__(min(processes or room, room), device, workers, timeout)
        self._task = ray.remote(max_retries=0)(_run_on_ray).options(
            num_cpus=needed.pop("CPU"), num_gpus=needed.pop("GPU", 0), resources=needed
        )

    def threads(self, runs: int) -> int:
        """One: the core that a run asks the cluster for."""
        return 1

    def start(self, job: Job, environment: dict[str, str]) -> Any:
        """Submit a job."""
        return self._task.remote(str(job.request), str(job.log), environment, self.timeout)

    def poll(self, handle: Any) -> int | None:
        """The exit code of a job's process; None while it runs or waits for its place.

        Raises:
            UserError: Ray cannot start it.
        """
        if not self._ray.wait([handle], timeout=0)[0]:
            return None
        known = self._ray.exceptions
        try:
            return int(self._ray.get(handle))
        except (known.WorkerCrashedError, known.NodeDiedError, known.OutOfMemoryError):
            return -signal.SIGKILL
        except known.RayError as error:
            raise UserError(f"Ray cannot start a run: {error}") from error

    def stop(self, handles: Sequence[Any]) -> None:
        """Cancel jobs; their processes save the state of their runs and end."""
        for handle in handles:
            self._ray.cancel(handle)
        if handles:
            self._ray.wait(list(handles), num_returns=len(handles), timeout=STOP_SECONDS)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._ray.shutdown()


def ray_resources(device: str, workers: int) -> dict[str, int]:
    """What a run asks a Ray cluster for, by Ray's names."""
    cores = {"CPU": 1 + workers}
    return cores if device == "cpu" else {**cores, "TPU" if device == "tpu" else "GPU": 1}


@contextmanager
def open_pool(
    engine: str,
    processes: int = 0,
    device: str = "auto",
    workers: int = 0,
    timeout: float | None = None,
) -> Iterator[Pool]:
    """The pool of the engine `local` or `ray`; the arguments are those of `Pool` and `RayPool`.

    Raises:
        UserError: as `RayPool`.
    """
    pool = (RayPool if engine == RAY else Pool)(processes, device, workers, timeout)
    try:
        yield pool
    finally:
        pool.close()


def _gpus() -> list[str]:
    """What names each GPU of this machine that this process may use."""
    import torch

    named = os.environ.get(GPUS)
    return named.split(",") if named else list(map(str, range(torch.accelerator.device_count())))


def usable_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_cores() -> int:
    """Usable CPU cores that the last minute's load has left free; at least 1.

    Threads that share cores with other processes wait for each other: on two busy cores a training
    step takes more than twice as long with two threads as with one.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, usable_cores() - round(load))


def thread_environment(threads: int) -> dict[str, str]:
    """Environment of a process that trains, to be set before it loads torch.

    So many threads, which sleep while they wait; what the user's environment says comes first.
    """
    chosen = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return {name: os.environ.get(name) or value for name, value in chosen.items()}


def run_many(
    configs: Sequence[RunConfig],
    runs_dir: str | os.PathLike[str],
    pool: Pool,
    force: bool = False,
    progress: bool = True,
    micro_batch: int | None = None,
    function: str = TRAIN,
) -> Iterator[Outcome]:
    """Run configurations in processes of a pool and yield how each ended, as soon as it has.

    A finished run is not trained again, an interrupted one is resumed. A run that another process
    holds fails with that lock as its error.

    Args:
        configs: what to run, each once.
        runs_dir: a folder a run is made in it; `worker.log` in it holds what the run printed.
        pool: where the processes run.
        force: train finished runs again.
        progress: show one bar over the steps of all runs.
        micro_batch: images that a run computes at once; None: the batch.
        function: `module:name` of what a process calls; it leaves what `read_result` reads.

    Raises:
        UserError: a folder cannot be written, or Ray cannot start a run.
        Preempted: a signal asked to stop; the runs have saved their state.
    """
    from effspinenet_lib.results import CURVE_FILE
    from effspinenet_lib.training.device import CPU
    from effspinenet_lib.training.preemption import handle_preemption
    from effspinenet_lib.training.run import LOG, REQUEST, read_result

    environment = thread_environment(pool.threads(len(configs)))
    if pool.device == CPU:
        environment["ACCELERATE_USE_CPU"] = "true"
    request = {
        "runs_dir": str(Path(runs_dir).resolve()),
        "function": function,
    }
    fixed = {"micro_batch": micro_batch, "workers": pool.workers}
    folders = [(config, Path(runs_dir) / config.key) for config in configs]
    waiting = deque(Job(config, path, path / REQUEST, path / LOG) for config, path in folders)
    running: list[Job] = []
    finished_steps = 0
    bar = tqdm(
        total=sum(config.recipe.steps for config in configs),
        desc=f"{len(configs)} runs, {environment['OMP_NUM_THREADS']} threads each",
        unit="step",
        disable=None if progress and configs else True,
    )
    with handle_preemption(), bar:
        try:
            while waiting or running:
                while waiting and len(running) < pool.processes:
                    job = waiting.popleft()
                    job.attempts += 1
                    job.place = min(set(range(pool.processes)) - {one.place for one in running})
                    ensure_folder(job.folder)
                    # a further attempt resumes what the first one has trained
                    options = {**fixed, "force": force and job.attempts == 1}
                    config = job.config.to_dict()
                    write_json(job.request, {**request, "config": config, "options": options})
                    job.handle = pool.start(job, environment)
                    running.append(job)
                time.sleep(POLL_SECONDS)
                for job in list(running):
                    code = pool.poll(job.handle)
                    if code is None:
                        continue
                    running.remove(job)
                    if code and code not in ERRORS and job.attempts < ATTEMPTS:
                        waiting.appendleft(job)
                        continue
                    finished_steps += job.config.recipe.steps
                    result = read_result(job.folder) if code == 0 else None
                    error = None if result else _error(code, job.log, pool.timeout)
                    yield Outcome(job.config, job.attempts, job.log, result, error)
                bar.n = finished_steps + sum(_last_step(job.folder / CURVE_FILE) for job in running)
                bar.refresh()
        finally:
            pool.stop([job.handle for job in running])


def _last_step(curve: Path) -> int:
    """The step of the last complete row of a training curve; 0 before the first."""
    if not curve.exists():
        return 0
    lines = curve.read_text(encoding="utf-8").split("\n")[:-1]
    return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0


def _error(code: int, log: Path, timeout: float | None) -> UserError | Preempted:
    """The error that a process ended with, from its exit code and the last line of its log."""
    if code == HUNG:
        return TrainingError(f"no answer within {timeout:g} seconds")
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    told = [line for line in lines if line.startswith(TOLD)] if code in ERRORS else lines
    last = told[-1].removeprefix(TOLD) if told else "nothing"
    if code in ERRORS:
        return ERRORS[code](last)
    return TrainingError(f"its process died (exit code {code}); its last line: {last}")


def _start(request: str, log: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(log, "ab") as output:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "effspinenet_lib.experiments.launcher",
                request,
                str(os.getpid()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that was told to end; kill it where it does not."""
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _run_on_ray(request: str, log: str, environment: dict[str, str], timeout: float | None) -> int:
    """A Ray task: the exit code of the process that it starts on its machine."""
    process = _start(request, log, environment)
    try:
        # without a limit `wait` would not notice that the task is cancelled
        return process.wait(timeout or threading.TIMEOUT_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        return HUNG
    finally:
        process.terminate()
        _wait(process)


def _stop_with_parent(parent: int) -> None:
    """Stop this process when the one that started it is gone, so that no run is left behind."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os._exit(1)


def train(config: dict[str, Any], runs_dir: str, **options: Any) -> None:
    """Train and evaluate a configuration; `options` are those of `train_run`."""
    from effspinenet_lib.training.run import RunConfig, train_run

    train_run(RunConfig.from_dict(config), runs_dir, progress=False, **options)


def main(path: str, parent: str) -> int:
    """Run one request, the path of its JSON, for a process; returns the exit code."""
    threading.Thread(target=_stop_with_parent, args=(int(parent),), daemon=True).start()
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        function = pkgutil.resolve_name(request["function"])
        function(request["config"], request["runs_dir"], **request["options"])
    except (UserError, Preempted) as error:
        print(f"{TOLD}{error}", flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
