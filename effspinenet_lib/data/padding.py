"""Targets with a fixed number of rows, for compilers that build a program for every shape."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from effspinenet_lib.data.augment import Target

# Of a row that holds no object. Its box is 0, 0, 0, 0, which overlaps nothing.
PADDING_LABEL = -1
# Rows an image on such devices (Model Garden's RetinaNet configuration; COCO's images have fewer).
MAX_OBJECTS = 100


def pad_target(target: Target, rows: int) -> Target:
    """A detection target with `rows` rows, those of `PADDING_LABEL` last.

    Of more objects than that the largest are kept, in their order.

    Args:
        target: `boxes` [M, 4], `labels` int64 [M] and, if any is, `iscrowd` bool [M].
        rows: how many the result has.
    """
    if len(target["labels"]) > rows:
        boxes = target["boxes"]
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        largest = areas.argsort(descending=True, stable=True)[:rows].sort().values
        target = {name: values[largest] for name, values in target.items()}
    return {
        name: _extend(values, rows, PADDING_LABEL if name == "labels" else 0)
        for name, values in target.items()
    }


def _extend(values: Tensor, rows: int, filler: int) -> Tensor:
    around = [0, 0] * (values.dim() - 1) + [0, rows - len(values)]
    return functional.pad(values, around, value=filler)
