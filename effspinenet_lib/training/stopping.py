"""What ends a run before its last step: signals, lost processes, and a loss that ran away."""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch.distributed import DistError

from effspinenet_lib.errors import DataError, Preempted, TrainingError, UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # a scheduler's, and the keyboard's
# Launchers pass on a signal that the terminal has sent to their processes already: within this
# time it is the same one (our choice).
SAME_SIGNAL_SECONDS = 1.0
# A run has diverged when the last `DIVERGED_ROWS` rows of its curve, 200 steps, all lie above
# `DIVERGED_FACTOR` times the median of the rows before them (our choice: over 23 runs of the proxy
# profile's length no single row lay above 1.5 times that median).
DIVERGED_FACTOR = 10.0
DIVERGED_ROWS = 20
_GLOO = "/gloo/"  # in the plain errors of torch's transport between processors: a path of its code


class StopRequest:
    """Whether this process is to stop, and why.

    Attributes:
        signal: name of the signal that asked; empty before.
        failure: what keeps this process from going on; the other processes stop with it.
        step: steps that the model and the optimizer have behind them; None in mid-update.
    """

    def __init__(self) -> None:
        self.signal = ""
        self.failure: UserError | None = None
        self.step: int | None = None
        self._asked_at = 0.0
        self._in_steps = False

    @contextmanager
    def in_steps(self) -> Iterator[None]:
        """While this is open a signal waits for the end of the step; else it acts at once.

        An error that ends the steps ends the run, and no signal takes its place.
        """
        self._in_steps = True
        yield
        self._in_steps = False

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: remember the first one, obey the second at once.

        Raises:
            Preempted: no step is under way, so that there is nothing to wait for or to save.
            KeyboardInterrupt: the same from the keyboard, or asked for the second time.
        """
        now = time.monotonic()
        if self.signal and now - self._asked_at < SAME_SIGNAL_SECONDS:
            return
        if self._in_steps and not self.signal:
            self.signal, self._asked_at = signal.Signals(number).name, now
        elif number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        else:
            raise Preempted.by(signal.Signals(number).name)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Take the signals that ask to stop, in the main thread; elsewhere none can be taken."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[signal.Signals, Any] = {s: signal.signal(s, request.take) for s in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def preempted_first(stop: StopRequest) -> Iterator[None]:
    """Tell of the signal where it has ended the processes that load images too.

    A scheduler's reaches every process of a job, and so does the keyboard's.

    Raises:
        Preempted: in place of a `DataError` that came after the signal.
    """
    try:
        yield
    except DataError as error:
        if not stop.signal:
            raise
        raise Preempted.by(stop.signal) from error


@contextmanager
def lost_processes() -> Iterator[None]:
    """Say in one line that another process is gone, where torch tells of a broken connection.

    What the other one met, it says itself. This one has saved what it could by then.

    Raises:
        Preempted: another process died, or did not answer for torch's half an hour.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and _GLOO not in str(error):
            raise
        # a transport's own failure looks the same, and what it says tells them apart
        told = f" ({str(error).splitlines()[0]})" if isinstance(error, DistError) else ""
        raise Preempted(
            "another process of this run died; the same command goes on from the last checkpoint"
            f"{told}"
        ) from error


def usual_loss(losses: Sequence[float]) -> float:
    """The median of the rows before the last `DIVERGED_ROWS`; infinite where these are too few."""
    earlier = losses[:-DIVERGED_ROWS]
    return statistics.median(earlier) if len(earlier) >= DIVERGED_ROWS else math.inf


def is_far_above_usual(losses: Sequence[float]) -> bool:
    """Whether a curve's last row may be the first one of a divergence."""
    return len(losses) > 0 and losses[-1] > DIVERGED_FACTOR * usual_loss(losses)


def refuse_divergence(losses: Sequence[float], step: int) -> None:
    """Look at the losses of a curve's rows, the last of which is that of `step`.

    Raises:
        TrainingError: the run has diverged, see `DIVERGED_FACTOR`.
    """
    usual, lowest = usual_loss(losses), min(losses[-DIVERGED_ROWS:], default=0.0)
    if lowest > DIVERGED_FACTOR * usual:
        raise TrainingError(
            f"the run has diverged: up to step {step} the loss was {lowest:.3g} or more for the "
            f"last {DIVERGED_ROWS} rows of the curve, {usual:.3g} in the median before; the "
            "checkpoints are of before: lower the learning rate"
        )
