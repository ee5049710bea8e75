"""A search: ask a method for samples, run them as trials, record them, tell the method.

What a kill leaves is whole at any moment. The state of a method is written with the samples that
it asks for next, before any of them runs; a trial is recorded as soon as it ends. So a search that
goes on runs what is asked for and not recorded, and nothing else.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from effspinenet_lib.errors import CheckpointError, UnknownName, UserError
from effspinenet_lib.files import atomic_write, ensure_folder
from effspinenet_lib.models.specs import SEARCH_SPACE, parse_betas
from effspinenet_lib.results import REFERENCE, ResultsStore
from effspinenet_lib.search.engines import Engine
from effspinenet_lib.search.methods import (
    Choices,
    Evolution,
    Method,
    RandomSearch,
    population_size,
)
from effspinenet_lib.search.policy import PPO, REINFORCE, PolicySearch
from effspinenet_lib.search.record import (
    ELSEWHERE,
    FAILED,
    other_kind,
    plan_trials,
    reference_costs,
    refuse_other_settings,
    rows_of,
)
from effspinenet_lib.search.running import NO_PENALTY, Penalty, run_rows
from effspinenet_lib.search.settings import SearchSettings
from effspinenet_lib.search.space import BLOCKS

# (blocks, choices, seed, trials of the profile's search) -> method. The number that a user asks
# for is none of a method's business: a search that is extended goes on as it would have.
METHODS: dict[str, Callable[[int, int, int, int], Method]] = {
    "ppo": lambda blocks, choices, seed, _: PolicySearch(blocks, choices, seed, PPO),
    "reinforce": lambda blocks, choices, seed, _: PolicySearch(blocks, choices, seed, REINFORCE),
    "random": lambda blocks, choices, seed, _: RandomSearch(blocks, choices, seed),
    "evolution": lambda blocks, choices, seed, trials: Evolution(
        blocks, choices, seed, population_size(trials)
    ),
}
ANEW = (
    f"begin anew with --force, which drops the trials of this method and seed alone, or {ELSEWHERE}"
)
STATES_FOLDER = "search"  # beside the runs: one file a method and seed


@dataclass(frozen=True)
class Search:
    """One search and where its record is.

    Attributes:
        settings: what its trials are.
        store: of the profile; its `search_trials.csv` is the record.
        method: key in `METHODS`.
        seed: of the method and of every trial's run.
        trials: samples in all.
        penalty: on costly models.
    """

    settings: SearchSettings
    store: ResultsStore
    method: str
    seed: int
    trials: int
    penalty: Penalty = NO_PENALTY

    @property
    def state_file(self) -> Path:
        """Where the method's state is."""
        return self.store.runs_folder / STATES_FOLDER / f"{self.method}-{self.seed}.pt"

    def recorded(self) -> dict[int, Mapping[str, Any]]:
        """The rows of the record that are this search's, by trial."""
        frame = self.store.trials()
        own = frame[(frame["method"] == self.method) & (frame["seed"] == self.seed)]
        return {int(row["trial"]): row for row in rows_of(own)}


@dataclass(frozen=True)
class _Asked:
    """Samples that a method asked for: what the state file holds beside the method."""

    step: int
    first: int  # number of the first one's trial
    samples: tuple[Choices, ...]
    entropy: float


def run_search(
    search: Search, engine: Engine, progress: bool = True, force: bool = False
) -> pd.DataFrame:
    """Run a search to its number of trials, or go on with it.

    Args:
        search: what to run.
        engine: where its trials run.
        progress: show a bar over the trials.
        force: drop what the record holds of this search and begin anew.

    Returns:
        The record of this search, one row a trial.

    Raises:
        UnknownName: no such method.
        UserError: the record holds trials of another kind, another process runs this search, or
            as `running.run_rows`: the same call goes on later.
        CheckpointError: the state of the method is lost or broken, or trials that it has learned
            from are missing from the record.
    """
    if search.method not in METHODS:
        raise UnknownName("search method", search.method, METHODS)
    ensure_folder(search.state_file.parent)
    try:
        with FileLock(f"{search.state_file}.lock", timeout=0):
            _check_record(search, force)
            if force:
                search.state_file.unlink(missing_ok=True)
                search.store.drop_trials(search.method, search.seed)
            _run(search, engine, progress)
    except Timeout as error:
        raise UserError(
            f"{search.state_file}: another process runs this search; wait for it or stop it"
        ) from error
    return pd.DataFrame(list(search.recorded().values()))


def _run(search: Search, engine: Engine, progress: bool) -> None:
    rows = search.recorded()
    if all(number in rows for number in range(search.trials)):
        return
    method = METHODS[search.method](
        BLOCKS, len(SEARCH_SPACE), _stream(search), search.settings.trials
    )
    asked = _load(search, method, rows) or _ask(search, method, step=0, first=0)
    with tqdm(
        total=search.trials,
        initial=len(rows),
        desc=search.method,
        unit="trial",
        disable=None if progress else True,
    ) as bar:
        while True:
            for _ in _run_asked(search, engine, asked):
                bar.update()
            rows = search.recorded()
            first = asked.first + len(asked.samples)
            if first >= search.trials:
                return
            told = [(s, rows[asked.first + n]["reward"]) for n, s in enumerate(asked.samples)]
            worked = [(sample, reward) for sample, reward in told if not math.isnan(reward)]
            method.tell([sample for sample, _ in worked], [reward for _, reward in worked])
            asked = _ask(search, method, asked.step + 1, first)


def _stream(search: Search) -> int:
    """Seed of a method's samples; no two methods of one seed begin with the same ones."""
    entropy = [search.seed, *search.method.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _check_record(search: Search, force: bool) -> None:
    """Refuse to add to a record of trials of another kind; `force`: the own ones do not count.

    Raises:
        UserError: a trial has another setting or another penalty, or an own one would be another
            run now.
    """
    frame = search.store.trials()
    own = (frame["method"] == search.method) & (frame["seed"] == search.seed)
    kept = frame[~own] if force else frame
    refuse_other_settings(search.store, kept, search.settings, ANEW)
    target = reference_costs(search.settings).multi_adds
    for row in rows_of(kept[(kept["method"] != REFERENCE) & (kept["state"] != FAILED)]):
        reward = search.penalty.reward(row["AP"], row["multi_adds"] / target)
        if not math.isclose(reward, row["reward"], abs_tol=1e-9):
            raise other_kind(search.store, row, "another penalty", ANEW)
    for row in rows_of(frame[own & (not force)]):
        if search.settings.config(parse_betas(row["betas"]), search.seed).key != row["run"]:
            raise other_kind(search.store, row, "other settings", ANEW)


def _ask(search: Search, method: Method, step: int, first: int) -> _Asked:
    """Ask for the next batch; write it down with the method's state before anything runs."""
    entropy = method.entropy()
    count = min(search.settings.batch, search.trials - first)
    samples = tuple(method.ask(count))
    asked = _Asked(step, first, samples, entropy)
    state = {"step": step, "first": first, "samples": samples, "entropy": entropy}
    with atomic_write(search.state_file, "wb") as handle:
        torch.save({"asked": state, "method": method.state()}, handle)
    return asked


def _load(search: Search, method: Method, rows: Mapping[int, Mapping[str, Any]]) -> _Asked | None:
    """Load the state of the method; what it asked for last."""
    path = search.state_file
    if not path.exists():
        if not rows:
            return None
        raise CheckpointError(
            f"{path}: the state of the method is gone, so its search cannot go on; begin anew "
            "with --force, or choose another results folder"
        )
    try:
        saved = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
        method.load(saved["method"])
        asked = saved["asked"]
        samples = tuple(tuple(sample) for sample in asked["samples"])
        loaded = _Asked(asked["step"], asked["first"], samples, asked["entropy"])
    except Exception as error:
        raise CheckpointError(f"{path}: is no state of {search.method}: {error}") from error
    missing = [number for number in range(loaded.first) if number not in rows]
    if missing:
        raise CheckpointError(
            f"{search.store.folder}: the record lacks {len(missing)} of the trials that "
            f"{search.method} has learned from, the first of them {missing[0]}; put the record "
            "back, or begin anew with --force"
        )
    return loaded


def _run_asked(search: Search, engine: Engine, asked: _Asked) -> Iterator[int]:
    """Run what of the samples is not recorded; record each as it ends, and yield its number."""
    recorded = search.recorded()
    planned = plan_trials(
        search.settings, asked.samples, search.method, search.seed, asked.step, asked.first
    )
    rows = [{**row, "entropy": asked.entropy} for row in planned if row["trial"] not in recorded]
    yield from run_rows(search.settings, search.store, search.penalty, engine, rows)
