"""From a search's record to a model: the best distribution as a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd

from effspinenet_lib.errors import UserError
from effspinenet_lib.models.specs import EQUAL_BETAS, LEARNED_BETAS, SEARCH_SPACE, parse_betas
from effspinenet_lib.models.zoo import Distribution, write_distribution
from effspinenet_lib.report.search import best_sample, searched
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.search.search import get_search

PAPER = "paper"  # in place of a method: the distribution of Table 1
# What a distribution's file keeps of the trial that it comes from.
ORIGIN = ("method", "seed", "trial", "AP", "reward", "run", "setting", "commit", "date")


def export_distribution(
    store: ResultsStore, path: str | os.PathLike[str], method: str | None = None
) -> Distribution:
    """Write the best distribution of a record to a file that `create_model` takes by name.

    Args:
        store: of the profile.
        path: of the file.
        method: whose best; None: of all. `paper`: Table 1's distribution.

    Raises:
        UserError: the record has no finished trial, or the file cannot be written.
    """
    model = get_search(store.profile).model
    if method == PAPER:
        origin = {
            "source": "paper, Table 1; betas recovered from it (models/specs.py)",
            "in_search_space": set(LEARNED_BETAS) <= set(SEARCH_SPACE),
        }
        found = Distribution("Eff-SpineNet, Table 1", model, LEARNED_BETAS, origin)
    else:
        trials = store.trials()
        best = best_sample(trials if method is None else trials[trials["method"] == method])
        if best is None:
            raise UserError(
                f"the record has no finished trial{f' of {method}' if method else ''}; run "
                "`effspinenet search` first"
            )
        origin = json.loads(best[list(ORIGIN)].to_json())
        name = f"{model}, best of {store.profile} search"
        found = Distribution(name, model, parse_betas(best["betas"]), origin)
    write_distribution(Path(path), found)
    return found


def compared_betas(record: pd.DataFrame) -> dict[str, tuple[int, ...]]:
    """What `run_references` compares: the paper's two distributions and each method's best.

    Args:
        record: `ResultsStore.trials()`.
    """
    named = {"SP-EfficientNet-B0": EQUAL_BETAS, "Eff-SpineNet-D0": LEARNED_BETAS}
    best = {method: best_sample(rows) for method, rows in searched(record).groupby("method")}
    found = {f"best of {method!s}": parse_betas(row["betas"]) for method, row in best.items()}
    return named | found
