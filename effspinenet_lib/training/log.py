"""What a training leaves to look at: curve.csv, TensorBoard events and a progress bar."""

from __future__ import annotations

import contextlib
import csv
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from effspinenet_lib.errors import TrainingError, UserError
from effspinenet_lib.files import atomic_write
from effspinenet_lib.results import CURVE_FILE
from effspinenet_lib.training.loop import Losses
from effspinenet_lib.training.optim import learning_rate_at
from effspinenet_lib.training.recipe import Recipe

ROW_STEPS = 10  # our choice: steps averaged in a row of the curve
EVENTS = "tb"
# A run has diverged when the last `DIVERGED_ROWS` rows of its curve, 200 steps, all lie above
# `DIVERGED_FACTOR` times the median of the rows before them (our choice: in 23 runs of the
# proxy's length, on an earlier network, no row lay above 1.5 times that median).
DIVERGED_FACTOR = 10.0
DIVERGED_ROWS = 20


class TrainingLog:
    """The training curve of a run folder: a row every `ROW_STEPS` steps and at the last one.

    Columns: step, learning_rate, loss, one for each loss of the model (classification, box),
    images_per_second. Losses are means over the row's steps. All but the speed are the same for a
    resumed run as for one that was not interrupted.

    Args:
        folder: of the run.
        recipe: of the run.
        start: steps done; later rows of an interrupted run are dropped.
        state: the attribute `state` at `start`, or empty.
        progress: show a bar where stderr is a terminal.

    Attributes:
        state: of the unfinished row the `steps` and the `sums` of their losses.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, start: int, state: dict[str, Any], progress: bool
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, needed only here

        self.state = state or {"sums": {}, "steps": 0}
        self._path, self._recipe = folder / CURVE_FILE, recipe
        self._logged, self._since = start, time.monotonic()
        self._losses = _cut_curve(self._path, start)
        self._events = SummaryWriter(folder / EVENTS, purge_step=start + 1)
        # disable=None: silent where stderr is not a terminal
        self._bar = tqdm(
            total=recipe.steps, initial=start, unit="step", disable=None if progress else True
        )

    def close(self) -> None:
        """Close the bar and the events; those of a full disk are lost."""
        self._bar.close()
        with contextlib.suppress(OSError):
            self._events.close()

    def add(self, checked: Losses) -> None:
        """Count steps in; writes a row when one is full.

        Raises:
            UserError: the row cannot be written.
            TrainingError: the rows show that the run has diverged.
        """
        for step, losses in checked.items():
            sums = self.state["sums"]
            self.state = {
                "sums": {name: sums.get(name, 0.0) + value for name, value in losses.items()},
                "steps": self.state["steps"] + 1,
            }
            self._bar.update()
            if step % ROW_STEPS == 0 or step == self._recipe.steps:
                try:
                    self._write_row(step)
                except OSError as error:
                    raise UserError(
                        f"cannot write {self._path}: {error.strerror or error}; run again to "
                        "resume from the last checkpoint"
                    ) from error
                refuse_divergence(self._losses, step)

    @property
    def may_diverge(self) -> bool:
        """Whether the last row may be the first one of a divergence."""
        return bool(self._losses) and self._losses[-1] > DIVERGED_FACTOR * _usual(self._losses)

    def _write_row(self, step: int) -> None:
        means = {name: total / self.state["steps"] for name, total in self.state["sums"].items()}
        now = time.monotonic()
        speed = (step - self._logged) * self._recipe.batch_size / max(now - self._since, 1e-9)
        row = {
            "step": step,
            "learning_rate": learning_rate_at(self._recipe, step - 1),
            "loss": sum(means.values()),
            **means,
            "images_per_second": round(speed, 2),
        }
        with open(self._path, "a", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            if handle.tell() == 0:
                writer.writerow(row)
            writer.writerow(row.values())
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(f"train/{name}", value, step)
        self._losses.append(row["loss"])
        self._bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        self.state, self._logged, self._since = {"sums": {}, "steps": 0}, step, now


def _cut_curve(path: Path, step: int) -> list[float]:
    """Drop a curve's rows after `step`, and a row cut short; the losses of the others."""
    if step == 0:
        path.unlink(missing_ok=True)
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as handle:
        header, *rows = list(csv.reader(handle)) or [[]]
    kept = [row for row in rows if len(row) == len(header) and int(row[0]) <= step]
    with atomic_write(path) as out:
        csv.writer(out, lineterminator="\n").writerows([header, *kept] if header else [])
    return [float(row[header.index("loss")]) for row in kept]


def _usual(losses: Sequence[float]) -> float:
    """The median of the rows before the last `DIVERGED_ROWS`; infinite where these are too few."""
    earlier = losses[:-DIVERGED_ROWS]
    return statistics.median(earlier) if len(earlier) >= DIVERGED_ROWS else math.inf


def refuse_divergence(losses: Sequence[float], step: int) -> None:
    """Check the losses of a curve's rows, the last of which is that of `step`.

    Raises:
        TrainingError: the run has diverged, see `DIVERGED_FACTOR`.
    """
    usual, lowest = _usual(losses), min(losses[-DIVERGED_ROWS:], default=0.0)
    if lowest > DIVERGED_FACTOR * usual:
        raise TrainingError(
            f"the run has diverged: up to step {step} the loss was {lowest:.3g} or more for the "
            f"last {DIVERGED_ROWS} rows of the curve, {usual:.3g} in the median before; the "
            "checkpoints are of before: lower the learning rate"
        )
