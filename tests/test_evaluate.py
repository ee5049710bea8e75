"""COCO metrics against pycocotools, and evaluating a model over a data set."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from effspinenet_lib.data import Category, Dataset
from effspinenet_lib.data.dataset import AnnotationsBuilder
from effspinenet_lib.errors import DataError, UserError
from effspinenet_lib.training.coco import METRICS, coco_metrics
from effspinenet_lib.training.evaluate import (
    evaluate,
    to_original,
    write_predictions,
)


def pycocotools_metrics(
    truth: dict[str, Any], detections: list[dict[str, Any]], iou_type: str = "bbox"
) -> dict[str, float]:
    """The metrics by pycocotools itself; its `loadRes` cannot take an empty list."""
    reference = COCO()
    reference.dataset = copy.deepcopy(truth)
    reference.createIndex()
    if detections:
        results = reference.loadRes(copy.deepcopy(detections))
    else:
        results = COCO()
        results.dataset = {**copy.deepcopy(truth), "annotations": []}
        results.createIndex()
    evaluation = COCOeval(reference, results, iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {
        name: math.nan if value == -1 else 100 * value
        for name, value in zip(METRICS, evaluation.stats, strict=True)
    }


def check_against_pycocotools(
    truth: dict[str, Any], detections: list[dict[str, Any]], iou_type: str = "bbox"
) -> dict[str, float]:
    ours = coco_metrics(truth, detections, iou_type)
    assert ours == pytest.approx(
        pycocotools_metrics(truth, detections, iou_type), abs=1e-9, nan_ok=True
    )
    return ours


def make_truth(
    annotations: list[dict[str, Any]], images: int = 3, categories: tuple[int, ...] = (1, 2)
) -> dict[str, Any]:
    return {
        "images": [{"id": 10 + index, "width": 640, "height": 480} for index in range(images)],
        "categories": [{"id": number, "name": f"class {number}"} for number in categories],
        "annotations": annotations,
    }


def annotate(
    number: int, image: int, category: int, box: list[float], iscrowd: int = 0
) -> dict[str, Any]:
    area = box[2] * box[3]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": area,
        "iscrowd": iscrowd,
    }


def perturbed(truth: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Detections near the annotations: shifted, repeated, missed, mislabelled, scores tied."""
    rng = np.random.default_rng(seed)
    categories = [category["id"] for category in truth["categories"]]
    found = []
    for annotation in truth["annotations"]:
        for _ in range(rng.integers(0, 4)):
            x, y, w, h = annotation["bbox"]
            shift = rng.normal(0, 0.15, 4) * (w, h, w, h)
            wrong = rng.random() < 0.15
            found.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": int(rng.choice(categories))
                    if wrong
                    else annotation["category_id"],
                    "bbox": [
                        float(value) for value in (x + shift[0], y + shift[1], abs(w + shift[2]), h)
                    ],
                    "score": round(float(rng.random()), 1),
                }
            )
    return found


@pytest.fixture(scope="module", params=["train2017", "val2017"])
def real_truth(request: pytest.FixtureRequest, tiny_coco: Any) -> dict[str, Any]:
    with open(tiny_coco / "annotations" / f"instances_{request.param}.json") as handle:
        return json.load(handle)


def test_boxes_on_real_annotations_agree_with_pycocotools(real_truth: dict[str, Any]) -> None:
    assert any(annotation["iscrowd"] for annotation in real_truth["annotations"])
    metrics = check_against_pycocotools(real_truth, perturbed(real_truth, seed=0))
    assert 0 < metrics["AP_S"] < metrics["AP50"] < 100


def test_masks_on_real_annotations_agree_with_pycocotools(real_truth: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    reference = COCO()
    reference.dataset = copy.deepcopy(real_truth)
    reference.createIndex()
    found = []
    for annotation in reference.dataset["annotations"][::2]:
        pixels = np.roll(reference.annToMask(annotation), rng.integers(-6, 7, 2), (0, 1))
        rle = masks.encode(np.asfortranarray(pixels))
        found.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "segmentation": rle,
                "score": round(float(rng.random()), 1),
            }
        )
    metrics = check_against_pycocotools(real_truth, found, "segm")
    assert 0 < metrics["AP"] < 100
    # A box beside the mask must not take the place of the mask's area.
    boxed = [{**one, "bbox": [0.0, 0.0, 600.0, 400.0]} for one in found]
    assert coco_metrics(real_truth, boxed, "segm") == metrics


@pytest.mark.parametrize("seed", range(6))
def test_generated_hard_cases_agree_with_pycocotools(seed: int) -> None:
    """Crowds, empty images, a class without objects, ties, over 100 detections in an image."""
    rng = np.random.default_rng(seed)
    annotations = []
    for number in range(1, 60):
        w, h = np.exp(rng.uniform(0.5, 5.5, 2))
        box = [float(rng.uniform(0, 400)), float(rng.uniform(0, 300)), float(w), float(h)]
        crowd = int(rng.random() < 0.25)
        annotations.append(
            annotate(number, 10 + int(rng.integers(0, 4)), int(rng.integers(1, 4)), box, crowd)
        )
    truth = make_truth(annotations, images=7, categories=(1, 2, 3, 9))
    found = perturbed(truth, seed)
    busy = [{**found[i % len(found)], "image_id": 10} for i in range(250)]
    stray = [{**one, "image_id": 16} for one in found[:20]]
    flat = [{**one, "bbox": [*one["bbox"][:2], 0.0, one["bbox"][3]]} for one in found[:5]]
    check_against_pycocotools(truth, found + busy + stray + flat)


def test_equal_scores_keep_the_order_of_the_detections() -> None:
    truth = make_truth([annotate(1, 10, 1, [10, 10, 50, 50])])
    hit = {"image_id": 10, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.5}
    miss = {**hit, "bbox": [300, 300, 50, 50]}
    assert check_against_pycocotools(truth, [hit, miss])["AP"] == pytest.approx(100)
    assert check_against_pycocotools(truth, [miss, hit])["AP"] == pytest.approx(50)


def test_one_object_of_two_found_is_51_of_101_recall_points() -> None:
    truth = make_truth([annotate(1, 10, 1, [10, 10, 50, 50]), annotate(2, 11, 1, [10, 10, 50, 50])])
    found = [{"image_id": 10, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.9}]
    metrics = coco_metrics(truth, found)
    assert metrics["AP"] == pytest.approx(100 * 51 / 101)
    assert metrics["AR_100"] == pytest.approx(50)
    assert math.isnan(metrics["AP_S"])
    assert math.isnan(metrics["AR_L"])
    assert tuple(metrics) == METRICS


def test_no_detections_score_zero_where_there_are_objects() -> None:
    truth = make_truth([annotate(1, 10, 1, [10, 10, 50, 50])])
    metrics = check_against_pycocotools(truth, [])
    assert metrics["AP"] == metrics["AR_100"] == metrics["AP_M"] == 0
    assert math.isnan(metrics["AP_L"])


@pytest.mark.parametrize(
    "annotations", [[], [annotate(1, 10, 1, [0, 0, 200, 200], iscrowd=1)]], ids=["none", "crowd"]
)
@pytest.mark.parametrize("detected", [False, True])
def test_metrics_are_undefined_without_objects(
    annotations: list[dict[str, Any]], detected: bool
) -> None:
    found = [{"image_id": 10, "category_id": 1, "bbox": [5, 5, 50, 50], "score": 0.9}]
    metrics = check_against_pycocotools(make_truth(annotations), found if detected else [])
    assert all(math.isnan(value) for value in metrics.values())


def test_a_detection_inside_a_crowd_is_no_mistake() -> None:
    crowd = annotate(2, 10, 1, [100, 100, 300, 300], iscrowd=1)
    truth = make_truth([annotate(1, 10, 1, [10, 10, 50, 50]), crowd])
    inside = {"image_id": 10, "category_id": 1, "bbox": [150, 150, 40, 40], "score": 0.9}
    hit = {"image_id": 10, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.5}
    assert check_against_pycocotools(truth, [inside, hit])["AP"] == pytest.approx(100)


def test_an_annotation_numbered_0_counts() -> None:
    """COCO's matching reads id 0 as "no match"; the metrics must not depend on numbering."""
    found = [{"image_id": 10, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.9}]
    truth = make_truth([annotate(0, 10, 1, [10, 10, 50, 50])])
    assert coco_metrics(truth, found)["AP"] == pytest.approx(100)


def test_nothing_is_printed_and_nothing_is_changed(capfd: pytest.CaptureFixture[str]) -> None:
    truth = make_truth([annotate(0, 10, 1, [10, 10, 50, 50])])
    found = [{"image_id": 10, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.9}]
    before = copy.deepcopy((truth, found))
    coco_metrics(truth, found)
    assert (truth, found) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 99}, "detection 2: image 99"),
        ({"category_id": 7}, "detection 2: category 7"),
        ({"score": math.nan}, "detection 2: .* not finite"),
        ({"bbox": [0.0, 0.0, math.inf, 1.0]}, "detection 2: .* not finite"),
        ({"score": None}, "detection 2 has no 'score'"),
    ],
)
def test_a_broken_detection_is_named(change: dict[str, Any], message: str) -> None:
    truth = make_truth([annotate(1, 10, 1, [10, 10, 50, 50])])
    good = {"image_id": 10, "category_id": 1, "bbox": [10.0, 10.0, 50.0, 50.0], "score": 0.9}
    broken = {key: value for key, value in {**good, **change}.items() if value is not None}
    with pytest.raises(DataError, match=message):
        coco_metrics(truth, [good, broken])


def test_a_broken_annotation_is_named() -> None:
    annotation = annotate(1, 10, 1, [10, 10, 50, 50])
    del annotation["area"]
    with pytest.raises(DataError, match="annotation 1 has no 'area'"):
        coco_metrics(make_truth([annotation]), [])


class Scenes(Dataset):
    """Five grey images of unlike shapes; categories whose ids are not their places."""

    SIZES = ((90, 120), (120, 60), (64, 64), (33, 200), (100, 50))

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        builder = AnnotationsBuilder()
        for number, (height, width) in enumerate(self.SIZES):
            index = builder.add_image(100 - number, f"{number}.png", height, width)
            for label in (0, 1, 1)[: number % 4]:
                x, y = rng.uniform(0, (width / 2, height / 2))
                box = (float(x), float(y), float(x + width / 3), float(y + height / 3))
                builder.add_box(index, box, label, False, width * height / 9)
        super().__init__("scenes", [Category(7, "seven"), Category(3, "three")], builder.build())

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
