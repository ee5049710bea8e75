"""Layers and backbone: shapes, wiring, ablation switches."""

import math

import pytest
import torch
from torch.nn import functional as F

from effspinenet_lib.errors import UserError
from effspinenet_lib.models.layers import (
    MBConv,
    Resample,
    SpaceToDepth,
    StochasticDepth,
    WeightedFusion,
)
from effspinenet_lib.models.scale_permuted import BackboneOptions, EffSpineNet
from effspinenet_lib.models.specs import MODELS

SPEC = MODELS["eff_spinenet_m0"].backbone


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return EffSpineNet(SPEC).eval()


@pytest.mark.parametrize("size", [(64, 64), (128, 192), (224, 224), (240, 240), (97, 131)])
def test_feature_sides_are_ceilings(backbone, size):
    with torch.inference_mode():
        features = backbone(torch.randn(2, 3, *size))
    assert list(features) == [3, 4, 5, 6, 7]
    for level, feature in features.items():
        expected = tuple(-(-side // 2**level) for side in size)
        assert feature.shape == (2, backbone.feature_dims[level], *expected)


def test_the_papers_sides_at_224(backbone):
    with torch.inference_mode():
        features = backbone(torch.randn(1, 3, 224, 224))
    assert features[6].shape[-2:] == (4, 4)
    assert features[7].shape[-2:] == (2, 2)


@pytest.mark.parametrize("size", [(63, 128), (128, 32)])
def test_small_images_are_refused_with_the_reason(backbone, size):
    with pytest.raises(UserError, match="at least 64 pixels"):
        backbone(torch.randn(1, 3, *size))


@pytest.mark.parametrize(
    "options",
    [
        {"space_to_depth": False},
        {"weighted_fusion": False},
        {"squeeze_excitation": False},
        {"activation": "relu"},
        {"stochastic_depth": 0.0},
    ],
)
def test_each_option_changes_the_network_alone(options):
    torch.manual_seed(0)
    model = EffSpineNet(SPEC, BackboneOptions(**options))
    model.train()
    features = model(torch.randn(2, 3, 128, 128))
    sum(feature.square().mean() for feature in features.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without
    names = {type(layer).__name__ for layer in model.modules()}
    assert ("SpaceToDepth" in names) == options.get("space_to_depth", True)
    assert ("WeightedFusion" in names) == options.get("weighted_fusion", True)
    assert ("SqueezeExcitation" in names) == options.get("squeeze_excitation", True)
    assert ("SiLU" in names) == (options.get("activation", "swish") == "swish")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "swishy"}, "unknown activation 'swishy'; did you mean swish"),
        ({"space_to_depth": "fales"}, "space_to_depth is 'fales'; it must be true or false"),
        ({"weighted_fusion": 1}, "weighted_fusion is 1; it must be true or false"),
        ({"stochastic_depth": "foo"}, "stochastic_depth is 'foo'"),
        ({"stochastic_depth": 5}, "stochastic_depth is 5; it must be a number from 0 to below 1"),
        ({"stochastic_depth": math.nan}, "stochastic_depth is nan"),
    ],
)
def test_values_that_mean_no_network_are_refused(options, message):
    with pytest.raises(UserError) as caught:
        BackboneOptions(**options)
    assert message in str(caught.value)


def test_stochastic_depth_grows_linearly_to_the_last_block():
    model = EffSpineNet(SPEC, BackboneOptions(stochastic_depth=0.36))
    rates = [
        next(layer.p for layer in group.modules() if isinstance(layer, StochasticDepth))
        for group in model.groups
    ]
    assert rates == pytest.approx([0.02 * number for number in range(1, 19)])


def test_an_output_depends_on_the_inputs_that_the_table_names(backbone):
    """Cut each of block 16's inputs (9, 14 and the idle 13); P5 must change each time."""
    images = torch.randn(1, 3, 128, 128)
    with torch.inference_mode():
        before = backbone(images)[5]
        for source in (9, 14, 13):
            resample = backbone.fusions["16"].resample[str(source)]
            handle = resample.register_forward_hook(lambda _m, _i, output: output * 0)
            after = backbone(images)[5]
            handle.remove()
            assert not torch.allclose(before, after)


def test_space_to_depth_against_a_loop():
    features = torch.randn(2, 3, 6, 4)
    moved = SpaceToDepth()(features)
    for channel in range(3):
        for row in range(2):
            for column in range(2):
                assert torch.equal(
                    moved[:, channel * 4 + row * 2 + column],
                    features[:, channel, row::2, column::2],
                )


def test_space_to_depth_pads_odd_sides_with_zeros():
    moved = SpaceToDepth()(torch.ones(1, 1, 3, 3))
    assert moved.shape == (1, 4, 2, 2)
    assert moved.sum() == 9


@pytest.mark.parametrize("space_to_depth", [True, False])
@pytest.mark.parametrize(
    ("levels", "sides"), [((2, 5), (32, 4)), ((3, 4), (15, 8)), ((5, 2), (4, 31)), ((4, 4), (8, 8))]
)
def test_resampling_reaches_the_target(space_to_depth, levels, sides):
    resample = Resample(8, levels[0], 12, levels[1], space_to_depth).eval()
    out = resample(torch.randn(1, 8, sides[0], sides[0]), (sides[1], sides[1]))
    assert out.shape == (1, 12, sides[1], sides[1])


def test_resampling_to_the_same_level_and_dimension_is_the_identity():
    features = torch.randn(1, 8, 4, 4)
    assert Resample(8, 4, 8, 4, True)(features, (4, 4)) is features


def test_fusion_is_equation_1():
    fusion = WeightedFusion(3)
    fusion.weights.data = torch.tensor([0.5, 2.0, -1.0])
    a, b, c = torch.randn(3, 2, 4, 5, 5)
    expected = (0.5 * a + 2.0 * b + 0.0 * c) / (0.5 + 2.0 + 0.0 + 0.001)
    assert torch.allclose(fusion([a, b, c]), expected, atol=1e-6)


def test_mbconv_against_its_formula():
    torch.manual_seed(0)
    block = MBConv(8, 8, 3, 1, 6, 0.2, "swish", 0.0).eval()
    assert block.excite.reduce.out_channels == int(0.2 * 8)
    features = torch.randn(2, 8, 7, 7)
    x = F.silu(block.expand[1](F.conv2d(features, block.expand[0].weight)))
    x = F.conv2d(x, block.depthwise[0].weight, padding=1, groups=48)
    x = F.silu(block.depthwise[1](x))
    gate = block.excite.expand(F.silu(block.excite.reduce(x.mean((2, 3), keepdim=True))))
    x = block.project(x * torch.sigmoid(gate))
    assert torch.allclose(block(features), x + features, atol=1e-5)


def test_mbconv_without_a_residual_where_the_shape_changes():
    assert not MBConv(8, 12, 3, 1, 6, 0.2, "swish", 0.0).residual
    assert not MBConv(8, 8, 3, 2, 6, 0.2, "swish", 0.0).residual
    assert MBConv(8, 12, 3, 2, 6, 0.2, "swish", 0.0)(torch.randn(2, 8, 7, 7)).shape[-1] == 4
