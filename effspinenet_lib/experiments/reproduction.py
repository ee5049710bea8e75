"""Which runs an item needs, and running those that are missing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from effspinenet_lib.errors import UserError
from effspinenet_lib.experiments.fanout import run_all
from effspinenet_lib.experiments.items import ITEMS, PROFILES, Item, Profile, Row, get_item
from effspinenet_lib.experiments.paper_data import paper_data
from effspinenet_lib.experiments.parameters import CPU_BATCH, Parameters
from effspinenet_lib.models.cost import measure_cost
from effspinenet_lib.models.zoo import TASKS, create_model, default_image_size
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.results.paper import paper_values
from effspinenet_lib.results.schemas import COST_UNITS
from effspinenet_lib.training.recipes import get_recipe
from effspinenet_lib.training.run import WEIGHTS, RunConfig


@dataclass(frozen=True)
class PlannedRun:
    """A run that a row of an item needs."""

    row: Row
    config: RunConfig


def planned_runs(item: Item, parameters: Parameters) -> list[PlannedRun]:
    """Runs that an item needs under a profile; rows may share a run.

    Seed by seed, so that an interrupted item has every row before any has a second seed.

    Raises:
        UserError: a row has no recipe for the profile.
        DataError: the data root does not hold the data of a row's task.
    """
    return [
        PlannedRun(row, configure_row(item, row, parameters, seed))
        for seed in parameters.seeds
        for row in item.rows
    ]


def configure_row(item: Item, row: Row, parameters: Parameters, seed: int) -> RunConfig:
    """The run that a row needs under a profile.

    Raises:
        UserError: the row has no recipe for the profile.
        DataError: the data root does not hold the data of the row's task.
    """
    profile = parameters.profile
    small = profile.data is not None
    data = profile.data or paper_data(parameters.data_root, row.task)
    return RunConfig(
        model=row.proxy_model if small else row.model,
        task=row.task,
        image_size=profile.image_size or default_image_size(row.model, row.task),
        data=data,
        recipe=get_recipe(_recipe_name(item, row, profile)),
        seed=seed,
        model_options=dict(row.options),
        initial_weights=None if small else _initial_weights(row, parameters, seed),
    )


def has_recipe(row: Row, profile: Profile) -> bool:
    """Whether a row can be trained under a profile."""
    return not row.recipes or profile.name in row.recipes


def _recipe_name(item: Item, row: Row, profile: Profile) -> str:
    if not has_recipe(row, profile):
        raise UserError(
            f"{item.id}, {row.label}: has no recipe in the profile {profile.name}, only in "
            f"{' and '.join(row.recipes)}"
        )
    return row.recipes[profile.name] if row.recipes else profile.recipes[row.task]


def _initial_weights(row: Row, parameters: Parameters, seed: int) -> str | None:
    """Where the run that a row starts from leaves its weights; None for fresh weights."""
    if parameters.initial_weights is not None:
        return str(parameters.initial_weights)
    if not row.starts_from:
        return None
    item = get_item(row.starts_from)
    (origin,) = (other for other in item.rows if other.model == row.model)
    # where the data lies is no part of the key
    config = configure_row(item, origin, replace(parameters, data_root=None), seed)
    store = ResultsStore(parameters.results_dir, parameters.profile.name)
    return str(store.runs_folder / config.key / WEIGHTS)


def reproduce(
    name: str,
    parameters: Parameters,
    progress: bool = True,
    forced: set[str] | None = None,
    micro_batch: int | None = None,
) -> ResultsStore:
    """Measure an item's costs and run what is missing of its runs; record both.

    A finished run is not run again unless `force`; an interrupted one goes on from its last
    checkpoint. So after an interruption the same call is simply made again.

    Args:
        name: an item's id.
        parameters: from `check_parameters`.
        progress: show a bar in terminals and notebooks.
        forced: keys of the runs that earlier items of the same forced call ran anew; grows.
        micro_batch: images that a run computes at once; their gradients add up to the batch's,
            and the run stays the same one. None: the batch, but `CPU_BATCH` of the paper's
            batches on a processor.

    Returns:
        The store with the item's measurements.

    Raises:
        UnknownName: no such item.
        UserError: a run failed; the message names its log.
    """
    if micro_batch is None and parameters.paper_on_processor:
        micro_batch = CPU_BATCH
    item = get_item(name)
    store = ResultsStore(parameters.results_dir, parameters.profile.name)
    store.add_measurements(item.id, cost_rows(item.rows))
    planned = planned_runs(item, parameters)
    store.drop_runs(item.id, _outdated(item, planned, store))
    anew = forced if forced is not None else set()
    finished = {
        run.config.key
        for run in planned
        if store.finished(run.config.key) and (not parameters.force or run.config.key in anew)
    }
    for run in planned:
        if run.config.key in finished:
            metrics = store.metrics_of(run.config.key)
            record = store.run(run.config.key)
            store.add_measurements(item.id, run_rows(run, metrics, record))
    missing = {run.config.key: run.config for run in planned if run.config.key not in finished}
    anew.update(missing)
    for result in run_all(
        list(missing.values()),
        store.runs_folder,
        processes=parameters.devices,
        device=parameters.device,
        force=parameters.force,
        progress=progress,
        micro_batch=micro_batch,
    ):
        # The run is recorded last: one that is killed between the two is recorded anew.
        for run in planned:
            if run.config.key == result.key:
                rows = run_rows(run, result.metrics, result.record)
                store.add_measurements(item.id, rows)
        store.add_run({**result.record, "profile": parameters.profile.name})
    return store


def _outdated(item: Item, planned: Sequence[PlannedRun], store: ResultsStore) -> set[str]:
    """Runs recorded for an item that differ from the planned ones in more than the seed.

    They were made with settings of another version; a mean over seeds must not mix the two.
    """
    wanted = {(run.row.label, _without_seed(run.config.to_dict())) for run in planned}
    configs = {
        key: _without_seed(json.loads(text))
        for key, text in store.runs()[["run", "config"]].itertuples(index=False)
    }
    frame = store.measurements(item.id).query("source != 'cost'")
    recorded = set(frame[["row", "run"]].itertuples(index=False, name=None))
    return {run for row, run in recorded if (row, configs.get(run)) not in wanted}


def _without_seed(config: dict[str, Any]) -> str:
    kept = {name: value for name, value in config.items() if name != "seed"}
    return json.dumps({**kept, "data": {**kept["data"], "root": None}}, sort_keys=True)


def cost_rows(trained: Sequence[Row]) -> list[dict[str, Any]]:
    """Measure each row's model at the paper's image size and number of classes."""
    rows = []
    for row in trained:
        size = default_image_size(row.model, row.task)
        cost = measure_cost(create_model(row.model, row.task, **row.options), size)
        common = {
            **_common(row, row.model, f"zeros, {TASKS[row.task]} classes, {size}x{size}"),
            "source": "cost",
        }
        for metric, (scale, unit) in COST_UNITS.items():
            value = getattr(cost, metric) / scale
            rows.append({**common, "metric": metric, "value": value, "unit": unit})
    return rows


def run_rows(
    run: PlannedRun, metrics: Mapping[str, float], record: Mapping[str, Any]
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
        **_common(run.row, config.model, describe_data(config)),
        "seed": config.seed,
        "run": config.key,
        "commit": record["commit"],
        "date": record["date"],
        "note": ", ".join(notes),
    }
    return [
        {**common, "metric": metric, "value": value, "unit": "%"}
        for metric, value in metrics.items()
    ]


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


def _common(row: Row, model: str, data: str) -> dict[str, Any]:
    return {"row": row.label, "model": model, "task": row.task, "data": data}


def item_status(*results_dirs: str | os.PathLike[str]) -> pd.DataFrame:
    """One row an item: what of it is rebuilt, computed from the items and the CSVs.

    Args:
        results_dirs: results folders; what is measured in any of them counts, but for runs that
            stopped before their last step.

    Returns:
        Columns `item`, `title`, `notebook`, `paper_values`, `cost_rows`, `proxy_rows`,
        `paper_scale_rows` (numbers of rows).
    """
    stores = [
        ResultsStore(Path(folder), profile) for folder in results_dirs for profile in PROFILES
    ]
    rows = []
    for item in ITEMS.values():
        measured = pd.concat([store.results(item.id) for store in stores])
        unique = measured.drop_duplicates(["row", "metric", "source", "seed"])
        counts = unique["source"].value_counts()
        rows.append(
            {
                "item": item.id,
                "title": item.title,
                "notebook": item.notebook or "",
                "paper_values": len(paper_values(item.id)) if item.id.startswith("table") else 0,
                **{
                    f"{source}_rows": int(counts.get(source, 0))
                    for source in ("cost", "proxy", "paper_scale")
                },
            }
        )
    return pd.DataFrame(rows)
