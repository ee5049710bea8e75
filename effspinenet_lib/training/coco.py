"""The 12 COCO metrics, of boxes or of masks."""

from __future__ import annotations

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
    found = _checked_detections(detections, truth, shape)
    reference = COCO(truth)
    evaluation = COCOeval_faster(
        reference, reference.loadRes(found), iou_type, print_function=_say_nothing
    )
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


def _checked_detections(
    detections: Sequence[Mapping[str, Any]], truth: Mapping[str, Any], shape: str
) -> list[dict[str, Any]]:
    """Copy the keys that count; a `bbox` beside a mask would set the mask's area."""
    images = {image["id"] for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    kept = ("image_id", "category_id", shape, "score")
    copies = []
    for number, detection in enumerate(detections, start=1):
        missing = [key for key in kept if key not in detection]
        if missing:
            raise DataError(f"detection {number} has no {missing[0]!r}")
        if detection["image_id"] not in images:
            raise DataError(f"detection {number}: image {detection['image_id']} is not listed")
        if detection["category_id"] not in categories:
            raise DataError(
                f"detection {number}: category {detection['category_id']} is not listed"
            )
        numbers = [detection["score"], *(detection[shape] if shape == "bbox" else ())]
        if not all(math.isfinite(value) for value in numbers):
            raise DataError(f"detection {number}: a number of {numbers} is not finite")
        copies.append({key: detection[key] for key in kept})
    return copies
