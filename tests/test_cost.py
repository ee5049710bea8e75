"""Costs: the authors' own counts, an independent counter, hand sums, and the committed table."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from effspinenet_lib import create_model, measure_cost
from effspinenet_lib.experiments import default_results_dir
from effspinenet_lib.experiments.cost_table import model_cost
from effspinenet_lib.models.cost import layer_multi_adds
from effspinenet_lib.models.layers import MBConv, WeightedFusion
from effspinenet_lib.models.zoo import default_image_size, list_models, model_entry
from effspinenet_lib.results import COST_UNITS, read_table
from effspinenet_lib.results.paper import paper_values

ITEMS = ("table-03", "table-06", "table-07", "table-08", "table-09", "table-10", "table-11")
OWN = ("eff_spinenet", "sp_efficientnet")
PLAIN = {"space_to_depth": False}
# What the authors' tool gives for the authors' network, which sums a block's inputs, in billions
# and millions (TensorFlow 1.15, tensorflow/tpu at 1021ed8; segmentation's parameters not counted).
AUTHORS: list[tuple[str, str, dict[str, Any], float, float | None]] = [
    ("eff_spinenet_d0", "detection", {}, 2.4598, 3.7472),
    ("eff_spinenet_d1", "detection", {}, 5.9194, 5.2036),
    ("eff_spinenet_d2", "detection", {}, 10.2921, 6.2093),
    ("eff_spinenet_d0", "instances", {}, 4.7275, 4.6375),
    ("eff_spinenet_d1", "instances", {}, 9.1727, 6.3945),
    ("eff_spinenet_d2", "instances", {}, 15.9587, 9.2288),
    ("eff_spinenet_m0", "detection", {}, 0.1528, 0.6730),
    ("eff_spinenet_m1", "detection", {}, 0.4818, 0.9860),
    ("eff_spinenet_m2", "detection", {}, 0.9687, 2.3608),
    ("sp_efficientnet_b0", "detection", {}, 2.3390, 4.5850),
    ("eff_spinenet_d0", "detection", PLAIN, 2.3693, 3.3086),
    ("eff_spinenet_d0", "classification", {}, 0.3815, 3.5667),
    ("eff_spinenet_d1", "classification", {}, 0.6936, 4.9664),
    ("eff_spinenet_d2", "classification", {}, 0.8909, 5.8276),
    ("eff_spinenet_d0", "segmentation", {}, 2.0639, None),
    ("eff_spinenet_d2", "segmentation", {}, 3.7771, None),
]


@pytest.mark.parametrize(("name", "task", "options", "operations", "parameters"), AUTHORS)
def test_the_count_is_that_of_the_authors_tool(
    name: str, task: str, options: dict[str, Any], operations: float, parameters: float | None
) -> None:
    given = (("weighted_fusion", False), *options.items())
    cost = model_cost(name, task, default_image_size(name, task), given)
    assert round(cost.authors_count / 1e9, 4) == operations
    if parameters is not None:
        assert round(cost.parameters / 1e6, 4) == parameters


def test_the_count_of_d0_to_the_operation() -> None:
    """4,919,507,035 float operations there; 53 of the graph's belong to no layer."""
    cost = model_cost("eff_spinenet_d0", "detection", 512, (("weighted_fusion", False),))
    assert 2 * cost.authors_count == 4_919_507_035 - 53
    assert 2 * cost.multi_adds == 4_469_845_696 + 319_271_424  # convolutions, depthwise ones


def test_multiply_adds_against_torchs_counter() -> None:
    size = 128
    model = create_model("eff_spinenet_m0", num_classes=7).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.network(torch.zeros(1, 3, size, size))
    counted = counter.get_total_flops()
    assert measure_cost(model, size).multi_adds * 2 == counted


def test_a_small_model_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),  # 8x8 out: 64 * 8 * 27
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),  # 64 * 8 * 9
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),  # 80
    )
    cost = measure_cost(model, 16)
    assert cost.multi_adds == 64 * 8 * 27 + 64 * 8 * 9 + 80
    assert cost.parameters == 8 * 27 + 16 + 8 * 9 + 80 + 10
    weights = 8 * 27 + 8 * 9 + 80
    elementwise = 3 * 64 * 8  # norm, swish, mean
    operations = elementwise + 5 * 8 + 10 + 2 * weights  # norm's channels, bias, initialisers
    assert cost.authors_count == cost.multi_adds + operations / 2


def test_gates_residuals_and_fusion_by_hand() -> None:
    block = MBConv(8, 8, 3, 1, 6, 0.2, "swish", 0.0)

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = nn.Conv2d(3, 8, 1, bias=False)
            self.block, self.fuse = block, WeightedFusion(2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            features = self.lift(images)
            return self.fuse([features, self.block(features)])

    cost = measure_cost(Fused(), 4)
    multi_adds = 16 * (3 * 8 + 8 * 48 + 48 * 9 + 48 * 8) + 2 * 48
    assert cost.multi_adds == multi_adds
    weights = 3 * 8 + 8 * 48 + 48 * 9 + 2 * 48 + 48 * 8
    norms = 16 * (48 + 48 + 8) + 5 * (48 + 48 + 8)
    swish = 16 * (48 + 48) + 1
    squeeze = 2 * 16 * 48 + 48 + 1  # mean and gate, biases
    residual, fusion = 16 * 8, 2 * 16 * 8
    operations = norms + swish + squeeze + residual + fusion + 2 * weights
    assert cost.authors_count == multi_adds + operations / 2


def test_a_transposed_convolution_uses_each_weight_once_an_input_position() -> None:
    layer = nn.ConvTranspose2d(4, 6, 2, stride=2)
    features = torch.zeros(1, 4, 5, 5)
    assert layer_multi_adds(layer, features, layer(features)) == 25 * 4 * 6 * 4


def test_the_models_mode_is_restored() -> None:
    model = create_model("eff_spinenet_m0").train()
    measure_cost(model, 64)
    assert model.training
    assert not any(layer._forward_hooks for layer in model.modules())


# ---- the committed table


@pytest.fixture(scope="module")
def everything() -> pd.DataFrame:
    return read_table(default_results_dir() / "cost" / "costs.csv", "cost")


@pytest.fixture(scope="module")
def costs(everything: pd.DataFrame) -> pd.DataFrame:
    return everything.dropna(subset="printed")


def test_every_model_is_counted_for_every_task(everything: pd.DataFrame) -> None:
    pairs = set(everything[["model", "task"]].itertuples(index=False, name=None))
    assert pairs == {
        (name, task) for name in list_models() for task in model_entry(name).image_sizes
    }
    assert (everything.groupby(["model", "task"])["metric"].nunique() == 2).all()


def test_every_printed_cost_has_its_row(costs: pd.DataFrame) -> None:
    paper = pd.concat([paper_values(item) for item in ITEMS])
    paper = paper[paper["metric"].isin(COST_UNITS)].dropna(subset="value")
    printed = paper.set_index(["item", "row", "metric"])["value"]
    listed = costs.set_index(["item", "row", "metric"])["printed"]
    assert len(listed) == 72
    pd.testing.assert_series_equal(
        printed.sort_index(), listed.sort_index(), check_names=False, check_exact=True
    )


def test_28_of_36_own_cells_are_met_to_the_digits_and_the_others_explained(
    costs: pd.DataFrame,
) -> None:
    own = costs[costs["model"].str.startswith(OWN)]
    assert len(own) == 36
    assert (own["as_printed"] == "yes").sum() == 28
    missed = own[own["as_printed"] == "no"]
    assert (missed["note"] != "").all()
    far = own[own["authors_difference_percent"].abs() > 3]
    assert set(far[["model", "metric"]].itertuples(index=False, name=None)) == {
        ("eff_spinenet_d0", "parameters"),
        ("sp_efficientnet_b0", "parameters"),
        ("eff_spinenet_m1", "multi_adds"),
    }


def test_the_cells_of_other_models_are_close_or_explained(costs: pd.DataFrame) -> None:
    others = costs[~costs["model"].str.startswith(OWN)]
    nearest = others[["difference_percent", "authors_difference_percent"]].abs().min(axis=1)
    assert (others[nearest > 5]["note"] != "").all()


@pytest.mark.parametrize("column", ["measured", "authors_count"])
def test_the_differences_are_those_of_the_numbers(costs: pd.DataFrame, column: str) -> None:
    stated = {
        "measured": "difference_percent",
        "authors_count": "authors_difference_percent",
    }[column]
    computed = 100 * (costs[column] / costs["printed"] - 1)
    assert (computed - costs[stated]).abs().max() < 0.01


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("eff_spinenet_m0", "detection"),
        ("efficientdet_d0", "detection"),
        ("mobilenetv3_small_ssdlite", "detection"),
        ("efficientnet_b0", "classification"),
    ],
)
def test_committed_costs_are_what_the_models_cost_now(
    costs: pd.DataFrame, name: str, task: str
) -> None:
    rows = costs[(costs["model"] == name) & (costs["task"] == task) & (costs["options"] == "")]
    cost = model_cost(name, task, default_image_size(name, task))
    for row in rows.itertuples(index=False):
        measured = getattr(cost, str(row.metric)) / COST_UNITS[str(row.metric)][0]
        assert row.measured == pytest.approx(measured, abs=1e-6)
