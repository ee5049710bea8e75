"""Every model by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from effspinenet_lib.backbones import BackboneOptions, ScalePermutedBackbone
from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.specs import MODELS, SCALES, ModelSpec
from effspinenet_lib.tasks.detection import RetinaNet

TASKS = ("detection",)
# Recovered: the paper's cost columns fit a head of 90 classes, COCO's highest category id.
COCO_CLASSES = 90


def list_models() -> dict[str, tuple[str, ...]]:
    """Names of the models, each with the tables of the paper that it stands in."""
    return {name: spec.tables for name, spec in sorted(MODELS.items())}


def model_spec(name: str) -> ModelSpec:
    """Specification of a model.

    Raises:
        UnknownName: no such model; the message lists near names.
    """
    if name not in MODELS:
        raise UnknownName("model", name, MODELS)
    return MODELS[name]


def default_image_size(name: str) -> int:
    """Image side in pixels that Table 2 gives a model."""
    return SCALES[model_spec(name).scale].input_size


def check_model(name: str, task: str, options: Mapping[str, Any]) -> BackboneOptions:
    """Check what `create_model` is given, without building anything.

    Raises:
        UnknownName: the model, task or option is not known; the message lists near names.
        UserError: an option's value is none.
    """
    model_spec(name)
    if task not in TASKS:
        raise UnknownName("task", task, TASKS)
    known = [option.name for option in fields(BackboneOptions)]
    for option in options:
        if option not in known:
            raise UnknownName("model option", option, known)
    return BackboneOptions(**options)


def create_model(
    name: str, task: str = "detection", num_classes: int = COCO_CLASSES, **options: Any
) -> nn.Module:
    """Build a model with fresh weights.

    Args:
        name: one of `list_models()`.
        task: `detection` (RetinaNet).
        num_classes: classes, without background.
        options: fields of `BackboneOptions`: `space_to_depth`, `weighted_fusion`,
            `squeeze_excitation`, `activation`, `stochastic_depth`.

    Returns:
        A module: images and targets in, losses in training, detections in evaluation.

    Raises:
        UnknownName: the model, task or option is not known; the message lists near names.
        UserError: `num_classes` is not positive, or an option's value is none.
    """
    checked = check_model(name, task, options)
    if num_classes < 1:
        raise UserError(f"num_classes is {num_classes}; a model needs at least one class")
    spec = model_spec(name)
    scale = SCALES[spec.scale]
    backbone = ScalePermutedBackbone(spec.backbone, checked)
    return RetinaNet(
        backbone,
        num_classes,
        scale.head_dim,
        scale.head_layers,
        backbone.options.activation,
    )
