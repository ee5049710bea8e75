"""COCO's matching of detections to objects, of all images and categories at once.

A group is an image and a category; only its own objects can match a detection. The matching is
greedy: the detections of a group choose in the order of their scores. It is done for each IoU
threshold and each range of areas, here all at once: an int64 holds one bit for each of the
thresholds, from the lowest up, of each of the ranges, in the order of `AREAS`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

# COCO's own settings (pycocotools.cocoeval.Params).
THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREAS = ((0, 1e5**2), (0, 32**2), (32**2, 96**2), (96**2, 1e5**2))  # all, small, medium, large
MAX_DETECTIONS = 100  # of a group

ALL_THRESHOLDS = (1 << len(THRESHOLDS)) - 1
# Times the bits of the first range: the same bits in every range.
IN_EVERY_RANGE = sum(1 << place * len(THRESHOLDS) for place in range(len(AREAS)))
PAIRS_AT_ONCE = 1 << 18  # so that the memory for overlaps is a few dozen MB at most

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shapes:
    """Boxes or masks, each of an image and a category.

    Attributes:
        image: [N], the place of its id among all.
        category: [N], the same.
        area: [N], in square pixels.
        shape: float64 [N, 4], boxes x y w h; or [N] of compressed run lengths.
    """

    image: Integers
    category: Integers
    area: Floats
    shape: NDArray[Any]

    def areas(self) -> Integers:
        """The bits of the ranges in which the area lies, [N]; the limits belong to them."""
        bits = np.zeros(len(self.area), np.int64)
        for place, (low, high) in enumerate(AREAS):
            inside = (low <= self.area) & (self.area <= high)
            bits[inside] |= ALL_THRESHOLDS << place * len(THRESHOLDS)
        return bits


@dataclass(frozen=True)
class Objects(Shapes):
    """What is to be found; `crowd` [N]: a region of many, which is always ignored."""

    crowd: NDArray[np.bool_]

    def counted(self) -> Integers:
        """The bits of the ranges in which it is to be found, [N]; in others it is ignored."""
        return np.where(self.crowd, 0, self.areas())


@dataclass(frozen=True)
class Detections(Shapes):
    """What was found, with its `score` [N]."""

    score: Floats


_S = TypeVar("_S", bound=Shapes)


def match(
    objects: Objects, detections: Detections, categories: int
) -> tuple[Detections, Integers, Integers]:
    """Match detections to objects.

    Args:
        objects: what is to be found; the order of those of a group decides between equal overlaps.
        detections: what was found; the order of those of a group decides between equal scores.
        categories: their number.

    Returns:
        The detections that are looked at, by image, category and falling score; the bits of each
        where it hits an object, [N], and where it is a mistake, [N]. Where it is neither it is
        ignored.
    """
    objects = _take(objects, np.lexsort((objects.category, objects.image)))
    order = np.lexsort((-detections.score, detections.category, detections.image))
    detections = _take(detections, order)
    groups = detections.image * categories + detections.category
    best = np.flatnonzero(place_within(groups) < MAX_DETECTIONS)
    detections, groups = _take(detections, best), groups[best]
    first, after = (
        np.searchsorted(objects.image * categories + objects.category, groups, side)
        for side in ("left", "right")
    )
    found, real, iou = _overlapping(objects, detections, groups, first, after - first)
    matched, hits = _choose(objects, groups, found, real, iou)
    return detections, hits, detections.areas() & ~matched


def _take(shapes: _S, rows: Integers) -> _S:
    return type(shapes)(*(getattr(shapes, field.name)[rows] for field in fields(shapes)))


def holds(bits: Integers, area: int, threshold: int) -> NDArray[np.bool_]:
    """Whether the bit of a range of areas and a threshold, by their places, is set, [N]."""
    return (bits >> (area * len(THRESHOLDS) + threshold)) & 1 == 1


def place_within(groups: NDArray[Any]) -> Integers:
    """The place of each value in its run of equal ones, [N], from 0."""
    starts = _starts(groups)
    return np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))


def _starts(groups: NDArray[Any]) -> Integers:
    """Where the runs of equal values begin."""
    return np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]])[: len(groups)])


def _overlapping(
    objects: Objects, detections: Detections, groups: Integers, first: Integers, counts: Integers
) -> tuple[Integers, Integers, Floats]:
    """The pairs whose IoU reaches the lowest threshold: detection, object, IoU, each [P].

    The objects of detection i's group are the `counts[i]` ones from `first[i]` on.
    """
    masks = detections.shape.ndim == 1
    rows = np.flatnonzero(counts)
    parts = groups[rows] if masks else np.cumsum(counts[rows]) // PAIRS_AT_ONCE
    pairs = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for start, stop in itertools.pairwise([*_starts(parts), len(rows)]):
        part = rows[start:stop]
        found = np.repeat(part, counts[part])
        real = first[found] + place_within(found)
        if masks:
            of_group = real[: counts[part[0]]]
            crowd = objects.crowd[of_group]
            iou = _mask_overlaps(objects.shape[of_group], detections.shape[part], crowd)
        else:
            iou = _box_overlaps(objects.shape[real], detections.shape[found], objects.crowd[real])
        near = iou >= THRESHOLDS[0]
        pairs.append((found[near], real[near], iou[near]))
    found, real, iou = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return found, real, iou


def _box_overlaps(real: Floats, found: Floats, crowd: NDArray[np.bool_]) -> Floats:
    """The IoU of pairs of boxes; for a crowd the share of the detection that lies in it.

    The operations and their order are pycocotools', so that the results are the same to the bit.
    """
    (x1, y1, w1, h1), (x2, y2, w2, h2) = found.T, real.T
    width = np.minimum(w1 + x1, w2 + x2) - np.maximum(x1, x2)
    height = np.minimum(h1 + y1, h2 + y2) - np.maximum(y1, y2)
    area, shared = w1 * h1, width * height
    union = np.where(crowd, area, area + w2 * h2 - shared)
    common = (width > 0) & (height > 0) & (union > 0)
    return np.divide(shared, union, out=np.zeros(len(crowd)), where=common)


def _mask_overlaps(
    real: NDArray[np.object_], found: NDArray[np.object_], crowd: NDArray[np.bool_]
) -> Floats:
    """The IoU of every detection with every object, by detection."""
    return np.ravel(coco_mask.iou(found.tolist(), real.tolist(), crowd.tolist()))


def _choose(
    objects: Objects, groups: Integers, found: Integers, real: Integers, iou: Floats
) -> tuple[Integers, Integers]:
    """Let each detection take the best object that is left, all groups at once.

    Objects that count go before ignored ones whatever the overlap; then the greatest overlap is
    the best, and of equal ones the later object. An object can be taken once, a crowd many times.

    Returns:
        The bits of each detection where it has taken an object, and where one that counts.
    """
    best = np.lexsort((-real, -iou, found))
    found, real, iou = found[best], real[best], iou[best]
    passed = ((1 << np.searchsorted(THRESHOLDS, iou, side="right")) - 1) * IN_EVERY_RANGE
    counted = objects.counted()
    # A detection asks its objects twice: first as ones that count, then as ignored ones.
    wanted = np.concatenate([passed & counted[real], passed & ~counted[real]])
    found, real = np.tile(found, 2), np.tile(real, 2)
    by_detection = np.argsort(found, kind="stable")
    turn = place_within(groups[found[by_detection]])
    order = by_detection[np.argsort(turn, kind="stable")]
    found, real, wanted = found[order], real[order], wanted[order]
    matched, hits = np.zeros((2, len(groups)), np.int64)
    gone, single = np.zeros(len(counted), np.int64), np.where(objects.crowd, 0, -1)
    # In each turn every group asks once, so that no detection or object occurs twice.
    for start, stop in itertools.pairwise([0, *np.cumsum(np.bincount(turn))]):
        detection, target = found[start:stop], real[start:stop]
        taken = wanted[start:stop] & ~matched[detection] & ~gone[target]
        matched[detection] |= taken
        hits[detection] |= taken & counted[target]
        gone[target] |= taken & single[target]
    return matched, hits
