"""Where trials run: processes that live over many trials, or a Ray cluster.

An engine makes one attempt at a trial, in another process, under a time limit; several threads
ask it at once. Retrying and recording are `run`'s, so they are the same for every engine.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.search.trials import ONE_THREAD, Device, Trial, TrialFailed, run_trial
from effspinenet_lib.training.devices import AUTO, CPU, THREAD_VARIABLES

TPU = "tpu"
GPU = "gpu"  # any other accelerator
RAY_CORES, RAY_GPU, RAY_TPU = "CPU", "GPU", "TPU"  # Ray's names
IDLE_SECONDS = 3.0  # our choice: a process that waits for a request needs under one to end
STARTING_SECONDS = 120.0  # our choice: a process that imports torch on a busy machine


class Engine(AbstractContextManager["Engine"], ABC):
    """Runs attempts at trials in other processes; leaving the block stops them.

    Args:
        trial: what an attempt calls.
        workers: attempts at the same time.
        timeout: seconds after which an attempt counts as hung and is killed.
        device: what each attempt computes on.
    """

    def __init__(
        self,
        trial: Trial = run_trial,
        workers: int = 1,
        timeout: float = 600.0,
        device: Device = ONE_THREAD,
    ) -> None:
        self.trial, self.workers, self.timeout = trial, workers, timeout
        self.device = device
        self.closed = threading.Event()
        self._open()

    def _open(self) -> None:
        """Make what the attempts run on."""

    @abstractmethod
    def attempt(self, request: Mapping[str, Any]) -> dict[str, float]:
        """Run the trial once on `request`.

        Raises:
            TrialFailed: it raised, died or hung; the message says which.
        """

    def close(self) -> None:
        """Stop what still runs; the attempts under way fail, and no other begins."""
        self.closed.set()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the engine."""
        self.close()


class LocalEngine(Engine):
    """Processes on this machine; on processors each computes on one thread."""

    def _open(self) -> None:
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._all = [_Worker(self.trial, self.device, self.closed) for _ in range(self.workers)]
        for worker in self._all:
            self._idle.put(worker)

    def attempt(self, request: Mapping[str, Any]) -> dict[str, float]:
        """Run the trial in an idle process; one that died or hung is replaced."""
        worker = self._idle.get()
        try:
            return worker.ask(request, self.timeout)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the idle processes, kill the busy ones."""
        super().close()
        for worker in self._all:
            worker.end()


class _Worker:
    """A process that answers requests one after the other; started when first asked."""

    def __init__(self, trial: Trial, device: Device, closed: threading.Event) -> None:
        self._trial, self._device, self._closed = trial, device, closed
        self._busy = False
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection[Any, Any] | None = None

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, float]:
        self._busy = True
        try:
            connection = self._connection or self._start()
            if self._closed.is_set():
                raise TrialFailed("the search was stopped")
            connection.send(dict(request))
            if not connection.poll(timeout):
                raise TrialFailed(f"no answer within {timeout:g} seconds")
            answer = connection.recv()
        except (EOFError, OSError) as error:
            process = self._process
            self.stop()
            code = process.exitcode if process else None
            raise TrialFailed(f"its process died (exit code {code})") from error
        except TrialFailed:
            self.stop()
            raise
        finally:
            self._busy = False
        if isinstance(answer, str):
            self.stop()  # an accelerator may be beyond use in the process that saw an error
            raise TrialFailed(answer)
        return dict(answer)

    def _start(self) -> Connection[Any, Any]:
        # a forked child would inherit torch's threads and locks in whatever state they are
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve,
            args=(theirs, self._trial, self._device),
            daemon=self._device.workers == 0,  # a daemon cannot start processes
        )
        process.start()
        theirs.close()
        self._process, self._connection = process, ours
        if not ours.poll(STARTING_SECONDS):
            raise TrialFailed(f"its process did not start within {STARTING_SECONDS:g} seconds")
        ours.recv()
        return ours

    def end(self) -> None:
        """End the process from another thread than the one that asks it, if one does."""
        process = self._process
        if not self._busy:
            self.stop(IDLE_SECONDS)
        elif process is not None:
            # the thread that waits for its answer cleans up: it would not hear a connection close
            process.kill()

    def stop(self, patience: float = 0.0) -> None:
        """End the process: an idle one by itself within `patience` seconds, any other by a kill."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is not None:
            process.join(patience)
            process.kill()
            process.join()


def _serve(connection: Connection[Any, Any], trial: Trial, device: Device) -> None:
    """Answer requests until the other side is gone: a dictionary, or why it failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a keyboard's reaches all; the search decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _prepare(device)
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(_answer(trial, request))


def _answer(trial: Trial, request: Mapping[str, Any]) -> dict[str, float] | str:
    try:
        return trial(request)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _prepare(device: Device) -> None:
    """On processors one thread a process trains more in all than one process on every core."""
    if device.kind == CPU:
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"), ACCELERATE_USE_CPU="true")


def _end_with_parent() -> None:
    """Leave no trial behind that holds its folder when the search was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class RayEngine(Engine):
    """A Ray cluster: the one at `RAY_ADDRESS`, or processes on this machine.

    An attempt asks for a core for itself and for each process that loads its images, and for one
    accelerator if it computes on one. The kind of device `auto` is an accelerator where the cluster
    has one; 0 workers are as many as it has room for.

    Raises:
        UserError: Ray is not installed, or the cluster has no room for an attempt.
    """

    def _open(self) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError(
                "the engine ray is not installed: pip install 'effspinenet[ray]'"
            ) from error
        self._ray = ray
        cores = self.workers * (1 + self.device.workers)
        alone = cores > 0 and not os.environ.get("RAY_ADDRESS")
        ray.init(num_cpus=cores if alone else None, include_dashboard=False, log_to_driver=False)
        there = ray.cluster_resources()
        if self.device.kind == AUTO:
            kind = GPU if there.get(RAY_GPU) else TPU if there.get(RAY_TPU) else CPU
            self.device = replace(self.device, kind=kind)
        needed = ray_resources(self.device)
        room = min(int(there.get(name, 0) // amount) for name, amount in needed.items())
        if room == 0:
            ray.shutdown()
            raise UserError(f"a trial needs {needed} of the Ray cluster, which has {there}")
        self.workers = self.workers or room
        options = {
            "num_cpus": needed.pop(RAY_CORES),
            "num_gpus": needed.pop(RAY_GPU, 0),
            "resources": needed,
        }
        self._answer = ray.remote(max_retries=0, **options)(_answer_on_ray)

    def attempt(self, request: Mapping[str, Any]) -> dict[str, float]:
        """Run the trial as a Ray task."""
        reference = self._answer.remote(self.trial, dict(request), self.device)
        ready, _ = self._ray.wait([reference], timeout=self.timeout)
        if not ready:
            self._ray.cancel(reference, force=True)
            raise TrialFailed(f"no answer within {self.timeout:g} seconds")
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise TrialFailed(f"its process died ({type(error).__name__})") from error
        if isinstance(answer, str):
            raise TrialFailed(answer)
        return dict(answer)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        super().close()
        self._ray.shutdown()


def _answer_on_ray(
    trial: Trial, request: Mapping[str, Any], device: Device
) -> dict[str, float] | str:
    _prepare(device)
    return _answer(trial, request)


def ray_resources(device: Device) -> dict[str, int]:
    """What an attempt asks a Ray cluster for, by Ray's names."""
    cores = {RAY_CORES: 1 + device.workers}
    if device.kind == CPU:
        return cores
    return {**cores, RAY_TPU if device.kind == TPU else RAY_GPU: 1}


LOCAL = "local"
ENGINES: dict[str, type[LocalEngine] | type[RayEngine]] = {LOCAL: LocalEngine, "ray": RayEngine}


def get_engine(name: str) -> type[LocalEngine] | type[RayEngine]:
    """An engine by name.

    Raises:
        UnknownName: there is none.
    """
    if name not in ENGINES:
        raise UnknownName("engine", name, ENGINES)
    return ENGINES[name]
