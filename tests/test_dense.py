"""Classification and segmentation: heads and losses by plain functions, and the comparators."""

import math

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.segmentation import DeepLabV3

from effspinenet_lib import create_model
from effspinenet_lib.errors import TrainingError, UserError
from effspinenet_lib.models.dense import PyramidMean, resize
from effspinenet_lib.models.layers import SpaceToDepth

CLASSES = 5
DEEPLABS = ("mobilenetv2_deeplabv3", "resnet101_deeplabv3")


def classifier(name="eff_spinenet_m0", **options):
    torch.manual_seed(0)
    return create_model(name, "classification", CLASSES, **options)


def segmenter(name="eff_spinenet_m0", **options):
    torch.manual_seed(0)
    return create_model(name, "segmentation", CLASSES, **options)


def on_meta(name, task, num_classes=None, **options):
    with torch.device("meta"):
        return create_model(name, task, num_classes, **options)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def labelled(*labels):
    return [{"label": torch.tensor(label)} for label in labels]


def cross_entropy(row, label, smoothing=0.0):
    """Of one list of logits."""
    total = math.log(sum(math.exp(value) for value in row))
    wanted = [(1 - smoothing) * (c == label) + smoothing / len(row) for c in range(len(row))]
    return sum(w * (total - value) for w, value in zip(wanted, row, strict=True))


# ---- the heads of sections 4.2 and 4.3


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
    model = on_meta("eff_spinenet_m0", task, **options)
    assert any(isinstance(layer, SpaceToDepth) for layer in model.modules()) == expected


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


def test_the_classifier_is_a_linear_layer_on_the_global_mean():
    model = classifier().eval()
    images = torch.randn(2, 3, 97, 131)
    with torch.inference_mode():
        merged = model.head[0](model.backbone(images))
        logits = model.network(images)
    linear = model.head[-1]
    assert merged.shape == (2, 256, 13, 17)
    expected = merged.mean((2, 3)) @ linear.weight.T + linear.bias
    assert torch.allclose(logits, expected, atol=1e-5)


def test_the_classifier_without_coarse_levels_is_the_mean_of_p3_to_p5():
    model = classifier(coarse_levels=False).eval()
    images = torch.randn(2, 3, 96, 128)
    with torch.inference_mode():
        features = model.backbone(images)
        merged = model.head[0](features)
        laterals = zip(model.head[0].lateral, (3, 4, 5), strict=True)
        levels = [lateral(features[level]) for lateral, level in laterals]
    expected = sum(F.interpolate(level, (12, 16)) for level in levels) / 3  # nearest
    assert torch.allclose(merged, expected, atol=1e-5)


def test_the_segmentation_head_against_plain_functions():
    model = segmenter().eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.uniform_(-0.5, 0.5)
                layer.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, 97, 131)
    with torch.inference_mode():
        x = model.head.merge(model.backbone(images))
        assert x.shape == (2, 24, 13, 17)
        *layers, predict = model.head.subnet
        assert len(layers) == 3
        for conv, norm, _ in layers:
            x = F.conv2d(x, conv.depthwise.weight, padding=1, groups=24)
            x = F.silu(norm(F.conv2d(x, conv.pointwise.weight, conv.pointwise.bias)))
        x = F.conv2d(x, predict.weight, predict.bias)
        assert torch.allclose(model.network(images), x, atol=1e-5)


@pytest.mark.parametrize(("name", "rate"), [("eff_spinenet_m0", 0.2), ("efficientnet_b2", 0.3)])
def test_dropout_acts_before_the_classifier(name, rate):
    model = on_meta(name, "classification")
    if name == "efficientnet_b2":
        assert model.backbone.drop_rate == rate
    else:
        assert [m.p for m in model.head if isinstance(m, nn.Dropout)] == [rate]
        changed = on_meta(name, "classification", dropout=0.5)
        assert [m.p for m in changed.head if isinstance(m, nn.Dropout)] == [0.5]


@pytest.mark.parametrize("size", [(64, 64), (97, 131)])
@pytest.mark.parametrize("name", ["eff_spinenet_m0", "efficientnet_b0"])
def test_scores_sum_to_1_at_any_size(name, size):
    with torch.inference_mode():
        outputs = classifier(name).eval()(torch.randn(2, 3, *size))
    for output in outputs:
        assert output["scores"].shape == (CLASSES,)
        assert float(output["scores"].sum()) == pytest.approx(1)


@pytest.mark.parametrize("size", [(97, 131)])
@pytest.mark.parametrize("name", ["eff_spinenet_m0", "mobilenetv2_deeplabv3"])
def test_logits_have_the_images_size(name, size):
    with torch.inference_mode():
        outputs = segmenter(name).eval()(torch.randn(1, 3, *size))
    assert [output["logits"].shape for output in outputs] == [(CLASSES, *size)]


# ---- losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_classification_loss_against_its_formula(smoothing):
    model = classifier()
    model.label_smoothing = smoothing
    logits = torch.randn(3, CLASSES)
    loss = model.loss(logits, labelled(2, 0, 3))
    rows = zip(logits.tolist(), (2, 0, 3), strict=True)
    expected = sum(cross_entropy(row, label, smoothing) for row, label in rows) / 3
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_the_segmentation_loss_against_a_loop_over_pixels():
    torch.manual_seed(4)
    model = segmenter()
    logits = torch.randn(2, CLASSES, 6, 8)
    labels = torch.randint(CLASSES, (2, 6, 8))  # the logits' own size: nothing to interpolate
    labels[torch.rand(2, 6, 8) < 0.2] = 255
    targets = [{"semantic": each} for each in labels]
    counted = torch.nonzero(labels != 255).tolist()
    total = sum(cross_entropy(logits[i, :, y, x].tolist(), labels[i, y, x]) for i, y, x in counted)
    assert 0 < len(counted) < labels.numel()
    assert float(model.loss(logits, targets)) == pytest.approx(
        float(total) / len(counted), rel=1e-5
    )
    assert int(model.loss_count(torch.zeros(2, 3, 6, 8), targets)) == len(counted)


def test_where_no_pixel_counts_the_loss_is_0():
    model = segmenter().train()
    targets = [{"semantic": torch.full((64, 64), 255)} for _ in range(2)]
    loss = model(torch.randn(2, 3, 64, 64), targets)["cross_entropy"]
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def learn(model, images, targets, rate, steps):
    """In training mode: the running statistics of norms of few values are of no use."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=rate, momentum=0.9)
    for _ in range(steps):
        loss = model(images, targets)["cross_entropy"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_few_images_are_classified():
    model, images = classifier(stochastic_depth=0.0), torch.randn(4, 3, 64, 64)
    learn(model, images, labelled(0, 1, 2, 3), 0.05, 20)
    assert model.network(images).argmax(1).tolist() == [0, 1, 2, 3]


def test_a_few_images_are_segmented():
    model = segmenter(stochastic_depth=0.0)
    labels = torch.zeros(4, 64, 64, dtype=torch.int64)
    labels[0, :32], labels[1, :, 16:], labels[2, 32:], labels[3, :, :32] = 1, 2, 2, 1
    images = F.one_hot(labels, 3).permute(0, 3, 1, 2) + 0.1 * torch.randn(4, 3, 64, 64)
    learn(model, images, [{"semantic": each} for each in labels], 0.1, 30)
    found = resize(model.network(images), (64, 64)).argmax(1)
    assert float((found == labels).float().mean()) > 0.95


def test_what_cannot_be_done_is_refused_with_the_reason():
    model = classifier().train()
    with pytest.raises(ValueError, match="targets are needed"):
        model(torch.randn(2, 3, 64, 64))
    with pytest.raises(UserError, match="1 image of 64x64 is too little for batch normalisation"):
        model(torch.randn(1, 3, 64, 64), labelled(0))
    target = {"semantic": torch.zeros(64, 64, dtype=torch.int64)}
    with pytest.raises(UserError, match="too little for batch normalisation"):
        segmenter("mobilenetv2_deeplabv3").train()(torch.randn(1, 3, 64, 64), [target])
    with torch.no_grad():
        model.head[-1].bias[0] = math.nan
    with pytest.raises(TrainingError, match="not finite"):
        model.eval()(torch.randn(1, 3, 64, 64))


# ---- EfficientNet (Table 10)


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b1", "efficientnet_b2"])
def test_efficientnet_has_as_many_parameters_as_torchvisions(name):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
    assert parameters(on_meta(name, "classification")) == parameters(theirs)


# ---- DeepLabv3 (Table 11)


def test_the_parameters_of_deeplabv3_are_the_printed_ones():
    """MobileNetV2's paper: 2.11 M and 58.16 M."""
    counts = [f"{parameters(on_meta(name, 'segmentation')) / 1e6:.2f}" for name in DEEPLABS]
    assert counts == ["2.11", "58.16"]


@pytest.mark.parametrize("name", DEEPLABS)
def test_deeplabs_against_torchvisions_forward(name):
    class Named(nn.Module):
        """The backbone as torchvision wants it."""

        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone

        def forward(self, images):
            return {"out": self.backbone(images)[0]}

    model = segmenter(name).eval()
    classify = nn.Sequential(model.head.pooling, model.head.predict)
    reference = DeepLabV3(Named(model.backbone), classify).eval()
    images = torch.randn(2, 3, 97, 64)
    with torch.inference_mode():
        expected = reference(images)["out"]
        logits = torch.stack([output["logits"] for output in model(images)])
    assert logits.shape == (2, CLASSES, 97, 64)
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "stride"),
    [
        ("eff_spinenet_m0", {}, 8),
        ("mobilenetv2_deeplabv3", {}, 16),
        ("mobilenetv2_deeplabv3", {"output_stride": 8}, 8),
        ("resnet101_deeplabv3", {}, 16),
        ("resnet101_deeplabv3", {"output_stride": 8}, 8),
    ],
)
def test_output_strides(name, options, stride):
    model = on_meta(name, "segmentation", CLASSES, **options).eval()
    logits = model.network(torch.zeros(1, 3, 129, 260, device="meta"))
    assert logits.shape == (1, CLASSES, -(-129 // stride), -(-260 // stride))


def test_a_smaller_stride_doubles_the_rates_of_the_pooling():
    def rates(stride):
        pooling = on_meta("resnet101_deeplabv3", "segmentation", output_stride=stride).head.pooling
        return {m.dilation[0] for m in pooling.modules() if isinstance(m, nn.Conv2d)} - {1}

    assert rates(16) == {6, 12, 18}
    assert rates(8) == {12, 24, 36}
