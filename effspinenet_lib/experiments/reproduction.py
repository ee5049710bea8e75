"""Running what a table or figure of the paper still needs, and reading what was measured.

    results = reproduce("table-09", profile="proxy")

counts what the rows' models cost, trains the runs that are missing and returns the paper's rows,
the measured ones, the runs and their curves. A finished run is not trained again unless `force`;
an interrupted one is resumed: after an interruption the same call is made again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState

from effspinenet_lib.data import DataConfig, detect_format
from effspinenet_lib.data.config import UNKNOWN_ROOT
from effspinenet_lib.errors import DataError, UnknownName, UserError
from effspinenet_lib.experiments.cost_table import model_cost
from effspinenet_lib.experiments.items import (
    PAPER,
    PROFILES,
    PROXY,
    SMOKE,
    Item,
    Profile,
    Row,
    default_results_dir,
    get_item,
)
from effspinenet_lib.experiments.launcher import (
    ENGINES,
    LOCAL,
    Outcome,
    open_pool,
    run_many,
    thread_environment,
    usable_cores,
)
from effspinenet_lib.files import ensure_folder
from effspinenet_lib.models.specs import TASKS
from effspinenet_lib.models.zoo import default_image_size
from effspinenet_lib.results import (
    COST_UNITS,
    CURVE_FILE,
    ItemResults,
    ResultsStore,
    merged_results,
)
from effspinenet_lib.results.paper import paper_values
from effspinenet_lib.training.checkpoint import KEPT
from effspinenet_lib.training.device import ACCELERATORS, AUTO, CPU, GPU, TPU, present_accelerators
from effspinenet_lib.training.recipes import get_recipe
from effspinenet_lib.training.run import WEIGHTS, RunConfig, RunResult, train_run

# Our choice: the paper's batches of 256 and more take days a step on a CPU. The activations of two
# images of the largest own model, Eff-SpineNet-D2, take 5 GB in float32 (`plan` counts them), which
# a machine with 8 GB holds; a number that depended on the memory would make the same command
# another run on another machine.
CPU_BATCH = 2
# Task -> format of the data that the paper trains it on.
FORMATS = {
    "detection": "coco",
    "instances": "coco",
    "classification": "imagenet",
    "segmentation": "voc_segmentation",
}
# Format -> where a split's list lies in the folder, and the names of the two splits, the paper's
# first.
SPLITS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "coco": ("annotations/instances_{}.json", (("train2017", "val2017"), ("train", "val"))),
    "imagenet": ("{}", (("train", "val"),)),
    "voc_segmentation": (
        "ImageSets/Segmentation/{}.txt",
        (("train_aug", "val"), ("train", "val")),
    ),
    "voc": ("ImageSets/Main/{}.txt", (("train", "val"),)),
}

logger = logging.getLogger(__name__)


# Parameters


@dataclass(frozen=True)
class RunParameters:
    """A notebook's parameters, checked and resolved by `resolve_parameters`.

    Attributes:
        device: `cpu`, `gpu` or `tpu`; with Ray also `auto`, as the cluster decides it.
        devices: runs at once; 0: as many as a Ray cluster has room for.
        initial_weights: weights file that the paper's runs start from, in place of the run that
            an item names.
        started: keys of the runs that calls with these parameters have trained, which `force`
            does not train a second time.
    """

    profile: Profile
    data_root: Path | None
    results_dir: Path
    seeds: tuple[int, ...]
    engine: str = LOCAL
    device: str = CPU
    devices: int = 1
    force: bool = False
    initial_weights: Path | None = None
    started: set[str] = field(default_factory=set, compare=False)

    @property
    def store(self) -> ResultsStore:
        """The profile's CSV files."""
        return ResultsStore(self.results_dir, self.profile.name)


def resolve_parameters(
    profile: str = "smoke",
    data_root: str | os.PathLike[str] | None = None,
    results_dir: str | os.PathLike[str] | None = None,
    accelerator: str = AUTO,
    devices: int | str = AUTO,
    seeds: str | int | Sequence[int] | None = None,
    engine: str = LOCAL,
    force: bool = False,
) -> RunParameters:
    """Check a notebook's parameters before any work starts; "" and None take the default.

    Args:
        profile: `smoke`, `proxy` or `paper`.
        data_root: folder of the data that the paper uses for an item's task, such as COCO 2017;
            only the profile `paper` reads it.
        results_dir: where the CSVs and runs go; default the checkout's `results`.
        accelerator: `auto` takes an accelerator where there is one, else the CPU; `cpu`, `gpu` or
            `tpu`.
        devices: runs at once; `auto` is one for each CPU core or GPU, and as many as a Ray cluster
            has room for. Small runs can share a GPU: give more. A TPU takes one.
        seeds: one run a seed: such as "0,1,2", a number or a list; default the profile's own.
        engine: `local` processes, or a `ray` cluster.
        force: train finished runs again.

    Raises:
        UnknownName: an unknown profile, accelerator or engine.
        UserError: an accelerator that is missing, an invalid seed or number of devices, a missing
            data root, a folder that cannot be written.
    """
    if profile not in PROFILES:
        raise UnknownName("profile", str(profile), PROFILES)
    if not isinstance(force, bool):
        raise UserError(f"force is {force!r}; write True or False")
    device, count = resolve_devices(engine, accelerator, devices)
    numbers, chosen = _parse_seeds(seeds), PROFILES[profile]
    root = Path(data_root).resolve() if data_root else None
    if not chosen.data and (root is None or not root.is_dir()):
        raise UserError(
            f"the profile {profile!r} trains on the paper's data (COCO 2017 for detection): set "
            "data_root to its folder" + (f" ({root} does not exist)" if root else "")
        )
    folder = (Path(results_dir) if results_dir else default_results_dir()).resolve()
    ensure_folder(ResultsStore(folder, profile).folder)
    return RunParameters(
        chosen, root, folder, numbers or chosen.seeds, engine, device, count, force
    )


def resolve_devices(engine: str, accelerator: str, devices: int | str) -> tuple[str, int]:
    """The kind of device that runs use, and how many run at once; 0: as many as Ray has room for.

    Raises:
        UnknownName: an unknown engine or accelerator.
        UserError: the accelerator is missing, or the number is invalid.
    """
    for kind, name, known in (
        ("engine", engine, ENGINES),
        ("accelerator", accelerator, ACCELERATORS),
    ):
        if name not in known:
            raise UnknownName(kind, str(name), known)
    count = 0
    if devices not in (AUTO, ""):
        count = int(devices) if str(devices).isdecimal() else 0
        if count < 1:
            raise UserError(f"devices is {devices!r}; give a positive number or 'auto'")
    if engine != LOCAL:
        return accelerator, count
    present = sorted(present_accelerators())
    device = next(iter(present), CPU) if accelerator == AUTO else accelerator
    if device not in (CPU, *present):
        there = ", ".join((CPU, *present))
        raise UserError(f"accelerator {device!r} is not on this machine; it has {there}")
    if count > 1 and device == TPU:
        raise UserError(f"devices is {devices!r}; a TPU takes one run at a time: give 1")
    at_once = {CPU: usable_cores(), GPU: torch.accelerator.device_count(), TPU: 1}
    return device, count or at_once[device]


def _parse_seeds(seeds: str | int | Sequence[int] | None) -> tuple[int, ...]:
    given = str(seeds).split(",") if isinstance(seeds, (str, int)) else seeds or ()
    values = [str(seed).strip() for seed in given if str(seed).strip()]
    if not all(value.isdecimal() for value in values):
        raise UserError(f"seeds is {seeds!r}; give numbers from 0 up, such as '0,1,2'")
    return tuple(dict.fromkeys(int(value) for value in values))


# From rows to runs


@dataclass(frozen=True)
class PlannedRun:
    """A run that a row of an item needs."""

    row: Row
    config: RunConfig

    @property
    def label(self) -> str:
        """The run's name for people."""
        return f"{self.row.label}, seed {self.config.seed}"


def planned_runs(item: Item, parameters: RunParameters) -> list[PlannedRun]:
    """Runs that an item needs under a profile; rows may share a run, or need none in it.

    Seed by seed, so that an interrupted item has every row before any has a second seed.

    Raises:
        DataError: the data root does not hold the data of a row's task.
    """
    return [
        PlannedRun(row, configure_row(item, row, parameters, seed))
        for seed in parameters.seeds
        for row in item.rows
        if seed in row.seeds_in(parameters.profile.name, parameters.seeds)
    ]


def configure_row(item: Item, row: Row, parameters: RunParameters, seed: int) -> RunConfig:
    """The run that a row needs under a profile.

    Raises:
        UserError: the row is not trained in the profile.
        DataError: the data root does not hold the data of the row's task.
    """
    profile = parameters.profile
    if not row.trains_in(profile.name):
        raise UserError(f"{item.id}, {row.label}: is not trained in the profile {profile.name}")
    model, size = row.model_in(profile)
    return RunConfig(
        model=model,
        task=row.task,
        image_size=size or default_image_size(model, row.task),
        data=profile.data.get(row.task) or paper_data(parameters.data_root, row.task),
        recipe=get_recipe(row.recipes.get(profile.name) or profile.recipes[row.task]),
        seed=seed,
        model_options=dict(row.options),
        initial_weights=_initial_weights(row, parameters, seed),
    )


def _initial_weights(row: Row, parameters: RunParameters, seed: int) -> str | None:
    """Where the run that a row starts from leaves its weights; None for fresh weights."""
    if parameters.initial_weights is not None:
        return str(parameters.initial_weights)
    profile = parameters.profile
    if profile.name not in row.init_from:
        return None
    item = get_item(row.init_from[profile.name])
    model, _ = row.model_in(profile)
    origin = next(
        other
        for other in item.rows
        if other.trains_in(profile.name) and other.model_in(profile)[0] == model
    )
    # where the data lies is no part of the key
    config = configure_row(item, origin, replace(parameters, data_root=None), seed)
    return str(parameters.store.runs_folder / config.key / WEIGHTS)


def paper_data(root: Path | None, task: str) -> DataConfig:
    """The paper's data of a task in a folder of any layout that has it, its splits found by name.

    Args:
        root: the folder; None takes the paper's layout without looking, to plan a run.
        task: of the model.

    Raises:
        DataError: the folder has no known layout, or none of the known splits.
    """
    layout = FORMATS[task] if root is None else detect_format(root, task)
    place, splits = SPLITS.get(layout, SPLITS["coco"])
    if root is None:
        return DataConfig(layout, UNKNOWN_ROOT, *splits[0])
    for names in splits:
        if all((root / place.format(name)).exists() for name in names):
            return DataConfig(layout, str(root.resolve()), *names)
    wanted = " nor ".join(f"{train}/{evaluate}" for train, evaluate in splits)
    raise DataError(f"{root}: has no splits {wanted} ({place.format('<split>')}); name them so")


# Running


def reproduce(
    name: str,
    parameters: RunParameters | None = None,
    *,
    progress: bool = True,
    micro_batch: int | None = None,
    **given: Any,
) -> ItemResults:
    """Measure an item's costs, run what is missing of its runs, and read its results.

    Args:
        name: an item's id, such as `table-09`; one without rows is only read.
        parameters: from `resolve_parameters`, where several items share them.
        progress: show a bar in terminals and notebooks.
        micro_batch: images that a run computes at once; their gradients add up to the batch's,
            and the run stays the same one. None: the batch, but `CPU_BATCH` of the paper's
            batches on a CPU.
        **given: arguments of `resolve_parameters`, in place of `parameters`.

    Raises:
        UnknownName: no such item, profile, accelerator or engine.
        UserError: an invalid parameter, or a run failed; the message names its log. The others
            are recorded.
    """
    item = get_item(name)
    parameters = parameters or resolve_parameters(**given)
    if not item.rows:
        return read_results(item, parameters)
    store, planned = parameters.store, planned_runs(item, parameters)
    store.drop_runs(item.id, _outdated(item, parameters))
    finished = store.finished()
    records = {record["run"]: record for record in store.runs().to_dict("records")}
    missing: dict[str, RunConfig] = {}
    rows = cost_rows(item.rows)
    for run in planned:
        key = run.config.key
        if key in finished and (key in parameters.started or not parameters.force):
            rows += run_rows(run, finished[key], records[key])
        else:
            missing[key] = run.config
    store.add_measurements(item.id, rows)
    failed: list[Outcome] = []
    if missing:
        with open_pool(parameters.engine, parameters.devices, parameters.device) as pool:
            if micro_batch is None and not parameters.profile.data and pool.device == CPU:
                micro_batch = CPU_BATCH
            logger.info(
                "%d runs, %d at once, %s threads each",
                len(missing),
                min(len(missing), pool.processes),
                thread_environment(pool.threads(len(missing)))["OMP_NUM_THREADS"],
            )
            for outcome in run_many(
                list(missing.values()),
                store.runs_folder,
                pool,
                parameters.force,
                progress,
                micro_batch,
            ):
                if outcome.result is None:
                    failed.append(outcome)
                    continue
                parameters.started.add(outcome.result.key)
                own = [run for run in planned if run.config.key == outcome.result.key]
                _record(store, item, own, outcome.result)
    if failed:
        error, config = failed[0].error, failed[0].config
        assert error is not None
        raise type(error)(
            f"{len(failed)} of {len(missing)} runs failed; the first, {config.model} seed "
            f"{config.seed}: {error} (log: {failed[0].log}); run the same again to resume them"
        )
    return read_results(item, parameters)


def _record(store: ResultsStore, item: Item, runs: Sequence[PlannedRun], result: RunResult) -> None:
    """Record what a run measured for rows of an item.

    The run comes last: one that is killed between the two is recorded again.
    """
    for run in runs:
        store.add_measurements(item.id, run_rows(run, result.metrics, result.record))
    store.add_run(result.record)


def _outdated(item: Item, parameters: RunParameters) -> set[str]:
    """Runs recorded for an item that its rows would not make today, with the same seed.

    They are of another version's settings; a mean over seeds must not mix the two.
    """
    rows = {row.label: row for row in item.rows if row.trains_in(parameters.profile.name)}
    measured = parameters.store.measurements(item.id)
    recorded = measured.loc[measured["run"] != "", ["row", "seed", "run"]].drop_duplicates()
    return {
        run
        for label, seed, run in recorded.itertuples(index=False)
        if label not in rows or configure_row(item, rows[label], parameters, int(seed)).key != run
    }


def train_row(
    item: Item,
    row: Row,
    parameters: RunParameters,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    max_steps: int | None = None,
    checkpoints: int = KEPT,
    workers: int = 0,
    progress: bool = True,
) -> RunResult:
    """Train one row of an item with the first seed, evaluate it and record it with its cost.

    In this process, and under `torchrun` or `accelerate launch` in all of theirs. Interrupted,
    the same call resumes it; so does a later one with more steps.

    Args:
        item: of the row.
        row: what to train.
        parameters: from `resolve_parameters`; this process takes the device that it finds.
        batch_size: images a step; the recipe is scaled to it. None: the recipe's own, but
            `CPU_BATCH` at the paper's settings on a CPU without `micro_batch`.
        micro_batch: images computed at once; their gradients add up to the batch's.
        max_steps: stop after that many steps of the unchanged schedule. The row's note then says
            how many of how many, and the run's state is partial.
        checkpoints: how many of the last ones are kept.
        workers: processes that load images.
        progress: show bars where stderr is a terminal.

    Raises:
        UserError: the row is not trained in the profile, a longer run of it is recorded, or what
            `train_run` raises.
        DataError: the data root does not hold the data of the row's task.
        CheckpointError: the weights that the row starts from are missing.
    """
    config = configure_row(item, row, parameters, parameters.seeds[0])
    paper_on_cpu = not parameters.profile.data and parameters.device == CPU
    if batch_size is None and micro_batch is None and paper_on_cpu:
        batch_size = CPU_BATCH
    if batch_size is not None:
        config = replace(config, recipe=config.recipe.scale_to_batch(batch_size))
    store = parameters.store
    if max_steps is not None and max_steps < config.recipe.steps:
        _protect_longer(store, item, row, config, max_steps)
    result = train_run(
        config,
        store.runs_folder,
        force=parameters.force,
        workers=workers,
        max_steps=max_steps,
        progress=progress,
        checkpoints=checkpoints,
        micro_batch=micro_batch,
    )
    if PartialState().is_main_process:
        store.add_measurements(item.id, cost_rows([row]))
        _record(store, item, [PlannedRun(row, config)], result)
    return result


def _protect_longer(
    store: ResultsStore, item: Item, row: Row, config: RunConfig, max_steps: int
) -> None:
    """Refuse a run of few steps whose row would replace that of another, longer run."""
    rows = store.measurements(item.id)
    same = rows[(rows["row"] == row.label) & (rows["seed"] == config.seed)]
    runs = store.runs()
    other = runs["run"].isin(same["run"]) & (runs["run"] != config.key)
    longer = runs[other & (runs["images"] > max_steps * config.recipe.batch_size)]
    for run, images in longer[["run", "images"]].itertuples(index=False):
        raise UserError(
            f"{store.folder / item.id}.csv holds what run {run}, of {images:,} images, measured "
            f"for {row.label}; {max_steps} steps of {config.recipe.batch_size} would replace it: "
            "give another results folder"
        )


# Rows of the results


def cost_rows(trained: Sequence[Row]) -> list[dict[str, Any]]:
    """Measure each row's model at the paper's image size and number of classes."""
    rows = []
    for row in trained:
        size = default_image_size(row.model, row.task)
        cost = model_cost(row.model, row.task, size, tuple(row.options.items()))
        data = f"zeros, {TASKS[row.task]} classes, {size}x{size}"
        common = {"row": row.label, "model": row.model, "task": row.task, "data": data}
        for metric, (scale, unit) in COST_UNITS.items():
            value = getattr(cost, metric) / scale
            rows.append(
                {**common, "source": "cost", "metric": metric, "value": value, "unit": unit}
            )
    return rows


def run_rows(
    run: PlannedRun, metrics: Mapping[str, float], record: Mapping[Any, Any]
) -> list[dict[str, Any]]:
    """Rows of an item for a run, dated and marked by the run's own record.

    A run that stopped early, or whose recipe was scaled to another batch, says so in its note.
    """
    config = run.config
    notes = [f"{name}={value}" for name, value in run.row.options.items()]
    steps, batch = config.recipe.steps, config.recipe.batch_size
    if int(record["steps"]) < steps:
        notes.append(f"{int(record['steps']):,} of {steps:,} steps")
    if config.recipe.scaled_from_batch is not None:
        notes.append(f"recipe scaled from batch {config.recipe.scaled_from_batch} to {batch}")
    common = {
        "row": run.row.label,
        "model": config.model,
        "task": run.row.task,
        "data": describe_data(config),
        "seed": config.seed,
        "run": config.key,
        "commit": record["commit"],
        "date": record["date"],
        "note": ", ".join(notes),
        "unit": "%",
    }
    return [{**common, "metric": metric, "value": value} for metric, value in metrics.items()]


def describe_data(config: RunConfig) -> str:
    """What a run trained and was evaluated on, in a few words for the `data` column.

    A folder is called by its own name, so that a small one is not taken for the paper's data.
    """
    data = config.data
    named = data.format if data.root is None else f"{data.format} ({Path(data.root).name})"
    parts = [named, f"{data.train_split}/{data.eval_split}"]
    if data.train_images is not None:
        parts.append(f"{data.train_images}/{data.eval_images} images")
    return ", ".join([*parts, f"{config.image_size}x{config.image_size}"])


# Reading


def read_results(item: Item, parameters: RunParameters) -> ItemResults:
    """What is known of an item, without running anything.

    Raises:
        DataError: a file has a broken row; names the file and the line.
    """
    labels: dict[str, str] = {}
    for run in planned_runs(item, parameters):
        labels.setdefault(run.config.key, run.label)
    own = parameters.store
    folders = dict.fromkeys((own.results_dir, default_results_dir()))
    profiles = dict.fromkeys((own.profile, PROXY, PAPER))
    measured = merged_results(folders, profiles, item.id)
    measured = measured[measured["source"] != SMOKE]  # its accuracy means nothing
    measured = measured.reset_index(drop=True)
    runs = own.runs()
    runs = runs[runs["run"].isin(labels)]
    curves = {key: own.runs_folder / key / CURVE_FILE for key in labels}
    return ItemResults(
        paper_values(item.id) if item.id.startswith("table") else measured.iloc[:0],
        measured,
        runs.assign(label=runs["run"].map(labels)),
        {labels[key]: pd.read_csv(path) for key, path in curves.items() if path.is_file()},
        [row.label for row in item.rows if row.trains_in(PROXY)],
    )
