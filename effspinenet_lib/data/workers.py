"""What happens in the processes that load images, told in one line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from effspinenet_lib.errors import DataError

# How torch's messages begin of a worker that died, and of an error that one met.
_TORCH_PREFIX, _FROM_WORKER = "DataLoader worker", "Caught "
# How long a signal that a process died may take: our choice, far more than it does.
SIGNAL_SECONDS = 0.5


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
        told = [str(e) for e in (error.__cause__, error) if str(e).startswith(_TORCH_PREFIX)]
        if not told:
            raise
        raise DataError(
            f"a process that loads images died ({told[0].splitlines()[0].strip()}); if memory ran "
            "out, use fewer workers; the same command goes on from the last checkpoint"
        ) from error


class Batches(DataLoader[Any]):
    """torch's loader, with errors that say in one line what happened and what to do."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with worker_errors():
            try:
                yield from super().__iter__()
            except (EOFError, OSError) as error:
                if not self.num_workers or str(error).startswith(_FROM_WORKER):
                    raise
                # The line to a process broke; the signal that tells of its death interrupts this.
                time.sleep(SIGNAL_SECONDS)
                raise RuntimeError(f"{_TORCH_PREFIX} cannot be reached: {error!r}") from error


def start_worker(worker: int) -> None:
    """One thread a loading process: they are as many as the cores that they may use."""
    del worker
    torch.set_num_threads(1)
