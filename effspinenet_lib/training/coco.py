"""The 12 COCO metrics, of boxes or of masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from effspinenet_lib.errors import DataError
from effspinenet_lib.training.coco_matching import Detections, Objects, match
from effspinenet_lib.training.coco_summary import METRICS, summarize

__all__ = ["IOU_TYPES", "METRICS", "coco_metrics"]

IOU_TYPES = ("bbox", "segm")
Record = Mapping[str, Any]
Places = Mapping[Any, int]  # of ids in their order


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
            or holds a shape that cannot be read or a number that is not finite; names the record.
    """
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type is {iou_type!r}; it must be one of {', '.join(IOU_TYPES)}")
    categories = _places(ground_truth["categories"])
    reader = _Reader(ground_truth["images"], categories, masks=iou_type == "segm")
    objects = reader.objects(ground_truth["annotations"])
    found, hits, misses = match(objects, reader.detections(detections), len(categories))
    return summarize(objects, found, hits, misses, len(categories))


def _places(records: Iterable[Record]) -> Places:
    return {number: place for place, number in enumerate(sorted({one["id"] for one in records}))}


class _Reader:
    """Turns records into arrays; looks at single ones only where something is wrong."""

    def __init__(self, images: Sequence[Record], categories: Places, masks: bool) -> None:
        self.places = {"image_id": _places(images), "category_id": categories}
        self.images = {image["id"]: image for image in images}
        self.masks = masks
        self.shape = "segmentation" if masks else "bbox"

    def objects(self, records: Sequence[Record]) -> Objects:
        """The annotations of the ground truth."""
        name = "ground truth: annotation"
        image, category, area, shape = self._columns(records, name, "area")
        if self.masks:
            shape, _ = self._run_lengths(records, name)
        crowd = np.array([bool(record.get("iscrowd", 0)) for record in records], np.bool_)
        return Objects(image, category, area, shape, crowd)

    def detections(self, records: Sequence[Record]) -> Detections:
        """The detections, whose area is that of their box or mask."""
        image, category, score, shape = self._columns(records, "detection", "score")
        if self.masks:
            shape, area = self._run_lengths(records, "detection")
        else:
            area = shape[:, 2] * shape[:, 3]
        return Detections(image, category, area, shape, score)

    def _columns(
        self, records: Sequence[Record], name: str, number: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[Any]]:
        """Image, category, the number asked for, and boxes [N, 4] where there are no masks."""
        try:
            image, category = (
                np.fromiter(map(place.__getitem__, map(itemgetter(key), records)), np.int64)
                for key, place in self.places.items()
            )
            numbers = np.fromiter(map(itemgetter(number), records), np.float64)
            shapes = list(map(itemgetter(self.shape), records))
            boxes = np.zeros((0, 4)) if self.masks else _boxes(shapes)
            if np.isfinite(numbers).all() and np.isfinite(boxes).all():
                return image, category, numbers, boxes
        except (KeyError, TypeError, ValueError):
            pass
        for index, record in enumerate(records, start=1):
            try:
                self._check(record, f"{name} {index}", number)
            except TypeError as error:
                raise DataError(f"{name} {index} cannot be read ({error})") from error
        raise DataError(f"{name}s cannot be read")

    def _check(self, record: Record, where: str, number: str) -> None:
        for key in ("image_id", "category_id", self.shape, number):
            if key not in record:
                raise DataError(f"{where} has no {key!r}")
        for key, kind in (("image_id", "image"), ("category_id", "category")):
            if record[key] not in self.places[key]:
                raise DataError(f"{where}: {kind} {record[key]} is not listed")
        box = [] if self.masks else record["bbox"]
        if not self.masks and (isinstance(box, str) or len(box) != 4):
            raise DataError(f"{where}: bbox is {box!r}; four numbers x, y, w, h are needed")
        numbers = [record[number], *box]
        if not all(map(_is_finite, numbers)):
            raise DataError(f"{where}: a number of {numbers} is not finite")

    def _run_lengths(
        self, records: Sequence[Record], name: str
    ) -> tuple[NDArray[np.object_], NDArray[np.float64]]:
        """The masks as compressed run lengths, and their areas in pixels."""
        masks, areas = np.empty(len(records), np.object_), np.zeros(len(records))
        for index, record in enumerate(records):
            try:
                masks[index] = _compressed(record[self.shape], self.images[record["image_id"]])
                areas[index] = coco_mask.area(masks[index])
            except Exception as error:  # pycocotools raises bare ones too
                raise DataError(
                    f"{name} {index + 1}: its segmentation cannot be read ({error})"
                ) from error
        return masks, areas


def _boxes(shapes: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    if not set(map(len, shapes)) <= {4}:
        raise ValueError("a box has not four numbers")
    return np.fromiter(itertools.chain.from_iterable(shapes), np.float64).reshape(-1, 4)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def _compressed(shape: Any, image: Record) -> dict[str, Any]:
    """Polygons or run lengths as compressed run lengths."""
    if isinstance(shape, Mapping) and isinstance(shape["counts"], str | bytes):
        return dict(shape)
    parts = coco_mask.frPyObjects(shape, image["height"], image["width"])
    encoded: dict[str, Any] = coco_mask.merge(parts) if isinstance(shape, list) else parts
    return encoded
