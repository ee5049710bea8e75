"""The detectors of Table 3 against torchvision, timm, effdet and equations written out."""

from functools import partial

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F
from torchvision.models import efficientnet_b0, resnet50
from torchvision.ops import FeaturePyramidNetwork, StochasticDepth
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from effspinenet_lib import create_model
from effspinenet_lib.errors import UserError
from effspinenet_lib.models.fpn import BiFPN, BiFPNCell, FeaturePyramid, TimmFeatures
from effspinenet_lib.models.specs import MODELS, SPINENET_49

NAMES = ("efficientnet_b0_fpn", "efficientdet_d0", "resnet50_fpn", "spinenet_49")
LEVELS = (3, 4, 5, 6, 7)


def on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **options)


def effdets(name, side):
    """EfficientDet's code in PyTorch, with the symmetric padding of this library."""
    effdet = pytest.importorskip(
        "effdet", reason="the package effdet is not installed; it is the reference for EfficientDet"
    )
    config = effdet.get_efficientdet_config(name)
    config.image_size, config.pad_type = (side, side), ""
    config.backbone_name = config.backbone_name.removeprefix("tf_")
    return effdet.EfficientDet(config, pretrained_backbone=False)


def test_efficientdet_has_the_parameters_of_its_code():
    """The largest; the code runs beside the smallest below."""
    with torch.device("meta"):
        reference = effdets("tf_efficientdet_d2", 512)
    ours = on_meta("efficientdet_d2")
    assert [
        sum(p.numel() for p in part.parameters())
        for part in (ours.backbone, ours.class_head, ours.box_head)
    ] == [
        sum(p.numel() for p in (*reference.backbone.parameters(), *reference.fpn.parameters())),
        sum(p.numel() for p in reference.class_net.parameters()),
        sum(p.numel() for p in reference.box_net.parameters()),
    ]


def copy_in_order(source, target):
    """Load a module's tensors into another's, in the order of their making."""
    values = source.state_dict() if isinstance(source, nn.Module) else source
    keys = target.state_dict()
    target.load_state_dict(dict(zip(keys, values.values(), strict=True)))


def test_efficientdet_computes_what_its_code_does():
    torch.manual_seed(0)
    reference = effdets("tf_efficientdet_d0", 128).eval()
    randomise_norms(reference)
    ours = create_model("efficientdet_d0").eval()
    copy_in_order(reference.backbone, ours.backbone.extractor.stages)
    copy_in_order(reference.fpn.resample["3"].conv, ours.backbone.coarser)
    for cell, their_cell in zip(ours.backbone.cells, reference.fpn.cell, strict=True):
        nodes = [*(cell.down[level] for level in "6543"), *(cell.up[level] for level in "4567")]
        for node, theirs in zip(nodes, their_cell.fnode, strict=True):
            nn.init.uniform_(theirs.combine.edge_weights, -0.3, 2.0)
            copy_in_order(
                {
                    **theirs.combine.resample.state_dict(),
                    "edge_weights": theirs.combine.edge_weights,
                    **theirs.after_combine.state_dict(),
                },
                node,
            )
    heads = ((ours.class_head, reference.class_net), (ours.box_head, reference.box_net))
    for head, theirs in heads:
        copy_in_order(theirs.conv_rep, head.convs)
        copy_in_order(theirs.predict, head.predict)
        for layer, norms in enumerate(theirs.bn_rep):
            for level, norm in enumerate(norms):
                copy_in_order(norm, head.norms[level * head.layers + layer])
    images = torch.randn(2, 3, 128, 128)
    with torch.inference_mode():
        found = ours.network(images)[:2]
        expected = [
            torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, width) for level in levels], 1)
            for levels, width in zip(reference(images), (90, 4), strict=True)
        ]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_efficientdets_anchors_are_its_codes():
    """4 strides, three scales an octave; its ratios are rounded to 1.4 by 0.7."""
    model = on_meta("efficientdet_d0")
    anchors = model.anchors(torch.zeros(1, 3, 128, 128), ((16, 16),))[:9]
    sides = (anchors[:, 2:] - anchors[:, :2]).tolist()
    expected = [
        [4 * 8 * 2 ** (octave / 3) * scale for scale in ratio]
        for octave in range(3)
        for ratio in ((0.7, 1.4), (1.0, 1.0), (1.4, 0.7))
    ]
    assert torch.allclose(torch.tensor(sides), torch.tensor(expected), rtol=0.011)


@pytest.mark.parametrize("name", NAMES)
def test_every_norm_is_this_librarys(name):
    norms = [layer for layer in on_meta(name).modules() if isinstance(layer, nn.BatchNorm2d)]
    assert {layer.eps for layer in norms} == {1e-3}
    assert {round(layer.momentum, 6) for layer in norms} == {0.01}


@pytest.mark.parametrize("size", [(97, 131), (64, 65)])
@pytest.mark.parametrize("name", ["efficientnet_b0_fpn", "efficientdet_d0", "spinenet_49"])
def test_feature_sides_are_ceilings(name, size):
    backbone = on_meta(name).backbone
    features = backbone(torch.zeros(2, 3, *size, device="meta"))
    assert tuple(features) == LEVELS
    for level, feature in features.items():
        sides = tuple(-(-side // 2**level) for side in size)
        assert feature.shape == (2, backbone.feature_dims[level], *sides)


@pytest.mark.parametrize("name", ["resnet50_fpn", "efficientdet_d0", "spinenet_49"])
def test_small_images_are_refused_with_the_reason(name):
    with pytest.raises(UserError, match="at least 64 pixels"):
        on_meta(name).network(torch.zeros(1, 3, 63, 128, device="meta"))


# ---- feature extractors


def randomise_norms(module):
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)


def test_resnet_features_are_torchvisions():
    torch.manual_seed(0)
    reference = resnet50(weights=None, norm_layer=partial(nn.BatchNorm2d, eps=1e-3)).eval()
    randomise_norms(reference)
    features = TimmFeatures("resnet50", stochastic_depth=0.2).eval()
    weights = {k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    features.stages.load_state_dict(weights)
    images = torch.randn(1, 3, 97, 64)
    with torch.inference_mode():
        found = features(images)
        x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(images))))
        x = reference.layer1(x)
        for level in (3, 4, 5):
            x = getattr(reference, f"layer{level - 1}")(x)
            assert features.feature_dims[level] == x.shape[1]
            torch.testing.assert_close(found[level], x, rtol=1e-4, atol=1e-4)


def test_efficientnet_features_are_torchvisions():
    torch.manual_seed(0)
    reference = efficientnet_b0(weights=None).features.eval()
    randomise_norms(reference)
    features = TimmFeatures("efficientnet_b0", stochastic_depth=0.2).eval()
    last = 8  # the 1x1 convolution of the classifier, which a detector does not have
    theirs = [v for k, v in reference.state_dict().items() if not k.startswith(f"{last}.")]
    ours = features.stages.state_dict()
    features.stages.load_state_dict(dict(zip(ours, theirs, strict=True)))
    for layer in features.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-5  # torchvision's
    images = torch.randn(1, 3, 97, 64)
    with torch.inference_mode():
        found = features(images)
        x, stages = images, []
        for stage in reference[:last]:
            x = stage(x)
            stages.append(x)
    for level, stage in ((3, 3), (4, 5), (5, 7)):
        torch.testing.assert_close(found[level], stages[stage], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # timm counts blocks from 0; of EfficientNet's 16 the last has 15/16 of the rate.
        ("efficientnet_b0_fpn", [0.24 * block / 16 for block in range(1, 16)]),
        ("efficientdet_d0", [0.24 * block / 16 for block in range(1, 16)]),
        ("resnet50_fpn", [0.24 * block / 15 for block in range(1, 16)]),
        # none in its two stem blocks
        ("spinenet_49", [0, 0, *(0.24 * block / 15 for block in range(1, 16))]),
    ],
)
def test_stochastic_depth_grows_linearly_to_the_last_block(name, expected):
    def rates(model):
        return [
            layer.drop_prob if isinstance(layer, DropPath) else layer.p
            for layer in model.modules()
            if isinstance(layer, DropPath | StochasticDepth)
        ]

    assert rates(on_meta(name, stochastic_depth=0.24)) == pytest.approx(expected)
    assert not any(rates(on_meta(name, stochastic_depth=0.0)))


@pytest.mark.parametrize(("activation", "other"), [("swish", "ReLU"), ("relu", "SiLU")])
def test_resnet50_fpn_has_one_activation_throughout(activation, other):
    layers = {
        type(layer).__name__ for layer in on_meta("resnet50_fpn", activation=activation).modules()
    }
    assert other not in layers
    assert {"ReLU", "SiLU"} & layers


# ---- feature pyramids


class FixedStages(nn.Module):
    """Stands in for a feature extractor: gives the stages that it was made with."""

    def __init__(self, dims, images):
        super().__init__()
        self.feature_dims = dims
        height, width = images.shape[-2:]
        self.stages = {
            level: torch.randn(len(images), dim, -(-height // 2**level), -(-width // 2**level))
            for level, dim in dims.items()
        }

    def forward(self, images):
        return dict(self.stages)


def test_feature_pyramid_is_torchvisions():
    torch.manual_seed(0)
    images = torch.zeros(1, 3, 200, 136)
    stages = FixedStages({3: 5, 4: 6, 5: 7}, images)
    pyramid = FeaturePyramid(stages, 8, "relu", separable=False)
    pyramid.norms = nn.ModuleList(nn.Identity() for _ in LEVELS)
    reference = FeaturePyramidNetwork([5, 6, 7], 8, LastLevelP6P7(8, 8))
    neck = pyramid.neck
    for index, level in enumerate((3, 4, 5)):
        reference.inner_blocks[index][0].load_state_dict(neck[f"lateral_{level}"].state_dict())
        reference.layer_blocks[index][0].load_state_dict(neck[f"refine_{level}"].state_dict())
    reference.extra_blocks.p6.load_state_dict(neck["coarser_6"].state_dict())
    reference.extra_blocks.p7.load_state_dict(neck["coarser_7"].state_dict())
    with torch.inference_mode():
        expected = list(reference({str(k): v for k, v in stages.stages.items()}).values())
        found = list(pyramid(images).values())
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_separable_feature_pyramid_has_no_dense_3x3_convolution():
    pyramid = FeaturePyramid(
        FixedStages({3: 5, 4: 6, 5: 7}, torch.zeros(1, 3, 64, 64)), 8, "swish", separable=True
    )
    spatial = [m for m in pyramid.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert [conv.groups for conv in spatial] == [8] * 5


def brute_force_cell(cell, pyramid):
    """EfficientDet's equations for one cell, written out for each level."""

    def fuse(node, inputs):
        weights = [max(float(w), 0.0) for w in node.fuse.weights]
        inputs = [project(x) for project, x in zip(node.project, inputs, strict=True)]
        fused = sum(w * x for w, x in zip(weights, inputs, strict=True)) / (sum(weights) + 1e-4)
        _, separable, norm = node.refine
        x = F.silu(fused)
        x = F.conv2d(x, separable.depthwise.weight, padding=1, groups=x.shape[1])
        return norm(F.conv2d(x, separable.pointwise.weight, separable.pointwise.bias))

    def up(x, like):
        rows = torch.arange(like.shape[-2]) * x.shape[-2] // like.shape[-2]
        columns = torch.arange(like.shape[-1]) * x.shape[-1] // like.shape[-1]
        return x[..., rows, :][..., columns]

    def down(x):
        padded = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
        return padded.unfold(2, 3, 2).unfold(3, 3, 2).amax((-2, -1))

    p3, p4, p5, p6, p7 = (pyramid[level] for level in LEVELS)
    middle6 = fuse(cell.down["6"], [p6, up(p7, p6)])
    middle5 = fuse(cell.down["5"], [p5, up(middle6, p5)])
    middle4 = fuse(cell.down["4"], [p4, up(middle5, p4)])
    out3 = fuse(cell.down["3"], [p3, up(middle4, p3)])
    out4 = fuse(cell.up["4"], [p4, middle4, down(out3)])
    out5 = fuse(cell.up["5"], [p5, middle5, down(out4)])
    out6 = fuse(cell.up["6"], [p6, middle6, down(out5)])
    out7 = fuse(cell.up["7"], [p7, down(out6)])
    return dict(zip(LEVELS, (out3, out4, out5, out6, out7), strict=True))


def test_bifpn_cell_against_efficientdets_equations():
    dims = {3: 4, 4: 5, 5: 7, 6: 6, 7: 6}
    torch.manual_seed(0)
    cell = BiFPNCell(dims, 6, "swish").eval()
    randomise_norms(cell)
    for name, weights in cell.named_parameters():
        if name.endswith("fuse.weights"):
            nn.init.uniform_(weights, -0.3, 2.0)  # some are negative: they must count as 0
    height, width = 200, 136
    pyramid = {
        level: torch.randn(2, dim, -(-height // 2**level), -(-width // 2**level))
        for level, dim in dims.items()
    }
    with torch.inference_mode():
        found, expected = cell(pyramid), brute_force_cell(cell, pyramid)
    for level in LEVELS:
        torch.testing.assert_close(found[level], expected[level], rtol=1e-4, atol=1e-5)


def test_bifpn_makes_its_coarse_levels_from_c5():
    torch.manual_seed(0)
    images = torch.zeros(1, 3, 200, 136)
    pyramid = BiFPN(FixedStages({3: 5, 4: 6, 5: 7}, images), 8, 1, "swish").eval()
    seen = {}
    pyramid.cells[0].register_forward_pre_hook(lambda _, inputs: seen.update(inputs[0]))
    with torch.inference_mode():
        pyramid(images)
        p6 = F.max_pool2d(pyramid.coarser(pyramid.extractor.stages[5]), 3, 2, 1)
    torch.testing.assert_close(seen[6], p6)
    torch.testing.assert_close(seen[7], F.max_pool2d(p6, 3, 2, 1))


# ---- SpineNet-49


def test_spinenet_49_is_wired_as_table_1_says():
    """Its 17 blocks are Table 1's 18 without the one of level 1; `test_released` runs them."""
    ours, table = SPINENET_49.blocks, MODELS["eff_spinenet_d0"].backbone.blocks
    assert [block.level for block in ours] == [block.level for block in table[1:]]
    assert [block.is_output for block in ours] == [block.is_output for block in table[1:]]
    for block, row in zip(ours[3:], table[4:], strict=True):
        assert block.inputs == tuple(index - 1 for index in row.inputs)
    # Its third block fuses the first two; in Table 1 that block follows the second.
    assert [block.inputs for block in ours[:3]] == [(0,), (1,), (1, 2)]
    # Block 13 of Table 1, added to block 16.
    assert SPINENET_49.extra_inputs == {15: (12,)}
