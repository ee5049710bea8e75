"""One training run: a folder named by its configuration, trained and evaluated once.

`<runs_dir>/<key>/` holds config.json, data.json, curve.csv, tb/ and checkpoints while it trains,
then model.safetensors, predictions.json, metrics.json and, last of all, run.json.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from accelerate import Accelerator
from accelerate.utils import broadcast
from filelock import FileLock, Timeout
from torch import nn

from effspinenet_lib.data import (
    Augmentation,
    Dataset,
    classes_of,
    open_dataset,
    require_same_categories,
    training_loader,
)
from effspinenet_lib.data.augment import MAX_OBJECTS
from effspinenet_lib.data.loader import worker_errors
from effspinenet_lib.errors import DataError, Preempted, UserError
from effspinenet_lib.files import ensure_folder, read_json, write_json
from effspinenet_lib.models import zoo
from effspinenet_lib.models.dense import Classifier
from effspinenet_lib.results import current_commit, today, upsert
from effspinenet_lib.training.checkpoint import (
    KEPT,
    Checkpoint,
    Checkpointer,
    load_backbone,
    load_into,
    load_latest,
    save_weights,
)
from effspinenet_lib.training.config import RunConfig, describe_data
from effspinenet_lib.training.device import (
    CPU,
    STATIC_SHAPES,
    describe_hardware,
    disable_malloc_trim,
    make_accelerator,
    prepare_model,
    resolve_precision,
)
from effspinenet_lib.training.evaluate import evaluate, write_predictions
from effspinenet_lib.training.export import inference_copy
from effspinenet_lib.training.log import TrainingLog
from effspinenet_lib.training.loop import Step, seed_everything, train_steps
from effspinenet_lib.training.optim import Ema, build_ema, build_optimizer, load_optimizer
from effspinenet_lib.training.preemption import Preemption, handle_preemption, lost_processes
from effspinenet_lib.training.recipes import EVALUATION_BATCH

__all__ = ["LOG", "REQUEST", "RunConfig", "RunResult", "read_result", "train_run"]

CHECKPOINT_SECONDS = 60.0  # our choice: what a kill can cost at most
FINISHED, PARTIAL = "finished", "partial"
OWN_DATA = "own"  # in the place of a profile
CONFIG, DATA, RECORD, METRICS = "config.json", "data.json", "run.json", "metrics.json"
PREDICTIONS, WEIGHTS, LOCK = "predictions.json", "model.safetensors", "run.lock"
# Written by whoever starts a run in a process of its own; a forced run keeps them.
REQUEST, LOG = "request.json", "worker.log"


@dataclass(frozen=True)
class RunResult:
    """What a run gave.

    Attributes:
        key: of the configuration.
        metrics: name -> value in percent; NaN where it is not defined.
        steps: steps trained.
        images: images trained on, repeats counted.
        wall_seconds: training over all interruptions, and the evaluation.
        images_per_second: of the training.
        folder: of its files.
        record: its row of runs.csv, without the profile.
    """

    key: str
    metrics: dict[str, float]
    steps: int
    images: int
    wall_seconds: float
    images_per_second: float
    folder: Path
    record: dict[str, Any]


@dataclass(frozen=True)
class RunOptions:
    """A run, its folder and processes, and what changes neither its key nor its result.

    The fields are `train_run`'s arguments; `target` are the steps to train to.
    """

    config: RunConfig
    folder: Path
    accelerator: Accelerator
    target: int
    workers: int
    progress: bool
    checkpoint_seconds: float
    checkpoints: int
    micro_batch: int | None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return bool(self.accelerator.is_main_process)

    @property
    def parts(self) -> int:
        """Parts of a batch that each process computes one after the other."""
        share = max(1, self.config.recipe.batch_size // self.accelerator.num_processes)
        return math.ceil(share / (self.micro_batch or share))


@dataclass
class TrainState:
    """What is trained, the steps and the seconds it was trained for.

    `model` is on its device and, with several processes, wrapped for them; `log` is the unfinished
    row of the curve.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    step: int = 0
    seconds: float = 0.0
    log: dict[str, Any] = field(default_factory=dict)


def train_run(
    config: RunConfig,
    runs_dir: str | os.PathLike[str],
    force: bool = False,
    workers: int = 0,
    max_steps: int | None = None,
    progress: bool = True,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    checkpoints: int = KEPT,
    micro_batch: int | None = None,
    runs_csv: str | os.PathLike[str] | None = None,
) -> RunResult:
    """Train and evaluate a configuration, or resume it, or return what it gave before.

    Under `torchrun` or `accelerate launch` every process calls this; they share each batch and the
    evaluation, and the main one writes.

    On SIGTERM, and on SIGINT (Ctrl-C) for the first time, the current step is finished and its
    state saved.

    Args:
        config: what to run.
        runs_dir: the run's folder is made in it.
        force: discard what the folder holds and start over.
        workers: processes that load images, for each training process; 0: it loads them itself.
        max_steps: stop after that many steps of the unchanged schedule; a later call resumes.
        progress: show bars where stderr is a terminal.
        checkpoint_seconds: time between checkpoints.
        checkpoints: how many are kept, the newest ones.
        micro_batch: images that a process computes at once, where its share of the batch needs
            more memory than it has; their gradients are added up. None: the share at once.
        runs_csv: the run's row is added to this file, with the profile "own"; None: to none.

    Raises:
        UserError: a setting is wrong, the folder cannot be written, or another process runs it.
        DataError: the data cannot be used, or a loader worker died.
        CheckpointError: a checkpoint or the initial weights do not fit.
        TrainingError: a loss is not finite, the run has diverged, or memory is too small.
        Preempted: a signal asked to stop, or another process of the run died.
    """
    for name, count in (
        ("max_steps", max_steps),
        ("checkpoints", checkpoints),
        ("micro_batch", micro_batch),
    ):
        if count is not None and count < 1:
            raise UserError(f"{name} is {count}; it must be 1 or more")
    accelerator = make_accelerator()
    if accelerator.device.type == CPU:
        disable_malloc_trim()
    run = RunOptions(
        config=config,
        folder=ensure_folder(Path(runs_dir) / config.key),
        accelerator=accelerator,
        target=min(max_steps or config.recipe.steps, config.recipe.steps),
        workers=workers,
        progress=progress,
        checkpoint_seconds=checkpoint_seconds,
        checkpoints=checkpoints,
        micro_batch=micro_batch,
    )
    with handle_preemption() as preemption, lost_processes(), _alone_in(run):
        if run.is_main:
            _clean(run.folder, force)
        accelerator.wait_for_everyone()
        train, held_out = _open_data(run)
        result = read_result(run.folder)
        if result is None or result.steps < run.target:
            state = build_or_resume(run, train)
            if state.step < run.target:
                run_steps(run, state, train, preemption)
            _evaluate(run, state, held_out)
            accelerator.wait_for_everyone()
            result = read_result(run.folder)
            assert result is not None
        if runs_csv is not None and run.is_main:
            row = {**result.record, "profile": OWN_DATA}
            upsert(Path(runs_csv), "run", [row], f"run {result.key}")
        return result


def build_or_resume(run: RunOptions, dataset: Dataset) -> TrainState:
    """The model and its optimizer, fresh or as they were at the last checkpoint."""
    config, accelerator = run.config, run.accelerator
    latest = load_latest(run.folder, config.key, config.model)
    seed_everything(config.seed)
    plain = zoo.create_model(
        config.model,
        task=config.task,
        num_classes=classes_of(dataset, config.task),
        **config.options,
    )
    if latest is not None:
        load_into(plain, latest.model_state, str(run.folder))
    elif config.initial_weights is not None:
        load_backbone(plain, config.initial_weights)
    if isinstance(plain, Classifier):
        plain.label_smoothing = config.recipe.label_smoothing
    model = prepare_model(plain, config.recipe, accelerator, run.parts)
    optimizer = accelerator.prepare_optimizer(build_optimizer(model, config.recipe))
    ema = build_ema(accelerator.unwrap_model(model), config.recipe)
    if latest is None:
        return TrainState(model, optimizer, ema)
    load_optimizer(optimizer, latest.optimizer_state)
    if ema is not None and latest.ema_state is not None:
        ema.module.load_state_dict(latest.ema_state)
    return TrainState(model, optimizer, ema, latest.step, latest.wall_seconds, latest.curve_state)


def run_steps(run: RunOptions, state: TrainState, dataset: Dataset, preemption: Preemption) -> None:
    """Train `state` to the target; the main process logs and saves checkpoints.

    Asked to stop, it saves the state after the current step. Any other error leaves the last
    checkpoint.
    """
    config, recipe, accelerator = run.config, run.config.recipe, run.accelerator
    # the shapes of Mask R-CNN vary anyway
    padded = accelerator.device.type in STATIC_SHAPES and config.task != "instances"
    batches = training_loader(
        dataset,
        config.image_size,
        recipe.batch_size,
        Augmentation(recipe.scale_jitter, recipe.flip_probability),
        config.seed,
        state.step,
        run.target,
        workers=run.workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        task=config.task,
        auto_augment=recipe.auto_augment,
        pad_targets=MAX_OBJECTS if padded else None,
    )
    steps = train_steps(
        state.model,
        state.optimizer,
        batches,
        recipe,
        accelerator,
        config.seed,
        state.step,
        run.micro_batch,
        state.ema,
        preemption,
    )
    with preemption.in_steps(), _loader_errors(preemption):
        try:
            if run.is_main:
                _log_and_save(run, state, steps)
            else:
                for checked in steps:
                    state.step = checked[-1].step
        except Preempted:
            accelerator.wait_for_everyone()  # a launcher ends the others once one has ended
            raise
    if accelerator.num_processes > 1:  # all evaluate with the main one's running statistics
        for buffer in _trained(run, state).buffers():
            buffer.copy_(broadcast(buffer))


def _log_and_save(run: RunOptions, state: TrainState, steps: Iterator[list[Step]]) -> None:
    config, accelerator = run.config, run.accelerator
    checkpointer = Checkpointer(run.folder, run.checkpoint_seconds, run.checkpoints)
    began, spent = time.monotonic(), state.seconds
    log = TrainingLog(run.folder, state.step, config.recipe.steps, state.log, run.progress)

    def save() -> None:
        state.seconds, state.log = spent + time.monotonic() - began, log.state()
        checkpointer.save(
            Checkpoint(
                run=config.key,
                model=config.model,
                step=state.step,
                model_state=accelerator.unwrap_model(state.model).state_dict(),
                optimizer_state=state.optimizer.state_dict(),
                curve_state=state.log,
                wall_seconds=state.seconds,
                ema_state=state.ema.module.state_dict() if state.ema else None,
            )
        )

    with closing(log):
        try:
            for checked in steps:
                log.add(checked)
                state.step = checked[-1].step
                # what may be the start of a divergence replaces no earlier checkpoint
                if state.step == run.target or (checkpointer.due and not log.may_diverge):
                    save()
        except Preempted:
            save()
            raise


@contextmanager
def _loader_errors(preemption: Preemption) -> Iterator[None]:
    """Errors of loader workers; one that a signal ended with this process is no failure."""
    try:
        with worker_errors():
            yield
    except DataError as error:
        if not preemption.signal:
            raise
        raise Preempted.by(preemption.signal) from error


def _trained(run: RunOptions, state: TrainState) -> nn.Module:
    """The model that is evaluated and kept: the average where the recipe has one."""
    model: nn.Module = run.accelerator.unwrap_model(state.model)
    return model if state.ema is None else state.ema.module


def _evaluate(run: RunOptions, state: TrainState, dataset: Dataset) -> None:
    """Evaluate the model; the main process writes what a run leaves, run.json last."""
    config, folder = run.config, run.folder
    began = time.monotonic()
    model = _trained(run, state)
    evaluation = evaluate(
        inference_copy(model),
        dataset,
        config.task,
        config.image_size,
        EVALUATION_BATCH,
        run.workers,
        run.progress,
        accelerator=run.accelerator,
    )
    if not run.is_main:
        return
    metrics = {
        name: None if math.isnan(value) else value for name, value in evaluation.metrics.items()
    }
    save_weights(
        folder / WEIGHTS,
        model.state_dict(),
        {
            "model": config.model,
            "task": config.task,
            "num_classes": classes_of(dataset, config.task),
            "options": config.options,
            "categories": [{"id": c.id, "name": c.name} for c in dataset.categories],
            "image_size": config.image_size,
            "run": config.key,
            "steps": state.step,
            "metrics": metrics,
        },
    )
    write_predictions(folder / PREDICTIONS, evaluation.predictions)
    write_json(folder / METRICS, metrics)
    seconds = time.monotonic() - began
    write_json(folder / RECORD, _record(run, state, seconds))


def _record(run: RunOptions, state: TrainState, evaluation_seconds: float) -> dict[str, Any]:
    """The run's row of runs.csv; the caller knows the profile."""
    config, accelerator = run.config, run.accelerator
    images = state.step * config.recipe.batch_size
    processes = accelerator.num_processes
    shared = f"; processes: {processes}, parts a step: {run.parts}"
    hardware = describe_hardware(accelerator) + (shared if processes * run.parts > 1 else "")
    return {
        "run": config.key,
        "state": FINISHED if state.step == config.recipe.steps else PARTIAL,
        "model": config.model,
        "task": config.task,
        "profile": "",
        "seed": config.seed,
        "steps": state.step,
        "images": images,
        "wall_seconds": round(state.seconds + evaluation_seconds, 2),
        "images_per_second": round(images / max(state.seconds, 1e-9), 2),
        "precision": resolve_precision(config.recipe, accelerator.device),
        "threads": torch.get_num_threads(),
        "hardware": hardware,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "config": json.dumps(config.to_dict(), sort_keys=True),
        "commit": current_commit(),
        "date": today(),
    }


# --- The run's folder ----------------------------------------------------------------------------


def read_result(folder: Path) -> RunResult | None:
    """What the run in `folder` gave, or None where it has not been evaluated yet."""
    if not all((folder / name).exists() for name in (RECORD, METRICS, WEIGHTS)):
        return None
    record = read_json(folder / RECORD)
    metrics = read_json(folder / METRICS)
    return RunResult(
        key=record["run"],
        metrics={name: math.nan if value is None else value for name, value in metrics.items()},
        steps=record["steps"],
        images=record["images"],
        wall_seconds=record["wall_seconds"],
        images_per_second=record["images_per_second"],
        folder=folder,
        record=record,
    )


@contextmanager
def _alone_in(run: RunOptions) -> Iterator[None]:
    """Lock the run folder against other runs; the main process does it for all of a run."""
    if not run.is_main:
        yield
        return
    try:
        with FileLock(run.folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise UserError(
            f"{run.folder}: another process is running this configuration; wait for it or stop it"
        ) from error


def _clean(folder: Path, force: bool) -> None:
    """Remove what a kill in the middle of a write left; with `force`, the run before."""
    for path in folder.iterdir():
        if force and path.is_dir():
            shutil.rmtree(path)
        elif path.match(".*.tmp") or (force and path.name not in (LOCK, REQUEST, LOG)):
            path.unlink()


def _open_data(run: RunOptions) -> tuple[Dataset, Dataset]:
    """What to train and to evaluate on; refused where the folder holds a run on other data.

    The path of the data is no part of a run's key, so its content is compared.
    """
    config, path = run.config, run.folder / DATA
    train = open_dataset(config.data, "train", config.task)
    held_out = open_dataset(config.data, "eval", config.task)
    require_same_categories(train, held_out)
    found = {"train": describe_data(train), "eval": describe_data(held_out)}
    for part, known in (read_json(path) if path.exists() else {}).items():
        if found[part]["digest"] != known["digest"]:
            raise DataError(
                f"{run.folder}: holds a run on other data than {train.name} is now; choose "
                "another output folder, or start over with force"
            )
    if run.is_main:
        write_json(run.folder / CONFIG, config.to_dict())
        write_json(path, found)
    return train, held_out
