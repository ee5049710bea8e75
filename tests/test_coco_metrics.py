"""COCO's metrics against pycocotools."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from effspinenet_lib.errors import DataError
from effspinenet_lib.training.evaluate import METRICS, coco_metrics

Records = list[dict[str, Any]]


def pycocotools_metrics(truth: dict[str, Any], found: Records, iou_type: str) -> dict[str, float]:
    """The metrics by pycocotools itself; its `loadRes` cannot take an empty list."""
    reference = COCO()
    reference.dataset = copy.deepcopy(truth)
    reference.createIndex()
    if found:
        results = reference.loadRes(copy.deepcopy(found))
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


def check(truth: dict[str, Any], found: Records, iou_type: str = "bbox") -> dict[str, float]:
    """Ours, which are pycocotools' to 1e-12."""
    ours = coco_metrics(truth, found, iou_type)
    assert ours == pytest.approx(
        pycocotools_metrics(truth, found, iou_type), abs=1e-10, nan_ok=True
    )
    return ours


def make_truth(
    annotations: Records, images: int = 3, categories: tuple[int, ...] = (1, 2)
) -> dict[str, Any]:
    return {
        "images": [{"id": 10 + index, "width": 640, "height": 480} for index in range(images)],
        "categories": [{"id": number, "name": f"class {number}"} for number in categories],
        "annotations": annotations,
    }


def annotate(
    number: int, image: int, category: int, box: list[float], iscrowd: int = 0
) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": iscrowd,
    }


@pytest.fixture(scope="module", params=["train2017", "val2017"])
def real_truth(request: pytest.FixtureRequest, tiny_coco: Any) -> dict[str, Any]:
    with open(tiny_coco / "annotations" / f"instances_{request.param}.json") as handle:
        return json.load(handle)


def test_boxes_on_real_annotations(real_truth: dict[str, Any]) -> None:
    """Shifted, repeated, missed, mislabelled; scores tied."""
    assert any(annotation["iscrowd"] for annotation in real_truth["annotations"])
    rng = np.random.default_rng(0)
    categories = [category["id"] for category in real_truth["categories"]]
    found = []
    for annotation in real_truth["annotations"]:
        for _ in range(rng.integers(0, 4)):
            x, y, w, h = annotation["bbox"]
            shift = rng.normal(0, 0.15, 4) * (w, h, w, h)
            box = (x + shift[0], y + shift[1], abs(w + shift[2]), h)
            wrong = rng.random() < 0.15
            label = int(rng.choice(categories)) if wrong else annotation["category_id"]
            found.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": label,
                    "bbox": [float(side) for side in box],
                    "score": round(float(rng.random()), 1),
                }
            )
    metrics = check(real_truth, found)
    assert 0 < metrics["AP_S"] < metrics["AP50"] < 100


def test_masks_on_real_annotations(real_truth: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    reference = COCO()
    reference.dataset = copy.deepcopy(real_truth)
    reference.createIndex()
    found = []
    for annotation in reference.dataset["annotations"][::2]:
        pixels = np.roll(reference.annToMask(annotation), rng.integers(-6, 7, 2), (0, 1))
        found.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "segmentation": masks.encode(np.asfortranarray(pixels)),
                "score": round(float(rng.random()), 1),
            }
        )
    metrics = check(real_truth, found, "segm")
    assert 0 < metrics["AP"] < 100
    # a box must not take the place of the mask's area
    boxed = [{**one, "bbox": [0.0, 0.0, 600.0, 400.0]} for one in found]
    assert coco_metrics(real_truth, boxed, "segm") == metrics


def random_ids(rng: np.random.Generator, count: int) -> list[int]:
    """Ids that are neither consecutive nor in order, one of them 0."""
    return rng.permutation([0, *rng.choice(np.arange(1, 60), count - 1, replace=False)]).tolist()


def random_truth(rng: np.random.Generator, objects: int) -> dict[str, Any]:
    """Boxes of whole numbers: equal overlaps, areas at the limits, crowds, empty images."""
    images, categories = random_ids(rng, 7), random_ids(rng, 5)
    annotations = []
    for number in rng.permutation(objects).tolist():
        sides = rng.choice([20, 32, 40, 96, 110], 2)
        box = [*rng.integers(0, 6, 2) * 20, *(sides[:1].repeat(2) if number % 2 else sides)]
        category, image = int(rng.choice(categories[:-1])), int(rng.choice(images[:-2]))
        crowd = int(rng.random() < 0.2)
        one = annotate(number + 1, image, category, [int(side) for side in box], crowd)
        # As in COCO, the area is not that of the box.
        one["area"] = float(rng.choice([one["area"], 32**2, 96**2, 32**2 + 1, 96**2 - 0.5]))
        annotations.append(one)
    return {
        "images": [{"id": image, "width": 240, "height": 240} for image in images],
        "categories": [{"id": category, "name": f"class {category}"} for category in categories],
        "annotations": annotations,
    }


def random_detections(rng: np.random.Generator, truth: dict[str, Any], count: int) -> Records:
    """Detections whose overlaps are often at a threshold to the bit, and whose scores are tied."""
    images, categories = ([one["id"] for one in truth[key]] for key in ("images", "categories"))
    found = []
    for _ in range(count):
        real = truth["annotations"][rng.integers(len(truth["annotations"]))]
        x, y, w, h = real["bbox"]
        if rng.random() < 0.5:  # k twentieths of the object
            w = w * int(rng.integers(8, 22)) / 20
        elif rng.random() < 0.5:
            x, y = x + int(rng.integers(-8, 9)), y + int(rng.integers(-8, 9))
        elsewhere = rng.random() < 0.1
        found.append(
            {
                "image_id": int(rng.choice(images)) if elsewhere else real["image_id"],
                "category_id": int(rng.choice(categories)) if elsewhere else real["category_id"],
                "bbox": [x, y, w, h],
                "score": round(float(rng.random()), 1),
            }
        )
    return found


@pytest.mark.parametrize("seed", range(10))
def test_random_boxes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, objects=int(rng.integers(1, 60)))
    found = random_detections(rng, truth, int(rng.choice([3, 40, 400])))
    check(truth, found)
    for one in truth["annotations"] + found:  # now rounding decides at the thresholds
        one["bbox"] = [0.7 * side for side in one["bbox"]]
    check(truth, found)
    if seed % 4 == 0:  # over 100, and over 10, of one image and category; flat ones
        busy = {key: found[0][key] for key in ("image_id", "category_id")}
        crowded = [{**one, **busy} for one in random_detections(rng, truth, 260)]
        flat = [{**one, "bbox": [*one["bbox"][:2], 0.0, one["bbox"][3]]} for one in found[:5]]
        check(truth, found + crowded + flat)


@pytest.mark.parametrize("seed", range(3))
def test_random_masks(seed: int) -> None:
    """Rectangles as every kind of segmentation that COCO knows."""
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, objects=20)
    found = random_detections(rng, truth, 60)
    for place, one in enumerate(truth["annotations"]):
        rectangle = run_lengths(one["bbox"])
        x, y, w, h = one["bbox"]
        counts = {**rectangle, "counts": list(map(len, runs(masks.decode(rectangle))))}
        polygons = [
            [x, y, x + w / 2, y, x + w / 2, y + h, x, y + h],
            [x, y, x + w, y, x + w, y + h],
        ]
        one["segmentation"] = (rectangle, counts, polygons)[place % 3]
    for one in found:
        one["segmentation"] = run_lengths(one.pop("bbox"))
    check(truth, found, "segm")


def run_lengths(box: list[float]) -> dict[str, Any]:
    x, y, w, h = (round(side) for side in box)
    pixels = np.zeros((240, 240), np.uint8, order="F")
    pixels[max(y, 0) : y + h, max(x, 0) : x + w] = 1
    encoded = masks.encode(pixels)
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def runs(pixels: np.ndarray) -> list[np.ndarray]:
    """The runs of equal pixels down the columns, of which the first is of zeros."""
    values = np.concatenate([[0], pixels.ravel(order="F")])
    first, *others = np.split(values, np.flatnonzero(np.diff(values)) + 1)
    return [first[1:], *others]


ONE = annotate(1, 10, 1, [10, 10, 50, 50])
HIT = {"image_id": 10, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.5}
MISS = {**HIT, "bbox": [300, 300, 50, 50]}


def test_equal_scores_keep_the_order_of_the_detections() -> None:
    assert check(make_truth([ONE]), [HIT, MISS])["AP"] == pytest.approx(100)
    assert check(make_truth([ONE]), [MISS, HIT])["AP"] == pytest.approx(50)


def test_one_object_of_two_found_is_51_of_101_recall_points() -> None:
    metrics = coco_metrics(make_truth([ONE, annotate(2, 11, 1, [10, 10, 50, 50])]), [HIT])
    assert tuple(metrics) == METRICS
    assert metrics["AP"] == pytest.approx(100 * 51 / 101)
    assert metrics["AR_100"] == pytest.approx(50)
    assert math.isnan(metrics["AP_S"])
    assert math.isnan(metrics["AR_L"])


def test_without_detections_the_metrics_are_0_and_without_objects_undefined() -> None:
    metrics = check(make_truth([ONE]), [])
    assert metrics["AP"] == metrics["AR_100"] == metrics["AP_M"] == 0
    for objects in ([], [{**ONE, "iscrowd": 1}]):
        for found in ([], [HIT]):
            metrics = check(make_truth(objects), found)
            assert all(math.isnan(value) for value in metrics.values())


def test_a_detection_inside_a_crowd_is_no_mistake() -> None:
    crowd = annotate(2, 10, 1, [100, 100, 300, 300], iscrowd=1)
    inside = {**HIT, "bbox": [150, 150, 40, 40], "score": 0.9}
    assert check(make_truth([ONE, crowd]), [inside, HIT])["AP"] == pytest.approx(100)


def test_an_annotation_numbered_0_counts_and_nothing_is_printed_or_changed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """COCO's matching reads id 0 as "no match"; the metrics must not depend on numbering."""
    truth, found = make_truth([{**ONE, "id": 0}]), [HIT]
    before = copy.deepcopy((truth, found))
    assert coco_metrics(truth, found)["AP"] == pytest.approx(100)
    assert (truth, found) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change", [{"score": math.nan}, {"bbox": [0.0, 0.0, math.inf, 1.0]}], ids=["score", "box"]
)
def test_a_detection_that_is_not_finite_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"detection 2: .* not finite"):
        coco_metrics(make_truth([ONE]), [HIT, {**HIT, **change}])
