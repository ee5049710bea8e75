"""One row of a table or figure, trained in this process and recorded, whole or for a few steps."""

from __future__ import annotations

from dataclasses import replace

from accelerate import PartialState

from effspinenet_lib.errors import UserError
from effspinenet_lib.experiments.items import Item, Row
from effspinenet_lib.experiments.parameters import CPU_BATCH, Parameters
from effspinenet_lib.experiments.reproduction import (
    PlannedRun,
    configure_row,
    cost_rows,
    run_rows,
)
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.training.checkpoint import KEPT
from effspinenet_lib.training.config import RunConfig
from effspinenet_lib.training.run import RunResult, train_run


def train_row(
    item: Item,
    row: Row,
    parameters: Parameters,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    max_steps: int | None = None,
    checkpoints: int = KEPT,
    workers: int = 0,
    progress: bool = True,
) -> RunResult:
    """Train one row of an item with the first seed, evaluate it and record it with its cost.

    Interrupted, the same call goes on; so does a later one with more steps.

    Args:
        item: of the row.
        row: what to train.
        parameters: from `check_parameters`; this process takes the device that it finds.
        batch_size: images a step; the recipe is scaled to it (`Recipe.for_batch`). None: the
            recipe's own, but `CPU_BATCH` at the paper's settings on a processor without
            `micro_batch`.
        micro_batch: images computed at once; their gradients add up to the batch's.
        max_steps: stop after that many steps of the unchanged schedule. The row's note then says
            how many of how many, and the run's state is partial.
        checkpoints: how many of the last ones are kept.
        workers: processes that load images.
        progress: show bars where stderr is a terminal.

    Returns:
        What the run gave.

    Raises:
        UserError: the row has no recipe for the profile, or what `train_run` raises.
        DataError: the data root does not hold the data of the row's task.
        CheckpointError: the weights that the row starts from are missing.
    """
    config = configure_row(item, row, parameters, parameters.seeds[0])
    if batch_size is None and micro_batch is None and parameters.paper_on_processor:
        batch_size = CPU_BATCH
    if batch_size is not None:
        config = replace(config, recipe=config.recipe.for_batch(batch_size))
    store = ResultsStore(parameters.results_dir, parameters.profile.name)
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
    if not PartialState().is_main_process:
        return result
    measured = run_rows(PlannedRun(row, config), result.metrics, result.record)
    store.add_measurements(item.id, [*cost_rows([row]), *measured])
    # recorded last: a run that is killed between the two is recorded anew
    store.add_run({**result.record, "profile": parameters.profile.name})
    return result


def _protect_longer(
    store: ResultsStore, item: Item, row: Row, config: RunConfig, max_steps: int | None
) -> None:
    """Refuse a run of few steps whose row would take the place of another, longer run's."""
    if max_steps is None or max_steps >= config.recipe.steps:
        return
    frame = store.measurements(item.id)
    same = frame[
        (frame["row"] == row.label)
        & (frame["model"] == config.model)
        & (frame["source"] == store.source)
        & (frame["seed"] == config.seed)
    ]
    images = store.runs().set_index("run")["images"]
    longer = [
        run
        for run in same["run"].unique()
        if run != config.key and images.get(run, 0) > max_steps * config.recipe.batch_size
    ]
    if longer:
        raise UserError(
            f"{store.folder / item.id}.csv holds what run {longer[0]}, of {images[longer[0]]:,} "
            f"images, measured for {row.label}; {max_steps} steps of {config.recipe.batch_size} "
            "would replace it: give another results folder"
        )
