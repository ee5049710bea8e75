"""What a run is: its configuration, the key made of it, and the data it was really run on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from effspinenet_lib.data import DataConfig, Dataset
from effspinenet_lib.errors import CheckpointError
from effspinenet_lib.models.zoo import check_model, known_options
from effspinenet_lib.results import config_hash
from effspinenet_lib.training.recipe import Recipe
from effspinenet_lib.training.recipes import recipe_from_dict

RUN_KEY = re.compile("[0-9a-f]{12}")  # of `config_hash`


@dataclass(frozen=True)
class RunConfig:
    """What decides a run's result, up to the hardware and the number of processes.

    Attributes:
        model: one of `list_models()`, or the path of a distribution, which is replaced by its
            model and betas.
        task: of the model.
        image_size: side of the square input in pixels.
        data: what to train and evaluate on.
        recipe: how to train.
        seed: of the weights, the order, the augmentation and stochastic depth.
        model_options: passed to `create_model`; they win over the recipe's stochastic depth,
            dropout and anchor size.
        initial_weights: weights file of another run to start from; None: fresh weights.

    Raises:
        UnknownName: the model, task or an option is not known; the message lists near names.
        UserError: an option's value is invalid.
        DataError: the path holds no distribution.
    """

    model: str
    task: str
    image_size: int
    data: DataConfig
    recipe: Recipe
    seed: int = 0
    model_options: Mapping[str, Any] = field(default_factory=dict)
    initial_weights: str | None = None

    def __post_init__(self) -> None:
        """Resolve the model's name and check its options, once."""
        model, options = check_model(self.model, self.task, self.model_options)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "model_options", options)

    @property
    def options(self) -> dict[str, Any]:
        """The options the model is created with."""
        known = known_options(self.model)
        names = ("stochastic_depth", "dropout", "anchor_size")
        rates = {name: getattr(self.recipe, name) for name in names}
        given = {name: r for name, r in rates.items() if name in known and r is not None}
        return {**given, **self.model_options}

    @cached_property
    def key(self) -> str:
        """12 hexadecimal digits that name the configuration and its folder.

        Paths are left out, so that moved data is the same data. Initial weights count by the key of
        the run in whose folder they are, else by the SHA-256 of the file.

        Raises:
            CheckpointError: initial weights that no run made are missing.
        """
        values = self.to_dict()
        values["data"].pop("root", None)
        if self.initial_weights is not None:
            folder = Path(self.initial_weights).parent.name
            values["initial_weights"] = (
                folder if RUN_KEY.fullmatch(folder) else file_digest(self.initial_weights)
            )
        return config_hash(values)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON types; without initial weights it does not name them."""
        start = {} if self.initial_weights is None else {"initial_weights": self.initial_weights}
        return {
            "model": self.model,
            "task": self.task,
            "image_size": self.image_size,
            "data": self.data.to_dict(),
            "recipe": self.recipe.to_dict(),
            "seed": self.seed,
            "model_options": self.options,
            **start,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The configuration that `to_dict` gave `values` of."""
        data, recipe = DataConfig.from_dict(values["data"]), recipe_from_dict(values["recipe"])
        return cls(**{**values, "data": data, "recipe": recipe})


def file_digest(path: str) -> str:
    """The SHA-256 of a weights file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"{path}: the initial weights cannot be read ({error.strerror}); train the run that "
            "makes them, or give another file"
        ) from error


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """The counts of a data set and digests that identify it.

    Returns:
        `digest` is of categories and annotations, `masks` of the masks where the task has read
        them, `files` of the names, sizes and times of image files where there are any.
    """
    digest = hashlib.sha256(repr(dataset.categories).encode())
    for item in fields(dataset.annotations):
        values = getattr(dataset.annotations, item.name)
        digest.update(
            np.float32(values).tobytes() if values.dtype.kind == "f" else values.tobytes()
        )
    more = {"masks": dataset.masks_digest(), "files": dataset.files_digest()}
    digests = {name: value for name, value in more.items() if value}
    return {**dataset.describe(), "digest": digest.hexdigest(), **digests}
