"""COCO evaluation against pycocotools, on detections made from a seed: time and all 12 numbers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.pairs import compare, time_in_turn
from benchmarks.record import Figure, ratio_figure
from effspinenet_lib.training.evaluate import METRICS, coco_metrics

# As val2017: 5,000 images, 80 categories, 7 objects and up to 100 detections an image.
IMAGES, CATEGORIES, OBJECTS, DETECTIONS, SIDE = 5_000, 80, 7, 100, 640
QUICK_IMAGES = 500
SLOWEST_PAIRS = 3  # pycocotools takes a minute or two for all images
GOAL = 10.0
EQUAL = 1e-9  # of 100 percent


def evaluation(rounds: int, quick: bool) -> Iterator[Figure]:
    """The 12 box metrics of the same detections."""
    images = QUICK_IMAGES if quick else IMAGES
    truth, detections = _make(np.random.default_rng(0), images)
    ours, theirs = coco_metrics(truth, detections), _pycocotools(truth, detections)
    differences = np.abs(np.array([ours[name] for name in METRICS]) - 100 * theirs)
    if differences.max() > EQUAL:
        raise AssertionError(f"the 12 numbers differ by up to {differences.max():g} percent")
    works = {
        "ours": lambda: coco_metrics(truth, detections),
        "pycocotools": lambda: _pycocotools(truth, detections),
    }
    times = time_in_turn(works, min(rounds, SLOWEST_PAIRS))
    yield ratio_figure(
        "evaluation",
        "COCO evaluation against pycocotools, the same 12 numbers",
        f"{images} images, {DETECTIONS} detections each",
        compare(times["ours"], times["pycocotools"]),
        None if quick else GOAL,
    )


def _make(
    generator: np.random.Generator, images: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    annotations, detections = [], []
    for image in range(images):
        corners = generator.uniform(0, SIDE * 0.7, (OBJECTS, 2))
        sizes = generator.uniform(8, SIDE * 0.3, (OBJECTS, 2))
        labels = generator.integers(CATEGORIES, size=OBJECTS)
        for box, label in zip(np.hstack([corners, sizes]), labels, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                }
            )
        for which in generator.integers(OBJECTS, size=DETECTIONS):
            box = np.hstack([corners[which], sizes[which]]) + generator.normal(0, 8, 4)
            detections.append(
                {
                    "image_id": image,
                    "category_id": int(labels[which]),
                    "bbox": np.maximum(box, 1).tolist(),
                    "score": float(generator.uniform()),
                }
            )
    truth = {
        "images": [{"id": image, "width": SIDE, "height": SIDE} for image in range(images)],
        "annotations": annotations,
        "categories": [{"id": label, "name": str(label)} for label in range(CATEGORIES)],
    }
    return truth, detections


def _pycocotools(truth: dict[str, Any], detections: list[dict[str, Any]]) -> NDArray[np.float64]:
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.array(evaluation.stats)
