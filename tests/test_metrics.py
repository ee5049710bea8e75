"""Accuracy and mean intersection over union against counting by hand."""

import math

import pytest
import torch

from effspinenet_lib.training.evaluate import accuracy, count_hits, count_pixels, mean_iou


def counted_accuracy(scores, labels, k):
    """By sorting each row."""
    hits = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda c: -row[c])
        hits += label in order[:k]
    return 100 * hits / len(labels)


def counted_miou(pairs, num_classes):
    """By visiting each pixel of each class."""
    shares = []
    for c in range(num_classes):
        both = either = 0
        for predicted, expected in pairs:
            flat = zip(predicted.flatten().tolist(), expected.flatten().tolist(), strict=True)
            for p, e in flat:
                if e != 255:
                    both += p == c and e == c
                    either += p == c or e == c
        if either:
            shares.append(both / either)
    return 100 * sum(shares) / len(shares)


@pytest.mark.parametrize("classes", [9, 5, 3])
def test_accuracy_against_sorting(classes):
    """With fewer than 5 classes the top 5 are all of them."""
    torch.manual_seed(0)
    scores, labels = torch.randn(40, classes), torch.randint(classes, (40,))
    expected = {f"top{k}": counted_accuracy(scores, labels, k) for k in (1, 5)}
    counts = sum(map(count_hits, scores, labels.tolist()))
    assert accuracy(counts) == pytest.approx(expected)


def test_a_hand_counted_accuracy():
    counts = sum(map(count_hits, torch.eye(7), (0, 1, 2, 6)))
    assert accuracy(counts)["top1"] == 75.0


@pytest.mark.parametrize("classes", [2, 7])
def test_miou_against_visiting_each_pixel(classes):
    torch.manual_seed(2)
    confusion, pairs = torch.zeros(classes, classes, dtype=torch.int64), []
    for side in (5, 9, 4):  # images of several sizes, whose counts are summed before the division
        predicted = torch.randint(classes, (side, side + 2))
        expected = torch.randint(classes, (side, side + 2))
        expected[torch.rand(expected.shape) < 0.2] = 255
        pairs.append((predicted, expected))
        confusion += count_pixels(predicted, expected, classes)
    assert mean_iou(confusion)["mIOU"] == pytest.approx(counted_miou(pairs, classes))


def test_a_hand_counted_miou():
    expected = torch.tensor([[0, 0, 1], [1, 1, 255]])
    confusion = count_pixels(torch.tensor([[0, 1, 1], [1, 2, 3]]), expected, 5)
    # Class 0: 1 of 2. Class 1: 2 of 4. Class 2, predicted only: 0 of 1. 3 (ignored) and 4: out.
    assert mean_iou(confusion)["mIOU"] == pytest.approx(100 * (0.5 + 0.5 + 0) / 3)
    assert confusion[1, 2] == 1  # expected 1, predicted 2
    assert confusion[2, 1] == 0


def test_bytes_are_labels_too():
    """100 classes: the pair's number passes 255."""
    expected = torch.arange(100, dtype=torch.uint8).reshape(10, 10)
    assert torch.equal(
        count_pixels(expected.clone(), expected, 100), torch.eye(100, dtype=torch.int64)
    )


def test_where_nothing_counts_there_is_no_metric():
    none = count_pixels(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255), 3)
    assert math.isnan(mean_iou(none)["mIOU"])
    assert all(math.isnan(value) for value in accuracy(torch.zeros(3)).values())
