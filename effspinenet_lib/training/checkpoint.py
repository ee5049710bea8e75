"""Checkpoints from which a killed run resumes: written atomically, read without running code."""

from __future__ import annotations

import io
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effspinenet_lib.errors import CheckpointError, TrainingError
from effspinenet_lib.files import atomic_write
from effspinenet_lib.models import zoo
from effspinenet_lib.models.base import TaskModel
from effspinenet_lib.models.weights import load_weights

logger = logging.getLogger(__name__)

FORMAT = 1
KEPT = 2  # our choice: the newest, and the one before in case the newest cannot be read
NAME = re.compile(r"checkpoint-(\d+)\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run.

    The place in the learning-rate schedule and in the data are functions of the step, and the loop
    seeds all random generators at every step: they have no other state.
    """

    run: str  # key
    model: str  # name
    step: int  # steps done
    model_state: dict[str, Tensor]
    optimizer_state: dict[str, Any]
    curve_state: dict[str, Any]  # `TrainingLog.state`
    wall_seconds: float  # of training up to here, over all interruptions
    ema_state: dict[str, Tensor] | None = None  # the averaged weights, where the recipe has them


def save_checkpoint(folder: Path, checkpoint: Checkpoint, kept: int = KEPT) -> Path:
    """Write `checkpoint-<step>.pt` in `folder` and drop all but the newest `kept`.

    Raises:
        UserError: it cannot be written; those before it are kept.
        TrainingError: the weights are not finite; those before it are kept.
    """
    tensors = (*checkpoint.model_state.values(), *(checkpoint.ema_state or {}).values())
    # one answer for all of them: XLA builds a program for each that is waited for
    if not torch.stack([value.isfinite().all() for value in tensors]).all():
        raise TrainingError(
            f"the weights are not finite after step {checkpoint.step}; the same command "
            "resumes from the last checkpoint: lower the learning rate"
        )
    path = folder / f"checkpoint-{checkpoint.step}.pt"
    with atomic_write(path, "wb") as handle:
        # in memory first: on a full disk torch's writer hides the reason
        written = io.BytesIO()
        torch.save({"format": FORMAT, **vars(checkpoint)}, written)
        handle.write(written.getbuffer())
    for old in list_checkpoints(folder)[kept:]:
        old.unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files in `folder`, the newest (most steps) first."""
    found = [(int(m[1]), path) for path in folder.glob("*.pt") if (m := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def load_latest(folder: Path, run: str, model: str) -> Checkpoint | None:
    """The newest checkpoint of `folder` that can be read, or None.

    A file that cannot be read is named in a warning, and the one before it is used.

    Raises:
        CheckpointError: a checkpoint is of another run or model.
    """
    for path in list_checkpoints(folder):
        try:
            checkpoint = load_checkpoint(path)
        except Exception as error:  # torch raises many kinds for a damaged file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning("%s cannot be read (%s); trying the one before it", path, reason)
            continue
        if (checkpoint.run, checkpoint.model) != (run, model):
            raise CheckpointError(
                f"{path}: is of model {checkpoint.model}, run {checkpoint.run}, not of {model}, "
                f"run {run}; move it away, or start over with force"
            )
        return checkpoint
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint; raises whatever torch raises for a damaged one."""
    contents = torch.load(path, map_location="cpu", weights_only=True)
    version = contents.pop("format")
    if version != FORMAT:
        raise ValueError(f"checkpoint format {version}, this version reads {FORMAT}")
    return Checkpoint(**contents)


# --- Weights -------------------------------------------------------------------------------------


def create_from_weights(path: str | Path) -> tuple[TaskModel, dict[str, Any]]:
    """The model of a weights file, in evaluation mode, and the file's metadata.

    The model is on the accelerator where there is one.

    Raises:
        CheckpointError: the file cannot be read or its tensors do not fit the model.
        UnknownName: it is of a model that this version does not have.
    """
    _, metadata = load_weights(path)
    model = zoo.create_model(metadata["model"], metadata["task"], weights=path)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return model.eval().to(device), metadata
