"""One training run: a folder named by its configuration, trained and evaluated once.

`<runs_dir>/<key>/` holds config.json, data.json, curve.csv, tb/ and checkpoints while it trains,
then model.safetensors, predictions.json, metrics.json and, last of all, run.json.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from accelerate import Accelerator
from accelerate.utils import broadcast, extract_model_from_parallel
from filelock import FileLock, Timeout
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from effspinenet_lib.data import Dataset, classes_of
from effspinenet_lib.data.augment import MAX_OBJECTS, MEAN, STD, Augmentation
from effspinenet_lib.data.check import check_parts, write_report
from effspinenet_lib.data.loader import training_loader, worker_errors
from effspinenet_lib.data.records import InvalidData
from effspinenet_lib.errors import DataError, Preempted, UserError
from effspinenet_lib.files import ensure_folder, read_json, write_json
from effspinenet_lib.models import weights, zoo
from effspinenet_lib.models.dense import Classifier
from effspinenet_lib.results import current_commit, today, upsert
from effspinenet_lib.training import checkpoint, device
from effspinenet_lib.training.config import RunConfig, describe_data
from effspinenet_lib.training.evaluate import evaluate, write_predictions
from effspinenet_lib.training.log import TrainingLog
from effspinenet_lib.training.loop import seed_everything, train_steps
from effspinenet_lib.training.optim import build_ema, build_optimizer, load_optimizer
from effspinenet_lib.training.preemption import handle_preemption, lost_processes
from effspinenet_lib.training.recipes import EVALUATION_BATCH

__all__ = ["LOG", "REQUEST", "RunConfig", "RunResult", "read_result", "train_run"]

logger = logging.getLogger(__name__)
CHECKPOINT_SECONDS = 60.0  # our choice: what a kill can cost at most
FINISHED, PARTIAL = "finished", "partial"
OWN_DATA = "own"  # in the place of a profile
CONFIG, DATA, RECORD, METRICS = "config.json", "data.json", "run.json", "metrics.json"
PREDICTIONS, WEIGHTS, LOCK = "predictions.json", "model.safetensors", "run.lock"
FAULTS = "faults.csv"  # of data that was refused
# Written by whoever starts a run in a process of its own; a forced run keeps them.
REQUEST, LOG = "request.json", "worker.log"


@dataclass(frozen=True)
class RunResult:
    """What a run left in its folder.

    Attributes:
        folder: of its files.
        metrics: name -> value in percent; NaN where it is not defined.
        record: its row of runs.csv, without the profile: steps, seconds, speed, hardware.
        trained_before: a call before this one gave it.
    """

    folder: Path
    metrics: dict[str, float]
    record: dict[str, Any]
    trained_before: bool = False

    @property
    def key(self) -> str:
        """Of the configuration."""
        return str(self.record["run"])

    @property
    def steps(self) -> int:
        """Steps trained."""
        return int(self.record["steps"])


@dataclass
class TrainState:
    """What is trained, and how far it is."""

    model: nn.Module  # on its device and, with several processes, wrapped for them
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    step: int = 0
    seconds: float = 0.0  # of training, over all interruptions
    curve: dict[str, Any] = field(default_factory=dict)  # its unfinished row

    @property
    def plain(self) -> nn.Module:
        """The model as `create_model` gave it."""
        model: nn.Module = extract_model_from_parallel(self.model)
        return model

    @property
    def trained(self) -> nn.Module:
        """The model that is evaluated and kept: the average where the recipe has one."""
        return self.plain if self.ema is None else self.ema.module


def train_run(
    config: RunConfig,
    runs_dir: str | os.PathLike[str],
    force: bool = False,
    workers: int = 0,
    max_steps: int | None = None,
    progress: bool = True,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    checkpoints: int = checkpoint.KEPT,
    micro_batch: int | None = None,
    runs_csv: str | os.PathLike[str] | None = None,
    skip_bad_images: bool = False,
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
        skip_bad_images: leave out images that are missing or cannot be decoded; data.json names
            them.

    Raises:
        UserError: a setting is wrong, the folder cannot be written, or another process runs it.
        DataError: the data cannot be used, or a loader worker died.
        CheckpointError: a checkpoint or the initial weights do not fit.
        TrainingError: a loss is not finite, the run has diverged, or memory is too small.
        Preempted: a signal asked to stop, or another process of the run died.
    """
    limits = {"max_steps": max_steps, "checkpoints": checkpoints, "micro_batch": micro_batch}
    for name, count in limits.items():
        if count is not None and count < 1:
            raise UserError(f"{name} is {count}; it must be 1 or more")
    accelerator = device.make_accelerator()
    if accelerator.device.type == device.CPU:
        device.disable_malloc_trim()
    main, recipe = accelerator.is_main_process, config.recipe
    share = max(1, recipe.batch_size // accelerator.num_processes)
    parts = math.ceil(share / (micro_batch or share))  # of a batch, one after the other
    folder = ensure_folder(Path(runs_dir) / config.key)
    target = min(max_steps or recipe.steps, recipe.steps)
    with handle_preemption() as preemption, lost_processes(), _alone_in(folder, main):
        if main:
            _clean(folder, force)
        accelerator.wait_for_everyone()
        train, held_out = _open_data(config, folder, main, skip_bad_images)
        result = read_result(folder)
        if result is not None and result.steps >= target:
            result = replace(result, trained_before=True)
        else:
            state = build_or_resume(config, folder, train, accelerator, parts)
            static = accelerator.device.type in device.STATIC_SHAPES
            batches = training_loader(
                train,
                config.image_size,
                recipe.batch_size,
                Augmentation(recipe.scale_jitter, recipe.flip_probability),
                config.seed,
                start_step=state.step,
                total_steps=target,
                workers=workers,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                task=config.task,
                auto_augment=recipe.auto_augment,
                pad_targets=MAX_OBJECTS if static else None,
            )
            steps = train_steps(
                state.model,
                state.optimizer,
                batches,
                recipe,
                accelerator,
                config.seed,
                start_step=state.step,
                micro_batch=micro_batch,
                ema=state.ema,
                preemption=preemption,
            )
            log = TrainingLog(folder, recipe, state.step, state.curve, progress) if main else None
            saved_at = time.monotonic()
            began = saved_at - state.seconds
            with preemption.in_steps(), worker_errors(), closing(log) if log else nullcontext():
                for checked in steps:
                    state.step = max(checked)
                    if log is None:
                        continue
                    log.add(checked)
                    # what may be the start of a divergence replaces no earlier checkpoint
                    due = time.monotonic() - saved_at >= checkpoint_seconds and not log.may_diverge
                    if due or preemption.agreed or state.step == target:
                        saved_at = time.monotonic()
                        state.seconds, state.curve = saved_at - began, log.state
                        _save(config, folder, state, checkpoints)
            # a signal during the last checkpoint asks a single process after the last check
            alone_and_asked = accelerator.num_processes == 1 and preemption.signal
            if preemption.agreed or alone_and_asked:
                accelerator.wait_for_everyone()  # a launcher ends the others once one has ended
                raise Preempted(
                    f"stopped after step {state.step} by "
                    f"{preemption.signal or 'a signal to another process'}; the same command "
                    f"{'without --force ' if force else ''}resumes there"
                )
            if accelerator.num_processes > 1:  # all evaluate with the main one's statistics
                for buffer in state.trained.buffers():
                    buffer.copy_(broadcast(buffer))
            _evaluate(config, folder, state, held_out, accelerator, workers, progress, parts)
            accelerator.wait_for_everyone()
            result = read_result(folder)
            assert result is not None
        if runs_csv is not None and main:
            row = {**result.record, "profile": OWN_DATA}
            upsert(Path(runs_csv), "run", [row], f"run {result.key}")
        return result


# --- The parts of a run --------------------------------------------------------------------------


def _open_data(
    config: RunConfig, folder: Path, main: bool, skip_bad: bool
) -> tuple[Dataset, Dataset]:
    """What to train and to evaluate on; refused where the folder holds a run on other data.

    The path of the data is no part of a run's key, so its content is compared.
    """
    data = config.data
    wanted = [data.part_of("train"), data.part_of("eval")]
    datasets, faults = check_parts(data, wanted, config.task, skip_bad)
    if faults:
        if main:
            write_report(folder / FAULTS, str(data.root), faults)
        raise InvalidData(faults, str(folder / FAULTS))
    train, held_out = datasets
    assert train is not None
    assert held_out is not None
    found = {"train": describe_data(train), "eval": describe_data(held_out)}
    path = folder / DATA
    for part, known in (read_json(path) if path.exists() else {}).items():
        differing = [
            what
            for what, name in (("annotations", "digest"), ("masks", "masks"), ("images", "files"))
            if name in known and found[part].get(name) != known[name]
        ]
        if differing:
            raise DataError(
                f"{folder}: holds a run on other data than {train.name} is now (other "
                f"{' and '.join(differing)}); choose another output folder, or start over with "
                "force"
            )
    if main:
        for part, facts in found.items():
            if skipped := facts.get("skipped"):
                logger.warning("%s: left out %d bad images: %s", part, len(skipped), skipped[:5])
        write_json(folder / CONFIG, config.to_dict())
        write_json(path, found)
    return train, held_out


def build_or_resume(
    config: RunConfig, folder: Path, dataset: Dataset, accelerator: Accelerator, parts: int
) -> TrainState:
    """The model and its optimizer, fresh or as they were at the last checkpoint."""
    latest = checkpoint.load_latest(folder, config.key, config.model)
    seed_everything(config.seed)
    classes = classes_of(dataset, config.task)
    plain = zoo.create_model(config.model, config.task, classes, **config.options)
    if latest is not None:
        weights.load_into(plain, latest.model_state, str(folder))
    elif config.initial_weights is not None:
        weights.load_backbone(plain, config.initial_weights)
    if isinstance(plain, Classifier):
        plain.label_smoothing = config.recipe.label_smoothing
    model = device.prepare_model(plain, config.recipe, accelerator, parts)
    optimizer = accelerator.prepare_optimizer(build_optimizer(model, config.recipe))
    state = TrainState(model, optimizer, None)
    state.ema = build_ema(state.plain, config.recipe)
    if latest is not None:
        load_optimizer(optimizer, latest.optimizer_state)
        if state.ema is not None and latest.ema_state is not None:
            state.ema.module.load_state_dict(latest.ema_state)
        state.step, state.seconds = latest.step, latest.wall_seconds
        state.curve = latest.curve_state
    return state


def _save(config: RunConfig, folder: Path, state: TrainState, kept: int) -> None:
    saved = checkpoint.Checkpoint(
        run=config.key,
        model=config.model,
        step=state.step,
        model_state=state.plain.state_dict(),
        optimizer_state=state.optimizer.state_dict(),
        curve_state=state.curve,
        wall_seconds=state.seconds,
        ema_state=state.ema.module.state_dict() if state.ema else None,
    )
    checkpoint.save_checkpoint(folder, saved, kept)


def _evaluate(
    config: RunConfig,
    folder: Path,
    state: TrainState,
    dataset: Dataset,
    accelerator: Accelerator,
    workers: int,
    progress: bool,
    parts: int,
) -> None:
    """Evaluate the model; the main process writes what a run leaves, run.json last."""
    began = time.monotonic()
    evaluation = evaluate(
        state.trained,
        dataset,
        config.task,
        config.image_size,
        EVALUATION_BATCH,
        workers,
        progress,
        accelerator,
    )
    if not accelerator.is_main_process:
        return
    metrics = {
        name: None if math.isnan(value) else value for name, value in evaluation.metrics.items()
    }
    weights.save_weights(
        folder / WEIGHTS,
        state.trained.state_dict(),
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
            "normalisation": {"mean": MEAN, "std": STD},
            "data": {
                part: {"name": facts["name"], "images": facts["images"]}
                for part, facts in read_json(folder / DATA).items()
            },
            "commit": current_commit(),
            "licence": weights.LICENCE,
        },
    )
    write_predictions(folder / PREDICTIONS, evaluation.predictions)
    write_json(folder / METRICS, metrics)
    images = state.step * config.recipe.batch_size
    processes = accelerator.num_processes
    shared = f"; processes: {processes}, parts a step: {parts}" if processes * parts > 1 else ""
    record = {
        "run": config.key,
        "state": FINISHED if state.step == config.recipe.steps else PARTIAL,
        "model": config.model,
        "task": config.task,
        "profile": "",  # the caller knows it
        "seed": config.seed,
        "steps": state.step,
        "images": images,
        "wall_seconds": round(state.seconds + time.monotonic() - began, 2),
        "images_per_second": round(images / max(state.seconds, 1e-9), 2),
        "precision": device.resolve_precision(config.recipe, accelerator.device),
        "threads": torch.get_num_threads(),
        "hardware": device.describe_hardware(accelerator) + shared,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "config": json.dumps(config.to_dict(), sort_keys=True),
        "commit": current_commit(),
        "date": today(),
    }
    write_json(folder / RECORD, record)


# --- The run's folder ----------------------------------------------------------------------------


def read_result(folder: Path) -> RunResult | None:
    """What the run in `folder` gave, or None where it has not been evaluated yet."""
    if not all((folder / name).exists() for name in (RECORD, METRICS, WEIGHTS)):
        return None
    metrics = read_json(folder / METRICS)
    known = {name: math.nan if value is None else value for name, value in metrics.items()}
    return RunResult(folder, known, read_json(folder / RECORD))


@contextmanager
def _alone_in(folder: Path, main: bool) -> Iterator[None]:
    """Lock the run folder against other runs; the main process does it for all of a run."""
    try:
        with FileLock(folder / LOCK, timeout=0) if main else nullcontext():
            yield
    except Timeout as error:
        raise UserError(
            f"{folder}: another process is running this configuration; wait for it or stop it"
        ) from error


def _clean(folder: Path, force: bool) -> None:
    """Remove what a kill in the middle of a write left; with `force`, the run before."""
    for path in folder.iterdir():
        if force and path.is_dir():
            shutil.rmtree(path)
        elif path.match(".*.tmp") or (force and path.name not in (LOCK, REQUEST, LOG)):
            path.unlink()
