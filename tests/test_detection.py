"""Anchors, matching, losses and post-processing against torchvision and brute force."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou, nms

from effspinenet_lib import create_model
from effspinenet_lib.errors import TrainingError, UnknownName, UserError
from effspinenet_lib.models.anchors import (
    IGNORED,
    NEGATIVE,
    AnchorSettings,
    decode_boxes,
    encode_boxes,
    make_anchors,
    match_anchors,
)

SIDES = ((16, 16), (8, 8), (4, 4), (2, 2), (1, 1))
CPU = torch.device("cpu")


def random_boxes(count, side=128):
    corners = torch.rand(count, 2) * side * 0.7
    return torch.cat([corners, corners + 4 + torch.rand(count, 2) * side * 0.3], 1)


@pytest.fixture(scope="module")
def anchors():
    return make_anchors(SIDES, AnchorSettings(), CPU)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("eff_spinenet_m0", num_classes=5)


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


def test_matching_against_torchvision(anchors):
    torch.manual_seed(1)
    boxes = random_boxes(6)
    matches = match_anchors(anchors, boxes, torch.zeros(6, dtype=torch.bool), AnchorSettings())
    expected = Matcher(0.5, 0.5, allow_low_quality_matches=True)(box_iou(boxes, anchors))
    # torchvision gives a low-quality anchor to the object it overlaps most, here it goes to
    # the object whose best anchor it is: positives are the same, and so are the clear ones.
    assert torch.equal(matches >= 0, expected >= 0)
    clear = box_iou(anchors, boxes).amax(1) >= 0.5
    assert torch.equal(matches[clear], expected[clear])


def test_every_object_has_an_anchor(anchors):
    boxes = torch.tensor([[10.0, 10.0, 14.0, 13.0], [90.0, 3.0, 93.0, 9.0]])
    matches = match_anchors(anchors, boxes, torch.zeros(2, dtype=torch.bool), AnchorSettings())
    assert set(matches[matches >= 0].tolist()) == {0, 1}


def test_crowds_are_neither_positive_nor_negative(anchors):
    boxes = torch.tensor([[0.0, 0.0, 60.0, 60.0], [80.0, 80.0, 120.0, 120.0]])
    iscrowd = torch.tensor([True, False])
    matches = match_anchors(anchors, boxes, iscrowd, AnchorSettings())
    assert 0 not in matches.tolist()
    assert 1 in matches.tolist()
    for anchor, match in zip(anchors.tolist(), matches.tolist(), strict=True):
        width = min(anchor[2], 60) - max(anchor[0], 0)
        height = min(anchor[3], 60) - max(anchor[1], 0)
        share = max(width, 0) * max(height, 0)
        share /= (anchor[2] - anchor[0]) * (anchor[3] - anchor[1])
        if abs(share - 0.5) > 1e-4 and match < 0:
            assert match == (IGNORED if share > 0.5 else NEGATIVE)


def test_losses_against_a_loop(model, anchors):
    torch.manual_seed(2)
    targets = [
        {
            "boxes": random_boxes(3),
            "labels": torch.tensor([0, 4, 2]),
            "iscrowd": torch.tensor([False, True, False]),
        },
        {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "iscrowd": torch.zeros(0, dtype=torch.bool),
        },
    ]
    logits = torch.randn(2, len(anchors), 5)
    codes = torch.randn(2, len(anchors), 4) * 0.1
    losses = model.losses(logits, codes, anchors, targets)

    focal = box = positives = 0.0
    for image, target in enumerate(targets):
        matches = match_anchors(anchors, target["boxes"], target["iscrowd"], AnchorSettings())
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


def test_an_image_without_objects_has_a_finite_loss(model):
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "iscrowd": torch.zeros(0, dtype=torch.bool),
    }
    losses = model.train()(torch.randn(2, 3, 64, 64), [empty, empty])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["box"] == 0


def test_targets_need_not_say_that_there_are_no_crowds(model):
    images = torch.randn(2, 3, 64, 64)
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    torch.manual_seed(1)  # the same stochastic depth in both
    without = model.train()(images, [target] * 2)
    torch.manual_seed(1)
    saying = model(images, [{**target, "iscrowd": torch.tensor([False])}] * 2)
    assert {name: float(loss) for name, loss in without.items()} == pytest.approx(
        {name: float(loss) for name, loss in saying.items()}
    )


def test_broken_weights_are_an_error_and_not_an_ap_of_zero(model):
    with torch.no_grad():
        model.class_head.predict.pointwise.weight[0] = math.nan
    with pytest.raises(TrainingError, match="not finite"):
        model.eval()(torch.randn(1, 3, 64, 64))


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
        confident = scores[:, label] > 0.05
        kept = nms(boxes[confident], scores[confident, label], 0.5)
        expected += [
            (float(score), label, box.tolist())
            for score, box in zip(
                scores[confident, label][kept], boxes[confident][kept], strict=True
            )
        ]
    expected.sort(key=lambda detection: -detection[0])
    expected = expected[:100]
    assert len(found["scores"]) == len(expected) == 100
    for index, (score, label, box) in enumerate(expected):
        assert found["scores"][index].item() == pytest.approx(score)
        assert found["labels"][index].item() == label
        assert found["boxes"][index].tolist() == pytest.approx(box, abs=1e-3)


def test_detections_of_a_fresh_model_are_in_bounds(model):
    with torch.inference_mode():
        (found,) = model.eval()(torch.randn(1, 3, 128, 192))
    assert len(found["scores"]) <= 100
    assert found["boxes"].shape == (len(found["scores"]), 4)


def test_a_location_starts_with_a_low_probability(model):
    model.eval()
    with torch.inference_mode():
        logits, _, _ = model.network(torch.randn(2, 3, 128, 128))
    assert logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.2)


def test_a_batch_too_small_for_the_norms_is_refused(model):
    with pytest.raises(UserError, match="2 images a batch"):
        model.train()(torch.randn(1, 3, 128, 96), [{}])


def test_training_needs_targets(model):
    with pytest.raises(ValueError, match="targets"):
        model.train()(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        ({"name": "eff_spinnet_d0"}, "eff_spinenet_d0"),
        ({"name": "eff_spinenet_m0", "task": "detect"}, "detection"),
        ({"name": "eff_spinenet_m0", "space2depth": True}, "space_to_depth"),
    ],
)
def test_unknown_names_list_the_near_ones(arguments, near):
    with pytest.raises(UnknownName, match=near):
        create_model(**arguments)


def test_no_classes_is_refused():
    with pytest.raises(UserError, match="at least one class"):
        create_model("eff_spinenet_m0", num_classes=0)
