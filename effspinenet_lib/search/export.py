"""From a search's record to a model: the best distribution as a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

from effspinenet_lib.errors import UserError
from effspinenet_lib.models.specs import LEARNED_BETAS, MODELS, SEARCH_SPACE, parse_betas
from effspinenet_lib.models.zoo import Distribution, write_distribution
from effspinenet_lib.report.search import best_sample
from effspinenet_lib.results import REFERENCE, ResultsStore
from effspinenet_lib.search.record import FAILED, equal_betas
from effspinenet_lib.search.settings import get_search

PAPER = "paper"  # in a method's place: the distribution of Table 1
# What the record says of a trial that a distribution's file carries on.
ORIGIN = ("method", "seed", "trial", "AP", "reward", "run", "setting", "commit", "date")


def best_trial(record: pd.DataFrame, method: str | None = None) -> Any:
    """The trial of the highest reward; of equal ones the one with fewer parameters.

    Args:
        record: `ResultsStore.trials()`.
        method: only of this one's trials; None: of all that a method chose.

    Raises:
        UserError: there is no trial with a result.
    """
    best = best_sample(record if method is None else record[record["method"] == method])
    if best is None:
        raise UserError(
            f"the record has no finished trial{f' of {method}' if method else ''}; run "
            "`effspinenet search` first"
        )
    return best


def found_distribution(store: ResultsStore, method: str | None = None) -> Distribution:
    """The best distribution of a record, or with `paper` as the method Table 1's.

    Raises:
        UserError: the record has no finished trial.
    """
    model = get_search(store.profile).model
    if method == PAPER:
        return paper_distribution(model)
    best = best_trial(store.trials(), method)
    origin = {name: _plain(best[name]) for name in ORIGIN}
    name = f"{model}, best of {store.profile} search"
    return Distribution(name, model, parse_betas(best["betas"]), origin)


def paper_distribution(model: str = "eff_spinenet_d0") -> Distribution:
    """Table 1's distribution, as betas that solve for its dimensions.

    Its `origin` says how far the dimensions that the betas give are from the printed ones.
    """
    distribution = Distribution("Eff-SpineNet, Table 1", model, LEARNED_BETAS)
    printed = [block.feature_dim for block in MODELS["eff_spinenet_d0"].backbone.blocks]
    pairs = zip(distribution.feature_dims, printed, strict=True)
    origin = {
        "source": "paper, Table 1; betas recovered from it (choices/learned.py)",
        "in_search_space": all(beta in SEARCH_SPACE for beta in LEARNED_BETAS),
        "largest_difference_channels": max(abs(given - wanted) for given, wanted in pairs),
    }
    return Distribution(distribution.name, model, LEARNED_BETAS, origin)


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
    """What `run_references` sets beside each other: the paper's two and each method's best.

    Args:
        record: `ResultsStore.trials()`.
    """
    named = {"SP-EfficientNet-B0": equal_betas(), "Eff-SpineNet-D0": LEARNED_BETAS}
    worked = record[record["state"] != FAILED]
    for method in sorted(set(worked["method"]) - {REFERENCE}):
        named[f"best of {method}"] = parse_betas(best_trial(record, method)["betas"])
    return named


def _plain(value: Any) -> Any:
    """A cell as JSON type."""
    return value.item() if hasattr(value, "item") else value
