"""What the paper says of its search space (section 5.1.5), counted on random samples of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effspinenet_lib.files import ensure_folder
from effspinenet_lib.models.specs import EQUAL_BETAS, SCALES
from effspinenet_lib.models.zoo import COCO_CLASSES
from effspinenet_lib.report.search import SPACE_FILE
from effspinenet_lib.results import current_commit, today
from effspinenet_lib.results.csvfile import to_row, write_rows
from effspinenet_lib.results.schemas import SPACE
from effspinenet_lib.search.space import (
    detector_costs,
    sample_betas,
)

# What is stated, as the share in percent that it takes; more than half is our reading of most.
STATED = {"all": 100.0, "most": 50.0}
PERCENT = 100.0
RANGE = 0.10  # section 5.1.5: within 10 % of the target
SCALE = "D0"  # section 5.1.1: models are sampled at the D0 scale
PERCENTILES = (1, 50, 99)


def space_statements(samples: int, seed: int) -> list[dict[str, Any]]:
    """Count samples and compare what the paper says with them.

    Args:
        samples: distributions drawn uniformly.
        seed: of the draw.

    Returns:
        Rows of `search/space.csv`, without commit and date.
    """
    betas = sample_betas(samples, seed)
    size = SCALES[SCALE].input_size
    equal = np.array([EQUAL_BETAS])
    target = detector_costs(equal, SCALES[SCALE], COCO_CLASSES, size)
    costs = detector_costs(betas, SCALES[SCALE], COCO_CLASSES, size)
    multi_adds, count, parameters = (
        getattr(costs, name) / getattr(target, name)
        for name in ("multi_adds", "authors_count", "parameters")
    )
    rows = []
    for name, ratio in (("multi-adds", multi_adds), ("authors-count", count)):
        within = PERCENT * float(np.mean(np.abs(ratio - 1) <= RANGE))
        text = f"{name} of the detector within 10 % of SP-EfficientNet-B0's"
        rows.append(_statement(f"{name}-within-10-percent", text, "all", within))
    text = "samples with fewer parameters than SP-EfficientNet-B0"
    rows.append(
        _statement("parameters-reduced", text, "most", PERCENT * float(np.mean(parameters < 1)))
    )
    for name, ratio in (
        ("multi-adds", multi_adds),
        ("authors-count", count),
        ("parameters", parameters),
    ):
        for share in PERCENTILES:
            value = PERCENT * float(np.percentile(ratio, share))
            text = f"{name} over SP-EfficientNet-B0's, percentile {share}"
            rows.append(_statement(f"{name}-percentile-{share}", text, "", value))
    return [{"equation": "approximate", "samples": samples, **row} for row in rows]


def _statement(key: str, text: str, stated: str, computed: float) -> dict[str, Any]:
    """A row; what the paper says holds where `computed` is over what it says, or all of it."""
    verdict = ""
    if stated:
        verdict = "holds" if computed > STATED[stated] or computed == PERCENT else "mismatch"
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
