"""A search: ask a controller for samples, train them, record them, tell the controller.

A kill at any moment loses nothing. The state of a controller is written with the samples that it
asks for, before any of them runs; a trial is recorded as soon as it ends. So a search that is
started again runs what was asked for and is not recorded, and nothing else. Equal samples are
trained once. The record is `search_trials.csv`; it holds trials of one setting and one penalty.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from effspinenet_lib.data import DataConfig
from effspinenet_lib.data.config import UNKNOWN_ROOT
from effspinenet_lib.data.shapescenes import CATEGORIES
from effspinenet_lib.data.splits import HeldOutSplit
from effspinenet_lib.errors import CheckpointError, TrainingError, UnknownName, UserError
from effspinenet_lib.experiments.launcher import Outcome
from effspinenet_lib.experiments.plan import SEARCH_TRIALS
from effspinenet_lib.files import atomic_write, ensure_folder
from effspinenet_lib.models.specs import (
    COCO_CLASSES,
    EQUAL_BETAS,
    MODELS,
    SCALES,
    SEARCH_SPACE,
    betas_text,
    parse_betas,
)
from effspinenet_lib.results import REFERENCE, ResultsStore
from effspinenet_lib.search.controllers import CONTROLLERS, Choices, Controller
from effspinenet_lib.search.space import BLOCKS, Costs, detector_costs, feature_dims
from effspinenet_lib.training.config import RunConfig
from effspinenet_lib.training.recipe import Recipe
from effspinenet_lib.training.recipes import SEARCH_HELD_OUT_IMAGES, get_recipe

FINISHED, DUPLICATE, FAILED = "finished", "duplicate", "failed"  # states of a trial
OWN_FORMAT = "shapescenes"
HELD_OUT = "search"  # split of ShapeScenes that no training and no table sees
STATES_FOLDER = "search"  # in the folder of runs: one file a method and seed
ELSEWHERE = "choose another results folder"
RESTART = (
    f"restart with --force, which drops the trials of this method and seed alone, or {ELSEWHERE}"
)
# Runs configurations and tells how each ended, as soon as it has: `launcher.run_many` with a pool.
Runner = Callable[[Sequence[RunConfig]], Iterator[Outcome]]


# Settings


@dataclass(frozen=True)
class SearchSettings:
    """The search of a profile.

    Attributes:
        profile: `smoke`, `proxy` or `paper`.
        model: scale-permuted model that a trial trains with the betas of its sample.
        image_size: side of the square input in pixels.
        data: what a trial is trained and, on the held-out split, evaluated on.
        recipe: how a trial is trained.
        methods: those of `all`.
        trials: samples of each method.
        batch: samples between two updates of a controller.
        timeout: seconds after which a trial counts as hung.
        micro_batch: images of a batch that a trial computes at once, which its norms see; None:
            all of them.
    """

    profile: str
    model: str
    image_size: int
    data: DataConfig
    recipe: Recipe
    methods: tuple[str, ...]
    trials: int
    batch: int
    timeout: float
    micro_batch: int | None = None

    def on(
        self, root: Path | None, batch_size: int | None = None, micro_batch: int | None = None
    ) -> SearchSettings:
        """The same search on the data in a user's folder, with the recipe scaled to a batch.

        Raises:
            UserError: a folder is needed and missing, or is given and not needed.
        """
        needed = self.data.format != OWN_FORMAT
        if needed and (root is None or not root.is_dir()):
            raise UserError(
                f"the profile {self.profile!r} searches on COCO 2017: name its folder with --data"
                + (f" ({root} does not exist)" if root else "")
            )
        if not needed and root is not None:
            raise UserError(f"the profile {self.profile!r} has data of its own; leave out --data")
        recipe = self.recipe if batch_size is None else self.recipe.scale_to_batch(batch_size)
        data = self.data if root is None else replace(self.data, root=str(root.resolve()))
        return replace(self, data=data, recipe=recipe, micro_batch=micro_batch)

    def config(self, betas: tuple[int, ...], seed: int) -> RunConfig:
        """The run of a trial."""
        options = {"betas": betas_text(betas)}
        return RunConfig(
            self.model, "detection", self.image_size, self.data, self.recipe, seed, options
        )

    def costs(self, betas: Sequence[tuple[int, ...]]) -> Costs:
        """What the models of trials cost."""
        scale = SCALES[MODELS[self.model].scale]
        classes = len(CATEGORIES) if self.data.format == OWN_FORMAT else COCO_CLASSES
        return detector_costs(np.array(betas), scale, classes, self.image_size)

    @cached_property
    def equal_multi_adds(self) -> int:
        """Multiply-adds of the model with SP-EfficientNet's distribution."""
        return int(self.costs([EQUAL_BETAS]).multi_adds[0])

    def reward(self, row: Mapping[str, Any], penalty: float) -> float:
        """The AP, less a penalty on multiply-adds above those of SP-EfficientNet."""
        return float(row["AP"] * (row["multi_adds"] / self.equal_multi_adds) ** penalty)

    @property
    def description(self) -> str:
        """What a trial is, in a few words; trials of one record have the same."""
        data, recipe = self.data, self.recipe
        counts = (data.train_images, data.eval_images)
        images = "all" if counts == (None, None) else "/".join(map(str, counts))
        return (
            f"{self.model}, {data.format} {data.train_split}/{data.eval_split} {images} images, "
            f"{self.image_size}x{self.image_size}, {recipe.name}"
            + (f" scaled to batch {recipe.batch_size}" if recipe.scaled_from_batch else "")
            + (f", {self.micro_batch} images at once" if self.micro_batch else "")
        )


SEARCHES: dict[str, SearchSettings] = {
    settings.profile: settings
    for settings in (
        SearchSettings(
            "smoke",
            model="eff_spinenet_m0",
            image_size=64,
            data=DataConfig(
                OWN_FORMAT, eval_split=HELD_OUT, train_images=16, eval_images=4, image_size=64
            ),
            recipe=get_recipe("smoke_search"),
            methods=("ppo", "reinforce", "random", "evolution"),
            trials=4,
            batch=2,
            timeout=300,  # our choice: most of a trial is the import of torch
        ),
        SearchSettings(
            "proxy",
            model="eff_spinenet_m0",
            # Our choice, with an earlier recipe: in 45 seconds of one core 96 pixels gave 2.1 AP,
            # 64 pixels 1.0, 128 pixels 1.8.
            image_size=96,
            # Our choice: 200 steps of 16 see each image 1.6 times; 300 to evaluate take 2 seconds.
            data=DataConfig(
                OWN_FORMAT, eval_split=HELD_OUT, train_images=2000, eval_images=300, image_size=96
            ),
            recipe=get_recipe("proxy_search"),
            methods=("ppo", "random", "evolution"),
            trials=50,
            batch=10,  # our choice: four updates, as the last batch is never told
            timeout=900,  # our choice: twenty times what a trial takes
        ),
        SearchSettings(
            "paper",
            model="eff_spinenet_d0",
            image_size=SCALES["D0"].input_size,  # paper 5.1.1: SP-EfficientNet-B0 at 512
            data=DataConfig(
                "coco",
                UNKNOWN_ROOT,
                HeldOutSplit("train2017", "rest", SEARCH_HELD_OUT_IMAGES).name,
                HeldOutSplit("train2017", "held", SEARCH_HELD_OUT_IMAGES).name,
            ),
            recipe=get_recipe("paper_search_trial"),
            methods=("ppo",),  # paper 5.1.1: reinforcement learning
            trials=SEARCH_TRIALS,
            batch=20,  # our choice: the paper does not say how many samples make an update
            timeout=24 * 3600,  # our choice: many times what a trial takes on one accelerator
        ),
    )
}


def get_search(profile: str) -> SearchSettings:
    """The search of a profile.

    Raises:
        UnknownName: there is none.
    """
    if profile not in SEARCHES:
        raise UnknownName("profile of a search", profile, SEARCHES)
    return SEARCHES[profile]


# The search


@dataclass(frozen=True)
class Search:
    """One search and where its record is.

    Attributes:
        settings: what its trials are.
        store: of the profile; its `search_trials.csv` is the record.
        method: key in `CONTROLLERS`.
        seed: of the controller and of every trial's run.
        trials: samples in all.
        penalty: exponent of a model's multiply-adds over SP-EfficientNet's in the reward, MnasNet's
            soft constraint (arXiv 1807.11626, equation 2: -0.07); 0: the reward is the AP.

    Raises:
        UnknownName: no such method.
        UserError: the penalty is above 0 or not finite.
    """

    settings: SearchSettings
    store: ResultsStore
    method: str
    seed: int
    trials: int
    penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in CONTROLLERS:
            raise UnknownName("search method", self.method, CONTROLLERS)
        if not -math.inf < self.penalty <= 0:
            raise UserError(
                f"the penalty is {self.penalty}; it must be 0 or a finite number below, such as "
                "-0.07"
            )

    @property
    def state_file(self) -> Path:
        """Where the controller's state is."""
        return self.store.runs_folder / STATES_FOLDER / f"{self.method}-{self.seed}.pt"

    def controller(self) -> Controller:
        """A controller that has learned nothing; no two methods of a seed begin with one sample."""
        entropy = [self.seed, *self.method.encode()]
        stream = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        make = CONTROLLERS[self.method]
        return make(BLOCKS, len(SEARCH_SPACE), stream, self.settings.trials)

    def recorded(self) -> dict[int, dict[str, Any]]:
        """The rows of the record that are this search's, by trial."""
        return {int(row["trial"]): row for row in _rows(self.store.trials()) if self.owns(row)}

    def owns(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of the record is this search's."""
        return (row["method"], row["seed"]) == (self.method, self.seed)


@dataclass(frozen=True)
class _Asked:
    """Samples that a controller asked for: what the state file holds with the controller."""

    step: int
    first: int  # number of the first one's trial
    samples: list[Choices]
    entropy: float


def run_search(
    search: Search, runner: Runner, progress: bool = True, force: bool = False
) -> pd.DataFrame:
    """Run a search to its number of trials, or resume it.

    Args:
        search: what to run.
        runner: runs its trials.
        progress: show a bar over the trials.
        force: drop what the record holds of this search and start from the beginning.

    Returns:
        The record of this search, one row a trial.

    Raises:
        UserError: the record holds trials of another kind, another process runs this search, or
            the error of a trial that is no fault of its own: it is not recorded, trials under way
            are stopped, and the same call resumes the search.
        CheckpointError: the controller's state is lost or broken, or trials that it has learned
            from are missing from the record.
    """
    ensure_folder(search.state_file.parent)
    try:
        with FileLock(f"{search.state_file}.lock", timeout=0):
            kept = [row for row in _rows(search.store.trials()) if not (force and search.owns(row))]
            _check_record(search.store, kept, search.settings, search.penalty, RESTART)
            if force:
                search.state_file.unlink(missing_ok=True)
                search.store.drop_trials(search.method, search.seed)
            _run(search, runner, progress)
    except Timeout as error:
        raise UserError(
            f"{search.state_file}: another process runs this search; wait for it or stop it"
        ) from error
    return pd.DataFrame(list(search.recorded().values()))


def _run(search: Search, runner: Runner, progress: bool) -> None:
    rows = search.recorded()
    if rows.keys() >= set(range(search.trials)):
        return
    settings, controller = search.settings, search.controller()
    asked = _load(search, controller, rows) or _ask(search, controller, step=0, first=0)
    with _bar(search.method, search.trials, progress, initial=len(rows)) as bar:
        while True:
            chosen = [tuple(SEARCH_SPACE[index] for index in one) for one in asked.samples]
            planned = plan_trials(
                settings, chosen, search.method, search.seed, asked.step, asked.first
            )
            new = [{**row, "entropy": asked.entropy} for row in planned if row["trial"] not in rows]
            _run_trials(settings, search.store, search.penalty, runner, new, bar)
            rows = search.recorded()
            first = asked.first + len(asked.samples)
            if first >= search.trials:
                return
            told = [(s, rows[asked.first + n]["reward"]) for n, s in enumerate(asked.samples)]
            worked = [(sample, reward) for sample, reward in told if not math.isnan(reward)]
            controller.tell([sample for sample, _ in worked], [reward for _, reward in worked])
            asked = _ask(search, controller, asked.step + 1, first)


def _bar(name: str, total: int, progress: bool, initial: int = 0) -> tqdm[Any]:
    silent = None if progress else True
    return tqdm(total=total, initial=initial, desc=name, unit="trial", disable=silent)


def _ask(search: Search, controller: Controller, step: int, first: int) -> _Asked:
    """Ask for the next batch; write it down with the controller's state before anything runs."""
    entropy = controller.entropy()
    count = min(search.settings.batch, search.trials - first)
    asked = _Asked(step, first, controller.ask(count), entropy)
    with atomic_write(search.state_file, "wb") as handle:
        torch.save({"asked": vars(asked), "method": controller.state()}, handle)
    return asked


def _load(search: Search, controller: Controller, rows: Collection[int]) -> _Asked | None:
    """Restore the controller; what it asked for last. None where it has not begun.

    `rows` are the numbers of the recorded trials.
    """
    path = search.state_file
    if not path.exists():
        if not rows:
            return None
        raise CheckpointError(
            f"{path}: the state of the controller is missing, so its search cannot be resumed; "
            f"{RESTART}"
        )
    try:
        saved = torch.load(path, weights_only=True)
        controller.load(saved["method"])
        asked = _Asked(**saved["asked"])
    except Exception as error:  # torch raises many kinds
        raise CheckpointError(f"{path}: is no state of {search.method}: {error}") from error
    missing = [number for number in range(asked.first) if number not in rows]
    if missing:
        raise CheckpointError(
            f"{search.store.folder}: the record lacks {len(missing)} of the trials that "
            f"{search.method} has learned from, the first of them {missing[0]}; restore the "
            "record, or restart with --force"
        )
    return asked


def run_references(
    settings: SearchSettings,
    store: ResultsStore,
    named: Mapping[str, tuple[int, ...]],
    seeds: Sequence[int],
    runner: Runner,
    progress: bool = True,
) -> pd.DataFrame:
    """Train distributions that no controller chose as trials of several seeds, each once.

    They show what the best of a search is worth against others, and how much a seed matters. What
    failed is run again under its number.

    Args:
        settings: what a trial is.
        store: of the profile; the rows join its `search_trials.csv` as method `reference`.
        named: betas by a name, which their rows have as note.
        seeds: of the runs.
        runner: runs the trials.
        progress: show a bar over the trials.

    Returns:
        The rows of method `reference`.

    Raises:
        UserError: the record holds trials of other settings, or as `run_search`.
    """
    recorded = _rows(store.trials())
    _check_record(store, recorded, settings, None, ELSEWHERE)
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        own = [row for row in recorded if (row["method"], row["seed"]) == (REFERENCE, seed)]
        done = {row["run"] for row in own if row["state"] != FAILED}
        numbers = {row["run"]: row["trial"] for row in own if row["state"] == FAILED}
        following = 1 + max((row["trial"] for row in own), default=-1)
        for name, betas in named.items():
            (row,) = plan_trials(settings, [betas], REFERENCE, seed, 0, following)
            if row["run"] in done:
                continue
            done.add(row["run"])
            row["trial"] = numbers.get(row["run"], following)
            if row["trial"] == following:
                following += 1
            rows.append({**row, "note": name})
    with _bar(REFERENCE, len(rows), progress) as bar:
        _run_trials(settings, store, 0.0, runner, rows, bar)
    frame = store.trials()
    return frame[frame["method"] == REFERENCE]


# The record


def plan_trials(
    settings: SearchSettings,
    betas: Sequence[tuple[int, ...]],
    method: str,
    seed: int,
    step: int,
    first: int,
) -> list[dict[str, Any]]:
    """The columns of trials that are known before they run.

    Args:
        settings: what a trial is.
        betas: of each trial.
        method: who chose them.
        seed: of the method and the runs.
        step: batch that they belong to.
        first: number of the first trial.
    """
    drawn, size = np.array(betas), SCALES["D0"].input_size
    dims = feature_dims(drawn)
    full = detector_costs(drawn, SCALES["D0"], COCO_CLASSES, size)
    own = settings.costs(betas)
    return [
        {
            "method": method,
            "seed": seed,
            "trial": first + number,
            "step": step,
            "betas": betas_text(sample),
            "feature_dims": "-".join(map(str, dims[number].tolist())),
            "multi_adds_d0": int(full.multi_adds[number]),
            "parameters_d0": int(full.parameters[number]),
            "multi_adds": int(own.multi_adds[number]),
            "parameters": int(own.parameters[number]),
            "run": settings.config(sample, seed).key,
            "setting": settings.description,
        }
        for number, sample in enumerate(betas)
    ]


def _run_trials(
    settings: SearchSettings,
    store: ResultsStore,
    penalty: float,
    runner: Runner,
    rows: Sequence[dict[str, Any]],
    bar: tqdm[Any],
) -> None:
    """Run planned rows and record each as it ends.

    Of rows with the same run the first is trained, unless the record has it from anyone's sample;
    the others take its result.
    """

    def record(ended: list[dict[str, Any]]) -> None:
        for row in ended:
            if row["state"] != FAILED:
                row["reward"] = settings.reward(row, penalty)
        store.add_trials(ended)
        if ended[0]["state"] == FINISHED:  # the checkpoints of all trials would fill a disk
            shutil.rmtree(store.runs_folder / ended[0]["run"], ignore_errors=True)
        bar.update(len(ended))

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["run"], []).append(row)
    known = {row["run"]: row for row in _rows(store.trials()) if row["state"] == FINISHED}
    for run in [run for run in groups if run in known]:
        record([_copy(row, known[run]) for row in groups.pop(run)])
    configs = [
        settings.config(parse_betas(first["betas"]), first["seed"]) for first, *_ in groups.values()
    ]
    for outcome in runner(configs):
        first, *others = groups[outcome.config.key]
        done = {**first, **_columns(outcome)}
        record([done, *(_copy(other, done) for other in others)])


def _columns(outcome: Outcome) -> dict[str, Any]:
    """What a trial that ended fills of its row.

    Raises:
        UserError: what failed is not the trial: the next one would fare no better.
    """
    result, error = outcome.result, outcome.error
    if result is not None and math.isfinite(result.metrics["AP"]):
        return {
            "state": FINISHED,
            "attempts": outcome.attempts,
            "AP": result.metrics["AP"],
            "seconds": result.record["wall_seconds"],
            "precision": result.record["precision"],
        }
    if error is not None and not isinstance(error, TrainingError):
        raise error
    note = str(error or "no AP: there is nothing to find in the held-out images")
    return {"state": FAILED, "attempts": outcome.attempts, "note": note}


def _copy(row: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A planned row with the result of another row of the same run."""
    source = f"as trial {known['trial']}"
    if known["state"] == FAILED:
        return {**row, "state": FAILED, "attempts": 0, "note": source}
    notes = [row.get("note"), f"{source} of {known['method']}"]
    return {
        **row,
        "state": DUPLICATE,
        "attempts": 0,
        "seconds": 0.0,
        "precision": known.get("precision"),
        "AP": known["AP"],
        "note": ", ".join(note for note in notes if note),
    }


def _check_record(
    store: ResultsStore,
    rows: Iterable[Mapping[str, Any]],
    settings: SearchSettings,
    penalty: float | None,
    remedy: str,
) -> None:
    """Refuse to add to a record of trials of another kind; a penalty of None fits all.

    Raises:
        UserError: a trial has another setting or another penalty, or would be another run now.
    """
    for row in rows:
        if row["setting"] != settings.description:
            difference = f"other settings ({row['setting']})"
        elif settings.config(parse_betas(row["betas"]), int(row["seed"])).key != row["run"]:
            difference = "other settings"
        elif (
            penalty is not None
            and row["method"] != REFERENCE
            and row["state"] != FAILED
            and not math.isclose(settings.reward(row, penalty), row["reward"], abs_tol=1e-9)
        ):
            difference = "another penalty"
        else:
            continue
        raise UserError(
            f"{store.folder}: trial {row['trial']} of {row['method']} with seed {row['seed']} was "
            f"made with {difference}, and a record holds trials of one kind; {remedy}"
        )


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]
