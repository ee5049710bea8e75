"""The 12 COCO metrics, and detecting over a whole data set to get them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor, nn
from tqdm.auto import tqdm

from effspinenet_lib.data import Batch, Dataset, evaluation_loader
from effspinenet_lib.errors import DataError, UserError
from effspinenet_lib.files import atomic_write

# In the order of COCO's summary: precision at 0.50:0.95, 0.50 and 0.75 and by object size, then
# recall at 1, 10 and 100 detections an image and by object size.
METRICS = (
    *("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"),
    *("AR_1", "AR_10", "AR_100", "AR_S", "AR_M", "AR_L"),
)
IOU_TYPES = ("bbox", "segm")
# What COCO's summary gives where there is no object to find.
UNDEFINED = -1.0


@dataclass(frozen=True)
class Evaluation:
    """What a model detects in a data set, and how well.

    Attributes:
        metrics: the 12 COCO metrics in percent; NaN where there is no object to find.
        detections: COCO result records: `image_id`, `category_id`, `bbox` (x, y, width, height
            in pixels of the original image) and `score`.
    """

    metrics: dict[str, float]
    detections: list[dict[str, Any]]


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


def evaluate_detection(
    model: nn.Module,
    dataset: Dataset,
    image_size: int,
    batch_size: int,
    workers: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Detect in every image of a data set and compute the COCO metrics of the boxes.

    The model computes on the device that its parameters lie on and is left in the mode
    (training or evaluation) in which it came.

    Args:
        model: gives `boxes`, `scores` and `labels` for each image in evaluation mode.
        dataset: what to detect in.
        image_size: side of the square input in pixels.
        batch_size: images at once.
        workers: processes that load images; 0: none beside this one.
        progress: show a bar where stderr is a terminal.

    Raises:
        UserError: the model has classes that the data set lacks.
        DataError: an image cannot be read, or the model gives numbers that are not finite.
    """
    batches = evaluation_loader(dataset, image_size, batch_size, workers)
    total = math.ceil(len(dataset) / batch_size)
    detections: list[dict[str, Any]] = []
    with (
        _evaluation_mode(model),
        torch.inference_mode(),
        tqdm(batches, "evaluate", total, disable=None if progress else True) as bar,
    ):
        for batch in bar:
            detections += _detect(model, batch, dataset)
    return Evaluation(coco_metrics(dataset.ground_truth(), detections), detections)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, then back in the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _detect(model: nn.Module, batch: Batch, dataset: Dataset) -> list[dict[str, Any]]:
    """COCO result records of one batch."""
    parameter = next(model.parameters(), None)
    images = batch.images if parameter is None else batch.images.to(parameter.device)
    outputs = model(images)
    records = []
    for output, image_id, scale, size in zip(
        outputs, batch.image_ids, batch.scales.tolist(), batch.sizes, strict=True
    ):
        corners = to_original(output["boxes"], scale, size)
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
        scores, labels = output["scores"].tolist(), output["labels"].tolist()
        if labels and max(labels) >= len(dataset.categories):
            raise UserError(
                f"the model found class {max(labels)}, counted from 0, but {dataset.name} has "
                f"{len(dataset.categories)} categories; create it with that num_classes"
            )
        records += [
            {
                "image_id": int(image_id),
                "category_id": dataset.categories[label].id,
                "bbox": box,
                "score": score,
            }
            for box, score, label in zip(boxes, scores, labels, strict=True)
        ]
    return records


def to_original(boxes: Tensor, scale: float, size: tuple[int, int]) -> Tensor:
    """Map boxes from input pixels to the original image, cut off at its edges.

    Args:
        boxes: [K, 4], x1 y1 x2 y2 in input pixels.
        scale: input pixels per original pixel.
        size: height and width of the original image.

    Returns:
        Boxes [K, 4] as float32 on the CPU, x1 y1 x2 y2 in original pixels.
    """
    height, width = size
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    return (boxes.detach().to("cpu", torch.float32) / scale).clamp(min=0).minimum(limits)


def write_detections(path: str | os.PathLike[str], detections: Sequence[Mapping[str, Any]]) -> None:
    """Write detections in COCO's result format, one record a line, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as handle:
        lines = (json.dumps(record, allow_nan=False) for record in detections)
        handle.write("[\n" + ",\n".join(lines) + "\n]\n" if detections else "[]\n")
