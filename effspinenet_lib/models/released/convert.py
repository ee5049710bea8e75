"""A released checkpoint as a weights file that `create_from_weights` loads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from effspinenet_lib.data.augment import RELEASED as RELEASED_PREPROCESSING
from effspinenet_lib.errors import CheckpointError, UnknownName
from effspinenet_lib.models.released.checkpoint import GardenCheckpoint
from effspinenet_lib.models.released.names import BOX_ORDER, Source, match_variables
from effspinenet_lib.models.released_specs import COCO_NAMES, RELEASED, SOURCE, ReleasedSpec
from effspinenet_lib.models.retinanet import RetinaNet
from effspinenet_lib.models.specs import SpineNetSpec
from effspinenet_lib.models.zoo import TASKS, create_model
from effspinenet_lib.training.checkpoint import save_weights

logger = logging.getLogger(__name__)

TASK = "detection"


def released_options(spec: ReleasedSpec) -> dict[str, Any]:
    """Options of `create_model` that give a released detector."""
    return {"released": True} if isinstance(spec.backbone, SpineNetSpec) else {}


def create_released(name: str, **options: Any) -> RetinaNet:
    """A released detector with fresh weights; options as of `create_model`.

    Raises:
        UnknownName: none of this name was released.
    """
    if name not in RELEASED:
        raise UnknownName("released model", name, RELEASED)
    model = create_model(name, TASK, **released_options(RELEASED[name]), **options)
    assert isinstance(model, RetinaNet)
    return model


def to_tensor(value: NDArray[np.float32], source: Source) -> NDArray[np.float32]:
    """A variable's value in the axes, and the order of box numbers, of its tensor."""
    value = value.transpose(source.axes)
    if source.boxes:
        value = value.reshape(-1, len(BOX_ORDER), *value.shape[1:])[:, BOX_ORDER]
        value = value.reshape(-1, *value.shape[2:])
    return np.ascontiguousarray(value)


def read_released(path: Path, name: str, average: bool = True) -> dict[str, torch.Tensor]:
    """The state dict of a released detector from a checkpoint of the Model Garden.

    Args:
        path: the checkpoint; see `GardenCheckpoint`.
        name: of the model.
        average: take the moving averages of the weights, where the checkpoint has them, as the
            Model Garden does in evaluation; else the weights of its last step.

    Raises:
        UnknownName: none of this name was released.
        UserError: TensorFlow is not installed.
        CheckpointError: the checkpoint cannot be read, or a variable is missing, too many or of
            another shape.
    """
    model = create_released(name)
    checkpoint = GardenCheckpoint(path)
    origin = f"{checkpoint.prefix} (model {name})"
    names = {path: variable.name for path, variable in checkpoint.variables.items()}
    sources = match_variables(model, names, origin)
    if average and checkpoint.has_averages:
        logger.info("%s: taking the moving averages of the weights", checkpoint.prefix)
    state = model.state_dict()
    for tensor, source in sources.items():
        value = checkpoint.read(source.path, average)
        expected = state[tensor].shape
        if value.ndim == len(source.axes):
            value = to_tensor(value, source)
        if value.shape != tuple(expected):
            raise CheckpointError(
                f"{origin}: {source.path} gives {tensor} the shape {list(value.shape)}, the "
                f"model's is {list(expected)}"
            )
        state[tensor] = torch.from_numpy(value)
    return state


def convert(path: Path, name: str, output: Path, average: bool = True) -> int:
    """Write a checkpoint's detector as a weights file; returns how many numbers it holds.

    The arguments and errors are those of `read_released`, and UserError where the file cannot be
    written.
    """
    state = read_released(path, name, average)
    save_weights(output, state, released_metadata(name, path.name))
    return sum(tensor.numel() for tensor in state.values())


def released_metadata(name: str, checkpoint: str) -> dict[str, Any]:
    """What the weights file of a released detector says of itself.

    Args:
        name: of the model, a key of `RELEASED`.
        checkpoint: name of the checkpoint.
    """
    spec = RELEASED[name]
    classes = TASKS[TASK]
    return {
        "model": name,
        "task": TASK,
        "num_classes": classes,
        "options": released_options(spec),
        "image_size": spec.image_size,
        "preprocessing": RELEASED_PREPROCESSING,
        "categories": [
            {"id": number, "name": COCO_NAMES.get(number, f"unused {number}")}
            for number in range(1, classes + 1)
        ],
        "source": f"{SOURCE}, experiment {spec.experiment}, checkpoint {checkpoint}",
        "metrics": spec.metrics,
    }
