"""Classification models: costs of Table 10, the head of section 4.2, loss and baselines."""

import math
import re

import pytest
import timm
import torch
import torchvision
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F

from effspinenet_lib import create_model, measure_cost
from effspinenet_lib.data import DataConfig
from effspinenet_lib.errors import TrainingError, UserError
from effspinenet_lib.models.dense import PyramidMean
from effspinenet_lib.models.layers import SpaceToDepth
from effspinenet_lib.models.scale_permuted import BackboneOptions, EffSpineNet
from effspinenet_lib.models.specs import MODELS
from effspinenet_lib.models.zoo import NOTES, default_image_size
from effspinenet_lib.training.config import RunConfig
from effspinenet_lib.training.recipes import get_recipe

CLASSES = 4
# Facts of the paper, Table 10: image side, billions of Multi-Adds, millions of parameters.
TABLE_10 = [
    ("eff_spinenet_d0", 224, 0.38, 3.57),
    ("eff_spinenet_d1", 240, 0.70, 4.97),
    ("eff_spinenet_d2", 256, 0.89, 5.83),
    ("efficientnet_b0", 224, 0.39, 5.30),
    ("efficientnet_b1", 240, 0.70, 7.80),
    ("efficientnet_b2", 260, 1.00, 9.20),
]


def classifier(name="eff_spinenet_m0", **options):
    torch.manual_seed(0)
    return create_model(name, task="classification", num_classes=CLASSES, **options)


def labelled(*labels):
    return [{"label": torch.tensor(label)} for label in labels]


@pytest.mark.parametrize(("name", "side", "multi_adds", "parameters"), TABLE_10)
def test_costs_of_table_10(name, side, multi_adds, parameters):
    assert default_image_size(name, "classification") == side
    with torch.device("meta"):
        model = create_model(name, task="classification")
    cost = measure_cost(model, side)
    assert cost.multi_adds / 1e9 == pytest.approx(multi_adds, rel=0.025)
    assert cost.parameters / 1e6 == pytest.approx(parameters, rel=0.015)


def test_the_costs_do_not_fit_with_space_to_depth():
    with torch.device("meta"):
        model = create_model("eff_spinenet_d0", task="classification", space_to_depth=True)
    assert measure_cost(model, 224).parameters / 1e6 > 1.1 * 3.57


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        ("classification", {}, False),
        ("classification", {"space_to_depth": True}, True),
        ("segmentation", {}, True),
        ("detection", {}, True),
        ("detection", {"space_to_depth": False}, False),
    ],
)
def test_space_to_depth_is_the_tasks_own_unless_it_is_said(task, options, expected):
    with torch.device("meta"):
        model = create_model("eff_spinenet_m0", task=task, **options)
    assert any(isinstance(layer, SpaceToDepth) for layer in model.modules()) == expected


def test_a_backbone_without_a_task_has_space_to_depth():
    with torch.device("meta"):
        backbone = EffSpineNet(MODELS["eff_spinenet_m0"].backbone, BackboneOptions())
    assert any(isinstance(layer, SpaceToDepth) for layer in backbone.modules())


@pytest.mark.parametrize("sides", [[(8, 8), (4, 4), (2, 2)], [(13, 17), (7, 9), (4, 5)]])
def test_the_pyramids_mean_against_a_loop(sides):
    torch.manual_seed(3)
    dims = {3: 6, 4: 5, 5: 7}
    merge = PyramidMean(dims, 4, "swish").eval()
    features = {
        level: torch.randn(2, dim, *side)
        for (level, dim), side in zip(dims.items(), sides, strict=True)
    }
    with torch.inference_mode():
        merged = merge(features)
        levels = [
            F.silu(lateral[1](F.conv2d(feature, lateral[0].weight)))
            for lateral, feature in zip(merge.lateral, features.values(), strict=True)
        ]
    height, width = sides[0]
    assert merged.shape == (2, 4, height, width)
    for y in range(height):
        for x in range(width):
            nearest = [
                level[:, :, y * level.shape[2] // height, x * level.shape[3] // width]
                for level in levels
            ]
            assert torch.allclose(merged[:, :, y, x], sum(nearest) / len(nearest), atol=1e-6)


def test_the_head_is_a_linear_layer_on_the_global_mean():
    model = classifier().eval()
    images = torch.randn(2, 3, 97, 131)
    with torch.inference_mode():
        merged = model.head[0](model.backbone(images))
        logits = model.network(images)
    linear = model.head[-1]
    assert merged.shape == (2, 256, 13, 17)
    expected = merged.mean((2, 3)) @ linear.weight.T + linear.bias
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (97, 131), (224, 224), (240, 160), (260, 260)])
@pytest.mark.parametrize("name", ["eff_spinenet_m0", "efficientnet_b0"])
def test_scores_sum_to_1_at_any_size(name, size):
    with torch.inference_mode():
        outputs = classifier(name).eval()(torch.randn(2, 3, *size))
    assert len(outputs) == 2
    for output in outputs:
        assert output["scores"].shape == (CLASSES,)
        assert float(output["scores"].sum()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b2"])
def test_efficientnet_against_timms_own(name):
    model = classifier(name).eval()
    reference = timm.create_model(name, num_classes=CLASSES, bn_eps=1e-3).eval()
    reference.load_state_dict(
        {
            re.sub("^head", "classifier", re.sub(r"^backbone\.", "", key)): value
            for key, value in model.state_dict().items()
        }
    )
    images = torch.randn(2, 3, 80, 96)
    with torch.inference_mode():
        expected = reference(images)
        assert torch.allclose(model.network(images), expected, atol=1e-5)
        scores = torch.stack([output["scores"] for output in model(images)])
    assert torch.allclose(scores, expected.softmax(1), atol=1e-6)


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b1", "efficientnet_b2"])
def test_efficientnet_has_as_many_parameters_as_torchvisions(name):
    with torch.device("meta"):
        ours = create_model(name, task="classification")
        theirs = getattr(torchvision.models, name)()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert NOTES[name] == ""


def test_stochastic_depth_reaches_the_last_block_of_efficientnet():
    def rates(**options):
        return [m.drop_prob for m in classifier(**options).modules() if isinstance(m, DropPath)]

    dropping = rates(name="efficientnet_b0", stochastic_depth=0.2)
    assert dropping == sorted(dropping)
    assert 0.17 < dropping[-1] < 0.2
    assert not any(rates(name="efficientnet_b0"))


@pytest.mark.parametrize(("name", "rate"), [("eff_spinenet_m0", 0.2), ("efficientnet_b2", 0.3)])
def test_dropout_acts_before_the_classifier(name, rate):
    model = classifier(name, stochastic_depth=0.0).eval()
    if name == "efficientnet_b2":
        assert model.backbone.drop_rate == rate
    else:
        assert [m.p for m in model.head if isinstance(m, nn.Dropout)] == [rate]


def test_dropout_is_an_option_and_the_recipes_rate_reaches_the_head():
    model = classifier("eff_spinenet_m0", dropout=0.5)
    assert [m.p for m in model.head if isinstance(m, nn.Dropout)] == [0.5]
    with pytest.raises(UserError, match="dropout is 1"):
        classifier("eff_spinenet_m0", dropout=1)
    recipe = get_recipe("paper_classification")
    config = RunConfig("eff_spinenet_m0", "classification", 64, DataConfig("shapescenes"), recipe)
    assert config.options["dropout"] == recipe.dropout == 0.2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_against_its_formula(smoothing):
    model = classifier()
    model.label_smoothing = smoothing
    logits = torch.randn(3, CLASSES)
    loss = model.loss(logits, labelled(2, 0, 3))
    expected = 0.0
    for row, label in zip(logits.tolist(), (2, 0, 3), strict=True):
        total = math.log(sum(math.exp(value) for value in row))
        for c, value in enumerate(row):
            target = (1 - smoothing) * (c == label) + smoothing / CLASSES
            expected += target * (total - value) / 3
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["eff_spinenet_m0", "efficientnet_b0"])
def test_every_parameter_gets_a_gradient(name):
    model = classifier(name).train()
    losses = model(torch.randn(2, 3, 64, 64), labelled(0, 1))
    assert list(losses) == ["cross_entropy"]
    losses["cross_entropy"].backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    assert not [key for key, gradient in gradients.items() if gradient is None]
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_few_images_are_learnt():
    """In training mode: the running statistics of norms of 4 values are of no use."""
    model = classifier(stochastic_depth=0.0).train()
    images, targets = torch.randn(4, 3, 64, 64), labelled(0, 1, 2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        loss = model(images, targets)["cross_entropy"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.network(images).argmax(1).tolist() == [0, 1, 2, 3]


def test_what_cannot_be_done_is_refused_with_the_reason():
    model = classifier().train()
    with pytest.raises(ValueError, match="targets are needed"):
        model(torch.randn(2, 3, 64, 64))
    with pytest.raises(UserError, match="1 image of 64x64 is too little for batch normalisation"):
        model(torch.randn(1, 3, 64, 64), labelled(0))
    with torch.no_grad():
        model.head[-1].bias[0] = math.nan
    with pytest.raises(TrainingError, match="not finite"):
        model.eval()(torch.randn(1, 3, 64, 64))
