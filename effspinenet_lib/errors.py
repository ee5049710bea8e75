"""Errors that a user can act on.

Each message is one line that says what is wrong, where, and what to do. The command line
prints it without a traceback and exits with the class's `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

NEAR_NAMES_SHOWN = 4
PREEMPTED_EXIT = 75  # sysexits.h: a temporary failure, try again


class UserError(Exception):
    """A problem that the user can solve: a wrong option, a missing file, an unwritable folder."""

    exit_code = 2

    @property
    def details(self) -> list[str]:
        """Lines that are printed before the message."""
        return []


class UnknownName(UserError):  # noqa: N818 - it says what happened
    """A name that is not in a list of known names; the message lists the near ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=NEAR_NAMES_SHOWN, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class DataError(UserError):
    """An invalid input file; the message names the file and the record."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint or weights file that does not fit what it is loaded into."""

    exit_code = 4


class TrainingError(UserError):
    """Training that cannot continue (a non-finite loss); the last checkpoint is kept."""

    exit_code = 5


class Preempted(BaseException):
    """A run that was asked to stop; its checkpoint is on disk, and the same command resumes it.

    No `Exception`, as KeyboardInterrupt is none: signal handlers raise it anywhere, and what
    handles any fault of a file must not take it for one.
    """

    exit_code = PREEMPTED_EXIT
    details: Sequence[str] = ()

    @classmethod
    def by(cls, name: str) -> Preempted:
        """Stopped by the signal of this name."""
        return cls(f"stopped by {name}; the same command resumes")
