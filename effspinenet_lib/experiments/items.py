"""The tables and figures of the paper, what each trains, and the profiles that say how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from effspinenet_lib.data import DataConfig
from effspinenet_lib.errors import UnknownName


@dataclass(frozen=True)
class Row:
    """A row of a table that is trained and whose cost is measured.

    Attributes:
        label: the row's name in `results/paper`.
        model: the paper's model.
        proxy_model: the small model that stands for it in the `smoke` and `proxy` profiles.
        options: options of `create_model` that the row switches.
    """

    label: str
    model: str
    proxy_model: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """A table or figure of the paper.

    Attributes:
        id: `table-01` to `table-11`, `figure-01` to `figure-05`.
        title: what it shows.
        notebook: stem of its notebook; None where the suite does not rebuild it yet.
        rows: what it trains and measures; empty where it only draws on specifications.
    """

    id: str
    title: str
    notebook: str | None = None
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Profile:
    """How much is trained.

    Attributes:
        name: `smoke`, `proxy` or `paper`.
        recipe: name of the training recipe.
        seeds: one run a seed.
        image_size: in pixels; None takes each model's own (Table 2).
        data: what is trained on; None takes COCO 2017 from the data root.
    """

    name: str
    recipe: str
    seeds: tuple[int, ...]
    image_size: int | None
    data: DataConfig | None


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            "smoke",
            "smoke_detection",
            seeds=(0,),
            image_size=64,
            data=DataConfig("shapescenes", train_images=32, eval_images=8, image_size=64),
        ),
        Profile(
            "proxy",
            "proxy_detection",
            seeds=(0, 1, 2),
            image_size=128,
            data=DataConfig("shapescenes"),
        ),
        Profile("paper", "paper_detection", seeds=(0,), image_size=None, data=None),
    )
}

_DEPTHWISE = {"space_to_depth": False}
_DEPTHWISE_SUM = {"space_to_depth": False, "weighted_fusion": False}

ITEMS: dict[str, Item] = {
    item.id: item
    for item in (
        Item("table-01", "Block specifications", "table_01_block_specs"),
        Item("table-02", "Model scaling", "table_02_scaling"),
        Item("table-03", "One-stage object detection on COCO"),
        Item("table-04", "Training strategies, one at a time"),
        Item("table-05", "Longer training schedules"),
        Item("table-06", "Two-stage detection and instance segmentation on COCO"),
        Item("table-07", "Mobile-size object detection on COCO"),
        Item(
            "table-08",
            "Learned resource distribution",
            "table_08_learned_distribution",
            (
                Row("SP-EfficientNet-B0", "sp_efficientnet_b0", "sp_efficientnet_m0"),
                Row("Eff-SpineNet-D0", "eff_spinenet_d0", "eff_spinenet_m0"),
            ),
        ),
        Item(
            "table-09",
            "Weighted fusion and space-to-depth",
            "table_09_architecture_ablation",
            (
                Row("Eff-SpineNet-D0", "eff_spinenet_d0", "eff_spinenet_m0"),
                Row("model 1", "eff_spinenet_d0", "eff_spinenet_m0", _DEPTHWISE),
                Row("model 2", "eff_spinenet_d0", "eff_spinenet_m0", _DEPTHWISE_SUM),
            ),
        ),
        Item("table-10", "ImageNet classification"),
        Item("table-11", "Semantic segmentation on PASCAL VOC 2012"),
        Item("figure-01", "FLOPs and parameters against AP, regular-size detectors"),
        Item("figure-02", "Resampling operation", "figure_02_resampling"),
        Item("figure-03", "Feature dimensions and resource shares", "figure_03_distribution"),
        Item("figure-04", "Multi-Adds against AP, mobile-size detectors"),
        Item("figure-05", "Architectures sampled in the search"),
    )
}


def get_item(name: str) -> Item:
    """Item by id.

    Raises:
        UnknownName: no such item; the message lists near names.
    """
    if name not in ITEMS:
        raise UnknownName("item", name, ITEMS)
    return ITEMS[name]
