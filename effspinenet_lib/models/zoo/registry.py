"""What the zoo knows of a model, and how a baseline enters it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from effspinenet_lib.errors import UserError
from effspinenet_lib.models.base import TaskModel

# Detection and instance segmentation. Recovered: the paper's cost columns fit a head of 90
# classes, COCO's highest category id.
COCO_CLASSES = 90
IMAGENET_CLASSES = 1000
VOC_CLASSES = 21  # PASCAL VOC's 20 and the background, which segmentation counts as a class

# Task -> classes of the benchmark that the paper uses for it.
TASKS: dict[str, int] = {
    "detection": COCO_CLASSES,
    "instances": COCO_CLASSES,
    "classification": IMAGENET_CLASSES,
    "segmentation": VOC_CLASSES,
}

# (task, classes, options) -> model with fresh weights.
Build = Callable[[str, int, Any], TaskModel]


@dataclass(frozen=True)
class NoOptions:
    """Options of a model that has none."""


@dataclass(frozen=True)
class DropOptions:
    """Options of a baseline.

    Attributes:
        stochastic_depth: drop rate of the last block; it grows linearly with depth.
    """

    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a rate out of range.

        Raises:
            UserError: the rate is not a number from 0 to below 1.
        """
        rate = self.stochastic_depth
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise UserError(
                f"model option stochastic_depth is {rate!r}; it must be a number from 0 to below 1"
            )


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: how it is asked for.
        image_sizes: task -> side of the square input in pixels that the paper gives it; the
            tasks that it can do.
        tables: items of the paper that it stands in.
        build: makes it.
        options: dataclass of its options.
    """

    name: str
    image_sizes: Mapping[str, int]
    tables: tuple[str, ...]
    build: Build
    options: type[Any] = NoOptions


BASELINES: dict[str, Entry] = {}


def baseline(
    name: str,
    image_sizes: Mapping[str, int],
    tables: tuple[str, ...],
    options: type[Any] = NoOptions,
) -> Callable[[Build], Build]:
    """Register the function below as the builder of a baseline; the arguments are `Entry`'s."""

    def register(build: Build) -> Build:
        BASELINES[name] = Entry(name, dict(image_sizes), tables, build, options)
        return build

    return register
