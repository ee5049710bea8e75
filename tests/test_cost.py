"""Cost against an independent counter, a hand sum, and the paper's cells."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from effspinenet_lib import create_model, measure_cost
from effspinenet_lib.models.cost import layer_multi_adds

# facts of the paper: Tables 3, 8 and 9 (billions of Multi-Adds, millions of parameters).
PAPER = [
    ("sp_efficientnet_b0", {}, 512, 2.4, 4.4),
    ("eff_spinenet_d0", {}, 512, 2.5, 3.6),
    ("eff_spinenet_d0", {"space_to_depth": False}, 512, 2.4, 3.3),
    ("eff_spinenet_d0", {"space_to_depth": False, "weighted_fusion": False}, 512, 2.4, 3.3),
    ("eff_spinenet_d1", {}, 640, 6.0, 5.2),
    ("eff_spinenet_d2", {}, 768, 10.3, 6.2),
]


@pytest.mark.parametrize(("name", "options", "size", "multi_adds", "parameters"), PAPER)
def test_costs_stand_within_the_papers_rounding(name, options, size, multi_adds, parameters):
    cost = measure_cost(create_model(name, **options), size)
    assert cost.multi_adds / 1e9 == pytest.approx(multi_adds, rel=0.025)
    assert cost.parameters / 1e6 == pytest.approx(parameters, rel=0.025)


def test_the_first_model_costs_what_was_recovered():
    cost = measure_cost(create_model("eff_spinenet_d0"), 512)
    assert str(cost) == "2.51 B multi-adds, 3.68 M parameters"


@pytest.mark.parametrize("size", [128, 224])
def test_multi_adds_against_torchs_counter(size):
    model = create_model("eff_spinenet_m0", num_classes=7).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.network(torch.zeros(1, 3, size, size))
    counted = counter.get_total_flops()
    assert measure_cost(model, size).multi_adds * 2 == counted


def test_a_small_model_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),  # 8x8 out: 64 * 8 * 27
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),  # 64 * 8 * 9
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),  # 80
    )
    cost = measure_cost(model, 16)
    assert cost.multi_adds == 64 * 8 * 27 + 64 * 8 * 9 + 80
    assert cost.parameters == 8 * 27 + 16 + 8 * 9 + 80 + 10


def test_a_transposed_convolution_uses_each_weight_once_an_input_position():
    layer = nn.ConvTranspose2d(4, 6, 2, stride=2)
    features = torch.zeros(1, 4, 5, 5)
    assert layer_multi_adds(layer, features, layer(features)) == 25 * 4 * 6 * 4


def test_the_models_mode_is_restored():
    model = create_model("eff_spinenet_m0").train()
    measure_cost(model, 64)
    assert model.training
    assert not any(layer._forward_hooks for layer in model.modules())
