"""Where trials run: processes that live over many trials, or a Ray cluster.

An engine makes one attempt at a trial, in another process, under a time limit; several threads
ask it at once. Retrying and recording are `running`'s, so they are the same for every engine.
"""

from __future__ import annotations

import concurrent.futures
import faulthandler
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

from effspinenet_lib.errors import TrainingError, UnknownName, UserError
from effspinenet_lib.search.trials import ONE_THREAD, Device, Trial, TrialFailed, run_trial
from effspinenet_lib.training.devices import AUTO, CPU, GPU, THREAD_VARIABLES, TPU

# What an attempt sends to the search: columns of the record, what became of the trial without any,
# or what ends the search, as the next trial would fare no better.
Answer = dict[str, Any] | TrialFailed | UserError
RAY_CORES, RAY_GPU, RAY_TPU = "CPU", "GPU", "TPU"  # Ray's names
RAY_ADDRESS = "RAY_ADDRESS"  # Ray's variable
ENDING_SECONDS = 3.0  # our choice: a process that waits for a request needs under one to end
STARTING_SECONDS = 120.0  # our choice: a process that imports torch on a busy machine
LOOKING_SECONDS = 0.5  # our choice: how soon an attempt on a cluster sees that the search stopped


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
    def attempt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run the trial once on `request`.

        Raises:
            TrialFailed: it died, diverged, hung or gave no AP; the message says which.
            UserError: what failed is not the trial.
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

    def attempt(self, request: Mapping[str, Any]) -> dict[str, Any]:
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

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        self._busy = True
        try:
            connection = self._connection or self._start()
            if self._closed.is_set():
                raise TrialFailed("the search was stopped")
            connection.send(dict(request))
            if not connection.poll(timeout):
                raise TrialFailed(f"no answer within {timeout:g} seconds")
            return _columns(connection.recv())
        except (EOFError, OSError) as error:
            code = self.stop(ENDING_SECONDS)
            raise TrialFailed(f"its process died (exit code {code})") from error
        except (TrialFailed, UserError):
            self.stop()  # an accelerator may be beyond use in the process that saw an error
            raise
        finally:
            self._busy = False

    def _start(self) -> Connection[Any, Any]:
        # a forked child would inherit torch's threads and locks in whatever state they are
        context = multiprocessing.get_context("spawn")
        try:
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
                raise UserError(
                    f"a process for trials did not start within {STARTING_SECONDS:g} seconds: the "
                    "machine is too busy for so many"
                )
            ours.recv()
        except EOFError as error:
            code = self.stop(ENDING_SECONDS)
            raise UserError(
                f"a process for trials ended as it started (exit code {code}); what it said is "
                'above (in a script, search under `if __name__ == "__main__":`)'
            ) from error
        except OSError as error:
            raise UserError(f"a process for trials cannot be started: {error}") from error
        return ours

    def end(self) -> None:
        """End the process from another thread than the one that asks it, if one does."""
        process = self._process
        if not self._busy:
            self.stop(ENDING_SECONDS)
        elif process is not None:
            # the thread that waits for its answer cleans up: it would not hear a connection close
            process.kill()

    def stop(self, patience: float = 0.0) -> int | None:
        """End the process: an idle one by itself within `patience` seconds, any other by a kill.

        Returns:
            Its exit code, if there was one.
        """
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is not None:
            process.join(patience)
            process.kill()
            process.join()
        return process.exitcode if process is not None else None


def _serve(connection: Connection[Any, Any], trial: Trial, device: Device) -> None:
    """Answer requests until the other side is gone."""
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


def _answer(trial: Trial, request: Mapping[str, Any]) -> Answer:
    try:
        return trial(request)
    except TrialFailed as error:
        return error
    except OSError as error:  # of no file that the library reads or writes: it would be a UserError
        return UserError(f"a trial cannot go on: {error}")
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, TrainingError):
            return _sendable(error)
        return TrialFailed(f"{type(error).__name__}: {error}")


def _sendable(error: UserError) -> UserError:
    """The error as the nearest of its kinds that is made of a message alone, as pickle makes it."""
    kinds = type(error).__mro__
    kind: type[UserError] = next(kind for kind in kinds if "__init__" not in vars(kind))
    return kind(str(error))


def _columns(answer: Answer) -> dict[str, Any]:
    """What an attempt filled.

    Raises:
        TrialFailed: it failed.
        UserError: the search cannot go on.
    """
    if isinstance(answer, Exception):
        raise answer
    return answer


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
    has one; 0 workers are as many as it has room for, and there are never more. The time limit is
    of the attempt's work: it may wait for its place in the cluster.

    Raises:
        UserError: Ray is not installed, there is no cluster, or it has no room for an attempt.
    """

    def _open(self) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError(
                "the engine ray is not installed: pip install 'effspinenet[ray]'"
            ) from error
        self._ray = ray
        address = os.environ.get(RAY_ADDRESS)
        # without an address Ray joins whatever cluster runs here; one that runs has its own cores
        cores = self.workers * (1 + self.device.workers) or None
        where = {} if address else {"address": "local", "num_cpus": cores}
        try:
            ray.init(**where, include_dashboard=False, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise UserError(f"there is no Ray cluster at {address}: {error}") from error
        there = ray.cluster_resources()
        if self.device.kind == AUTO:
            kind = GPU if there.get(RAY_GPU) else TPU if there.get(RAY_TPU) else CPU
            self.device = replace(self.device, kind=kind)
        needed = ray_resources(self.device)
        room = min(int(there.get(name, 0) // amount) for name, amount in needed.items())
        if room == 0:
            ray.shutdown()
            raise UserError(f"a trial needs {needed} of the Ray cluster, which has {there}")
        self.workers = min(self.workers or room, room)
        options = {
            "num_cpus": needed.pop(RAY_CORES),
            "num_gpus": needed.pop(RAY_GPU, 0),
            "resources": needed,
        }
        self._answer = ray.remote(max_retries=0, **options)(_answer_on_ray)

    def attempt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run the trial as a Ray task."""
        known = self._ray.exceptions
        given = (self.trial, dict(request), self.device, self.timeout)
        future = self._answer.remote(*given).future()
        while not self.closed.is_set():
            try:
                return _columns(future.result(LOOKING_SECONDS))
            except concurrent.futures.TimeoutError:
                continue
            except (known.WorkerCrashedError, known.NodeDiedError, known.OutOfMemoryError) as error:
                raise TrialFailed(
                    f"its process died, or gave no answer within {self.timeout:g} seconds "
                    f"({type(error).__name__})"
                ) from error
            except known.RayError as error:
                raise UserError(f"Ray cannot run a trial: {error}") from error
        raise TrialFailed("the search was stopped")

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        super().close()
        self._ray.shutdown()


def _answer_on_ray(
    trial: Trial, request: Mapping[str, Any], device: Device, timeout: float
) -> Answer:
    """Answer within `timeout` seconds, or end the process; where it was, its log shows."""
    _prepare(device)
    faulthandler.dump_traceback_later(timeout, exit=True)  # even where Python itself hangs
    try:
        return _answer(trial, request)
    finally:
        faulthandler.cancel_dump_traceback_later()


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
