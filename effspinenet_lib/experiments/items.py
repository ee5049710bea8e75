"""The tables and figures of the paper as experiments: what each trains, on what, and how much.

Every item is run by one command, whose profile says how much is trained:

    effspinenet reproduce table-09                                       # smoke: minutes
    effspinenet reproduce table-09 --profile proxy                       # hours of two CPU cores
    effspinenet reproduce table-09 --profile paper --data-root coco      # the paper's settings
    effspinenet reproduce table-09 --row "model 1" --data-root coco      # one row, in this process
    effspinenet plan table-09                                            # how long that takes

The profile `paper` trains the printed rows on the paper's data: COCO 2017 (Tables 3 to 9), ImageNet
(Table 10), PASCAL VOC 2012 with SBD (Table 11). The paper's values are in `results/paper`. `smoke`
and `proxy` train on ShapeScenes and ShapeGrid, drawn from a seed; `smoke` runs every step once at
the smallest size and says nothing about accuracy. In the proxy, rows that a table compares at equal
cost have models and image sizes of equal multiply-adds (`Row.group`), in the paper's proportion of
sizes; rows that are too large for two cores, or quoted from other papers without a counterpart of
equal cost, are not part of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from effspinenet_lib.data import DataConfig
from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.models.specs import TASKS
from effspinenet_lib.results import merged_results
from effspinenet_lib.results.paper import paper_values
from effspinenet_lib.training.recipes import SCHEDULE_EPOCHS

SMOKE, PROXY, PAPER = "smoke", "proxy", "paper"
# 500 evaluation images left the sampling of images a larger noise than the seeds'
PROXY_DATA = DataConfig("shapescenes", train_images=8_000, eval_images=2_000)
_SMOKE_DATA = DataConfig("shapescenes", train_images=32, eval_images=8, image_size=64)


def _scenes(config: DataConfig) -> dict[str, DataConfig]:
    """ShapeScenes by task; for classification ShapeGrid, whose 28 classes leave room for errors."""
    return {**dict.fromkeys(TASKS, config), "classification": replace(config, format="shapegrid")}


@dataclass(frozen=True)
class Profile:
    """How much is trained.

    Attributes:
        name: `smoke`, `proxy` or `paper`.
        recipes: task -> name of the training recipe.
        seeds: one run a seed.
        image_size: in pixels, where a row names no other; None takes each model's own (Table 2).
        data: task -> what is trained on; empty takes the paper's data from the data root.
    """

    name: str
    recipes: Mapping[str, str]
    seeds: tuple[int, ...]
    image_size: int | None
    data: Mapping[str, DataConfig]


@dataclass(frozen=True)
class Row:
    """A row of a table that is trained and whose cost is measured.

    Attributes:
        label: the row's name in `results/paper`.
        model: the paper's model.
        proxy_model: the model that is trained in its place in the profile `proxy`; empty: the
            row is not part of it.
        proxy_size: image size of that model; None: the profile's.
        group: a label; the table compares rows of one label, at equal cost.
        options: options of `create_model` that the row switches.
        task: of the model.
        recipes: profile -> training recipe, where the row has its own; empty: the profile's for
            the task. A row with own recipes is trained in their profiles alone.
        quoted: whether the paper quotes the row's numbers from other papers.
        init_from: profile -> item whose run of the same model and seed gives the initial weights;
            fresh ones elsewhere.
        proxy_seeds: so many of the proxy's own seeds are trained, fewer where a run is long.
    """

    label: str
    model: str
    proxy_model: str = ""
    proxy_size: int | None = None
    group: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    task: str = "detection"
    recipes: Mapping[str, str] = field(default_factory=dict)
    quoted: bool = False
    init_from: Mapping[str, str] = field(default_factory=dict)
    proxy_seeds: int = 5

    def seeds_in(self, profile: str, seeds: tuple[int, ...]) -> tuple[int, ...]:
        """Those of the seeds that a profile trains; none where it does not train the row."""
        if not self.trains_in(profile):
            return ()
        own = profile == PROXY and seeds == PROFILES[PROXY].seeds
        return seeds[: self.proxy_seeds] if own else seeds

    def trains_in(self, profile: str) -> bool:
        """Whether the row is trained in a profile."""
        if profile == PROXY and not self.proxy_model:
            return False
        return not self.recipes or profile in self.recipes

    def model_in(self, profile: Profile) -> tuple[str, int | None]:
        """The model that a profile trains, and its image size; None: the model's own."""
        if profile.name == PROXY:
            return self.proxy_model, self.proxy_size or profile.image_size
        if profile.name == SMOKE:
            return self.proxy_model or self.model, profile.image_size
        return self.model, profile.image_size


@dataclass(frozen=True)
class Item:
    """A table or figure of the paper.

    Attributes:
        id: `table-01` to `table-11`, `figure-01` to `figure-05`.
        title: what it shows.
        notebook: stem of its notebook.
        rows: what it trains and measures; empty where it only draws on specifications.
    """

    id: str
    title: str
    notebook: str
    rows: tuple[Row, ...] = ()


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            SMOKE,
            dict.fromkeys(TASKS, "smoke_detection"),
            seeds=(0,),
            image_size=64,
            data=_scenes(_SMOKE_DATA),
        ),
        Profile(
            PROXY,
            {
                "detection": "proxy_detection",
                "instances": "proxy_detection",
                "classification": "proxy_classification",
                "segmentation": "proxy_segmentation",
            },
            seeds=(0, 1, 2, 3, 4),
            image_size=128,
            data=_scenes(PROXY_DATA),
        ),
        Profile(
            PAPER,
            {task: f"paper_{task}" for task in TASKS},
            seeds=(0,),
            image_size=None,
            data={},
        ),
    )
}


def _itself(label: str, model: str, task: str = "detection", **changes: Any) -> Row:
    """The row of a model that is its own proxy."""
    return Row(label, model, model, task=task, **changes)


# Table 3: detection on COCO at 512 to 768 pixels. Compared at equal cost: D0, D1 and D2 each with
# EfficientNet-FPN and EfficientDet of its size. The proxy has the D0 size; the others take 2 to 40
# times as long. EfficientDet's numbers are quoted.
_R50 = "ResNet-50-FPN"
_TABLE_3 = (
    _itself("Eff-SpineNet-D0", "eff_spinenet_d0", group="D0"),
    Row("Eff-SpineNet-D1", "eff_spinenet_d1", group="D1"),
    Row("Eff-SpineNet-D2", "eff_spinenet_d2", group="D2"),
    _itself("EfficientNet-B0-FPN", "efficientnet_b0_fpn", group="D0"),
    Row("EfficientNet-B1-FPN", "efficientnet_b1_fpn", group="D1"),
    Row("EfficientNet-B2-FPN", "efficientnet_b2_fpn", group="D2"),
    _itself("EfficientDet-D0", "efficientdet_d0", group="D0", quoted=True),
    Row("EfficientDet-D1", "efficientdet_d1", group="D1", quoted=True),
    Row("EfficientDet-D2", "efficientdet_d2", group="D2", quoted=True),
    # Table 4: its 42.3 AP are those of 250 epochs.
    Row(
        _R50,
        "resnet50_fpn",
        recipes={SMOKE: "smoke_detection", PAPER: "paper_detection_250_epochs"},
    ),
    Row("SpineNet-49", "spinenet_49"),
)

# Tables 4 and 5: training strategies and lengths. The proxy trains M0 in place of D2, and without
# ResNet-50, which is too large for it.
_D2, _M0 = "Eff-SpineNet-D2", "eff_spinenet_m0"
_RELU = {"activation": "relu"}
_NO_SE = {**_RELU, "squeeze_excitation": False}


def _strategy(label: str, options: Mapping[str, Any], paper: str, proxy: str) -> Row:
    """A row of Table 4 or 5, by the recipes of both profiles; `paper` empty: not the paper's."""
    recipes = {PAPER: paper, PROXY: proxy, SMOKE: "smoke_detection"}
    recipes = {profile: recipe for profile, recipe in recipes.items() if recipe}
    return Row(f"{_D2} {label}", "eff_spinenet_d2", _M0, options=options, recipes=recipes)


def _r50_strategy(label: str, options: Mapping[str, Any], paper: str) -> Row:
    recipes = {PAPER: paper, SMOKE: "smoke_detection"}
    return Row(f"{_R50} {label}", "resnet50_fpn", options=options, recipes=recipes)


_BASELINE, _MS_TRAIN = "paper_strategies_baseline", "paper_strategies_ms_train"
_TABLE_4 = (
    _strategy("baseline", _NO_SE, _BASELINE, "proxy_strategies_baseline"),
    _strategy("+SE", _RELU, _BASELINE, "proxy_strategies_baseline"),
    _strategy("+long schedule", _RELU, "", "proxy_strategies_long"),
    _strategy("+ms train", _RELU, _MS_TRAIN, "proxy_strategies_ms_train"),
    _strategy("+Swish", {}, _MS_TRAIN, "proxy_strategies_ms_train"),
    _strategy("+SD", {}, "paper_detection", "proxy_strategies_stochastic_depth"),
    _r50_strategy("baseline", _RELU, _BASELINE),
    _r50_strategy("+ms train", _RELU, "paper_strategies_ms_train_250_epochs"),
    _r50_strategy("+Swish", {}, "paper_strategies_ms_train_250_epochs"),
    _r50_strategy("+SD", {}, "paper_detection_250_epochs"),
)
_TABLE_5 = (
    *(
        _strategy(
            f"{epochs} epochs",
            {},
            f"paper_detection_{epochs}_epochs",
            f"proxy_detection_{epochs}_epochs",
        )
        for epochs in SCHEDULE_EPOCHS
    ),
    _strategy("650 epochs", {}, "paper_detection", "proxy_detection_650_epochs"),
)

# Table 6: Mask R-CNN on COCO. The proxy has the smallest and the largest size, in the paper's
# proportion of images.
_LONG = 3  # seeds of a row whose run takes over half an hour, or starts from one that does
_TABLE_6 = (
    Row("Eff-SpineNet-D0", "eff_spinenet_d0", _M0, 128, task="instances", proxy_seeds=_LONG),
    Row("Eff-SpineNet-D1", "eff_spinenet_d1", task="instances"),
    Row(
        "Eff-SpineNet-D2",
        "eff_spinenet_d2",
        "eff_spinenet_m2",
        192,
        task="instances",
        proxy_seeds=_LONG,
    ),
)

# Table 7: mobile detection on COCO, Eff-SpineNet at 256 and 384 pixels, the others at 320, all
# quoted. The proxy has half of these sizes, for MnasFPN 144, at which its cost is that of its
# group. NAS-FPN's 15 repeats are a fit to the printed cost, so it is compared in cost alone;
# MnasNet-A1 costs a sixth less than M2.
_TABLE_7 = (
    _itself("Eff-SpineNet-M0", "eff_spinenet_m0", group="M0", proxy_size=128),
    _itself("Eff-SpineNet-M1", "eff_spinenet_m1", group="M1", proxy_size=192, proxy_seeds=_LONG),
    _itself("Eff-SpineNet-M2", "eff_spinenet_m2", group="M2", proxy_size=192, proxy_seeds=_LONG),
    *(
        Row(label, model, model if size else "", size, group, quoted=True, proxy_seeds=seeds)
        for label, model, group, size, seeds in (
            ("MobileNetV3-Small-SSDLite", "mobilenetv3_small_ssdlite", "M0", 160, 5),
            ("MobileNetV3-SSD", "mobilenetv3_large_ssdlite", "M1", 160, 5),
            ("MobileNetV2 + MnasFPN", "mobilenetv2_mnasfpn", "M1", 144, 5),
            ("MnasNet-A1-SSD", "mnasnet_a1_ssdlite", "M2", None, 0),
            ("MobileNetV2-NAS-FPN", "mobilenetv2_nas_fpn", "M2", None, 0),
            ("MobileNetV2-FPN", "mobilenetv2_fpn", "M2", 160, _LONG),
        )
    ),
)

# Table 8: SP-EfficientNet-B0 and the distribution that was learned from it. Table 9: D0 without
# space-to-depth (model 1), and without weighted fusion too (model 2).
_TABLE_8 = (
    Row("SP-EfficientNet-B0", "sp_efficientnet_b0", "sp_efficientnet_m0", group="D0"),
    Row("Eff-SpineNet-D0", "eff_spinenet_d0", "eff_spinenet_m0", group="D0"),
)
_TABLE_9 = tuple(
    Row(label, "eff_spinenet_d0", "eff_spinenet_m0", group="D0", options=options)
    for label, options in (
        ("Eff-SpineNet-D0", {}),
        ("model 1", {"space_to_depth": False}),
        ("model 2", {"space_to_depth": False, "weighted_fusion": False}),
    )
)

# Table 10: ImageNet at 224 to 260 pixels; EfficientNet is quoted. A row of the proxy alone leaves
# out P6 and P7, which the paper takes for the reason why Eff-SpineNet is less accurate.
_CLASSIFICATION = "classification"
_TABLE_10 = (
    *(
        Row(
            label,
            model,
            model if size == 0 else "",
            group=f"D{size}",
            task=_CLASSIFICATION,
            quoted=q,
        )
        for size in range(3)
        for label, model, q in (
            (f"Eff-SpineNet-D{size}", f"eff_spinenet_d{size}", False),
            (f"EfficientNet-B{size}", f"efficientnet_b{size}", True),
        )
    ),
    Row(
        "Eff-SpineNet-D0, P3 to P5",
        "eff_spinenet_d0",
        "eff_spinenet_d0",
        group="D0",
        options={"coarse_levels": False},
        task=_CLASSIFICATION,
        recipes={PROXY: "proxy_classification", SMOKE: "smoke_detection"},
    ),
)

# Table 11: segmentation of VOC from the backbones of Table 3; in the proxy, of Table 7, and M0 from
# fresh weights too. The two DeepLabv3 rows are quoted and start from COCO weights of networks that
# no item trains: they have costs alone.
_SEGMENTATION = "segmentation"
_TABLE_11 = (
    *(
        Row(
            label,
            model,
            proxy,
            task=_SEGMENTATION,
            init_from={PAPER: "table-03", PROXY: "table-07"},
            proxy_seeds=seeds,
        )
        for label, model, proxy, seeds in (
            ("Eff-SpineNet-D0", "eff_spinenet_d0", _M0, 5),
            ("Eff-SpineNet-D2", "eff_spinenet_d2", "eff_spinenet_m2", _LONG),
        )
    ),
    Row(
        "Eff-SpineNet-D0, from scratch",
        "eff_spinenet_d0",
        _M0,
        task=_SEGMENTATION,
        recipes={PROXY: "proxy_segmentation"},
    ),
)

ITEMS: dict[str, Item] = {
    item.id: item
    for item in (
        Item("table-01", "Block specifications", "table_01_block_specs"),
        Item("table-02", "Model scaling", "table_02_scaling"),
        Item(
            "table-03",
            "One-stage object detection on COCO",
            "table_03_one_stage_detection",
            _TABLE_3,
        ),
        Item(
            "table-04",
            "Training strategies, one at a time",
            "table_04_training_strategies",
            _TABLE_4,
        ),
        Item("table-05", "Longer training schedules", "table_05_training_schedule", _TABLE_5),
        Item(
            "table-06",
            "Two-stage detection and instance segmentation on COCO",
            "table_06_two_stage_detection",
            _TABLE_6,
        ),
        Item(
            "table-07",
            "Mobile-size object detection on COCO",
            "table_07_mobile_detection",
            _TABLE_7,
        ),
        Item(
            "table-08", "Learned resource distribution", "table_08_learned_distribution", _TABLE_8
        ),
        Item(
            "table-09",
            "Weighted fusion and space-to-depth",
            "table_09_architecture_ablation",
            _TABLE_9,
        ),
        Item("table-10", "ImageNet classification", "table_10_classification", _TABLE_10),
        Item(
            "table-11",
            "Semantic segmentation on PASCAL VOC 2012",
            "table_11_semantic_segmentation",
            _TABLE_11,
        ),
        Item(
            "figure-01",
            "FLOPs and parameters against AP, regular-size detectors",
            "figure_01_regular_size_tradeoff",
        ),
        Item("figure-02", "Resampling operation", "figure_02_resampling"),
        Item("figure-03", "Feature dimensions and resource shares", "figure_03_distribution"),
        Item(
            "figure-04", "Multi-Adds against AP, mobile-size detectors", "figure_04_mobile_tradeoff"
        ),
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


def default_results_dir() -> Path:
    """`results` of the checkout that the library is installed from, else of the current folder."""
    checkout = Path(__file__).resolve().parents[2]
    return (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / "results"


def item_status(*results_dirs: str | os.PathLike[str]) -> pd.DataFrame:
    """One row an item: what of it is measured, counted in the CSVs.

    Args:
        results_dirs: results folders; what is measured in any of them counts, but for runs that
            stopped before their last step.

    Returns:
        Columns `item`, `title`, `notebook`, `paper_values`, `cost_rows`, `proxy_rows`,
        `paper_scale_rows` (numbers of rows).
    """
    counts = merged_results(results_dirs, PROFILES).groupby(["item", "source"]).size()
    return pd.DataFrame(
        [
            {
                "item": item.id,
                "title": item.title,
                "notebook": item.notebook,
                "paper_values": len(paper_values(item.id)) if item.id.startswith("table") else 0,
                **{
                    f"{source}_rows": int(counts.get((item.id, source), 0))
                    for source in ("cost", "proxy", "paper_scale")
                },
            }
            for item in ITEMS.values()
        ]
    )
