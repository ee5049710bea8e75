"""What happens in the processes that load images, told in one line."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

from effspinenet_lib.errors import DataError

# How torch's messages begin of a worker that died, and of an error that one met.
_TORCH_PREFIX, _FROM_WORKER = "DataLoader worker", "Caught "
# How long a process may take to end once its line to this one broke: our choice, far more than it
# does. Only where none ends is it waited out.
EXIT_SECONDS = 10.0


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn what torch says of a loading process that died, or failed, into one clear line.

    The loaders do this themselves. A loop over one does it too: torch tells of a death by a
    signal, which interrupts the main process wherever it is.

    Raises:
        DataError: a process died, or met a `DataError` of its own.
    """
    try:
        yield
    except DataError as error:
        # From another process comes the whole traceback as the message, the message itself last.
        lines = str(error).strip().splitlines() or [""]
        if len(lines) == 1:
            raise
        raise DataError(lines[-1].split(f"{DataError.__name__}: ", 1)[-1]) from error
    except RuntimeError as error:
        told = str(error)
        if not told.startswith(_TORCH_PREFIX):
            raise
        raise DataError(
            f"a process that loads images died ({told.splitlines()[0].strip()}); if memory ran "
            "out, use fewer workers; the same command goes on from the last checkpoint"
        ) from error


class Batches(DataLoader[Any]):
    """torch's loader, with errors that say in one line what happened and what to do."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with worker_errors():
            batches = super().__iter__()
            try:
                yield from batches
            except (EOFError, OSError, RuntimeError) as error:
                told = str(error)
                line_broke = not isinstance(error, RuntimeError) and not told.startswith(
                    _FROM_WORKER
                )
                if not self.num_workers or not (line_broke or told.startswith(_TORCH_PREFIX)):
                    raise
                # Torch knows how a process ended only from a signal, which may come later.
                how = _ended(getattr(batches, "_workers", ())) or f"was lost: {error!r}"
                raise RuntimeError(f"{_TORCH_PREFIX} {how}") from error


def _ended(workers: Sequence[BaseProcess]) -> str:
    """How one of the processes ended other than it should; "" if none does within the time."""
    ready = connection.wait([worker.sentinel for worker in workers], EXIT_SECONDS)
    for worker in workers:
        if worker.sentinel in ready:
            worker.join()
        if worker.exitcode is not None and worker.exitcode < 0:
            return f"(pid {worker.pid}) is killed by signal: {signal.strsignal(-worker.exitcode)}"
        if worker.exitcode:
            return f"(pid {worker.pid}) exited with code {worker.exitcode}"
    return ""


def start_worker(worker: int) -> None:
    """One thread a loading process: they are as many as the cores that they may use."""
    del worker
    torch.set_num_threads(1)
