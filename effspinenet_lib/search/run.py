"""A search: ask a method for samples, run them as trials, record them, tell the method.

What a kill leaves is whole at any moment. The state of a method is written with the samples that
it asks for next, before any of them runs; a trial is recorded as soon as it ends. So a search that
goes on runs what is asked for and not recorded, and nothing else.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from effspinenet_lib.choices.learned import SEARCH_SPACE, parse_betas
from effspinenet_lib.errors import CheckpointError, UnknownName, UserError
from effspinenet_lib.files import atomic_write, ensure_folder
from effspinenet_lib.results import REFERENCE, ResultsStore
from effspinenet_lib.search.engines import Engine
from effspinenet_lib.search.methods import Choices, Evolution, Method, RandomSearch
from effspinenet_lib.search.policy import PPO, REINFORCE, PolicySearch
from effspinenet_lib.search.record import (
    FAILED,
    FINISHED,
    copy_of,
    finished_runs,
    plan_betas,
    plan_trials,
    reference_costs,
    rows_of,
)
from effspinenet_lib.search.settings import SearchSettings
from effspinenet_lib.search.space import BLOCKS
from effspinenet_lib.search.trials import TrialFailed, drop_run, trial_request

METHODS: dict[str, Callable[[int, int, int], Method]] = {
    "ppo": lambda blocks, choices, seed: PolicySearch(blocks, choices, seed, PPO),
    "reinforce": lambda blocks, choices, seed: PolicySearch(blocks, choices, seed, REINFORCE),
    "random": RandomSearch,
    "evolution": Evolution,
}
ATTEMPTS = 2  # a trial that gives nothing is tried once more
STATES_FOLDER = "search"  # beside the runs: one file a method and seed


@dataclass(frozen=True)
class Penalty:
    """MnasNet's soft constraint (arXiv 1807.11626, equation 2).

    Attributes:
        exponent: of a model's Multi-Adds over SP-EfficientNet's; 0: the reward is the AP. MnasNet
            took -0.07.
    """

    exponent: float = 0.0

    def reward(self, ap: float, multi_adds_ratio: float) -> float:
        """AP times the ratio to the exponent."""
        return ap * float(multi_adds_ratio**self.exponent)


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
    penalty: Penalty = Penalty()

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
        UserError: the record is of other settings, another process runs this search, or it
            cannot be written.
        CheckpointError: the record holds trials and the state of the method is lost or broken.
    """
    if search.method not in METHODS:
        raise UnknownName("search method", search.method, METHODS)
    ensure_folder(search.state_file.parent)
    try:
        with FileLock(f"{search.state_file}.lock", timeout=0):
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
    _check_settings(search, rows)
    if len(rows) >= search.trials:
        return
    method = METHODS[search.method](BLOCKS, len(SEARCH_SPACE), _stream(search))
    asked = _load(search, method, bool(rows)) or _ask(search, method, step=0, first=0)
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


def _check_settings(search: Search, rows: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse to go on with a record whose trials would be other runs or have other rewards now."""
    target = reference_costs(search.settings).multi_adds
    for row in rows.values():
        key = search.settings.config(parse_betas(row["betas"]), search.seed).key
        reward = search.penalty.reward(row["AP"], row["multi_adds"] / target)
        same = row["state"] == FAILED or math.isclose(reward, row["reward"], abs_tol=1e-9)
        described = row["setting"] == search.settings.description
        if key != row["run"] or not (same and described):
            raise UserError(
                f"{search.store.folder}: trial {row['trial']} of {search.method} was made with "
                f"other settings ({row['setting']}) or another penalty; begin anew with --force, "
                "or choose another results folder"
            )


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


def _load(search: Search, method: Method, needed: bool) -> _Asked | None:
    """Load the state of the method; what it asked for last."""
    path = search.state_file
    if not path.exists():
        if not needed:
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
        return _Asked(asked["step"], asked["first"], samples, asked["entropy"])
    except Exception as error:
        raise CheckpointError(f"{path}: is no state of {search.method}: {error}") from error


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
        UserError: the record cannot be written, or holds them with other settings.
    """
    frame = store.trials()
    known = rows_of(frame[frame["method"] == REFERENCE])
    rows = []
    for seed in seeds:
        own = [row for row in known if row["seed"] == seed]
        runs, first = (
            {row["run"] for row in own},
            1 + max((row["trial"] for row in own), default=-1),
        )
        for name, betas in named.items():
            (row,) = plan_betas(settings, [betas], REFERENCE, seed, 0, first)
            differs = (row["run"], row["setting"])
            if any(o["betas"] == row["betas"] and (o["run"], o["setting"]) != differs for o in own):
                raise UserError(
                    f"{store.folder}: {name} with seed {seed} was trained with other settings; "
                    "choose another results folder"
                )
            if row["run"] not in runs:
                runs.add(row["run"])
                rows.append({**row, "note": name})
                first += 1
    with tqdm(
        total=len(rows), desc=REFERENCE, unit="trial", disable=None if progress else True
    ) as bar:
        for _ in _run_rows(settings, store, Penalty(), engine, rows):
            bar.update()
    frame = store.trials()
    return frame[frame["method"] == REFERENCE]


def _run_asked(search: Search, engine: Engine, asked: _Asked) -> Iterator[int]:
    """Run what of the samples is not recorded; record each as it ends, and yield its number."""
    recorded = search.recorded()
    planned = plan_trials(
        search.settings, asked.samples, search.method, search.seed, asked.step, asked.first
    )
    rows = [{**row, "entropy": asked.entropy} for row in planned if row["trial"] not in recorded]
    yield from _run_rows(search.settings, search.store, search.penalty, engine, rows)


def _run_rows(
    settings: SearchSettings,
    store: ResultsStore,
    penalty: Penalty,
    engine: Engine,
    rows: Sequence[dict[str, Any]],
) -> Iterator[int]:
    """Run planned rows; record each as it ends, and yield its number.

    Of rows with the same run the first is trained, unless the record has it from anyone's
    sample; the others take its result.
    """
    target = reference_costs(settings).multi_adds
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["run"], []).append(row)
    known = finished_runs(store, settings)
    done = [[copy_of(row, known[run]) for row in groups.pop(run)] for run in known if run in groups]
    ended = (
        [first, *(copy_of(row, first) for row in others)]
        for first, others in _train(settings, store, engine, list(groups.values()))
    )
    for group in itertools.chain(done, ended):
        for row in group:
            if row["state"] != FAILED:
                row["reward"] = penalty.reward(row["AP"], row["multi_adds"] / target)
        store.add_trials(group)
        # a search would fill a disk with the checkpoints of its trials
        if group[0]["state"] == FINISHED:
            drop_run(group[0]["run"], store.runs_folder)
        yield from (row["trial"] for row in group)


def _train(
    settings: SearchSettings,
    store: ResultsStore,
    engine: Engine,
    groups: Sequence[list[dict[str, Any]]],
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Train the first row of each group, as many at once as the engine has workers."""
    with ThreadPoolExecutor(engine.workers) as pool:
        futures: dict[Future[dict[str, Any]], list[dict[str, Any]]] = {}
        for rows in groups:
            config = settings.config(parse_betas(rows[0]["betas"]), rows[0]["seed"])
            request = trial_request(
                config.to_dict(), store.runs_folder, engine.device, settings.micro_batch
            )
            futures[pool.submit(_attempts, engine, request)] = rows
        try:
            for future in as_completed(futures):
                first, *others = futures[future]
                yield {**first, **future.result()}, others
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if not all(future.done() for future in futures):
                engine.close()


def _attempts(engine: Engine, request: Mapping[str, Any]) -> dict[str, Any]:
    """Try a trial, and once more where it gave nothing: the columns that this fills."""
    reason = ""
    for attempt in range(1, ATTEMPTS + 1):
        if engine.closed.is_set():
            break
        try:
            answer = engine.attempt(request)
        except TrialFailed as error:
            reason = str(error)
        else:
            return {"state": FINISHED, "attempts": attempt, **answer}
    return {"state": FAILED, "attempts": ATTEMPTS, "note": reason}
