"""What a run leaves to look at: curve.csv, TensorBoard events and a progress bar."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from effspinenet_lib.errors import UserError
from effspinenet_lib.files import atomic_write
from effspinenet_lib.results import CURVE_FILE
from effspinenet_lib.training.loop import Step
from effspinenet_lib.training.stopping import is_far_above_usual, refuse_divergence

logger = logging.getLogger(__name__)

ROW_STEPS = 10  # our choice: steps averaged in a row of the curve
EVENTS = "tb"
SPEED = "images_per_second"


class Curve:
    """The training curve of a run folder: a row every `ROW_STEPS` steps and at the last one.

    Columns: step, learning_rate, loss, one a loss of the model (classification, box),
    images_per_second. Losses are means over the row's steps. All but the speed are the same
    for an interrupted run as for one that was not.

    Attributes:
        step: the last one that was counted in.
    """

    def __init__(
        self, folder: Path, start: int, total: int, state: dict[str, Any], progress: bool
    ) -> None:
        """Open the curve at step `start`; `state` is what `state()` gave there, or empty."""
        self._path = folder / CURVE_FILE
        self._total = total
        self._sums: dict[str, float] = dict(state.get("sums", {}))
        self._steps: int = state.get("steps", 0)
        self.step = start
        self._images = 0
        self._since = time.monotonic()
        self._has_header = cut_curve(self._path, start)
        self._losses = _losses_of(self._path)
        self._events = _Events(folder / EVENTS, start)
        # disable=None: silent where stderr is not a terminal
        self._bar = tqdm(
            total=total, initial=start, unit="step", disable=None if progress else True
        )

    def __enter__(self) -> Curve:
        """The curve itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the bar and the event file."""
        self._bar.close()
        self._events.close()

    def state(self) -> dict[str, Any]:
        """The sums of the row under way, for a checkpoint."""
        return {"sums": dict(self._sums), "steps": self._steps}

    def add(self, step: Step) -> None:
        """Count one step in; writes a row when one is full.

        Raises:
            UserError: the row cannot be written.
            TrainingError: the rows show that the run has diverged.
        """
        for name, value in step.losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1
        self._images += step.images
        self._bar.update()
        if step.step % ROW_STEPS == 0 or step.step == self._total:
            self._write_row(step)
        self.step = step.step
        if not self._steps:
            refuse_divergence(self._losses, step.step)

    @property
    def is_far_above_usual(self) -> bool:
        """Whether the last row may be the first one of a divergence."""
        return is_far_above_usual(self._losses)

    def _write_row(self, step: Step) -> None:
        means = {name: total / self._steps for name, total in self._sums.items()}
        now = time.monotonic()
        row: dict[str, float] = {
            "step": step.step,
            "learning_rate": step.learning_rate,
            "loss": sum(means.values()),
            **means,
            SPEED: round(self._images / max(now - self._since, 1e-9), 2),
        }
        self._append(row)
        self._losses.append(row["loss"])
        self._events.add({name: row[name] for name in row if name != "step"}, step.step)
        self._bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        self._sums, self._steps, self._images, self._since = {}, 0, 0, now

    def _append(self, row: dict[str, float]) -> None:
        try:
            with open(self._path, "a", encoding="utf-8", newline="") as handle:
                writer = csv.writer(handle, lineterminator="\n")
                if not self._has_header:
                    writer.writerow(row)
                    self._has_header = True
                writer.writerow(row.values())
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; run again to go on from the last "
                "checkpoint"
            ) from error


class _Events:
    """The curve as events for TensorBoard, which a run does without where there is no room."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, needed only here

        self._folder = folder
        self._writer: SummaryWriter | None = None
        with self._given_up():
            self._writer = SummaryWriter(folder, purge_step=start + 1)

    def add(self, values: dict[str, float], step: int) -> None:
        """Write one value of each name."""
        if self._writer is not None:
            with self._given_up():
                for name, value in values.items():
                    self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            with self._given_up():
                self._writer.close()

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            reason = error.strerror or error
            logger.warning("%s: no more events for TensorBoard (%s)", self._folder, reason)


def cut_curve(path: Path, step: int) -> bool:
    """Drop the rows after `step` (and a row cut short); whether a header is left.

    A run that goes on writes these rows again.
    """
    if step == 0:
        path.unlink(missing_ok=True)
    if not path.exists():
        return False
    with open(path, encoding="utf-8", newline="") as handle:
        header, *rows = list(csv.reader(handle)) or [[]]
    if not header:
        return False
    kept = [row for row in rows if len(row) == len(header) and int(row[0]) <= step]
    with atomic_write(path) as out:
        csv.writer(out, lineterminator="\n").writerows([header, *kept])
    return True


def _losses_of(path: Path) -> list[float]:
    """The losses of a curve's rows."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as handle:
        return [float(row["loss"]) for row in csv.DictReader(handle)]
