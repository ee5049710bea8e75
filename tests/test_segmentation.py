"""Segmentation models: costs of Table 11, the head of section 4.3, loss and DeepLabv3."""

import math

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.segmentation import DeepLabV3

from effspinenet_lib import create_model, measure_cost
from effspinenet_lib.errors import UserError
from effspinenet_lib.models.dense import upsample
from effspinenet_lib.models.zoo import NOTES, DeepLabOptions, default_image_size

CLASSES = 5
DEEPLABS = ("mobilenetv2_deeplabv3", "resnet101_deeplabv3")


def segmenter(name="eff_spinenet_m0", **options):
    torch.manual_seed(0)
    return create_model(name, task="segmentation", num_classes=CLASSES, **options)


def cost_of(name, size=None, **options):
    with torch.device("meta"):
        model = create_model(name, task="segmentation", **options)
    return measure_cost(model, size or default_image_size(name, "segmentation"))


def random_labels(*shape):
    labels = torch.randint(CLASSES, shape)
    labels[torch.rand(shape) < 0.2] = 255
    return labels


@pytest.mark.parametrize(
    ("name", "multi_adds"), [("eff_spinenet_d0", 2.1), ("eff_spinenet_d2", 3.8)]
)
def test_costs_of_table_11(name, multi_adds):
    assert default_image_size(name, "segmentation") == 512
    assert cost_of(name).multi_adds / 1e9 == pytest.approx(multi_adds, rel=0.015)


def test_costs_of_mobilenetv2_with_deeplabv3():
    """MobileNetV2's paper prints 2.75 B and 2.11 M; Table 11 2.8 B."""
    cost = cost_of("mobilenetv2_deeplabv3")
    assert f"{cost.parameters / 1e6:.2f}" == "2.11"
    assert cost.multi_adds / 1e9 == pytest.approx(2.75, rel=0.01)
    assert cost_of("mobilenetv2_deeplabv3", 512).multi_adds / 1e9 == pytest.approx(2.60, rel=0.01)


def test_costs_of_resnet101_with_deeplabv3_fit_a_stride_of_16():
    """MobileNetV2's paper prints 81.0 B and 58.16 M for stride 16; Table 11 81.0 B for 8."""
    cost = cost_of("resnet101_deeplabv3")
    assert f"{cost.parameters / 1e6:.2f}" == "58.16"
    assert cost.multi_adds / 1e9 == pytest.approx(81.0, rel=0.04)
    assert cost_of("resnet101_deeplabv3", output_stride=8).multi_adds / 1e9 > 3 * 81.0


def test_the_notes_hold_the_measured_costs():
    for name in DEEPLABS:
        assert f"{cost_of(name).multi_adds / 1e9:.3g} B" in NOTES[name]
    stride_8 = cost_of("resnet101_deeplabv3", output_stride=8).multi_adds / 1e9
    assert f"{stride_8:.1f} B at 8" in NOTES["resnet101_deeplabv3"]


def test_mobilenetv2_has_as_many_parameters_as_torchvisions_without_its_last_layers():
    with torch.device("meta"):
        ours = segmenter("mobilenetv2_deeplabv3").backbone
        theirs = torchvision.models.mobilenet_v2().features[:-1]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_resnet101_differs_from_torchvisions_in_the_stem_alone():
    with torch.device("meta"):
        ours = segmenter("resnet101_deeplabv3").backbone
        theirs = torchvision.models.resnet101()
    extra = 9 * (3 * 64 + 64 * 64 + 64 * 128) - 49 * 3 * 64  # three 3x3 instead of one 7x7
    extra += 2 * (64 + 128)  # their norms
    extra += (128 - 64) * (64 + 256)  # the first block takes 128 channels
    without_classifier = sum(p.numel() for p in theirs.parameters()) - 2048 * 1000 - 1000
    assert sum(p.numel() for p in ours.parameters()) == without_classifier + extra


def test_the_head_against_plain_functions():
    model = segmenter().eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.uniform_(-0.5, 0.5)
                layer.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, 97, 131)
    head = model.head
    with torch.inference_mode():
        features = model.backbone(images)
        x = 0
        for lateral, feature in zip(head.merge.lateral, features.values(), strict=True):
            rows = torch.arange(13) * feature.shape[2] // 13
            columns = torch.arange(17) * feature.shape[3] // 17
            x = x + lateral(feature)[:, :, rows][:, :, :, columns] / 5
        assert x.shape == (2, 24, 13, 17)
        assert len(head.subnet.convs) == 3
        for conv, norm in zip(head.subnet.convs, head.subnet.norms, strict=True):
            x = F.conv2d(x, conv.depthwise.weight, padding=1, groups=24)
            x = F.silu(norm(F.conv2d(x, conv.pointwise.weight)))
        predict = head.subnet.predict
        x = F.conv2d(x, predict.depthwise.weight, padding=1, groups=24)
        x = F.conv2d(x, predict.pointwise.weight, predict.pointwise.bias)
        assert torch.allclose(model.network(images), x, atol=1e-5)


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
    with torch.device("meta"):
        model = segmenter(name, **options).eval()
        logits = model.network(torch.zeros(1, 3, 129, 260))
    assert logits.shape == (1, CLASSES, -(-129 // stride), -(-260 // stride))


def test_a_smaller_stride_doubles_the_rates_of_the_pooling():
    def rates(stride):
        with torch.device("meta"):
            pooling = segmenter("resnet101_deeplabv3", output_stride=stride).head.pooling
        return {m.dilation[0] for m in pooling.modules() if isinstance(m, nn.Conv2d)} - {1}

    assert rates(16) == {6, 12, 18}
    assert rates(8) == {12, 24, 36}


@pytest.mark.parametrize("stride", [4, 32, "16", True, None])
def test_other_strides_are_refused(stride):
    with pytest.raises(UserError, match=r"output_stride is .*; it must be 8 or 16"):
        DeepLabOptions(output_stride=stride)


@pytest.mark.parametrize("size", [(64, 64), (97, 131), (224, 240), (260, 260)])
@pytest.mark.parametrize("name", ["eff_spinenet_m0", "mobilenetv2_deeplabv3"])
def test_logits_have_the_images_size(name, size):
    outputs = segmenter(name).eval()(torch.randn(1, 3, *size))
    assert [output["logits"].shape for output in outputs] == [(CLASSES, *size)]


def test_the_loss_against_a_loop_over_pixels():
    torch.manual_seed(4)
    model = segmenter()
    logits = torch.randn(2, CLASSES, 6, 8)
    labels = random_labels(2, 6, 8)  # the logits' own size: nothing to interpolate
    loss = model.loss(logits, [{"semantic": each} for each in labels])
    total = counted = 0.0
    for image in range(2):
        for y in range(6):
            for x in range(8):
                label = int(labels[image, y, x])
                if label != 255:
                    row = logits[image, :, y, x].tolist()
                    total += math.log(sum(math.exp(v) for v in row)) - row[label]
                    counted += 1
    assert 0 < counted < labels.numel()
    assert float(loss) == pytest.approx(total / counted, rel=1e-5)


@pytest.mark.parametrize("name", ["eff_spinenet_m0", *DEEPLABS])
def test_every_parameter_gets_a_gradient(name):
    model = segmenter(name).train()
    targets = [{"semantic": each} for each in random_labels(2, 64, 64)]
    losses = model(torch.randn(2, 3, 64, 64), targets)
    assert list(losses) == ["cross_entropy"]
    losses["cross_entropy"].backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    assert not [key for key, gradient in gradients.items() if gradient is None]
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_where_no_pixel_counts_the_loss_is_0():
    model = segmenter().train()
    targets = [{"semantic": torch.full((64, 64), 255)} for _ in range(2)]
    loss = model(torch.randn(2, 3, 64, 64), targets)["cross_entropy"]
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_few_images_are_learnt():
    """In training mode: the running statistics of norms of 4 values are of no use."""
    model = segmenter(stochastic_depth=0.0).train()
    labels = torch.zeros(4, 64, 64, dtype=torch.int64)
    labels[0, :32], labels[1, :, 16:], labels[2, 32:], labels[3, :, :32] = 1, 2, 2, 1
    images = F.one_hot(labels, 3).permute(0, 3, 1, 2) + 0.1 * torch.randn(4, 3, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        loss = model(images, [{"semantic": each} for each in labels])["cross_entropy"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = upsample(model.network(images), (64, 64)).argmax(1)
    assert float((found == labels).float().mean()) > 0.95


@pytest.mark.parametrize("name", ["eff_spinenet_m0", "mobilenetv2_deeplabv3"])
def test_a_single_small_image_is_too_little_to_train_on(name):
    targets = [{"semantic": torch.zeros(64, 64, dtype=torch.int64)}]
    with pytest.raises(UserError, match="too little for batch normalisation"):
        segmenter(name).train()(torch.randn(1, 3, 64, 64), targets)
