"""A resource distribution as a file: what a search leaves, and a model by the file's path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effspinenet_lib.errors import DataError, UnknownName, UserError
from effspinenet_lib.files import read_json, write_json
from effspinenet_lib.models.learned import check_betas, distributed
from effspinenet_lib.models.specs import MODELS, SCALES, BackboneSpec, scale_backbone

SUFFIX = ".json"
FORMAT = "eff-spinenet-distribution-1"


@dataclass(frozen=True)
class Distribution:
    """A resource distribution (section 3.3) and the scale that it is built at.

    Attributes:
        name: for people.
        model: scale-permuted model of the zoo whose distribution it replaces; gives the scale.
        betas: of the 18 blocks (Equation 4).
        origin: where it comes from and what is known of it, as JSON types.
    """

    name: str
    model: str
    betas: tuple[int, ...]
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def feature_dims(self) -> list[int]:
        """Feature dimensions of the 18 blocks at the scale D0, as Table 1 prints them."""
        return [block.feature_dim for block in distributed(self.betas).blocks]

    @property
    def backbone(self) -> BackboneSpec:
        """The backbone at the scale of `model`."""
        return scale_backbone(distributed(self.betas), SCALES[MODELS[self.model].scale])


def write_distribution(path: str | os.PathLike[str], distribution: Distribution) -> None:
    """Write a distribution as JSON, whole or not at all.

    Raises:
        UserError: the name does not end in `.json`, or the file cannot be written.
    """
    if not is_distribution(path):
        raise UserError(f"{path}: the file of a distribution must end in {SUFFIX}")
    write_json(
        path,
        {
            "format": FORMAT,
            "name": distribution.name,
            "model": distribution.model,
            "betas": list(distribution.betas),
            "feature_dims": distribution.feature_dims,
            "origin": dict(distribution.origin),
        },
    )


def read_distribution(path: str | os.PathLike[str]) -> Distribution:
    """Read what `write_distribution` wrote.

    Raises:
        DataError: the file is missing, is no such file, or its betas do not give its dimensions.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DataError(f"{path}: is no resource distribution (format {FORMAT})")
    try:
        distribution = Distribution(
            str(values["name"]),
            str(values["model"]),
            check_betas(values["betas"]),
            values.get("origin", {}),
        )
        stated = values["feature_dims"]
    except KeyError as error:
        raise DataError(f"{path}: is a broken distribution: it has no {error}") from error
    except (TypeError, UserError) as error:
        raise DataError(f"{path}: is a broken distribution: {error}") from error
    if not isinstance(distribution.origin, dict):
        raise DataError(f"{path}: is a broken distribution: its origin is no object")
    if distribution.model not in MODELS:
        raise UnknownName(f"scale-permuted model of {path}", distribution.model, MODELS)
    if distribution.feature_dims != stated:
        raise DataError(
            f"{path}: its betas give the dimensions {distribution.feature_dims}, it states "
            f"{stated}; correct the file, or export it anew"
        )
    return distribution


def is_distribution(name: str | os.PathLike[str]) -> bool:
    """Whether a model's name is the path of a distribution."""
    return Path(name).suffix == SUFFIX
