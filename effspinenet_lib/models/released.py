"""Checkpoints of the TensorFlow Model Garden as weights of this library.

Three steps: read the checkpoint's variables (`read_variables`, which needs TensorFlow), find the
variable of every tensor of the model (`match_variables`), bring its value to the tensor's layout
(`to_tensor`).

Keras numbers a backbone's layers in a checkpoint by their depth in the graph, but its variables
keep the name that the layer got when it was made, such as `conv2d_12/kernel`. Layers of one kind
are therefore ordered by the number in that name: the order in which the released code makes them,
which is that of this library's modules.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from effspinenet_lib.data.augment import RELEASED as RELEASED_PREPROCESSING
from effspinenet_lib.errors import CheckpointError, UnknownName, UserError
from effspinenet_lib.models.layers import MBConv, SeparableConv
from effspinenet_lib.models.released_specs import RELEASED, SOURCE, ReleasedSpec
from effspinenet_lib.models.retinanet import RetinaNet
from effspinenet_lib.models.specs import TASKS, SpineNetSpec
from effspinenet_lib.models.zoo import create_model

logger = logging.getLogger(__name__)
# The released detectors number their classes by COCO's category ids: the names by id, from 0, the
# background. Ten ids are not used.
COCO_NAMES: list[str] = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
UNUSED = "N/A"

TASK = "detection"


def create_released(name: str, **options: Any) -> RetinaNet:
    """A released detector with fresh weights; options as of `create_model`.

    Raises:
        UnknownName: no detector of this name was released.
    """
    if name not in RELEASED:
        raise UnknownName("released model", name, RELEASED)
    model = create_model(name, TASK, **_options(RELEASED[name]), **options)
    assert isinstance(model, RetinaNet)
    return model


def convert(
    path: Path, name: str, average: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a released detector from a checkpoint of the Model Garden's trainer.

    Args:
        path: a folder with `<name>-<step>.index` and its data files, of which the newest is
            taken, or the path of one without its ending.
        name: of the model.
        average: take the moving averages of the weights, where the checkpoint has them, as the
            Model Garden does in evaluation; else the weights of the last step.

    Returns:
        State dict and metadata, as `models.weights.save_weights` takes them.

    Raises:
        UnknownName: no detector of this name was released.
        UserError: TensorFlow is not installed.
        CheckpointError: the checkpoint is missing or cannot be read, or a variable is missing,
            unexpected or of another shape.
    """
    model = create_released(name)
    prefix = _find_prefix(path)
    variables = read_variables(prefix, average)
    origin = f"{prefix} (model {name})"
    names = {path: variable.name for path, variable in variables.items()}
    state = model.state_dict()
    for tensor, source in match_variables(model, names, origin).items():
        value = variables[source.path].value
        expected = list(state[tensor].shape)
        if value.ndim == len(source.axes):
            value = to_tensor(value, source)
        if list(value.shape) != expected:
            raise CheckpointError(
                f"{origin}: {source.path} gives {tensor} the shape {list(value.shape)}, the "
                f"model's is {expected}"
            )
        state[tensor] = torch.from_numpy(value)
    return state, released_metadata(name, path.name)


def released_metadata(name: str, checkpoint: str) -> dict[str, Any]:
    """Metadata of a released detector's weights file.

    Args:
        name: of the model, a key of `RELEASED`.
        checkpoint: name of the checkpoint.
    """
    spec = RELEASED[name]
    return {
        "model": name,
        "task": TASK,
        "num_classes": TASKS[TASK],
        "options": _options(spec),
        "image_size": spec.image_size,
        "preprocessing": RELEASED_PREPROCESSING,
        "categories": [
            {"id": number, "name": f"unused {number}" if name == UNUSED else name}
            for number, name in enumerate(COCO_NAMES[1:], start=1)
        ],
        "source": f"{SOURCE}, experiment {spec.experiment}, checkpoint {checkpoint}",
        "metrics": spec.metrics,
    }


def _options(spec: ReleasedSpec) -> dict[str, Any]:
    """Options of `create_model` that give the released arithmetic."""
    return {"released": True} if isinstance(spec.backbone, SpineNetSpec) else {}


# ---- the checkpoint's variables

GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
EMA_SLOT = "average"  # the Model Garden's slot with a variable's moving average
INDEX = re.compile(r"(.+-(\d+))\.index")


@dataclass(frozen=True)
class Variable:
    """A variable of a checkpoint's model.

    Attributes:
        name: that it got when it was made.
        value: of it, or its moving average.
    """

    name: str
    value: NDArray[np.float32]


def read_variables(prefix: Path, average: bool) -> dict[str, Variable]:
    """Read the variables of backbone and head from a checkpoint.

    Args:
        prefix: path of the checkpoint without its ending.
        average: of each variable the moving average, if there is one.

    Returns:
        Path in the model, `backbone/...` or `head/...` -> variable.

    Raises:
        UserError: TensorFlow is not installed.
        CheckpointError: it cannot be read, or holds no detector.
    """
    tensorflow = _tensorflow()
    try:
        reader = tensorflow.train.load_checkpoint(str(prefix))
        module = "tensorflow.core.protobuf.trackable_object_graph_pb2"
        graph = importlib.import_module(module).TrackableObjectGraph()
        graph.ParseFromString(reader.get_tensor(GRAPH))
        return {
            path: Variable(name, np.asarray(reader.get_tensor(key), np.float32))
            for path, name, key in _model_variables(graph, str(prefix), average)
        }
    except (tensorflow.errors.OpError, ValueError, RuntimeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{prefix}: cannot be read ({reason}); unpack or copy the checkpoint again"
        ) from error


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes on the CPU and its drivers
    try:
        return importlib.import_module("tensorflow")
    except ImportError as error:
        raise UserError(
            "reading this checkpoint needs TensorFlow, which is not installed here; in a virtual "
            "environment of its own: pip install -e '.[tensorflow]'"
        ) from error


def _find_prefix(path: Path) -> Path:
    """The newest checkpoint of a folder, or the one that the path names."""
    if path.is_dir():
        found = [m for file in path.iterdir() if (m := INDEX.fullmatch(file.name))]
        if not found:
            raise CheckpointError(
                f"{path}: has no checkpoint; a file such as ckpt-277200.index must be in it"
            )
        return path / max(found, key=lambda match: int(match[2]))[1]
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    if not prefix.with_name(f"{prefix.name}.index").is_file():
        raise CheckpointError(f"{path}: no such folder, and no checkpoint of this name")
    return prefix


def _model_variables(graph: Any, origin: str, average: bool) -> Iterator[tuple[str, str, str]]:
    """Path, name and key of the variables of backbone and head, from the object graph."""
    averages = {
        slot.original_variable_node_id: slot.slot_variable_node_id
        for node in graph.nodes
        for slot in node.slot_variables
        if slot.slot_name == EMA_SLOT
    }
    if average and averages:
        logger.info("%s: taking the moving averages of the weights", origin)
    for part in ("backbone", "head"):
        start = _child(graph, 0, part) or _child(graph, _child(graph, 0, "model"), f"_{part}")
        if start is None:
            raise CheckpointError(
                f"{origin}: has no {part}; it is not a detector that the Model Garden trained"
            )
        for path, number in _nodes_with_values(graph, start):
            name = graph.nodes[number].attributes[0].full_name
            value = averages.get(number, number) if average else number
            yield f"{part}/{path}", name, graph.nodes[value].attributes[0].checkpoint_key


def _child(graph: Any, node: int | None, name: str) -> int | None:
    children = graph.nodes[node].children if node is not None else ()
    return next((child.node_id for child in children if child.local_name == name), None)


def _nodes_with_values(graph: Any, start: int) -> Iterator[tuple[str, int]]:
    """Paths and numbers of the objects below one that hold a value, each by its shortest path.

    Keras lists each layer of a network twice, as `layer-7` and, if it has weights, as
    `layer_with_weights-4`; the second name is kept.
    """
    seen, queue = {start}, deque([("", start)])
    while queue:
        path, number = queue.popleft()
        if graph.nodes[number].attributes:
            yield path, number
            continue
        children = graph.nodes[number].children
        for child in sorted(children, key=lambda child: child.local_name.startswith("layer-")):
            if child.node_id not in seen:
                seen.add(child.node_id)
                queue.append((f"{path}/{child.local_name}".lstrip("/"), child.node_id))


# ---- which variable is which tensor

# Order of a variable's axes in the tensor: TensorFlow's kernels are height, width, in, out.
KERNEL, DEPTHWISE, VECTOR = (3, 2, 0, 1), (2, 3, 0, 1), (0,)
# TensorFlow's boxes are y, x, height, width; this library's x, y, width, height.
BOX_ORDER = (1, 0, 3, 2)

# Last part of a variable's path -> last part of the tensor's name, order of its axes.
Leaves = Mapping[str, tuple[str, tuple[int, ...]]]
LEAVES: Leaves = {
    "kernel": ("weight", KERNEL),
    "depthwise_kernel": ("weight", DEPTHWISE),
    "bias": ("bias", VECTOR),
    "gamma": ("weight", VECTOR),
    "beta": ("bias", VECTOR),
    "moving_mean": ("running_mean", VECTOR),
    "moving_variance": ("running_var", VECTOR),
}
SEPARABLE: Leaves = {
    **LEAVES,
    "depthwise_kernel": ("depthwise.weight", DEPTHWISE),
    "pointwise_kernel": ("pointwise.weight", KERNEL),
    "bias": ("pointwise.bias", VECTOR),
}
# Kind of a layer, as Keras names it -> its parts -> their modules.
SINGLE = {"": ""}
RESIDUAL = {
    "_shortcut": "downsample.0",
    "_norm0": "downsample.1",
    "_conv1": "conv1",
    "_norm1": "bn1",
    "_conv2": "conv2",
    "_norm2": "bn2",
    "_conv3": "conv3",
    "_norm3": "bn3",
}
KINDS: dict[str, Mapping[str, str]] = {
    "conv2d": SINGLE,
    "depthwise_conv2d": SINGLE,
    "batch_normalization": SINGLE,
    "inverted_bottleneck_block": {
        "_conv0": "expand.0",
        "_norm0": "expand.1",
        "_conv1": "depthwise.0",
        "_norm1": "depthwise.1",
        "_squeeze_excitation/_se_reduce": "excite.reduce",
        "_squeeze_excitation/_se_expand": "excite.expand",
        "_conv2": "project.0",
        "_norm2": "project.1",
    },
    "bottleneck_block": RESIDUAL,
    "residual_block": RESIDUAL,
}
# Older code has a class of its own for a synchronised norm.
LAYER_NAME = re.compile(rf"(?:sync_)?({'|'.join(KINDS)})(?:_(\d+))?")


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from.

    Attributes:
        path: of the variable in the model, such as `head/_classifier/bias`.
        axes: order of the variable's axes in the tensor.
        boxes: its first axis counts the numbers of boxes, four by four.
    """

    path: str
    axes: tuple[int, ...]
    boxes: bool = False


def to_tensor(value: NDArray[np.float32], source: Source) -> NDArray[np.float32]:
    """A variable's value in the layout of its tensor."""
    value = value.transpose(source.axes)
    if source.boxes:
        value = value.reshape(-1, len(BOX_ORDER), *value.shape[1:])[:, BOX_ORDER]
        value = value.reshape(-1, *value.shape[2:])
    return np.ascontiguousarray(value)


def match_variables(model: RetinaNet, names: Mapping[str, str], origin: str) -> dict[str, Source]:
    """Find the variable of every tensor of a released model.

    Args:
        model: as `create_released` makes it.
        names: each variable's name when it was made, by its path.
        origin: the checkpoint, for messages.

    Returns:
        Tensor's name -> its source; each variable occurs once.

    Raises:
        CheckpointError: a variable is missing or unexpected.
    """
    modules = {**_backbone_modules(model, names, origin), **_head_modules(model)}
    separable = {name for name, layer in model.named_modules() if isinstance(layer, SeparableConv)}
    # TensorFlow's norms do not count batches
    expected = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    found: dict[str, Source] = {}
    for path in names:
        layer, _, leaf = path.rpartition("/")
        module = modules.get(layer, "")
        name, axes = (SEPARABLE if module in separable else LEAVES).get(leaf, ("", VECTOR))
        tensor = f"{module}.{name}"
        if tensor not in expected:
            raise CheckpointError(
                f"{origin}: has the variable {path}, which the model does not have"
            )
        boxes = module == "box_head.predict" and axes != DEPTHWISE
        found[tensor] = Source(path, axes, boxes)
    missing = sorted(expected - found.keys())
    if missing:
        raise CheckpointError(f"{origin}: has no variable for {missing[0]}")
    return found


def _backbone_modules(model: RetinaNet, names: Mapping[str, str], origin: str) -> dict[str, str]:
    """The module of each part of the backbone's layers, paired in the order of their making."""
    modules = {}
    theirs, ours = _checkpoint_layers(names, origin), _model_layers(model)
    for kind, parts in KINDS.items():
        layers, made = theirs.get(kind, []), ours.get(kind, [])
        if len(layers) != len(made):
            raise CheckpointError(
                f"{origin}: its backbone has {len(layers)} {kind} layers, the model {len(made)}"
            )
        for layer, module in zip(layers, made, strict=True):
            for part, inner in parts.items():
                modules[f"{layer}/{part}".rstrip("/")] = f"{module}.{inner}".rstrip(".")
    return modules


def _checkpoint_layers(names: Mapping[str, str], origin: str) -> dict[str, list[str]]:
    """Paths of the backbone's layers by kind, in the order of their making."""
    numbered: dict[str, dict[int, str]] = {}
    for path, name in names.items():
        if not path.startswith("backbone/"):
            continue
        found = next((m for part in name.split("/") if (m := LAYER_NAME.fullmatch(part))), None)
        if found is None:
            raise CheckpointError(f"{origin}: {path} was made as {name!r}, no known kind of layer")
        layer = "/".join(path.split("/")[:2])
        numbered.setdefault(found[1], {})[int(found[2] or 0)] = layer
    return {kind: [layers[n] for n in sorted(layers)] for kind, layers in numbered.items()}


def _model_layers(model: RetinaNet) -> dict[str, list[str]]:
    """Names of the modules by kind: stem, blocks, resampling, and the 1x1 ones before the heads."""
    layers: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        kind = None
        if isinstance(module, MBConv):
            kind = "inverted_bottleneck_block"
        elif isinstance(module, Bottleneck):
            kind = "bottleneck_block"
        elif isinstance(module, BasicBlock):
            kind = "residual_block"
        elif name.startswith(("backbone.groups.", "class_head", "box_head")):
            pass  # part of a block, or of a head
        elif isinstance(module, nn.Conv2d):
            kind = "conv2d" if module.groups == 1 else "depthwise_conv2d"
        elif isinstance(module, nn.BatchNorm2d):
            kind = "batch_normalization"
        if kind is not None:
            layers.setdefault(kind, []).append(name)
    return layers


def _head_modules(model: RetinaNet) -> dict[str, str]:
    """The module of each layer of the heads."""
    modules = {
        "head/_classifier": "class_head.predict",
        "head/_box_regressor": "box_head.predict",
    }
    for branch, name, head in (
        ("cls", "class_head", model.class_head),
        ("box", "box_head", model.box_head),
    ):
        for layer in range(head.layers):
            modules[f"head/_{branch}_convs/{layer}"] = f"{name}.convs.{layer}"
        for number in range(len(head.norms)):
            level, layer = divmod(number, head.layers)
            modules[f"head/_{branch}_norms/{level}/{layer}"] = f"{name}.norms.{number}"
    return modules
