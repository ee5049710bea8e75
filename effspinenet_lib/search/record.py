"""The rows of `search_trials.csv`: what is known of a sample before it runs, and duplicates.

One file holds trials of one kind: the same setting, and rewards with the same penalty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from effspinenet_lib.errors import UserError
from effspinenet_lib.models.cost import Cost
from effspinenet_lib.models.specs import MODELS, SCALES, SEARCH_SPACE, betas_text
from effspinenet_lib.models.zoo import COCO_CLASSES
from effspinenet_lib.results import REFERENCE, ResultsStore
from effspinenet_lib.search.methods import Choices
from effspinenet_lib.search.settings import SearchSettings
from effspinenet_lib.search.space import detector_costs, feature_dims

FINISHED, DUPLICATE, FAILED = "finished", "duplicate", "failed"
DIMS_JOINT = "-"
ELSEWHERE = "choose another results folder"


def plan_trials(
    settings: SearchSettings,
    samples: Sequence[Choices],
    method: str,
    seed: int,
    step: int,
    first: int,
) -> list[dict[str, Any]]:
    """The columns of trials that are known before they run.

    Args:
        settings: what a trial is.
        samples: for each block an index into `SEARCH_SPACE`.
        method: who chose them.
        seed: of the method and the runs.
        step: batch that they belong to.
        first: number of the first trial.
    """
    chosen = [tuple(SEARCH_SPACE[index] for index in sample) for sample in samples]
    return plan_betas(settings, chosen, method, seed, step, first)


def plan_betas(
    settings: SearchSettings,
    betas: Sequence[tuple[int, ...]],
    method: str,
    seed: int,
    step: int,
    first: int,
) -> list[dict[str, Any]]:
    """`plan_trials` for betas that need not be of the space."""
    drawn = np.array(betas)
    dims = feature_dims(drawn)
    full = detector_costs(drawn, SCALES["D0"], COCO_CLASSES, SCALES["D0"].input_size)
    scale = SCALES[MODELS[settings.model].scale]
    own = detector_costs(drawn, scale, settings.classes, settings.image_size)
    return [
        {
            "method": method,
            "seed": seed,
            "trial": first + number,
            "step": step,
            "betas": betas_text(sample),
            "feature_dims": DIMS_JOINT.join(map(str, dims[number].tolist())),
            "multi_adds_d0": int(full.multi_adds[number]),
            "parameters_d0": int(full.parameters[number]),
            "multi_adds": int(own.multi_adds[number]),
            "parameters": int(own.parameters[number]),
            "run": settings.config(sample, seed).key,
            "setting": settings.description,
        }
        for number, sample in enumerate(betas)
    ]


def reference_costs(settings: SearchSettings) -> Cost:
    """What SP-EfficientNet costs as a trial: equal betas."""
    (row,) = plan_betas(settings, [equal_betas()], REFERENCE, 0, 0, 0)
    return Cost(row["multi_adds"], math.nan, row["parameters"])


def equal_betas() -> tuple[int, ...]:
    """The betas of SP-EfficientNet-B0: every block keeps its share."""
    return (SEARCH_SPACE[0],) * len(SCALES["D0"].repeats)


def finished_runs(store: ResultsStore) -> dict[str, dict[str, Any]]:
    """Rows of the record that have a result of their own, by run; whoever's samples they were."""
    frame = store.trials()
    return {row["run"]: row for row in rows_of(frame[frame["state"] == FINISHED])}


def refuse_other_settings(
    store: ResultsStore, rows: pd.DataFrame, settings: SearchSettings, remedy: str = ELSEWHERE
) -> None:
    """Refuse a record whose trials were others: one has no place beside them.

    Args:
        store: whose record it is.
        rows: of the record.
        settings: what a trial is now.
        remedy: what to do about it.

    Raises:
        UserError: a row is of another setting.
    """
    for row in rows_of(rows[rows["setting"] != settings.description]):
        raise other_kind(store, row, f"other settings ({row['setting']})", remedy)


def other_kind(
    store: ResultsStore, row: Mapping[str, Any], difference: str, remedy: str = ELSEWHERE
) -> UserError:
    """What to say of a record with a trial of another kind."""
    return UserError(
        f"{store.folder}: trial {row['trial']} of {row['method']} with seed {row['seed']} was made "
        f"with {difference}, and a record holds trials of one kind; {remedy}"
    )


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a frame as dictionaries."""
    return [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]


def copy_of(row: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A planned row with the result of another row of the same run."""
    if known["state"] == FAILED:
        return {**row, "state": FAILED, "attempts": 0, "note": f"as trial {known['trial']}"}
    source = f"as trial {known['trial']} of {known['method']}"
    return {
        **row,
        "state": DUPLICATE,
        "attempts": 0,
        "seconds": 0.0,
        "precision": known.get("precision"),
        "AP": known["AP"],
        "note": f"{row['note']}, {source}" if "note" in row else source,
    }
