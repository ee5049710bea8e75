"""Anchors, matching, losses and post-processing against torchvision and brute force."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, nms, sigmoid_focal_loss

from effspinenet_lib import create_model
from effspinenet_lib.data.augment import pad_target
from effspinenet_lib.errors import TrainingError, UserError
from effspinenet_lib.models.anchors import (
    IGNORED,
    NEGATIVE,
    AnchorSettings,
    assign_anchors,
    decode_boxes,
    encode_boxes,
    make_anchors,
    match_anchors,
)
from effspinenet_lib.models.retinanet import focal_loss_sum

SIDES = ((16, 16), (8, 8), (4, 4), (2, 2), (1, 1))
CPU = torch.device("cpu")
SETTINGS = AnchorSettings()


def random_boxes(count, side=128):
    corners = torch.rand(count, 2) * side * 0.7
    return torch.cat([corners, corners + 4 + torch.rand(count, 2) * side * 0.3], 1)


def random_targets(counts=(3, 0, 1), side=64):
    """Targets with crowds among them, for models of 5 classes."""
    return [
        {
            "boxes": random_boxes(count, side),
            "labels": torch.randint(0, 5, (count,)),
            "iscrowd": torch.arange(count) == index + 1,
        }
        for index, count in enumerate(counts)
    ]


@pytest.fixture(scope="module")
def anchors():
    return make_anchors(SIDES, SETTINGS, CPU)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("eff_spinenet_m0", num_classes=5)


# ---- anchors and boxes


def test_anchor_count_and_centres(anchors):
    assert len(anchors) == 9 * sum(h * w for h, w in SIDES)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert torch.allclose(centres[:9], torch.full((9, 2), 4.0))  # P3's first cell, stride 8
    assert torch.allclose(centres[-9:], torch.full((9, 2), 64.0))  # P7's only cell, stride 128


def test_anchor_areas_and_ratios(anchors):
    width, height = (anchors[:9, 2:] - anchors[:9, :2]).T
    expected = [(3 * 8 * 2 ** (i / 3)) ** 2 for i in range(3) for _ in range(3)]
    assert torch.allclose(width * height, torch.tensor(expected), rtol=1e-5)
    assert torch.allclose(width / height, torch.tensor([0.5, 1.0, 2.0] * 3), rtol=1e-5)


def test_box_coding_against_torchvision(anchors):
    boxes = random_boxes(len(anchors))
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    codes = encode_boxes(boxes, anchors)
    assert torch.allclose(codes, coder.encode_single(boxes, anchors), atol=1e-5)
    assert torch.allclose(decode_boxes(codes, anchors), boxes, atol=1e-3)
    wild = torch.full_like(codes, 50.0)
    assert torch.allclose(
        decode_boxes(wild, anchors), coder.decode_single(wild, anchors), rtol=1e-4
    )


def matched_one_by_one(anchors, boxes, iscrowd):
    """The rule of matching, an object at a time."""
    matches = [NEGATIVE] * len(anchors)
    iou = box_iou(anchors, boxes)
    objects = [m for m in range(len(boxes)) if not iscrowd[m]]
    for a, anchor in enumerate(anchors.tolist()):
        for box, crowd in zip(boxes.tolist(), iscrowd.tolist(), strict=True):
            width = min(anchor[2], box[2]) - max(anchor[0], box[0])
            height = min(anchor[3], box[3]) - max(anchor[1], box[1])
            area = (anchor[2] - anchor[0]) * (anchor[3] - anchor[1])
            if crowd and max(width, 0) * max(height, 0) / area >= SETTINGS.crowd_overlap:
                matches[a] = IGNORED
        best = max(objects, key=lambda m: iou[a, m], default=None)
        if best is not None and iou[a, best] >= SETTINGS.match_iou:
            matches[a] = best
    for m in objects:
        if iou[:, m].max() > 0:
            matches[int(iou[:, m].argmax())] = m
    return matches


@pytest.mark.parametrize("count", [1, 2, 9])
def test_matching_against_a_loop(count):
    torch.manual_seed(count)
    anchors = make_anchors(((8, 8), (4, 4), (2, 2), (1, 1), (1, 1)), SETTINGS, CPU)
    for _ in range(4):
        boxes, iscrowd = random_boxes(count, 64), torch.arange(count) % 4 == 1
        boxes[-1] = boxes[0] + 0.01  # two objects with one best anchor
        matches = match_anchors(anchors, boxes, iscrowd, SETTINGS)
        assert matches.tolist() == matched_one_by_one(anchors, boxes, iscrowd)


def test_an_object_outside_of_every_anchor_is_not_matched():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [10.0, 0.0, 20.0, 10.0]])
    boxes = torch.tensor([[50.0, 50.0, 60.0, 60.0]])
    matches = match_anchors(anchors, boxes, torch.tensor([False]), SETTINGS)
    assert matches.tolist() == [NEGATIVE, NEGATIVE]


def test_assignments_say_what_each_anchor_is_to_find():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [0.0, 20, 10, 30]])
    target = {
        "boxes": torch.tensor([[0.0, 20.0, 10.0, 31.0], [19.0, 0.0, 31.0, 12.0]]),
        "labels": torch.tensor([3, 4]),
        "iscrowd": torch.tensor([False, True]),
    }
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assigned = assign_anchors(anchors, [target, empty], SETTINGS)
    assert assigned.positive.tolist() == [[False, False, True], [False] * 3]
    assert assigned.ignored.tolist() == [[False, True, False], [False] * 3]
    assert assigned.labels.tolist() == [[NEGATIVE, NEGATIVE, 3], [NEGATIVE] * 3]
    assert torch.equal(assigned.boxes[0, 2], target["boxes"][0])
    assert torch.equal(assigned.boxes[0, :2], anchors[:2])
    assert torch.equal(assigned.boxes[1], anchors)


# ---- losses


@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_the_focal_loss_and_its_gradient_are_torchvisions(gamma):
    torch.manual_seed(0)
    logits = (torch.randn(3, 4000, 5) * 4).requires_grad_()
    classes = torch.randint(-3, 5, (3, 4000))
    kept = (torch.rand(3, 4000) < 0.9) | (classes >= 0)
    expected = (classes[..., None] == torch.arange(5)).double()
    exact = logits.detach().double().requires_grad_()
    focal = sigmoid_focal_loss(exact[kept], expected[kept], 0.25, gamma).sum()
    (focal / 7).backward()
    found = focal_loss_sum(logits, classes, kept, 0.25, gamma)
    (found / 7).backward()
    assert found.item() == pytest.approx(focal.item(), rel=2e-6)
    assert torch.allclose(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)
    assert not logits.grad[~kept].any()


def test_the_focal_loss_of_extreme_logits_is_finite():
    logits = torch.tensor([[[-200.0, 200.0], [200.0, -200.0]]], requires_grad=True)
    kept = torch.ones(1, 2, dtype=torch.bool)
    loss = focal_loss_sum(logits, torch.tensor([[1, 1]]), kept, 0.25, 1.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * 200 + 0.25 * 200)
    assert torch.allclose(logits.grad, torch.tensor([[[0.0, 0.0], [0.75, -0.25]]]))


def test_the_focal_loss_is_float32_and_its_gradient_has_the_logits_dtype():
    logits = torch.randn(1, 4, 3).bfloat16().requires_grad_()
    kept = torch.ones(1, 4, dtype=torch.bool)
    loss = focal_loss_sum(logits, torch.tensor([[0, -1, 2, 1]]), kept, 0.25, 1.5)
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


def test_losses_against_a_loop(model, anchors):
    torch.manual_seed(2)
    first, second = random_targets((3, 0), side=128)
    first["iscrowd"] = torch.tensor([False, True, False])
    targets = [first, second]
    logits = torch.randn(2, len(anchors), 5)
    codes = torch.randn(2, len(anchors), 4) * 0.1
    losses = model.losses(logits, codes, anchors, targets)

    focal = box = positives = 0.0
    for image, target in enumerate(targets):
        matches = match_anchors(anchors, target["boxes"], target["iscrowd"], SETTINGS)
        for anchor in range(len(anchors)):
            match = int(matches[anchor])
            if match == IGNORED:
                continue
            if match >= 0:
                positives += 1
                wanted = encode_boxes(target["boxes"][match], anchors[anchor])
                for error in (codes[image, anchor] - wanted).abs().tolist():
                    box += 0.5 * error**2 if error <= 0.1 else 0.1 * (error - 0.05)
            for label, logit in enumerate(logits[image, anchor].tolist()):
                positive = match >= 0 and int(target["labels"][match]) == label
                p = 1 / (1 + math.exp(-logit))
                chance, alpha = (p, 0.25) if positive else (1 - p, 0.75)
                focal -= alpha * (1 - chance) ** 1.5 * math.log(chance)
    assert losses["classification"].item() == pytest.approx(focal / (positives + 1), rel=1e-4)
    assert losses["box"].item() == pytest.approx(50 * box / 4 / (positives + 1), rel=1e-4)
    count = model.loss_count(torch.zeros(2, 3, 128, 128), targets)
    assert (int(count), int(model.loss_divisor(count))) == (positives, positives + 1)


def losses_and_gradients(model, targets):
    images = torch.randn(len(targets), 3, 64, 64, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    torch.manual_seed(1)  # the same stochastic depth
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {name: loss.item() for name, loss in losses.items()}, torch.cat(gradients)


@pytest.mark.parametrize("name", ["eff_spinenet_m0", "mobilenetv3_small_ssdlite"])
def test_padding_changes_neither_losses_nor_gradients(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    targets = random_targets()
    plain, gradients = losses_and_gradients(model, targets)
    model.load_state_dict(state)
    again, same = losses_and_gradients(model, [pad_target(target, 9) for target in targets])
    assert again == pytest.approx(plain, rel=1e-6)
    assert torch.allclose(same, gradients, rtol=1e-5, atol=1e-7)
    assert gradients.abs().max() > 1e-3


def test_an_image_without_objects_has_a_finite_loss(model):
    losses = model.train()(torch.randn(2, 3, 64, 64), random_targets((0, 0)))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["box"] == 0


def test_a_broken_code_of_an_anchor_without_object_leaves_the_box_loss_alone(model, anchors):
    """Codes of negatives take no part, not even by zero times infinity."""
    targets = random_targets((2,), side=128)
    codes = torch.zeros(1, len(anchors), 4)
    negative = ~assign_anchors(anchors, targets, SETTINGS).positive
    codes[negative] = torch.inf
    codes.requires_grad_()
    loss = model.losses(torch.zeros(1, len(anchors), 5), codes, anchors, targets)["box"]
    loss.backward()
    assert loss.isfinite()
    assert codes.grad.isfinite().all()
    assert not codes.grad[negative].any()


def test_a_location_starts_with_a_low_probability(model):
    with torch.inference_mode():
        logits, _, _ = model.eval().network(torch.randn(2, 3, 128, 128))
    assert logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.5)


# ---- detections


def test_detections_against_a_loop_over_classes(model, anchors):
    torch.manual_seed(3)
    scores = torch.rand(len(anchors), 5) ** 20
    codes = torch.randn(len(anchors), 4) * 0.2
    found = model.detections(scores, codes, anchors, (128, 120))

    boxes = decode_boxes(codes, anchors)
    limit = torch.tensor([120.0, 128.0, 120.0, 128.0])
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    expected = []
    for label in range(5):
        sides = boxes[:, 2:] - boxes[:, :2]
        confident = (scores[:, label] > 0.05) & (sides.prod(1) > 0)
        values = scores[confident, label]
        kept = nms(boxes[confident], values, 0.5)
        expected += [
            (float(score), label, box.tolist())
            for score, box in zip(values[kept], boxes[confident][kept], strict=True)
        ]
    expected.sort(key=lambda detection: -detection[0])
    assert len(found["scores"]) == 100
    for index, (score, label, box) in enumerate(expected[:100]):
        assert found["scores"][index].item() == pytest.approx(score)
        assert found["labels"][index].item() == label
        assert found["boxes"][index].tolist() == pytest.approx(box, abs=1e-3)


def test_what_cannot_be_done_is_refused_with_the_reason(model):
    with pytest.raises(ValueError, match="targets"):
        model.train()(torch.randn(2, 3, 64, 64))
    with pytest.raises(UserError, match="2 images a batch"):
        model.train()(torch.randn(1, 3, 128, 96), [{}])
    with torch.no_grad():
        model.class_head.predict.pointwise.weight[0] = math.nan
    with pytest.raises(TrainingError, match="not finite"):
        model.eval()(torch.randn(1, 3, 64, 64))
