"""Distributions that no method chose, trained as trials are, to set beside what a search found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from effspinenet_lib.results import REFERENCE, ResultsStore
from effspinenet_lib.search.engines import Engine
from effspinenet_lib.search.record import (
    FAILED,
    other_kind,
    plan_betas,
    refuse_other_settings,
    rows_of,
)
from effspinenet_lib.search.running import NO_PENALTY, run_rows
from effspinenet_lib.search.settings import SearchSettings


def run_references(
    settings: SearchSettings,
    store: ResultsStore,
    named: Mapping[str, tuple[int, ...]],
    seeds: Sequence[int],
    engine: Engine,
    progress: bool = True,
) -> pd.DataFrame:
    """Run distributions that no method chose as trials of several seeds, each once.

    What the best of a search is worth beside others, and how much a seed matters.

    Args:
        settings: what a trial is.
        store: of the profile; the rows join its `search_trials.csv` as method `reference`.
        named: betas by a name, which their rows have as note.
        seeds: of the runs.
        engine: where the trials run.
        progress: show a bar over the trials.

    Returns:
        The rows of method `reference`.

    Raises:
        UserError: the record holds trials of other settings, or as `running.run_rows`.
    """
    frame = store.trials()
    refuse_other_settings(store, frame, settings)
    known = frame[frame["method"] == REFERENCE]
    rows = [
        row
        for seed in seeds
        for row in _missing(settings, store, named, seed, rows_of(known[known["seed"] == seed]))
    ]
    with tqdm(
        total=len(rows), desc=REFERENCE, unit="trial", disable=None if progress else True
    ) as bar:
        for _ in run_rows(settings, store, NO_PENALTY, engine, rows):
            bar.update()
    frame = store.trials()
    return frame[frame["method"] == REFERENCE]


def _missing(
    settings: SearchSettings,
    store: ResultsStore,
    named: Mapping[str, tuple[int, ...]],
    seed: int,
    known: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Plan what `known`, the rows of a seed, lacks; what failed is run again under its number."""
    numbers = {row["run"]: row["trial"] for row in known if row["state"] == FAILED}
    there = {row["run"]: row for row in known if row["state"] != FAILED}
    runs, following = set(there), 1 + max((row["trial"] for row in known), default=-1)
    rows = []
    for name, betas in named.items():
        (row,) = plan_betas(settings, [betas], REFERENCE, seed, 0, following)
        for other in there.values():
            if other["betas"] == row["betas"] and other["run"] != row["run"]:
                raise other_kind(store, other, "other settings")
        if row["run"] in runs:
            continue
        runs.add(row["run"])
        row["trial"] = numbers.get(row["run"], following)
        following += row["trial"] == following
        rows.append({**row, "note": name})
    return rows
