"""What asks a run to stop before its last step: signals, and processes that are lost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch.distributed import DistError

from effspinenet_lib.errors import Preempted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # a scheduler's, and the keyboard's
# On Ctrl-C the terminal signals every process, and launchers such as torchrun send it once more.
# A second signal within this time is that echo, no second request (our choice).
SAME_SIGNAL_SECONDS = 1.0
_GLOO = "/gloo/"  # in the errors of torch's CPU transport: a path of its code


class Preemption:
    """Whether a run was asked to stop.

    Attributes:
        signal: name of the signal that asked this process; empty before.
        agreed: whether all processes of the run stop after the current step.
    """

    def __init__(self) -> None:
        self.signal = ""
        self.agreed = False
        self._asked_at = 0.0
        self._in_steps = False

    @contextmanager
    def in_steps(self) -> Iterator[None]:
        """While this is open, a signal waits for the end of the step; otherwise it acts at once.

        Not reset where the steps end in an error: a signal that arrives then is remembered, and
        cannot take the error's place.
        """
        self._in_steps = True
        yield
        self._in_steps = False

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: remember the first one, obey the second at once.

        Raises:
            Preempted: no step is running, so there is nothing to finish or to save.
            KeyboardInterrupt: the same from the keyboard, or asked for the second time.
        """
        now = time.monotonic()
        if self.signal and now - self._asked_at < SAME_SIGNAL_SECONDS:
            return
        if self._in_steps and not self.signal:
            self.signal, self._asked_at = signal.Signals(number).name, now
        elif number == signal.SIGTERM and not self.signal:
            raise Preempted.by(signal.Signals(number).name)
        else:
            raise KeyboardInterrupt


@contextmanager
def handle_preemption() -> Iterator[Preemption]:
    """Take the signals that ask to stop; only Python's main thread can."""
    preemption = Preemption()
    if threading.current_thread() is not threading.main_thread():
        yield preemption
        return
    before = {number: signal.signal(number, preemption.take) for number in STOP_SIGNALS}
    try:
        yield preemption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turn torch's error of a broken connection into one line.

    The process that failed reports its own error.

    Raises:
        Preempted: another process died, or did not answer within torch's half an hour.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and _GLOO not in str(error):
            raise
        # a failure of the transport itself looks the same; its message tells them apart
        reason = f" ({str(error).splitlines()[0]})" if isinstance(error, DistError) else ""
        raise Preempted(
            "another process of this run died; the same command resumes from the last checkpoint"
            f"{reason}"
        ) from error
