"""Layers and backbone: shapes, wiring, ablation switches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effspinenet_lib.errors import UserError
from effspinenet_lib.models.layers import (
    TRUNCATED_STD,
    DepthwiseConv2d,
    MBConv,
    Resample,
    SpaceToDepth,
    WeightedFusion,
    initialise,
)
from effspinenet_lib.models.scale_permuted import EffSpineNet
from effspinenet_lib.models.specs import MODELS, backbone_spec
from effspinenet_lib.models.zoo import check_model, create_model

SPEC = MODELS["eff_spinenet_m0"].backbone


@pytest.fixture(scope="module")
def backbone() -> EffSpineNet:
    torch.manual_seed(0)
    return EffSpineNet(SPEC).eval()


@pytest.mark.parametrize("size", [(64, 64), (128, 192), (224, 224), (97, 131)])
def test_feature_sides_are_ceilings(backbone: EffSpineNet, size: tuple[int, int]) -> None:
    with torch.inference_mode():
        features = backbone(torch.randn(2, 3, *size))
    assert list(features) == [3, 4, 5, 6, 7]
    for level, feature in features.items():
        expected = tuple(-(-side // 2**level) for side in size)
        assert feature.shape == (2, backbone.feature_dims[level], *expected)


@pytest.mark.parametrize("size", [(63, 128), (128, 32)])
def test_small_images_are_refused_with_the_reason(
    backbone: EffSpineNet, size: tuple[int, int]
) -> None:
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
def test_each_option_changes_the_network_alone(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = EffSpineNet(SPEC, **options)
    model.train()
    features = model(torch.randn(2, 3, 128, 128))
    sum(feature.square().mean() for feature in features.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without
    names = {type(layer).__name__ for layer in model.modules()}
    squeezes = options.get("squeeze_excitation", True)
    assert ("SpaceToDepth" in names) == options.get("space_to_depth", True)
    assert ("WeightedFusion" in names) == options.get("weighted_fusion", True)
    assert ("SqueezeExcitation" in names) == squeezes
    # squeeze-and-excitation has swish whatever the model's activation
    relu = options.get("activation") == "relu"
    assert ("ReLU" in names) == relu
    assert ("SiLU" in names) == (not relu or squeezes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "swishy"}, "unknown activation 'swishy'; did you mean swish"),
        ({"space_to_depth": "fales"}, "space_to_depth is 'fales'; it must be true or false"),
        ({"weighted_fusion": 1}, "weighted_fusion is 1; it must be true or false"),
        ({"stochastic_depth": "foo"}, "stochastic_depth is 'foo'"),
        ({"stochastic_depth": 5}, "stochastic_depth is 5; it must be a number from 0 to below 1"),
        ({"stochastic_depth": float("nan")}, "stochastic_depth is nan"),
        ({"depth": 1}, "unknown model option 'depth'"),
        ({"betas": "1-2"}, "18 whole numbers"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_model("eff_spinenet_m0", "detection", options)
    assert message in str(caught.value)


def test_stochastic_depth_is_the_authors() -> None:
    """rate * (i + 1) / 15 for the i-th block behind the stem, none in blocks 1 to 3."""
    model = EffSpineNet(MODELS["eff_spinenet_d1"].backbone, stochastic_depth=0.3)
    rates = [[layer.drop.p for layer in group] for group in model.groups]
    for number, group in enumerate(rates, start=1):
        assert group == [pytest.approx(max(0, number - 3) * 0.02)] * len(group)


def test_an_output_depends_on_the_inputs_that_the_table_names(backbone: EffSpineNet) -> None:
    """Cut each of block 16's inputs (9, 14 and the idle 13); P5 must change each time."""
    images = torch.randn(1, 3, 128, 128)
    fusion = backbone.fusions["16"]
    assert fusion.idle == (13,)
    sources = [*fusion.resample.values(), backbone.groups[12]]
    with torch.inference_mode():
        before = backbone(images)[5]
        for source in sources:
            handle = source.register_forward_hook(lambda _m, _i, output: output * 0)
            after = backbone(images)[5]
            handle.remove()
            assert not torch.allclose(before, after)


def test_a_block_that_nothing_takes_in_is_not_trained() -> None:
    spec = backbone_spec((1,) * 12 + (20,) + (1,) * 5)
    model = EffSpineNet(spec)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(n.startswith(("groups.12.", "fusions.13.")) for n in frozen)
    sum(f.mean() for f in model.train()(torch.randn(2, 3, 64, 64)).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_levels_that_are_not_read_are_not_trained() -> None:
    torch.manual_seed(0)
    model = create_model("eff_spinenet_m0", "classification", 5, coarse_levels=False)
    target = [{"label": torch.tensor(1)}] * 2
    sum(model.train()(torch.randn(2, 3, 128, 128), target).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert any(not p.requires_grad for p in model.parameters())


def test_space_to_depth_against_a_loop() -> None:
    features = torch.randn(2, 3, 6, 4)
    moved = SpaceToDepth()(features)
    for channel in range(3):
        for row in range(2):
            for column in range(2):
                assert torch.equal(
                    moved[:, channel * 4 + row * 2 + column],
                    features[:, channel, row::2, column::2],
                )
    odd = SpaceToDepth()(torch.ones(1, 1, 3, 3))
    assert odd.shape == (1, 4, 2, 2)
    assert odd.sum() == 9


@pytest.mark.parametrize("space_to_depth", [True, False])
@pytest.mark.parametrize(
    ("levels", "sides"),
    [((2, 5), (32, 4)), ((3, 4), (15, 8)), ((4, 7), (9, 2)), ((5, 2), (4, 31)), ((4, 4), (8, 8))],
)
def test_resampling_reaches_the_target(
    space_to_depth: bool, levels: tuple[int, int], sides: tuple[int, int]
) -> None:
    resample = Resample(8, levels[0], 12, levels[1], space_to_depth, "swish").eval()
    out = resample(torch.randn(1, 8, sides[0], sides[0]), (sides[1], sides[1]))
    assert out.shape == (1, 12, sides[1], sides[1])


def test_fusion_is_equation_1() -> None:
    fusion = WeightedFusion(3)
    fusion.weights.data = torch.tensor([0.5, 2.0, -1.0])
    a, b, c = torch.randn(3, 2, 4, 5, 5)
    expected = (0.5 * a + 2.0 * b + 0.0 * c) / (0.5 + 2.0 + 0.0 + 0.001)
    assert torch.allclose(fusion([a, b, c]), expected, atol=1e-6)


def test_mbconv_has_no_residual_where_the_shape_changes() -> None:
    assert not MBConv(8, 12, 3, 1, 6, 0.2, "swish", 0.0).residual
    assert not MBConv(8, 8, 3, 2, 6, 0.2, "swish", 0.0).residual
    assert MBConv(8, 12, 3, 2, 6, 0.2, "swish", 0.0)(torch.randn(2, 8, 7, 7)).shape[-1] == 4


def test_initial_weights_have_the_authors_distributions() -> None:
    torch.manual_seed(0)
    block = MBConv(64, 96, 3, 1, 6, 0.2, "swish", 0.0)
    initialise(block)
    wide = block.expand[0].weight
    assert wide.std().item() == pytest.approx(64**-0.5, rel=0.02)  # variance scaling, fan in
    assert wide.abs().max().item() < 2 * 64**-0.5 / TRUNCATED_STD
    depthwise = block.depthwise[0].weight
    limit = (6 / (9 * 384 + 9)) ** 0.5  # Glorot, uniform, fans 9 C and 9
    assert depthwise.abs().max().item() == pytest.approx(limit, rel=0.01)
    assert depthwise.std().item() == pytest.approx(limit / 3**0.5, rel=0.02)
    assert not block.excite.reduce.bias.any()


def test_a_stride_on_one_pixel_has_a_clean_gradient() -> None:
    """torch's own reads memory there that nobody wrote; freed memory is filled with NaN first."""
    conv = DepthwiseConv2d(64, 64, 3, 2, 1, groups=64, bias=False).to(torch.bfloat16)
    conv = conv.to(memory_format=torch.channels_last)
    for _ in range(50):
        filler = [torch.full((size,), torch.nan) for size in (64, 576, 1152, 4096, 65536)]
        del filler
        features = torch.randn(4, 64, 1, 1).to(torch.bfloat16, memory_format=torch.channels_last)
        conv.weight.grad = None
        conv(features).sum().backward()
        gradient = conv.weight.grad
        assert gradient.isfinite().all()
        off_centre = gradient.clone()
        off_centre[:, :, 1, 1] = 0
        assert not off_centre.any()
