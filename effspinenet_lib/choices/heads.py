"""What stands on the backbone: the heads of the four tasks (section 4)."""

from __future__ import annotations

from collections.abc import Callable

from effspinenet_lib.choices.settings import Choices
from effspinenet_lib.choices.tally import KERNEL, Tally
from effspinenet_lib.models.specs import CLASSIFICATION_DIM, Scale

BOX_CODE = 4
SEGMENTATION_CLASSES = 21  # PASCAL VOC's 20 and the background
# Mask R-CNN: sides of what is pooled for boxes and masks, and of the upsampling between; 100
# detections an image have masks (COCO's limit).
BOX_AREA, MASK_AREA, UPSAMPLING_AREA, MASKS = 7**2, 14**2, 2**2, 100


def _lateral(tally: Tally, dims: dict[int, int], dim: int, areas: dict[int, int]) -> None:
    """Count the 1x1 convolutions that bring P3 to P7 to one dimension."""
    for level, inputs in dims.items():
        tally.conv(inputs, dim, areas[level], norm=tally.choices.lateral_norm, active=True)


def _branch(
    tally: Tally, dim: int, layers: int, area: int, norms: int, counts: tuple[int, ...], last: str
) -> None:
    """Count separable convolutions and prediction layers of `counts` channels."""
    for _ in range(layers):
        tally.weights(dim * KERNEL**2 + dim * dim, area)
        if tally.choices.head_bias:
            tally.bias(dim, area)
        tally.norm(dim, area, norms)
        tally.elements("activation", dim * area)
    for outputs in counts:
        if last == "separable":
            tally.weights(dim * KERNEL**2 + dim * outputs, area)
        else:
            tally.weights(dim * outputs * (KERNEL**2 if last == "3x3" else 1), area)
        tally.bias(outputs, area)


def _norm_copies(choices: Choices, dims: dict[int, int]) -> int:
    return len(dims) if choices.head_norms == "per level" else 1


def _detection(tally: Tally, scale: Scale, dims: dict[int, int], areas: dict[int, int]) -> None:
    choices = tally.choices
    dim = scale.head_dim
    _lateral(tally, dims, dim, areas)
    area = sum(areas[level] for level in dims)
    for outputs in (choices.anchors * choices.classes, choices.anchors * BOX_CODE):
        _branch(
            tally,
            dim,
            scale.head_layers,
            area,
            _norm_copies(choices, dims),
            (outputs,),
            choices.prediction,
        )


def _merge(tally: Tally, dims: dict[int, int], dim: int, areas: dict[int, int]) -> int:
    """Count how P3 to P7 become one; returns the positions of P3."""
    finest = areas[min(dims)]
    late = tally.choices.merge == "before 1x1"
    _lateral(tally, dims, dim, dict.fromkeys(areas, finest) if late else areas)
    tally.elements("sum", (len(dims) - 1) * dim * finest)
    return finest


def _classification(
    tally: Tally, scale: Scale, dims: dict[int, int], areas: dict[int, int]
) -> None:
    del scale
    _merge(tally, dims, CLASSIFICATION_DIM, areas)
    outputs = tally.choices.classification_classes
    tally.weights(CLASSIFICATION_DIM * outputs, 1)
    tally.bias(outputs, 1)


def _segmentation(tally: Tally, scale: Scale, dims: dict[int, int], areas: dict[int, int]) -> None:
    last = tally.choices.segmentation_prediction
    dim = scale.head_dim
    area = _merge(tally, dims, dim, areas)
    _branch(tally, dim, scale.head_layers, area, 1, (SEGMENTATION_CLASSES,), last)


def _instances(tally: Tally, scale: Scale, dims: dict[int, int], areas: dict[int, int]) -> None:
    choices = tally.choices
    dim = scale.head_dim
    _lateral(tally, dims, dim, areas)
    _branch(
        tally,
        dim,
        choices.proposal_layers,
        sum(areas[level] for level in dims),
        _norm_copies(choices, dims),
        ((1 + BOX_CODE) * choices.proposal_anchors,),
        choices.proposal_prediction,
    )
    boxes = choices.proposals
    _branch(tally, dim, scale.head_layers, boxes * BOX_AREA, 1, (), "")
    inputs = dim * BOX_AREA
    for _ in range(choices.fc_layers):
        tally.weights(inputs * scale.box_fc_dim, boxes)
        if choices.fc_norm:
            tally.norm(scale.box_fc_dim, boxes)
        else:
            tally.bias(scale.box_fc_dim, boxes)
        inputs = scale.box_fc_dim
    classes = choices.instance_classes
    _linear(tally, inputs, classes, boxes)
    _linear(tally, inputs, BOX_CODE * (classes if choices.box_per_class else 1), boxes)
    _branch(tally, dim, scale.head_layers, MASKS * MASK_AREA, 1, (), "")
    tally.weights(UPSAMPLING_AREA * dim * dim, MASKS * MASK_AREA)
    fine = MASKS * MASK_AREA * UPSAMPLING_AREA
    tally.norm(dim, fine)
    tally.elements("activation", dim * fine)
    _branch(tally, dim, 0, fine, 1, (classes,), choices.mask_prediction)


def _linear(tally: Tally, inputs: int, outputs: int, rows: int) -> None:
    tally.weights(inputs * outputs, rows)
    tally.bias(outputs, rows)


HEADS: dict[str, Callable[[Tally, Scale, dict[int, int], dict[int, int]], None]] = {
    "detection": _detection,
    "instances": _instances,
    "classification": _classification,
    "segmentation": _segmentation,
}
