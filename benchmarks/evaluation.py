"""COCO evaluation against pycocotools, on detections made from a seed."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.pairs import Pair, time_pair
from effspinenet_lib.training.evaluate import coco_metrics

IMAGES, CATEGORIES, OBJECTS, DETECTIONS, SIDE = 300, 20, 7, 60, 640


def evaluation() -> Pair:
    """Time the 12 box metrics of the same detections."""
    truth, detections = _make(np.random.default_rng(0))
    return time_pair(
        f"COCO evaluation, {IMAGES} images, {IMAGES * DETECTIONS} detections, against pycocotools",
        lambda: coco_metrics(truth, detections),
        lambda: _pycocotools(truth, detections),
    )


def _make(generator: np.random.Generator) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    annotations, detections = [], []
    for image in range(IMAGES):
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
        "images": [{"id": image, "width": SIDE, "height": SIDE} for image in range(IMAGES)],
        "annotations": annotations,
        "categories": [{"id": label, "name": str(label)} for label in range(CATEGORIES)],
    }
    return truth, detections


def _pycocotools(truth: dict[str, Any], detections: list[dict[str, Any]]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()


PAIRS = (evaluation,)
