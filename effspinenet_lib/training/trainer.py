"""Training a run from its last checkpoint, or from the start, to its last step."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from effspinenet_lib.data import Augmentation, Dataset, classes_of, training_loader
from effspinenet_lib.data.augment import MAX_OBJECTS
from effspinenet_lib.data.loader import worker_errors
from effspinenet_lib.errors import TrainingError, UserError
from effspinenet_lib.models import zoo
from effspinenet_lib.models.dense import Classifier
from effspinenet_lib.training.checkpoint import (
    Checkpoint,
    load_backbone,
    load_into,
    load_latest,
    save_checkpoint,
)
from effspinenet_lib.training.config import RunConfig
from effspinenet_lib.training.devices import XLA
from effspinenet_lib.training.ema import Ema, build_ema
from effspinenet_lib.training.logs import Curve
from effspinenet_lib.training.loop import Step, prepare_model, seed_everything, train_steps
from effspinenet_lib.training.optim import build_optimizer, load_optimizer
from effspinenet_lib.training.stopping import StopRequest, preempted_first

logger = logging.getLogger(__name__)

STATIC_SHAPES = (XLA,)  # devices whose compiler builds a program for every shape


@dataclass(frozen=True)
class Job:
    """A run and the ways of running it that do not change what it is.

    Attributes:
        config: what to run.
        folder: of the run.
        target: steps to train to.
        workers: processes that load images, for each training process.
        progress: show bars where stderr is a terminal.
        checkpoint_seconds: time between checkpoints.
        checkpoints: how many are kept.
        micro_batch: images that a process computes at once; None: its share of the batch.
    """

    config: RunConfig
    folder: Path
    target: int
    workers: int
    progress: bool
    checkpoint_seconds: float
    checkpoints: int
    micro_batch: int | None

    def parts(self, processes: int) -> int:
        """Parts of a batch that each of the processes computes one after the other."""
        share = max(1, self.config.recipe.batch_size // processes)
        return math.ceil(share / (self.micro_batch or share))


@dataclass(frozen=True)
class Trained:
    """A model, the steps it was trained for and the time they took over all interruptions.

    Where the recipe has a moving average of the weights, the model is that.
    """

    model: nn.Module
    steps: int
    seconds: float


@dataclass
class _State:
    """What is trained, and how far it was when this process took it up."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    latest: Checkpoint | None

    @property
    def start(self) -> int:
        return self.latest.step if self.latest else 0

    @property
    def spent(self) -> float:
        return self.latest.wall_seconds if self.latest else 0.0


def train(job: Job, accelerator: Accelerator, dataset: Dataset, stop: StopRequest) -> Trained:
    """Train to the job's target; every process of a run calls this.

    Whatever ends the training before, the state after the last whole step is saved.

    Raises:
        TrainingError: a loss is not finite, the run has diverged, or memory is too small.
        Preempted: asked to stop.
        UserError: a checkpoint cannot be written; those before it are kept.
        DataError: an image cannot be read, or a loading process died.
        CheckpointError: a checkpoint or the initial weights do not fit.
    """
    config = job.config
    state = _take_up(job, accelerator, dataset)
    seconds = state.spent
    if state.start < job.target:
        batches = training_loader(
            dataset,
            config.image_size,
            config.recipe.batch_size,
            Augmentation(config.recipe.scale_jitter, config.recipe.flip_probability),
            config.seed,
            state.start,
            job.target,
            workers=job.workers,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            task=config.task,
            auto_augment=config.recipe.auto_augment,
            pad_targets=_padding(config.task, accelerator.device),
        )
        steps = train_steps(
            state.model,
            state.optimizer,
            batches,
            config.recipe,
            accelerator,
            config.seed,
            state.start,
            job.micro_batch,
            state.ema,
            stop,
        )
        seconds = _follow(job, accelerator, steps, state, stop)
    model = state.ema.module if state.ema else accelerator.unwrap_model(state.model)
    _share_buffers(model, accelerator)
    return Trained(model, max(state.start, job.target), seconds)


def _take_up(job: Job, accelerator: Accelerator, dataset: Dataset) -> _State:
    """Make the model and its optimizer, as they were at the last checkpoint."""
    config = job.config
    latest = load_latest(job.folder, config.key, config.model)
    seed_everything(config.seed)
    plain = zoo.create_model(
        config.model,
        task=config.task,
        num_classes=classes_of(dataset, config.task),
        **config.options,
    )
    if latest is not None:
        load_into(plain, latest.model_state, str(job.folder))
    elif config.initial_weights is not None:
        load_backbone(plain, config.initial_weights)
    if isinstance(plain, Classifier):
        plain.label_smoothing = config.recipe.label_smoothing
    parts = job.parts(accelerator.num_processes)
    model = prepare_model(plain, config.recipe, accelerator, parts)
    optimizer = accelerator.prepare_optimizer(build_optimizer(model, config.recipe))
    ema = build_ema(accelerator.unwrap_model(model), config.recipe)
    if latest is not None:
        load_optimizer(optimizer, latest.optimizer_state)
        if ema is not None and latest.ema_state is not None:
            ema.load_state_dict(latest.ema_state)
    return _State(model, optimizer, ema, latest)


def _padding(task: str, device: torch.device) -> int | None:
    """Rows that targets are padded to on `device`; the shapes of Mask R-CNN vary anyway."""
    return MAX_OBJECTS if device.type in STATIC_SHAPES and task != "instances" else None


def _follow(
    job: Job, accelerator: Accelerator, steps: Iterable[Step], state: _State, stop: StopRequest
) -> float:
    """Run the steps; the main process writes the curve and the checkpoints. The time in all."""
    if not accelerator.is_main_process:
        with stop.in_steps(), preempted_first(stop), worker_errors():
            for _ in steps:
                pass
        return state.spent
    curve_state = state.latest.curve_state if state.latest else {}
    total = job.config.recipe.steps
    # a launcher that lost a process asks the others to stop while this one still saves
    with (
        stop.in_steps(),
        Curve(job.folder, state.start, total, curve_state, job.progress) as curve,
    ):
        keeper = _Keeper(job, accelerator, state, curve)
        try:
            with preempted_first(stop), worker_errors():
                for step in steps:
                    try:
                        curve.add(step)
                        keeper.save_in_time(step.step)
                    except UserError as error:  # the other processes stop with this one
                        stop.failure = error
        except (UserError, RuntimeError, OSError):
            keeper.save_the_rest(stop)
            raise
    return keeper.seconds


class _Keeper:
    """Writes the checkpoints of a run."""

    def __init__(self, job: Job, accelerator: Accelerator, state: _State, curve: Curve) -> None:
        self._job, self._state, self._curve = job, state, curve
        self._model = accelerator.unwrap_model(state.model)
        self._tried = state.start
        self._began = self._saved_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """The time trained, over all interruptions."""
        return self._state.spent + time.monotonic() - self._began

    def save_in_time(self, step: int) -> None:
        """Save after the last step, and when the last checkpoint is old enough.

        What may be the beginning of a divergence takes no earlier checkpoint's place.

        Raises:
            UserError: it cannot be written.
            TrainingError: the weights are not finite.
        """
        due = time.monotonic() - self._saved_at >= self._job.checkpoint_seconds
        if (due and not self._curve.is_far_above_usual) or step == self._job.target:
            self._save(step)
            self._saved_at = time.monotonic()

    def save_the_rest(self, stop: StopRequest) -> None:
        """Save what was trained after the last checkpoint, if it is whole and worth it."""
        step = stop.step
        if step is None or step != self._curve.step or step == self._tried:
            return
        if self._curve.is_far_above_usual and not stop.signal:
            return
        with contextlib.suppress(UserError):  # what ended the run is the better message
            self._save(step)
            logger.info("%s: the state after step %d is saved", self._job.folder, step)

    def _save(self, step: int) -> None:
        self._tried = step
        state = self._state
        model_state = self._model.state_dict()
        ema_state = state.ema.state_dict() if state.ema else None
        weights = (*model_state.values(), *(ema_state or {}).values())
        # one answer for all of them: a compiler builds a program for each that is waited for
        if not torch.stack([value.isfinite().all() for value in weights]).all():
            raise TrainingError(
                f"the weights are not finite after step {step}; the same command goes on from the "
                "last checkpoint: lower the learning rate"
            )
        checkpoint = Checkpoint(
            run=self._job.config.key,
            model=self._job.config.model,
            step=step,
            model_state=model_state,
            optimizer_state=state.optimizer.state_dict(),
            curve_state=self._curve.state(),
            wall_seconds=self.seconds,
            ema_state=ema_state,
        )
        save_checkpoint(self._job.folder, checkpoint, self._job.checkpoints)


def _share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give all processes the main one's running statistics, with which all then evaluate."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            buffer.copy_(broadcast(buffer))
