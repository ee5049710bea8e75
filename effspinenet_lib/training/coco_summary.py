"""COCO's 12 numbers from where each detection hits."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from effspinenet_lib.training.coco_matching import (
    AREAS,
    MAX_DETECTIONS,
    THRESHOLDS,
    Detections,
    Floats,
    Integers,
    Objects,
    holds,
    place_within,
)

# In the order of COCO's summary: precision at 0.50:0.95, 0.50 and 0.75 and by object size, then
# recall at 1, 10 and 100 detections an image and by object size.
METRICS = (
    *("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"),
    *("AR_1", "AR_10", "AR_100", "AR_S", "AR_M", "AR_L"),
)
# COCO's own settings (pycocotools.cocoeval.Params).
RECALLS = np.linspace(0, 1, 101)
LIMITS = (1, 10, MAX_DETECTIONS)  # of the detections of an image and category
AT_50, AT_75 = 0, 5  # places among the thresholds


def summarize(
    objects: Objects, detections: Detections, hits: Integers, misses: Integers, categories: int
) -> dict[str, float]:
    """Average over the categories that have objects.

    Args:
        objects: what is to be found.
        detections: in the order of `coco_matching.match`.
        hits: the bits of each detection where it hits an object, [N].
        misses: the bits of each detection where it is a mistake, [N].
        categories: their number.

    Returns:
        `METRICS` in percent; NaN where there is no object to find.
    """
    counts = _counts(objects, categories)
    precision = np.full((*counts.shape, len(THRESHOLDS)), math.nan)
    recall = np.full((*precision.shape, len(LIMITS)), math.nan)
    places = place_within(detections.image * categories + detections.category)
    # Of equal scores the one in the earlier image comes first.
    by_score = np.lexsort((-detections.score, detections.category))
    starts = np.searchsorted(detections.category[by_score], np.arange(categories + 1))
    for category, (start, stop) in enumerate(itertools.pairwise(starts)):
        rows = by_score[start:stop]
        of_category = [values[rows] for values in (hits, misses, places)]
        present = np.flatnonzero(counts[category]).tolist()
        for area, threshold in itertools.product(present, range(len(THRESHOLDS))):
            cell, count = (category, area, threshold), int(counts[category, area])
            hit, missed = (holds(bits, area, threshold) for bits in of_category[:2])
            precision[cell] = _mean_precision(hit, missed, count)
            found = of_category[2][hit]
            recall[cell] = [np.count_nonzero(found < limit) / count for limit in LIMITS]
    values = (
        *(precision[:, 0], precision[:, 0, AT_50], precision[:, 0, AT_75]),
        *(precision[:, area] for area in range(1, len(AREAS))),
        *(recall[:, 0, :, limit] for limit in range(len(LIMITS))),
        *(recall[:, area, :, -1] for area in range(1, len(AREAS))),
    )
    return {name: _percent(value) for name, value in zip(METRICS, values, strict=True)}


def _counts(objects: Objects, categories: int) -> Integers:
    """How many objects are to be found, by category and range of areas."""
    counted = objects.counted()
    of_areas = [
        np.bincount(objects.category[holds(counted, area, 0)], minlength=categories)
        for area in range(len(AREAS))
    ]
    return np.stack(of_areas, axis=1)


def _mean_precision(hit: NDArray[np.bool_], missed: NDArray[np.bool_], count: int) -> float:
    """The mean over `RECALLS` of the best precision with at least that recall.

    Precision is the best at a hit, so that the hits are enough. A recall that is not reached has
    precision 0.
    """
    places = np.flatnonzero(hit)
    found = np.arange(1, len(places) + 1)
    precision = found / (np.cumsum(hit | missed)[places] + np.spacing(1))
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.append(best, 0.0)[np.searchsorted(found / count, RECALLS)].mean())


def _percent(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return 100.0 * float(known.mean()) if known.size else math.nan
