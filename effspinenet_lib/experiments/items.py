"""The tables and figures of the paper, what each trains, and the profiles that say how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from effspinenet_lib.data import DataConfig
from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.models.zoo import TASKS
from effspinenet_lib.training.recipes.ablations import SCHEDULE_EPOCHS


@dataclass(frozen=True)
class Row:
    """A row of a table that is trained and whose cost is measured.

    Attributes:
        label: the row's name in `results/paper`.
        model: the paper's model.
        proxy_model: the small model that stands for it in the `smoke` and `proxy` profiles.
        options: options of `create_model` that the row switches.
        task: of the model.
        recipes: profile -> training recipe, where the row has its own; empty: the profile's for
            the task.
        carried: whether the paper took the row's numbers over from other papers.
        starts_from: item whose run of the same model gives the initial weights at the paper's
            settings; empty: fresh weights.
    """

    label: str
    model: str
    proxy_model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    task: str = "detection"
    recipes: Mapping[str, str] = field(default_factory=dict)
    carried: bool = False
    starts_from: str = ""


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
        recipes: task -> name of the training recipe.
        seeds: one run a seed.
        image_size: in pixels; None takes each model's own (Table 2).
        data: what is trained on; None takes the paper's data from the data root.
    """

    name: str
    recipes: Mapping[str, str]
    seeds: tuple[int, ...]
    image_size: int | None
    data: DataConfig | None


PAPER = "paper"
PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            "smoke",
            dict.fromkeys(TASKS, "smoke_detection"),
            seeds=(0,),
            image_size=64,
            data=DataConfig("shapescenes", train_images=32, eval_images=8, image_size=64),
        ),
        Profile(
            "proxy",
            {
                "detection": "proxy_detection",
                "instances": "proxy_detection",
                "classification": "small_data_classification",
                "segmentation": "small_data_segmentation",
            },
            seeds=(0, 1, 2),
            image_size=128,
            data=DataConfig("shapescenes"),
        ),
        Profile(
            PAPER,
            {task: f"paper_{task}" for task in TASKS},
            seeds=(0,),
            image_size=None,
            data=None,
        ),
    )
}

_DEPTHWISE = {"space_to_depth": False}
_DEPTHWISE_SUM = {"space_to_depth": False, "weighted_fusion": False}
_RELU = {"activation": "relu"}
_NEITHER = {**_RELU, "squeeze_excitation": False}
# Stand-ins of the scaled models: as many models, each smaller than the next.
_STAND_INS = {"d0": "eff_spinenet_m0", "d1": "eff_spinenet_m1", "d2": "eff_spinenet_m2"}


def _scaled(task: str = "detection", **changes: Any) -> tuple[Row, ...]:
    """The rows of Eff-SpineNet-D0 to D2."""
    return tuple(
        Row(f"Eff-SpineNet-{size.upper()}", f"eff_spinenet_{size}", small, task=task, **changes)
        for size, small in _STAND_INS.items()
    )


def _itself(label: str, model: str, task: str = "detection", **changes: Any) -> Row:
    """The row of a model that has no smaller one in its place."""
    return Row(label, model, model, task=task, **changes)


def _strategy(label: str, model: str, options: Mapping[str, Any], recipe: str) -> Row:
    """A row of Table 4 or 5; their recipes have no counterpart in the profile `proxy`."""
    small = _STAND_INS["d2"] if model == "eff_spinenet_d2" else model
    recipes = {PAPER: recipe, "smoke": "smoke_detection"}
    return Row(label, model, small, options, recipes=recipes)


_D2, _R50 = "Eff-SpineNet-D2", "ResNet-50-FPN"
_TABLE_4 = (
    _strategy(f"{_D2} baseline", "eff_spinenet_d2", _NEITHER, "paper_strategies_baseline"),
    _strategy(f"{_D2} +SE", "eff_spinenet_d2", _RELU, "paper_strategies_baseline"),
    _strategy(f"{_D2} +ms train", "eff_spinenet_d2", _RELU, "paper_strategies_ms_train"),
    _strategy(f"{_D2} +Swish", "eff_spinenet_d2", {}, "paper_strategies_ms_train"),
    _strategy(f"{_D2} +SD", "eff_spinenet_d2", {}, "paper_detection"),
    _strategy(f"{_R50} baseline", "resnet50_fpn", _RELU, "paper_strategies_baseline"),
    _strategy(f"{_R50} +ms train", "resnet50_fpn", _RELU, "paper_strategies_ms_train_250_epochs"),
    _strategy(f"{_R50} +Swish", "resnet50_fpn", {}, "paper_strategies_ms_train_250_epochs"),
    _strategy(f"{_R50} +SD", "resnet50_fpn", {}, "paper_detection_250_epochs"),
)
_TABLE_5 = (
    *(
        _strategy(
            f"{_D2} {epochs} epochs", "eff_spinenet_d2", {}, f"paper_detection_{epochs}_epochs"
        )
        for epochs in SCHEDULE_EPOCHS
    ),
    _strategy(f"{_D2} 650 epochs", "eff_spinenet_d2", {}, "paper_detection"),
)
_TABLE_3 = (
    *_scaled(),
    *(_itself(f"EfficientNet-B{size}-FPN", f"efficientnet_b{size}_fpn") for size in range(3)),
    *(_itself(f"EfficientDet-D{size}", f"efficientdet_d{size}", carried=True) for size in range(3)),
    # Table 4: its 42.3 AP are those of 250 epochs.
    _itself(
        _R50,
        "resnet50_fpn",
        recipes={
            **{name: profile.recipes["detection"] for name, profile in PROFILES.items()},
            PAPER: "paper_detection_250_epochs",
        },
    ),
    _itself("SpineNet-49", "spinenet_49"),
)
_TABLE_7 = (
    *(_itself(f"Eff-SpineNet-M{size}", f"eff_spinenet_m{size}") for size in range(3)),
    *(
        _itself(label, model, carried=True)
        for label, model in (
            ("MobileNetV3-Small-SSDLite", "mobilenetv3_small_ssdlite"),
            ("MobileNetV3-SSD", "mobilenetv3_large_ssdlite"),
            ("MobileNetV2 + MnasFPN", "mobilenetv2_mnasfpn"),
            ("MnasNet-A1-SSD", "mnasnet_a1_ssdlite"),
            ("MobileNetV2-NAS-FPN", "mobilenetv2_nas_fpn"),
            ("MobileNetV2-FPN", "mobilenetv2_fpn"),
        )
    ),
)
_TABLE_10 = (
    *_scaled("classification"),
    *(
        _itself(f"EfficientNet-B{size}", f"efficientnet_b{size}", "classification", carried=True)
        for size in range(3)
    ),
)
# The two DeepLabv3 rows are carried over and start from COCO weights of networks that no item here
# trains: they have costs alone.
_TABLE_11 = tuple(
    row for row in _scaled("segmentation", starts_from="table-03") if row.model != "eff_spinenet_d1"
)

ITEMS: dict[str, Item] = {
    item.id: item
    for item in (
        Item("table-01", "Block specifications", "table_01_block_specs"),
        Item("table-02", "Model scaling", "table_02_scaling"),
        Item("table-03", "One-stage object detection on COCO", rows=_TABLE_3),
        Item("table-04", "Training strategies, one at a time", rows=_TABLE_4),
        Item("table-05", "Longer training schedules", rows=_TABLE_5),
        Item(
            "table-06",
            "Two-stage detection and instance segmentation on COCO",
            rows=_scaled("instances"),
        ),
        Item("table-07", "Mobile-size object detection on COCO", rows=_TABLE_7),
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
        Item("table-10", "ImageNet classification", rows=_TABLE_10),
        Item("table-11", "Semantic segmentation on PASCAL VOC 2012", rows=_TABLE_11),
        Item("figure-01", "FLOPs and parameters against AP, regular-size detectors"),
        Item("figure-02", "Resampling operation", "figure_02_resampling"),
        Item("figure-03", "Feature dimensions and resource shares", "figure_03_distribution"),
        Item("figure-04", "Multi-Adds against AP, mobile-size detectors"),
        Item("figure-05", "Architectures sampled in the search", "figure_05_search_samples"),
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


def find_row(item: Item, name: str) -> Row:
    """The row of an item by its label, or by its model where one row alone has it.

    Raises:
        UnknownName: no such row; the message lists near labels and models.
        UserError: several rows are of the model; the message lists their labels.
    """
    labels = {row.label.lower(): row for row in item.rows}
    if name.lower() in labels:
        return labels[name.lower()]
    rows = [row for row in item.rows if row.model == name]
    if len(rows) > 1:
        raise UserError(
            f"{item.id} has {len(rows)} rows of {name}; name one by its label: "
            f"{', '.join(row.label for row in rows)}"
        )
    if not rows:
        known = {name for row in item.rows for name in (row.label, row.model)}
        raise UnknownName(f"row of {item.id}", name, known)
    return rows[0]
