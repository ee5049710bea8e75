"""What the paper says of its search space (section 5.1.5), counted on random samples of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effspinenet_lib.files import ensure_folder
from effspinenet_lib.models.specs import SCALES
from effspinenet_lib.models.zoo.registry import COCO_CLASSES
from effspinenet_lib.report.search_space import (
    APPROXIMATE,
    EXACT,
    SAME_DIMS,
    SPACE_FILE,
    STATED,
)
from effspinenet_lib.results import current_commit, today
from effspinenet_lib.results.csvfile import to_row, write_rows
from effspinenet_lib.results.schemas import SPACE
from effspinenet_lib.search.space import (
    Ints,
    base_dims,
    detector_costs,
    reference_dims,
    sample_betas,
)

PERCENT = 100.0
RANGE = 0.10  # section 5.1.5: within 10 % of the target
EQUATIONS = {EXACT: False, APPROXIMATE: True}
SCALE = "D0"  # section 5.1.1: models are sampled at the D0 scale
PERCENTILES = (1, 50, 99)


def space_statements(samples: int, seed: int) -> list[dict[str, Any]]:
    """Count samples and compare what the paper says with them, for Equation 2 exact and not.

    Args:
        samples: distributions drawn uniformly.
        seed: of the draw.

    Returns:
        Rows of `search/space.csv`, without commit and date.
    """
    betas = sample_betas(samples, seed)
    size = SCALES[SCALE].input_size
    target = [
        int(v[0]) for v in detector_costs(reference_dims(), SCALES[SCALE], COCO_CLASSES, size)
    ]
    dims = {name: base_dims(betas, approximate) for name, approximate in EQUATIONS.items()}
    rows = []
    for name, drawn in dims.items():
        costs = detector_costs(drawn, SCALES[SCALE], COCO_CLASSES, size)
        found = _compare(costs, target, dims["exact"], drawn)
        rows += [{"equation": name, "samples": samples, **row} for row in found]
    return rows


def _compare(
    costs: tuple[Ints, Ints], target: Sequence[int], exact: Ints, drawn: Ints
) -> list[dict[str, Any]]:
    """The rows of one reading of Equation 2."""
    multi_adds, parameters = (cost / own for cost, own in zip(costs, target, strict=True))
    within = PERCENT * float(np.mean(np.abs(multi_adds - 1) <= RANGE))
    fewer = PERCENT * float(np.mean(parameters < 1))
    rows = [
        _statement(
            "multi-adds-within-10-percent",
            "Multi-Adds of the detector within 10 % of SP-EfficientNet-B0's",
            "all",
            within,
        ),
        _statement(
            "parameters-reduced",
            "samples with fewer parameters than SP-EfficientNet-B0",
            "most",
            fewer,
        ),
    ]
    for name, ratio in (("multi-adds", multi_adds), ("parameters", parameters)):
        for share in PERCENTILES:
            value = PERCENT * float(np.percentile(ratio, share))
            text = f"{name} over SP-EfficientNet-B0's, percentile {share}"
            rows.append(_statement(f"{name}-percentile-{share}", text, "", value))
    same = PERCENT * float(np.mean((exact == drawn).all(axis=1)))
    text = "samples with the dimensions of the exact equation"
    rows.append(_statement(SAME_DIMS, text, "", same))
    return rows


def _statement(key: str, text: str, stated: str, computed: float) -> dict[str, Any]:
    """A row; what the paper says holds where `computed` is over what it says, or all of it."""
    verdict = ""
    if stated:
        _, least = STATED[stated]
        verdict = "holds" if computed > least or computed == PERCENT else "mismatch"
    return {
        "claim": key,
        "section": "5.1.5" if stated else "",
        "statement": text,
        "stated": stated,
        "computed": round(computed, 3),
        "unit": "%",
        "verdict": verdict,
    }


def write_statements(results_dir: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `search/space.csv` whole; returns its path.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(results_dir) / SPACE_FILE
    ensure_folder(path.parent)
    stamp = {"commit": current_commit(), "date": today()}
    cells = [to_row({**row, **stamp}, SPACE, "statement on the space") for row in rows]
    write_rows(path, SPACE, cells)
    return path
