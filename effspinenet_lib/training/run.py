"""One training run: a folder named by its configuration, trained, evaluated, never run twice.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from accelerate import Accelerator
from filelock import FileLock, Timeout

from effspinenet_lib.data import Dataset, classes_of, open_dataset, require_same_categories
from effspinenet_lib.errors import DataError, UserError
from effspinenet_lib.files import ensure_folder, read_json, write_json
from effspinenet_lib.models import zoo
from effspinenet_lib.results import current_commit, today
from effspinenet_lib.training.accelerator import make_accelerator
from effspinenet_lib.training.checkpoint import KEPT, save_weights
from effspinenet_lib.training.config import RunConfig, describe_data
from effspinenet_lib.training.evaluate import evaluate, write_predictions
from effspinenet_lib.training.inference import inference_copy
from effspinenet_lib.training.loop import describe_hardware, resolve_precision
from effspinenet_lib.training.recipes import EVALUATION_BATCH
from effspinenet_lib.training.stopping import StopRequest, lost_processes, stop_requests
from effspinenet_lib.training.trainer import Job, Trained, train

__all__ = ["LOG", "REQUEST", "RunConfig", "RunResult", "read_result", "train_run"]

CHECKPOINT_SECONDS = 60.0  # our choice: what a kill can cost at most
FINISHED, PARTIAL = "finished", "partial"
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
        folder: where its files are.
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
) -> RunResult:
    """Train and evaluate a configuration, or go on with it, or return what it gave before.

    Under `torchrun`, `accelerate launch` or `launch.launch` every process calls this; they share
    each batch and the evaluation, and the main one writes.

    On SIGTERM, and on SIGINT (Ctrl-C) for the first time, the step under way is finished and its
    state saved.

    Args:
        config: what to run.
        runs_dir: the run's folder is made in it.
        force: drop what the folder holds and run anew.
        workers: processes that load images, for each training process; 0: none beside it.
        max_steps: stop after that many steps of the unchanged schedule; a later call goes on.
        progress: show bars where stderr is a terminal.
        checkpoint_seconds: time between checkpoints.
        checkpoints: how many are kept, the newest ones.
        micro_batch: images that a process computes at once, where its share of the batch needs
            more memory than it has; their gradients are added up. None: the share at once.

    Raises:
        UserError: a setting is wrong, the folder cannot be written, or another process runs it.
        DataError: the data cannot be used.
        CheckpointError: the folder holds a checkpoint of another run.
        TrainingError: a loss is not finite, the run has diverged, or memory is too small.
        Preempted: a signal asked to stop, or another process of the run died.
    """
    steps = config.recipe.steps
    target = steps if max_steps is None else min(max_steps, steps)
    if target < 1:
        raise UserError(f"max_steps is {max_steps}; at least one step is needed")
    for name, count in (("checkpoints", checkpoints), ("micro_batch", micro_batch)):
        if count is not None and count < 1:
            raise UserError(f"{name} is {count}; it must be 1 or more")
    zoo.check_model(config.model, config.task, config.options)
    accelerator = make_accelerator()
    folder = ensure_folder(Path(runs_dir) / config.key)
    job = Job(
        config, folder, target, workers, progress, checkpoint_seconds, checkpoints, micro_batch
    )
    with stop_requests() as stop, lost_processes(), _alone_in(folder, accelerator):
        if force and accelerator.is_main_process:
            _empty(folder)
        elif accelerator.is_main_process:
            for leftover in folder.glob(".*.tmp"):  # of a kill in the middle of a write
                leftover.unlink()
        accelerator.wait_for_everyone()
        done = read_result(folder)
        if done is None or done.steps < target:
            done = _train_and_evaluate(job, accelerator, stop)
        else:
            _check_same_data(job, _open_data(config))
    return done


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
def _alone_in(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the run folder against other runs; the processes of one run hold it together."""
    if not accelerator.is_main_process:
        yield
        return
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise UserError(
            f"{folder}: another process is running this configuration; wait for it or stop it"
        ) from error


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (LOCK, REQUEST, LOG):
            path.unlink()


def _train_and_evaluate(job: Job, accelerator: Accelerator, stop: StopRequest) -> RunResult:
    data = _open_data(job.config)
    _check_same_data(job, data)
    if accelerator.is_main_process:
        write_json(job.folder / CONFIG, job.config.to_dict())
        write_json(job.folder / DATA, {part: describe_data(data[part]) for part in data})
    trained = train(job, accelerator, data["train"], stop)
    _evaluate(job, accelerator, trained, data["eval"])
    accelerator.wait_for_everyone()
    result = read_result(job.folder)
    assert result is not None
    return result


def _open_data(config: RunConfig) -> dict[str, Dataset]:
    data = {
        "train": open_dataset(config.data, "train", config.task),
        "eval": open_dataset(config.data, "eval", config.task),
    }
    require_same_categories(data["train"], data["eval"])
    return data


def _check_same_data(job: Job, data: Mapping[str, Dataset]) -> None:
    """Refuse a folder that holds a run on other data: where data lies is no part of the key."""
    path = job.folder / DATA
    if not path.exists():
        return
    for part, known in read_json(path).items():
        if describe_data(data[part])["digest"] != known["digest"]:
            raise DataError(
                f"{job.folder}: holds a run on other data than {data[part].name} is now; choose "
                "another output folder, or force the run anew"
            )


def _evaluate(job: Job, accelerator: Accelerator, trained: Trained, dataset: Dataset) -> None:
    """Evaluate the model; the main process writes what a run leaves, run.json last."""
    config, folder = job.config, job.folder
    began = time.monotonic()
    evaluation = evaluate(
        inference_copy(trained.model),
        dataset,
        config.task,
        config.image_size,
        EVALUATION_BATCH,
        job.workers,
        job.progress,
        accelerator=accelerator,
    )
    if not accelerator.is_main_process:
        return
    metrics = {
        name: None if math.isnan(value) else value for name, value in evaluation.metrics.items()
    }
    save_weights(
        folder / WEIGHTS,
        trained.model.state_dict(),
        {
            "model": config.model,
            "task": config.task,
            "num_classes": classes_of(dataset, config.task),
            "options": config.options,
            "categories": [{"id": c.id, "name": c.name} for c in dataset.categories],
            "image_size": config.image_size,
            "run": config.key,
            "steps": trained.steps,
            "metrics": metrics,
        },
    )
    write_predictions(folder / PREDICTIONS, evaluation.predictions)
    write_json(folder / METRICS, metrics)
    record = _record(job, accelerator, trained, time.monotonic() - began)
    write_json(folder / RECORD, record)


def _record(
    job: Job, accelerator: Accelerator, trained: Trained, evaluation_seconds: float
) -> dict[str, Any]:
    """The run's row of runs.csv; the caller knows the profile."""
    config = job.config
    images = trained.steps * config.recipe.batch_size
    return {
        "run": config.key,
        "state": FINISHED if trained.steps == config.recipe.steps else PARTIAL,
        "model": config.model,
        "task": config.task,
        "profile": "",
        "seed": config.seed,
        "steps": trained.steps,
        "images": images,
        "wall_seconds": round(trained.seconds + evaluation_seconds, 2),
        "images_per_second": round(images / max(trained.seconds, 1e-9), 2),
        "precision": resolve_precision(config.recipe, accelerator.device),
        "threads": torch.get_num_threads(),
        "hardware": describe_hardware(accelerator) + _describe_sharing(job, accelerator),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "config": json.dumps(config.to_dict(), sort_keys=True),
        "commit": current_commit(),
        "date": today(),
    }


def _describe_sharing(job: Job, accelerator: Accelerator) -> str:
    """How batches were computed, where not by one process at once."""
    processes, parts = accelerator.num_processes, job.parts(accelerator.num_processes)
    return "" if processes == parts == 1 else f"; processes: {processes}, parts a step: {parts}"
