"""From a search's record to a model: the best distribution as a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd

from effspinenet_lib.errors import UserError
from effspinenet_lib.models.specs import EQUAL_BETAS, LEARNED_BETAS, SEARCH_SPACE, parse_betas
from effspinenet_lib.models.zoo import Distribution, write_distribution
from effspinenet_lib.results import REFERENCE, ResultsStore
from effspinenet_lib.search.search import FAILED, get_search

PAPER = "paper"  # in place of a method: the distribution of Table 1
# What a distribution's file keeps of the trial that it comes from.
ORIGIN = ("method", "seed", "trial", "AP", "reward", "run", "setting", "commit", "date")


def best_trial(record: pd.DataFrame, method: str | None = None) -> pd.Series[Any]:
    """The trial of the highest reward; of equal ones the one with the fewest parameters.

    Args:
        record: `ResultsStore.trials()`.
        method: only of this one's trials; None: of all that a method chose.

    Raises:
        UserError: there is no trial with a result.
    """
    chosen = record["method"] == method if method else record["method"] != REFERENCE
    rows = record[chosen & record["AP"].notna()]
    if rows.empty:
        raise UserError(
            f"the record has no finished trial{f' of {method}' if method else ''}; run "
            "`effspinenet search` first"
        )
    order = ["reward", "parameters", "trial"]
    return rows.sort_values(order, ascending=[False, True, True]).iloc[0]


def found_distribution(store: ResultsStore, method: str | None = None) -> Distribution:
    """The best distribution of a record, or with `paper` as the method Table 1's.

    Raises:
        UserError: the record has no finished trial.
    """
    model = get_search(store.profile).model
    if method == PAPER:
        origin = {
            "source": "paper, Table 1; betas recovered from it (models/specs.py)",
            "in_search_space": set(LEARNED_BETAS) <= set(SEARCH_SPACE),
        }
        return Distribution("Eff-SpineNet, Table 1", model, LEARNED_BETAS, origin)
    best = best_trial(store.trials(), method)
    origin = json.loads(best[list(ORIGIN)].to_json())
    name = f"{model}, best of {store.profile} search"
    return Distribution(name, model, parse_betas(best["betas"]), origin)


def export_distribution(
    store: ResultsStore, path: str | os.PathLike[str], method: str | None = None
) -> Distribution:
    """Write the best distribution of a record to a file that `create_model` takes by name.

    Raises:
        UserError: the record has no finished trial, or the file cannot be written.
    """
    distribution = found_distribution(store, method)
    write_distribution(Path(path), distribution)
    return distribution


def compared_betas(record: pd.DataFrame) -> dict[str, tuple[int, ...]]:
    """What `run_references` compares: the paper's two distributions and each method's best.

    Args:
        record: `ResultsStore.trials()`.
    """
    named = {"SP-EfficientNet-B0": EQUAL_BETAS, "Eff-SpineNet-D0": LEARNED_BETAS}
    worked = record[record["state"] != FAILED]
    for method in sorted(set(worked["method"]) - {REFERENCE}):
        named[f"best of {method}"] = parse_betas(best_trial(record, method)["betas"])
    return named
