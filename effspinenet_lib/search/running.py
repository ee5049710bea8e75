"""Running planned rows on an engine: each trained once, tried again, recorded as it ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from effspinenet_lib.errors import UserError
from effspinenet_lib.models.specs import parse_betas
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.search.engines import Engine
from effspinenet_lib.search.record import (
    FAILED,
    FINISHED,
    copy_of,
    finished_runs,
    reference_costs,
)
from effspinenet_lib.search.settings import SearchSettings
from effspinenet_lib.search.trials import TrialFailed, drop_run, trial_request

ATTEMPTS = 2  # a trial that gives nothing is tried once more


@dataclass(frozen=True)
class Penalty:
    """MnasNet's soft constraint (arXiv 1807.11626, equation 2).

    Attributes:
        exponent: of a model's Multi-Adds over SP-EfficientNet's; 0: the reward is the AP. MnasNet
            took -0.07.

    Raises:
        UserError: the exponent is above 0 or not finite.
    """

    exponent: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what gives no rewards."""
        if not -math.inf < self.exponent <= 0:
            raise UserError(
                f"the penalty is {self.exponent}; it must be 0 or a finite number below, such as "
                "-0.07"
            )

    def reward(self, ap: float, multi_adds_ratio: float) -> float:
        """AP times the ratio to the exponent."""
        return ap * float(multi_adds_ratio**self.exponent)


NO_PENALTY = Penalty()


def run_rows(
    settings: SearchSettings,
    store: ResultsStore,
    penalty: Penalty,
    engine: Engine,
    rows: Sequence[dict[str, Any]],
) -> Iterator[int]:
    """Run planned rows; record each as it ends, and yield its number.

    Of rows with the same run the first is trained, unless the record has it from anyone's
    sample; the others take its result.

    Args:
        settings: what a trial is.
        store: of the profile; its record holds trials of these settings alone.
        penalty: on costly models.
        engine: where the trials run.
        rows: from `plan_trials` or `plan_betas`.

    Raises:
        UserError: the record or a trial's folder cannot be written, the data cannot be used, or a
            worker cannot start. Trials under way are stopped; none of them is recorded.
    """
    target = reference_costs(settings).multi_adds
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["run"], []).append(row)
    known = finished_runs(store)
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
    """Try a trial, and once more where it gave nothing: the columns that this fills.

    Raises:
        UserError: what failed is not the trial.
    """
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
