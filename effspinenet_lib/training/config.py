"""What a run is: its configuration, the key made of it, and the data it was really run on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from effspinenet_lib.data import DataConfig, Dataset
from effspinenet_lib.recipes import Recipe, recipe_from_dict
from effspinenet_lib.results import run_key
from effspinenet_lib.zoo import known_options


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run's result depends on.

    Attributes:
        model: one of `list_models()`.
        task: of the model.
        image_size: side of the square input in pixels.
        data: what to train and evaluate on.
        recipe: how to train.
        seed: of the weights, the order, the augmentation and stochastic depth.
        model_options: passed to `create_model`; they win over the recipe's stochastic depth.
    """

    model: str
    task: str
    image_size: int
    data: DataConfig
    recipe: Recipe
    seed: int = 0
    model_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The options the model is created with."""
        known = known_options(self.model)
        drop = {"stochastic_depth": self.recipe.stochastic_depth}
        return {**(drop if "stochastic_depth" in known else {}), **self.model_options}

    @property
    def key(self) -> str:
        """12 hexadecimal digits that name the configuration and its folder.

        Where a data folder lies is no part of it: moved data is the same data.
        """
        values = self.to_dict()
        values["data"].pop("root", None)
        return run_key(values)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON types."""
        return {
            "model": self.model,
            "task": self.task,
            "image_size": self.image_size,
            "data": self.data.to_dict(),
            "recipe": self.recipe.to_dict(),
            "seed": self.seed,
            "model_options": self.options,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The configuration that `to_dict` gave `values` of."""
        return cls(
            **{
                **values,
                "data": DataConfig.from_dict(values["data"]),
                "recipe": recipe_from_dict(values["recipe"]),
            }
        )


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """The counts of a data set and a digest of its annotations, which tells it from others."""
    digest = hashlib.sha256(repr(dataset.categories).encode())
    for item in fields(dataset.annotations):
        digest.update(getattr(dataset.annotations, item.name).tobytes())
    return {**dataset.describe(), "digest": digest.hexdigest()}
