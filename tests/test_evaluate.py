"""Evaluating a model over a data set: perfect models, known mistakes, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from test_coco_metrics import HIT, ONE, make_truth, pycocotools_metrics
from torch import Tensor, nn
from torchvision.ops import roi_align

from effspinenet_lib.data import Annotations, Category, Dataset, ObjectCrops
from effspinenet_lib.data.dataset import RunLengths
from effspinenet_lib.errors import DataError, UserError
from effspinenet_lib.training.evaluate import (
    MASK_METRICS,
    TASK_METRICS,
    Evaluation,
    evaluate,
    paste_masks,
    to_original,
    write_predictions,
)

SIDE = 128  # of the input
SIZES = ((90, 120), (120, 60), (64, 64), (33, 200))


class Ellipses(Dataset):
    """Grey images of unlike shapes with two or three ellipses of two classes."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.shapes: list[list[np.ndarray]] = []
        images, objects = [], []
        for number, (height, width) in enumerate(SIZES):
            image = {"id": 50 - number, "file_name": f"{number}.png"}
            images.append({**image, "height": height, "width": width})
            self.shapes.append([])
            for category in (7, 3, 3)[: 2 + number % 2]:
                x, y = rng.uniform(0, (width / 2, height / 2))
                x1, y1, x2, y2 = int(x), int(y), int(x + width / 2.5), int(y + height / 2.5)
                mask = ellipse(height, width, (x1, y1, x2, y2))
                self.shapes[-1].append(mask)
                objects.append(
                    {
                        "image_id": image["id"],
                        "category_id": category,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": float(mask.sum()),
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}]
        truth = {"images": images, "annotations": objects, "categories": categories}
        table = Annotations.from_coco(truth)
        super().__init__("ellipses", [Category(**entry) for entry in categories], table)

    def load_image(self, index: int) -> np.ndarray:
        return np.full((*SIZES[index], 3), 128, np.uint8)

    def _read_masks(self) -> RunLengths:
        return RunLengths.from_coco(self.ground_truth())

    def ground_truth(self, masks: bool = False) -> dict[str, Any]:
        annotations = []
        for index in range(len(self)):
            rows = self.annotations.rows(index)
            for place, row in enumerate(range(rows.start, rows.stop)):
                x1, y1, x2, y2 = self.annotations.boxes[row].tolist()
                polygon = outline((x1, y1, x2, y2))
                annotations.append(
                    {
                        "id": row + 1,
                        "image_id": self.image_id(index),
                        "category_id": self.categories[self.annotations.labels[row]].id,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": float(self.shapes[index][place].sum()),
                        "iscrowd": 0,
                        "segmentation": [polygon],
                    }
                )
        images = [
            {"id": self.image_id(i), "file_name": f"{i}.png", "height": h, "width": w}
            for i, (h, w) in enumerate(SIZES)
        ]
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        return {"images": images, "annotations": annotations, "categories": categories}


def outline(box: tuple[float, ...]) -> list[float]:
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = (box[0] + box[2]) / 2 + (box[2] - box[0]) / 2 * np.cos(angle)
    y = (box[1] + box[3]) / 2 + (box[3] - box[1]) / 2 * np.sin(angle)
    return np.stack([x, y], 1).ravel().tolist()


def ellipse(height: int, width: int, box: tuple[int, ...]) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    across = (columns - (box[0] + box[2]) / 2) / ((box[2] - box[0]) / 2)
    down = (rows - (box[1] + box[3]) / 2) / ((box[3] - box[1]) / 2)
    return across**2 + down**2 <= 1


class Oracle(nn.Module):
    """Knows the annotations of the images that it is shown in order."""

    def __init__(self, dataset: Dataset, task: str) -> None:
        super().__init__()
        self.dataset, self.task, self.seen = dataset, task, 0
        self.frozen = nn.BatchNorm2d(3).eval()

    def forward(self, images: Tensor, extents: Any = None) -> list[dict[str, Tensor]]:
        assert (extents is not None) == (self.task in ("detection", "instances"))
        assert not self.training
        assert not torch.is_grad_enabled()
        assert images.shape[1:] == (3, SIDE, SIDE)
        outputs = [self.answer(self.seen + place) for place in range(len(images))]
        self.seen += len(images)
        return outputs

    def answer(self, index: int) -> dict[str, Tensor]:
        sample = self.dataset.load(index, self.task)
        if self.task == "classification":
            return {"scores": torch.eye(2)[int(sample.labels[0])]}
        height, width = sample.image.shape[:2]
        scale = SIDE / max(height, width)
        if self.task == "segmentation":
            logits = torch.zeros(3, SIDE, SIDE)
            rows = np.minimum(((np.arange(SIDE) + 0.5) / scale).astype(int), height - 1)
            columns = np.minimum(((np.arange(SIDE) + 0.5) / scale).astype(int), width - 1)
            labels = torch.from_numpy(sample.semantic[rows[:, None], columns]).long()
            return {"logits": logits.scatter(0, labels[None], 10.0)}
        boxes = torch.from_numpy(sample.boxes)
        labels = torch.from_numpy(sample.labels)
        if self.task == "detection":  # and a box that sticks out of the image
            outside = torch.tensor([[-50.0, -50.0, 1e4, 1e4]])
            return {
                "boxes": torch.cat([boxes * scale, outside]),
                "scores": torch.tensor([0.9] * len(boxes) + [0.25]),
                "labels": torch.cat([labels, labels.new_zeros(1)]),
            }
        masks = torch.from_numpy(sample.masks).float()
        cut = [
            roi_align(mask[None, None], [box[None]], (28, 28), sampling_ratio=4)[0, 0]
            for mask, box in zip(masks, boxes, strict=True)
        ]
        return {
            "boxes": boxes * scale,
            "scores": torch.full((len(boxes),), 0.9),
            "labels": labels,
            "masks": torch.stack(cut),
        }


def measured(model: nn.Module, dataset: Dataset, task: str) -> Evaluation:
    evaluation = evaluate(model, dataset, task, SIDE, 3, progress=False)
    assert tuple(evaluation.metrics) == TASK_METRICS[task]
    return evaluation


# --- detection ------------------------------------------------------------------------------


def test_boxes_come_back_in_original_pixels_and_category_ids() -> None:
    dataset = Ellipses()
    evaluation = measured(Oracle(dataset, "detection"), dataset, "detection")
    assert evaluation.metrics["AP"] == pytest.approx(100)
    truth = dataset.ground_truth()
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth["images"]}
    whole = [one for one in evaluation.predictions if one["score"] == 0.25]
    assert len(whole) == len(dataset)
    for one in whole:
        assert one["bbox"] == pytest.approx([0, 0, *sizes[one["image_id"]]])
        assert one["category_id"] == 7
    boxes = [one for one in evaluation.predictions if one not in whole]
    for found, annotation in zip(boxes, truth["annotations"], strict=True):
        assert found["image_id"] == annotation["image_id"]
        assert found["category_id"] == annotation["category_id"]
        assert found["bbox"] == pytest.approx(annotation["bbox"], rel=1e-4, abs=1e-3)


def test_the_batch_size_and_the_workers_change_nothing() -> None:
    dataset = Ellipses()
    one = evaluate(Oracle(dataset, "detection"), dataset, "detection", SIDE, 1)
    three = evaluate(Oracle(dataset, "detection"), dataset, "detection", SIDE, 3, workers=1)
    assert one == three


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    dataset = Ellipses()
    model = Oracle(dataset, "detection")
    model.training = training
    evaluate(model, dataset, "detection", SIDE, 3)
    assert model.training is training
    assert model.frozen.training is False
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_images_there_is_no_metric() -> None:
    empty = Ellipses()
    empty.annotations = Annotations.from_coco({"images": [], "annotations": [], "categories": []})
    evaluation = measured(Oracle(empty, "segmentation"), empty, "segmentation")
    assert math.isnan(evaluation.metrics["mIOU"])
    assert evaluation.predictions == []


def test_a_model_that_gives_nan_is_refused() -> None:
    dataset = Ellipses()
    model = Oracle(dataset, "detection")
    model.register_forward_hook(
        lambda _module, _inputs, outputs: [
            {**output, "scores": output["scores"] * math.nan} for output in outputs
        ]
    )
    with pytest.raises(DataError, match=r"detection 1: .* not finite"):
        evaluate(model, dataset, "detection", SIDE, 3)


def test_boxes_are_cut_off_at_the_edges() -> None:
    boxes = torch.tensor([[-10.0, 20.0, 500.0, 30.0], [8.0, 8.0, 16.0, 12.0]])
    assert to_original(boxes, (0.5, 0.5), (50, 80)).tolist() == [[0, 40, 80, 50], [16, 16, 32, 24]]
    assert to_original(boxes, (0.5, 0.25), None)[:, 0].tolist() == [4 * x for x in boxes[:, 0]]
    assert to_original(torch.zeros(0, 4), (2.0, 2.0), (5, 5)).shape == (0, 4)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_written_detections_are_read_by_pycocotools(tmp_path: Path, count: int) -> None:
    found = [{**HIT, "bbox": [1.5, 2.0, 3.0, 1 / 3], "score": 0.1 * n} for n in range(count)]
    path = tmp_path / "predictions.json"
    write_predictions(path, found)
    assert json.loads(path.read_text()) == found
    if found:
        reference = COCO()
        reference.dataset = make_truth([copy.deepcopy(ONE)])
        reference.createIndex()
        assert len(reference.loadRes(str(path)).dataset["annotations"]) == count
    with pytest.raises(ValueError, match="JSON"):
        write_predictions(path, [{"score": math.nan}])
    assert json.loads(path.read_text()) == found


# --- the other tasks ------------------------------------------------------------------------


def test_true_masks_score_high_and_as_pycocotools_says() -> None:
    dataset = Ellipses()
    evaluation = measured(Oracle(dataset, "instances"), dataset, "instances")
    assert evaluation.metrics["AP"] == pytest.approx(100)
    assert evaluation.metrics["AP50_mask"] == pytest.approx(100)
    assert evaluation.metrics["AP_mask"] > 85  # 28 x 28 values blur the edges
    found = [{k: v for k, v in r.items() if k != "bbox"} for r in evaluation.predictions]
    reference = pycocotools_metrics(dataset.ground_truth(), found, "segm")
    ours = [evaluation.metrics[name] for name in MASK_METRICS]
    assert ours == pytest.approx(list(reference.values()), nan_ok=True)


def test_masks_that_fill_their_boxes_score_by_their_overlap() -> None:
    """An ellipse is pi / 4 of its box: IoU 0.785, a match up to the threshold of 0.75."""
    dataset = Ellipses()

    class Filled(Oracle):
        def answer(self, index: int) -> dict[str, Tensor]:
            output = super().answer(index)
            return {**output, "masks": torch.ones_like(output["masks"])}

    metrics = measured(Filled(dataset, "instances"), dataset, "instances").metrics
    assert metrics["AP"] == pytest.approx(100)
    assert metrics["AP75_mask"] == pytest.approx(100)
    assert metrics["AP_mask"] == pytest.approx(60)  # 6 of the 10 thresholds


def test_pasted_masks_have_the_images_shape() -> None:
    masks, boxes = torch.ones(1, 28, 28), torch.tensor([[2.0, 1.0, 6.0, 4.0]])
    pasted = paste_masks(masks, boxes, (5, 9))
    assert pasted.shape == (1, 5, 9)
    rows, columns = torch.nonzero(pasted[0], as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 3, 2, 5)
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 9)).shape == (0, 5, 9)


def test_true_classes_and_one_mistake() -> None:
    crops = ObjectCrops(Ellipses())
    perfect = measured(Oracle(crops, "classification"), crops, "classification")
    assert perfect.metrics == {"top1": 100, "top5": 100}
    assert [p["category_id"] for p in perfect.predictions] == [
        crops.categories[label].id for label in crops.annotations.labels.tolist()
    ]

    class Mistaken(Oracle):
        def answer(self, index: int) -> dict[str, Tensor]:
            scores = super().answer(index)["scores"]
            return {"scores": scores.flip(0) if index == 2 else scores}

    metrics = measured(Mistaken(crops, "classification"), crops, "classification").metrics
    assert metrics["top1"] == pytest.approx(100 * (1 - 1 / len(crops)))
    assert metrics["top5"] == 100


def test_true_labels_come_back_in_original_pixels() -> None:
    dataset = Ellipses()
    metrics = measured(Oracle(dataset, "segmentation"), dataset, "segmentation").metrics
    assert metrics["mIOU"] > 95  # resizing there and back moves edges by a part of a pixel


def test_an_untaught_background_counts_against() -> None:
    """Everything called class 1: its IoU is its share of all pixels, that of the others 0."""
    dataset = Ellipses()

    class One(Oracle):
        def answer(self, index: int) -> dict[str, Tensor]:
            logits = torch.zeros(3, SIDE, SIDE)
            logits[1] = 1
            return {"logits": logits}

    labels = np.concatenate([dataset.semantic(i).ravel() for i in range(len(dataset))])
    metrics = measured(One(dataset, "segmentation"), dataset, "segmentation").metrics
    assert metrics["mIOU"] == pytest.approx(100 * (labels == 1).mean() / 3)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_model_with_more_classes_than_the_data_is_refused(task: str) -> None:
    dataset = Ellipses() if task == "segmentation" else ObjectCrops(Ellipses())

    class Wider(Oracle):
        def answer(self, index: int) -> dict[str, Tensor]:
            if task == "classification":
                return {"scores": torch.tensor([0.0, 0.0, 1.0])}
            return {"logits": torch.zeros(4, SIDE, SIDE)}

    with pytest.raises(UserError, match=r"class 2, counted from 0, .* has 2 categories"):
        measured(Wider(dataset, task), dataset, task)
