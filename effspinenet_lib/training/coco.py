"""The 12 COCO metrics, of boxes or of masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from faster_coco_eval import COCO, COCOeval_faster

from effspinenet_lib.errors import DataError

# In the order of COCO's summary: precision at 0.50:0.95, 0.50 and 0.75 and by object size, then
# recall at 1, 10 and 100 detections an image and by object size.
METRICS = (
    *("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"),
    *("AR_1", "AR_10", "AR_100", "AR_S", "AR_M", "AR_L"),
)
IOU_TYPES = ("bbox", "segm")
# What COCO's summary gives where there is no object to find.
UNDEFINED = -1.0


def coco_metrics(
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    iou_type: str = "bbox",
) -> dict[str, float]:
    """Compute COCO's 12 metrics as pycocotools does; the arguments are left as they are.

    Args:
        ground_truth: a COCO dictionary with `images`, `annotations` and `categories`.
        detections: COCO result records; with `bbox` for "bbox", `segmentation` (RLE) for "segm".
        iou_type: "bbox" or "segm".

    Returns:
        `METRICS` in percent; NaN where there is no object to find.

    Raises:
        DataError: an annotation or detection lacks a key, names an unknown image or category,
            or holds a number that is not finite; names the record.
    """
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type is {iou_type!r}; it must be one of {', '.join(IOU_TYPES)}")
    shape = "bbox" if iou_type == "bbox" else "segmentation"
    truth = _checked_truth(ground_truth, shape)
    reference = COCO(truth)
    results = _results(detections, truth, reference, shape)
    evaluation = COCOeval_faster(reference, results, iou_type, print_function=_say_nothing)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = (float(value) for value in evaluation.stats)
    return {
        name: math.nan if value == UNDEFINED else 100.0 * value
        for name, value in zip(METRICS, values, strict=True)
    }


def _say_nothing(*_: Any, **__: Any) -> None:
    pass


def _checked_truth(ground_truth: Mapping[str, Any], shape: str) -> dict[str, Any]:
    """Copy what the evaluation reads.

    Annotations are numbered from 1: COCO's matching takes the id 0 for "no match".
    """
    annotations = []
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        missing = {"image_id", "category_id", "area", shape} - set(annotation)
        if missing:
            raise DataError(f"ground truth: annotation {number} has no {min(missing)!r}")
        crowd = int(annotation.get("iscrowd", 0))
        annotations.append({**annotation, "id": number, "iscrowd": crowd})
    return {
        "images": [dict(image) for image in ground_truth["images"]],
        "annotations": annotations,
        "categories": [dict(category) for category in ground_truth["categories"]],
    }


def _results(
    detections: Sequence[Mapping[str, Any]], truth: Mapping[str, Any], reference: COCO, shape: str
) -> COCO:
    """The detections as the evaluation reads them; what it reads of boxes is written at once.

    Only the keys that count are copied: a `bbox` beside a mask would set the mask's area.
    """
    _check_detections(detections, truth, shape)
    if shape != "bbox" or not detections:
        kept = ("image_id", "category_id", shape, "score")
        return reference.loadRes([{key: found[key] for key in kept} for found in detections])
    results = COCO()
    results.dataset = {
        **{key: truth[key] for key in ("images", "categories")},
        "annotations": [
            {
                "id": number,
                "image_id": found["image_id"],
                "category_id": found["category_id"],
                "bbox": found["bbox"],
                "score": found["score"],
                "area": found["bbox"][2] * found["bbox"][3],
                "iscrowd": 0,
            }
            for number, found in enumerate(detections, start=1)
        ],
    }
    results.createIndex()
    return results


def _check_detections(
    detections: Sequence[Mapping[str, Any]], truth: Mapping[str, Any], shape: str
) -> None:
    """Refuse what cannot be evaluated; looks at single records only where something is wrong."""
    images = {image["id"] for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    if _seem_right(detections, images, categories, shape):
        return
    for number, detection in enumerate(detections, start=1):
        for key in ("image_id", "category_id", shape, "score"):
            if key not in detection:
                raise DataError(f"detection {number} has no {key!r}")
        if detection["image_id"] not in images:
            raise DataError(f"detection {number}: image {detection['image_id']} is not listed")
        if detection["category_id"] not in categories:
            raise DataError(
                f"detection {number}: category {detection['category_id']} is not listed"
            )
        numbers = [detection["score"], *(detection[shape] if shape == "bbox" else ())]
        if not all(math.isfinite(value) for value in numbers):
            raise DataError(f"detection {number}: a number of {numbers} is not finite")


def _seem_right(
    detections: Sequence[Mapping[str, Any]], images: set[int], categories: set[int], shape: str
) -> bool:
    try:
        numbers = [found["score"] for found in detections]
        shapes = [found[shape] for found in detections]
        listed = images.issuperset(found["image_id"] for found in detections)
        named = categories.issuperset(found["category_id"] for found in detections)
    except KeyError:
        return False
    if shape == "bbox":
        numbers += itertools.chain.from_iterable(shapes)
    return listed and named and all(map(math.isfinite, numbers))
