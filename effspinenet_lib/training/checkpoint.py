"""Checkpoints that a killed run goes on from, and the weights that a finished run leaves.

Both are written whole or not at all, and read without running code from the file.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from effspinenet_lib.errors import CheckpointError
from effspinenet_lib.files import atomic_write
from effspinenet_lib.models import zoo
from effspinenet_lib.models.base import TaskModel

logger = logging.getLogger(__name__)

FORMAT = 1
KEPT = 2  # our choice: the newest, and the one before in case the newest cannot be read
BACKBONE = "backbone."  # how the names of its tensors begin, in the models of every task
NEEDED_METADATA = {"model", "task", "num_classes", "options", "categories", "image_size"}
NAME = re.compile(r"checkpoint-(\d+)\.pt")
# what reading a damaged file raises: torch.load and zip records, then missing or odd contents
DAMAGED = (
    zipfile.BadZipFile,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    pickle.PickleError,
)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps.

    The step stands for what has no other state: the place in the learning-rate schedule and in
    the data are functions of it, and the loop seeds all random generators at every step from the
    run's seed and the step.

    Attributes:
        run: key of the run it belongs to.
        model: name of the model.
        step: steps done.
        model_state: the model's state dict.
        optimizer_state: the optimizer's state dict.
        curve_state: the part of the training curve not yet written (`logs.Curve.state`).
        wall_seconds: time spent up to here, over all interruptions.
        ema_state: the averaged weights (`ema.Ema.state_dict`), where the recipe has them.
    """

    run: str
    model: str
    step: int
    model_state: dict[str, torch.Tensor]
    optimizer_state: dict[str, Any]
    curve_state: dict[str, Any]
    wall_seconds: float
    ema_state: dict[str, torch.Tensor] | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, kept: int = KEPT) -> Path:
    """Write `checkpoint-<step>.pt` in `folder` and drop all but the newest `kept`.

    Raises:
        UserError: it cannot be written; the checkpoints before it are kept.
    """
    contents = {item.name: getattr(checkpoint, item.name) for item in fields(checkpoint)}
    path = folder / f"checkpoint-{checkpoint.step}.pt"
    with atomic_write(path, "wb") as handle:
        # in memory first: on a full disk torch's writer hides the reason behind its own complaint
        written = io.BytesIO()
        torch.save({"format": FORMAT, **contents}, written)
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
        except DAMAGED as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning("%s cannot be read (%s); trying the one before it", path, reason)
            continue
        if (checkpoint.run, checkpoint.model) != (run, model):
            raise CheckpointError(
                f"{path}: is of model {checkpoint.model}, run {checkpoint.run}, not of {model}, "
                f"run {run}; move it away, or force the run anew"
            )
        return checkpoint
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint; raises one of `DAMAGED` if the file is not a whole one."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch.load does not look at the checksums
    if damaged is not None:
        raise ValueError(f"the checksum of its record {damaged} is wrong")
    contents = torch.load(path, map_location="cpu", weights_only=True)
    version = contents.pop("format")
    if version != FORMAT:
        raise ValueError(f"checkpoint format {version}, this version reads {FORMAT}")
    return Checkpoint(**contents)


def save_weights(
    path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write weights as safetensors; each value of `metadata` is stored as JSON.

    Raises:
        UserError: the file cannot be written.
    """
    # safetensors takes dense tensors that share no memory
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    with atomic_write(path, "wb") as handle:
        handle.write(safetensors.torch.save(tensors, metadata=texts))


def load_weights(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state dict and the metadata of a weights file.

    Raises:
        CheckpointError: the file is missing, cut short or not one that `save_weights` wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {name: json.loads(text) for name, text in texts.items()}
    except (safetensors.SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path}: is not a whole safetensors weights file ({error}); copy it again, or rerun "
            "the training that wrote it"
        ) from error
    missing = sorted(NEEDED_METADATA - metadata.keys())
    if missing:
        raise CheckpointError(
            f"{path}: its metadata lacks {', '.join(missing)}; it was not written by "
            "`effspinenet train`"
        )
    return state, metadata


def create_from_weights(path: str | Path) -> tuple[TaskModel, dict[str, Any]]:
    """The model that a weights file is of, in evaluation mode, and the file's metadata.

    The model is on the accelerator where there is one.

    Raises:
        CheckpointError: the file cannot be read or its tensors do not fit the model.
        UnknownName: it is of a model that this version does not have.
    """
    state, metadata = load_weights(path)
    model = zoo.create_model(
        metadata["model"],
        task=metadata["task"],
        num_classes=metadata["num_classes"],
        **metadata["options"],
    )
    load_into(model, state, f"{path} (model {metadata['model']})")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return model.eval().to(device), metadata


def load_into(model: nn.Module, state: Mapping[str, torch.Tensor], origin: str) -> None:
    """Load a state dict into a model, all of it or nothing.

    Raises:
        CheckpointError: a tensor is missing, of another shape or too many; names the first.
    """
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise CheckpointError(f"{origin}: lacks {name}, which the model has")
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{origin}: {name} is {list(state[name].shape)}, the model's is "
                f"{list(tensor.shape)}"
            )
    for name in state:
        if name not in expected:
            raise CheckpointError(f"{origin}: has {name}, which the model has not")
    model.load_state_dict(dict(state))


def load_backbone(model: nn.Module, path: str | Path) -> None:
    """Start a model from the weights of another, which may be of another task.

    Taken is every tensor whose name and shape both have: all of the backbone, and of the rest
    what fits.

    Raises:
        CheckpointError: the file cannot be read, or the backbones differ; names the first tensor.
    """
    state, metadata = load_weights(path)
    expected = model.state_dict()
    fitting = {n: t for n, t in state.items() if n in expected and t.shape == expected[n].shape}
    for name in expected:
        if name.startswith(BACKBONE) and name not in fitting:
            raise CheckpointError(
                f"{path} (model {metadata['model']}): its {name} is missing or of another shape; "
                "start from weights of the same backbone"
            )
    model.load_state_dict({**expected, **fitting})
    logger.info("%s: %d of the model's %d tensors taken", path, len(fitting), len(expected))
