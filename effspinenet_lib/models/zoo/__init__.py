"""Every model by name.

A scale-permuted model is an entry of `specs.MODELS`. A baseline is a function under
`registry.baseline` in one of the modules imported below. The path of a resource distribution
(`distributions`) stands for the model that it names, with its betas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.models.base import TaskModel
from effspinenet_lib.models.learned import betas_text
from effspinenet_lib.models.specs import MODELS, SCALES, SEGMENTATION_SIZE, ModelSpec
from effspinenet_lib.models.zoo import image_models, mobile, one_stage, released  # noqa: F401 - they register
from effspinenet_lib.models.zoo.distributions import is_distribution, read_distribution
from effspinenet_lib.models.zoo.registry import BASELINES, TASKS, Entry
from effspinenet_lib.models.zoo.scale_permuted import ScalePermutedOptions, build_scale_permuted

__all__ = [
    "TASKS",
    "check_model",
    "create_model",
    "default_image_size",
    "known_options",
    "list_models",
    "model_entry",
    "resolve_model",
]


def list_models() -> dict[str, tuple[str, ...]]:
    """Names of the models, each with the tables of the paper that it stands in."""
    tables = {spec.name: spec.tables for spec in MODELS.values()}
    tables.update({entry.name: entry.tables for entry in BASELINES.values()})
    return dict(sorted(tables.items()))


def resolve_model(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The listed model and the options that a name and its options stand for.

    The path of a distribution becomes its model with its betas, so that nothing depends on
    where the file lies; any other name stays.

    Raises:
        DataError: a path that holds no distribution.
        UserError: betas are given beside a distribution.
    """
    if not is_distribution(name):
        return name, dict(options)
    if "betas" in options:
        raise UserError(f"{name} has betas of its own; give the option betas to a listed model")
    distribution = read_distribution(name)
    return distribution.model, {**options, "betas": betas_text(distribution.betas)}


def model_entry(name: str) -> Entry:
    """What the zoo knows of a model.

    Raises:
        UnknownName: no such model; the message lists near names.
        DataError: the path of a distribution that cannot be read.
    """
    name, _ = resolve_model(name, {})
    if name in BASELINES:
        return BASELINES[name]
    if name not in MODELS:
        raise UnknownName("model", name, list_models())
    return _scale_permuted_entry(MODELS[name])


def _scale_permuted_entry(spec: ModelSpec) -> Entry:
    scale = SCALES[spec.scale]
    sizes = {
        "detection": scale.input_size,
        "instances": scale.input_size,
        "classification": scale.classification_size,
        "segmentation": SEGMENTATION_SIZE,
    }

    def build(task: str, num_classes: int, options: ScalePermutedOptions) -> TaskModel:
        return build_scale_permuted(spec, task, num_classes, options)

    return Entry(spec.name, sizes, spec.tables, build, ScalePermutedOptions)


def default_image_size(name: str, task: str = "detection") -> int:
    """Image side in pixels that the paper gives a model for a task.

    Raises:
        UnknownName: no such model, or the model is not made for the task.
    """
    sizes = model_entry(name).image_sizes
    if task not in sizes:
        raise UnknownName(f"task of {name}" if task in TASKS else "task", task, sizes)
    return sizes[task]


def known_options(name: str) -> tuple[str, ...]:
    """Names of the options that `create_model` takes for a model."""
    return tuple(option.name for option in fields(model_entry(name).options))


def check_model(name: str, task: str, options: Mapping[str, Any]) -> Any:
    """Check what `create_model` is given, without building anything; returns the options.

    Raises:
        UnknownName: the model, task or option is not known, or the model is not made for the
            task; the message lists near names.
        UserError: an option's value is none.
    """
    name, options = resolve_model(name, options)
    default_image_size(name, task)
    known = known_options(name)
    for option in options:
        if option not in known:
            raise UnknownName("model option", option, known)
    return model_entry(name).options(**options)


def create_model(
    name: str, task: str = "detection", num_classes: int | None = None, **options: Any
) -> TaskModel:
    """Build a model with fresh weights.

    Args:
        name: one of `list_models()`, or the path of a distribution.
        task: `detection`, `instances` (detection with masks), `classification` or
            `segmentation` (semantic).
        num_classes: classes, without background but for `segmentation`, where it is a class of
            its own; None takes the benchmark's of the paper: 90, 90, 1000 and 21.
        options: for the scale-permuted models the fields of `ScalePermutedOptions`:
            `space_to_depth`, `weighted_fusion`, `squeeze_excitation`, `activation`,
            `stochastic_depth`, `betas`. `known_options` lists those of any model.

    Returns:
        Images and targets in, losses in training, predictions in
        evaluation.

    Raises:
        UnknownName: the model, task or option is not known, or the model is not made for the
            task; the message lists near names.
        UserError: `num_classes` is not positive, or an option's value is none.
    """
    checked = check_model(name, task, options)
    classes = TASKS[task] if num_classes is None else num_classes
    if classes < 1:
        raise UserError(f"num_classes is {classes}; a model needs at least one class")
    return model_entry(name).build(task, classes, checked)
