"""Accuracy and mean intersection over union against counting by hand."""

import math

import pytest
import torch

from effspinenet_lib.errors import UserError
from effspinenet_lib.training.metrics import Accuracy, ConfusionMatrix


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


@pytest.mark.parametrize("classes", [9, 6, 5])
def test_accuracy_against_sorting(classes):
    torch.manual_seed(0)
    scores, labels = torch.randn(40, classes), torch.randint(classes, (40,))
    accuracy = Accuracy()
    accuracy.add(scores, labels)
    assert accuracy.metrics() == pytest.approx(
        {f"top{k}": counted_accuracy(scores, labels, k) for k in (1, 5)}
    )


def test_accuracy_is_the_same_in_batches():
    torch.manual_seed(1)
    scores, labels = torch.randn(33, 8), torch.randint(8, (33,))
    whole, batches = Accuracy(), Accuracy()
    whole.add(scores, labels)
    for start in range(0, 33, 7):
        batches.add(scores[start : start + 7], labels[start : start + 7])
    assert batches.metrics() == whole.metrics()


def test_a_hand_counted_accuracy():
    accuracy = Accuracy()
    accuracy.add(torch.eye(7)[[0, 1, 2, 3]], torch.tensor([0, 1, 2, 6]))
    assert accuracy.metrics()["top1"] == 75.0


def test_with_fewer_than_5_classes_the_top_5_are_all():
    accuracy = Accuracy()
    accuracy.add(torch.randn(10, 3), torch.randint(3, (10,)))
    assert accuracy.metrics()["top5"] == 100.0


def test_no_image_no_accuracy():
    accuracy = Accuracy()
    accuracy.add(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert all(math.isnan(value) for value in accuracy.metrics().values())


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_that_are_no_class_are_refused(label):
    with pytest.raises(UserError, match=f"{label} to {label} do not fit the model's 4 classes"):
        Accuracy().add(torch.zeros(1, 4), torch.tensor([label]))
    with pytest.raises(UserError, match="create it with the num_classes of the data"):
        ConfusionMatrix(4).add(torch.zeros(1, 1), torch.full((1, 1), label))


@pytest.mark.parametrize("classes", [2, 7])
def test_miou_against_visiting_each_pixel(classes):
    torch.manual_seed(2)
    confusion, pairs = ConfusionMatrix(classes), []
    for side in (5, 9, 4):  # images of several sizes
        predicted = torch.randint(classes, (side, side + 2))
        expected = torch.randint(classes, (side, side + 2))
        expected[torch.rand(expected.shape) < 0.2] = 255
        pairs.append((predicted, expected))
        confusion.add(predicted, expected)
    assert confusion.metrics()["mIOU"] == pytest.approx(counted_miou(pairs, classes))


def test_a_hand_counted_miou():
    confusion = ConfusionMatrix(5)
    expected = torch.tensor([[0, 0, 1], [1, 1, 255]])
    confusion.add(torch.tensor([[0, 1, 1], [1, 2, 3]]), expected)
    # Class 0: 1 of 2. Class 1: 2 of 4. Class 2, predicted only: 0 of 1. 3 (ignored) and 4: out.
    assert confusion.metrics()["mIOU"] == pytest.approx(100 * (0.5 + 0.5 + 0) / 3)
    assert confusion.counts[1, 2] == 1  # expected 1, predicted 2
    assert confusion.counts[2, 1] == 0
    shares = confusion.intersection_over_union()
    assert shares[:3].tolist() == [0.5, 0.5, 0.0]
    assert shares[3:].isnan().all()


def test_the_counts_are_summed_before_they_are_divided():
    confusion = ConfusionMatrix(2)
    confusion.add(torch.tensor([[1]]), torch.tensor([[1]]))
    confusion.add(torch.zeros(3, 3, dtype=torch.int64), torch.ones(3, 3, dtype=torch.int64))
    assert confusion.metrics()["mIOU"] == pytest.approx(100 * (0 + 1 / 10) / 2)


def test_bytes_are_labels_too():
    """100 classes: the pair's number passes 255."""
    expected = torch.arange(100, dtype=torch.uint8).reshape(10, 10)
    confusion = ConfusionMatrix(100)
    confusion.add(expected.clone(), expected)
    assert torch.equal(confusion.counts, torch.eye(100, dtype=torch.int64))


def test_where_nothing_counts_there_is_no_miou():
    confusion = ConfusionMatrix(3)
    assert math.isnan(confusion.metrics()["mIOU"])
    confusion.add(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255))
    assert math.isnan(confusion.metrics()["mIOU"])


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="expected"):
        ConfusionMatrix(3).add(torch.zeros(2, 3), torch.zeros(3, 2))
