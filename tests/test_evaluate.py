"""Evaluating a model over a data set."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from test_coco_metrics import annotate, make_truth
from torch import nn

from effspinenet_lib.data import Annotations, Category, Dataset
from effspinenet_lib.errors import DataError, UserError
from effspinenet_lib.training.evaluate import (
    evaluate,
    to_original,
    write_predictions,
)


class Scenes(Dataset):
    """Five grey images of unlike shapes; categories whose ids are not their places."""

    SIZES = ((90, 120), (120, 60), (64, 64), (33, 200), (100, 50))

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        images, objects = [], []
        for number, (height, width) in enumerate(self.SIZES):
            image = {"id": 100 - number, "file_name": f"{number}.png"}
            images.append({**image, "height": height, "width": width})
            for category in (7, 3, 3)[: number % 4]:
                x, y = rng.uniform(0, (width / 2, height / 2)).tolist()
                objects.append(
                    {
                        "image_id": image["id"],
                        "category_id": category,
                        "bbox": [x, y, width / 3, height / 3],
                        "area": width * height / 9,
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}]
        truth = {"images": images, "annotations": objects, "categories": categories}
        table = Annotations.from_coco(truth)
        super().__init__("scenes", [Category(**entry) for entry in categories], table)

    def load_image(self, index: int) -> np.ndarray:
        return np.full((*self.SIZES[index], 3), 128, np.uint8)

    def ground_truth(self) -> dict[str, Any]:
        annotations = []
        for index in range(len(self)):
            sample = self.load(index)
            for box, label in zip(sample.boxes.tolist(), sample.labels, strict=True):
                x1, y1, x2, y2 = box
                annotations.append(
                    annotate(
                        len(annotations) + 1,
                        sample.image_id,
                        self.categories[label].id,
                        [x1, y1, x2 - x1, y2 - y1],
                    )
                )
        images = [
            {"id": self.image_id(index), "height": height, "width": width}
            for index, (height, width) in enumerate(self.SIZES)
        ]
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        return {"images": images, "annotations": annotations, "categories": categories}


class Oracle(nn.Module):
    """Gives the annotated boxes in input pixels, after one that sticks out of the image."""

    def __init__(self, dataset: Dataset, image_size: int, label: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.BatchNorm2d(3).eval()
        self.dataset, self.image_size, self.label, self.seen = dataset, image_size, label, 0

    def forward(self, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert images.shape[1:] == (3, self.image_size, self.image_size)
        outputs = []
        for _ in images:
            sample = self.dataset.load(self.seen)
            scale = self.image_size / max(sample.image.shape[:2])
            boxes = torch.from_numpy(sample.boxes) * scale
            labels = torch.from_numpy(sample.labels)
            if self.label is not None:
                labels = torch.full_like(labels, self.label)
            outside = torch.tensor([[-50.0, -50.0, 1e4, 1e4]])
            outputs.append(
                {
                    "boxes": torch.cat([boxes, outside]),
                    "scores": torch.tensor([0.9] * len(boxes) + [0.25]),
                    "labels": torch.cat([labels, labels.new_zeros(1)]),
                }
            )
            self.seen += 1
        return outputs


def test_boxes_come_back_in_original_pixels_and_category_ids() -> None:
    dataset = Scenes()
    evaluation = evaluate(Oracle(dataset, 128), dataset, "detection", 128, batch_size=2)
    assert evaluation.metrics["AP"] == pytest.approx(100)
    truth = dataset.ground_truth()
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth["images"]}
    whole = [one for one in evaluation.predictions if one["score"] == 0.25]
    assert len(whole) == len(dataset)
    for one in whole:
        assert one["bbox"] == pytest.approx([0, 0, *sizes[one["image_id"]]])
        assert one["category_id"] == 7
    boxes = [one for one in evaluation.predictions if one not in whole]
    assert len(boxes) == len(truth["annotations"])
    for found, annotation in zip(boxes, truth["annotations"], strict=True):
        assert found["image_id"] == annotation["image_id"]
        assert found["category_id"] == annotation["category_id"]
        assert found["bbox"] == pytest.approx(annotation["bbox"], rel=1e-4, abs=1e-3)


def test_the_batch_size_and_the_workers_change_nothing() -> None:
    dataset = Scenes()
    one = evaluate(Oracle(dataset, 128), dataset, "detection", 128, batch_size=1)
    three = evaluate(Oracle(dataset, 128), dataset, "detection", 128, batch_size=3, workers=1)
    assert one == three


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_every_module_is_as_before(training: bool) -> None:
    dataset = Scenes()
    model = Oracle(dataset, 128)
    model.training = training
    evaluate(model, dataset, "detection", 128, batch_size=2, progress=False)
    assert model.training is training
    assert model.frozen.training is False


def test_the_mode_is_as_before_after_a_failure() -> None:
    dataset = Scenes()
    model = Oracle(dataset, 128, label=2).train()
    with pytest.raises(UserError, match="class 2, counted from 0, but scenes has 2 categories"):
        evaluate(model, dataset, "detection", 128, batch_size=5)
    assert model.training


def test_a_model_that_gives_nan_is_refused() -> None:
    dataset = Scenes()
    model = Oracle(dataset, 128)
    model.register_forward_hook(
        lambda _module, _inputs, outputs: [
            {**output, "scores": output["scores"] * math.nan} for output in outputs
        ]
    )
    with pytest.raises(DataError, match=r"detection 1: .* not finite"):
        evaluate(model, dataset, "detection", 128, batch_size=5)


def test_boxes_are_cut_off_at_the_edges() -> None:
    boxes = torch.tensor([[-10.0, 20.0, 500.0, 30.0], [8.0, 8.0, 16.0, 12.0]])
    assert to_original(boxes, (0.5, 0.5), (50, 80)).tolist() == [[0, 40, 80, 50], [16, 16, 32, 24]]
    assert to_original(boxes, (0.5, 0.25), None)[:, 0].tolist() == [4 * x for x in boxes[:, 0]]
    assert to_original(torch.zeros(0, 4), (2.0, 2.0), (5, 5)).shape == (0, 4)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_written_detections_are_read_by_pycocotools(tmp_path: Any, count: int) -> None:
    found = [
        {"image_id": 10, "category_id": 1, "bbox": [1.5, 2.0, 3.0, 1 / 3], "score": 0.1 * n}
        for n in range(count)
    ]
    path = tmp_path / "predictions.json"
    write_predictions(path, found)
    assert json.loads(path.read_text()) == found
    if found:
        reference = COCO()
        reference.dataset = make_truth([annotate(1, 10, 1, [10, 10, 50, 50])])
        reference.createIndex()
        assert len(reference.loadRes(str(path)).dataset["annotations"]) == count
    with pytest.raises(ValueError, match="JSON"):
        write_predictions(path, [{"score": math.nan}])
    assert json.loads(path.read_text()) == found
