"""Which variable of a Model Garden checkpoint is which tensor of a released model.

Keras numbers the layers of a backbone in a checkpoint by their depth in the graph, but their
variables carry the name that the layer got when it was made, such as `conv2d_12/kernel`. Layers
of one kind are therefore ordered by the number in that name: the order in which the released
code makes them, which is that of this library's modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest

from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from effspinenet_lib.errors import CheckpointError
from effspinenet_lib.models.layers import MBConv, SeparableConv
from effspinenet_lib.models.retinanet import RetinaHead, RetinaNet

# How a variable's axes become the tensor's: TensorFlow's kernels are height, width, in, out.
KERNEL, DEPTHWISE, VECTOR = (3, 2, 0, 1), (2, 3, 0, 1), (0,)
# TensorFlow's boxes are y, x, height, width; this library's x, y, width, height.
BOX_ORDER = (1, 0, 3, 2)

Table = Mapping[str, tuple[str, tuple[int, ...]]]  # variable -> tensor, order of its axes
Parts = Mapping[str, tuple[str, Table]]  # layer of a block -> module, its table

CONV: Table = {"kernel": ("weight", KERNEL), "bias": ("bias", VECTOR)}
DEPTHWISE_CONV: Table = {"depthwise_kernel": ("weight", DEPTHWISE)}
SEPARABLE_CONV: Table = {
    "depthwise_kernel": ("depthwise.weight", DEPTHWISE),
    "pointwise_kernel": ("pointwise.weight", KERNEL),
    "bias": ("pointwise.bias", VECTOR),
}
NORM: Table = {
    "gamma": ("weight", VECTOR),
    "beta": ("bias", VECTOR),
    "moving_mean": ("running_mean", VECTOR),
    "moving_variance": ("running_var", VECTOR),
}
MBCONV: Parts = {
    "_conv0": ("expand.0", CONV),
    "_norm0": ("expand.1", NORM),
    "_conv1": ("depthwise.0", DEPTHWISE_CONV),
    "_norm1": ("depthwise.1", NORM),
    "_squeeze_excitation/_se_reduce": ("excite.reduce", CONV),
    "_squeeze_excitation/_se_expand": ("excite.expand", CONV),
    "_conv2": ("project.0", CONV),
    "_norm2": ("project.1", NORM),
}
RESIDUAL: Parts = {
    "_shortcut": ("downsample.0", CONV),
    "_norm0": ("downsample.1", NORM),
    "_conv1": ("conv1", CONV),
    "_norm1": ("bn1", NORM),
    "_conv2": ("conv2", CONV),
    "_norm2": ("bn2", NORM),
    "_conv3": ("conv3", CONV),
    "_norm3": ("bn3", NORM),
}

# Kinds of layers by the names that Keras gives them; older code has a class of its own for a norm
# that is synchronised.
_KINDS = (
    "conv2d",
    "depthwise_conv2d",
    "batch_normalization",
    "inverted_bottleneck_block",
    "bottleneck_block",
    "residual_block",
)
_LAYER_NAME = re.compile(rf"(?:sync_)?({'|'.join(_KINDS)})(?:_(\d+))?")


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


def match_variables(model: RetinaNet, names: Mapping[str, str], origin: str) -> dict[str, Source]:
    """Find the variable of every tensor of a released model.

    Args:
        model: as `zoo.released.build_released` makes it.
        names: path of every variable of the checkpoint's model -> its name when it was made.
        origin: the checkpoint, for messages.

    Returns:
        Tensor's name -> its source; each variable occurs once.

    Raises:
        CheckpointError: a variable is missing or one too many; names it.
    """
    sources = dict(_backbone_sources(model, names, origin))
    sources.update(_head_sources(model))
    expected = model.state_dict().keys() - {*_counters(model)}
    found = {name: source for name, source in sources.items() if name in expected}
    for name, source in found.items():
        if source.path not in names:
            raise CheckpointError(f"{origin}: lacks the variable {source.path} ({name} here)")
    extra = sorted(names.keys() - {source.path for source in found.values()})
    if extra:
        raise CheckpointError(f"{origin}: has the variable {extra[0]}, which the model has not")
    missing = sorted(expected - found.keys())
    if missing:
        raise CheckpointError(f"{origin}: has no variable for {missing[0]}")
    return found


def _counters(model: nn.Module) -> Iterator[str]:
    """Names of the batches that norms count, which TensorFlow does not."""
    return (name for name, _ in model.named_buffers() if name.endswith("num_batches_tracked"))


def _leaves(tensor: str, path: str, table: Table) -> Iterator[tuple[str, Source]]:
    for variable, (name, axes) in table.items():
        yield f"{tensor}.{name}", Source(f"{path}/{variable}", axes)


def _backbone_sources(
    model: RetinaNet, names: Mapping[str, str], origin: str
) -> Iterator[tuple[str, Source]]:
    """Pair the layers of each kind in the order in which they were made."""
    theirs, ours = _checkpoint_layers(names, origin), _model_layers(model)
    for kind in _KINDS:
        pairs = zip_longest(theirs.get(kind, []), ours.get(kind, []))
        for number, (path, tensor) in enumerate(pairs, start=1):
            if path is None or tensor is None:
                counts = f"{len(theirs.get(kind, []))}, the model {len(ours.get(kind, []))}"
                what = f"; {path} is one too many" if path else f"; number {number} is missing"
                raise CheckpointError(f"{origin}: its backbone has {kind} layers: {counts}{what}")
            if kind in ("conv2d", "depthwise_conv2d", "batch_normalization"):
                table = {"conv2d": CONV, "depthwise_conv2d": DEPTHWISE_CONV}.get(kind, NORM)
                yield from _leaves(tensor, path, table)
                continue
            parts = MBCONV if kind == "inverted_bottleneck_block" else RESIDUAL
            for part, (name, table) in parts.items():
                yield from _leaves(f"{tensor}.{name}", f"{path}/{part}", table)


def _checkpoint_layers(names: Mapping[str, str], origin: str) -> dict[str, list[str]]:
    """Paths of the backbone's layers by kind, in the order in which they were made."""
    numbered: dict[str, dict[int, str]] = {}
    for path, name in names.items():
        if not path.startswith("backbone/"):
            continue
        parts = (_LAYER_NAME.fullmatch(part) for part in name.split("/"))
        found = next((part for part in parts if part), None)
        if found is None:
            raise CheckpointError(f"{origin}: {path} was made as {name!r}, no known kind of layer")
        layer = "/".join(path.split("/")[:2])
        numbers = numbered.setdefault(found[1], {})
        if numbers.setdefault(int(found[2] or 0), layer) != layer:
            raise CheckpointError(f"{origin}: {path} and another layer were made as {name!r}")
    return {kind: [layers[n] for n in sorted(layers)] for kind, layers in numbered.items()}


def _model_layers(model: RetinaNet) -> dict[str, list[str]]:
    """Names of the modules by kind: stem, blocks, resampling, and what joins them to the heads."""
    layers: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if name.startswith(("backbone.groups.", "class_head", "box_head")):
            if isinstance(module, MBConv):
                kind = "inverted_bottleneck_block"
            elif isinstance(module, Bottleneck):
                kind = "bottleneck_block"
            elif isinstance(module, BasicBlock):
                kind = "residual_block"
            else:
                continue
        elif isinstance(module, nn.Conv2d):
            kind = "conv2d" if module.groups == 1 else "depthwise_conv2d"
        elif isinstance(module, nn.BatchNorm2d):
            kind = "batch_normalization"
        else:
            continue
        layers.setdefault(kind, []).append(name)
    return layers


def _head_sources(model: RetinaNet) -> Iterator[tuple[str, Source]]:
    yield from _branch_sources("class_head", model.class_head, "cls", "_classifier")
    for name, source in _branch_sources("box_head", model.box_head, "box", "_box_regressor"):
        last = name.startswith("box_head.predict") and source.axes != DEPTHWISE
        yield name, Source(source.path, source.axes, boxes=last)


def _branch_sources(
    tensor: str, head: RetinaHead, branch: str, predictor: str
) -> Iterator[tuple[str, Source]]:
    table = SEPARABLE_CONV if isinstance(head.predict, SeparableConv) else CONV
    for layer in range(head.layers):
        yield from _leaves(f"{tensor}.convs.{layer}", f"head/_{branch}_convs/{layer}", table)
    for number in range(len(head.norms)):
        level, layer = divmod(number, head.layers)
        path = f"head/_{branch}_norms/{level}/{layer}"
        yield from _leaves(f"{tensor}.norms.{number}", path, NORM)
    yield from _leaves(f"{tensor}.predict", f"head/{predictor}", table)
