"""Batches: the same ones in the same order for a seed, whatever the number of workers."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from effspinenet_lib.data.augment import (
    FITTED,
    PREPROCESSINGS,
    RELEASED,
    Augmentation,
    CropParams,
    Target,
    auto_augment,
    centre_crop,
    crop_image,
    draw_crop,
    fit_image,
    normalise,
    pad_target,
    random_crop,
    training_target,
)
from effspinenet_lib.data.dataset import Dataset
from effspinenet_lib.errors import DataError, UnknownName, UserError

# Words that keep the random streams of order and augmentation apart.
_ORDER_STREAM, _AUGMENTATION_STREAM = 0, 1
# Batches that a worker prepares ahead; more costs memory and gains nothing at these sizes.
_PREFETCH = 2
# How torch's messages begin about a worker that died, and about an error raised in one.
_WORKER_DIED, _RAISED_IN_WORKER = "DataLoader worker", "Caught "

EpochAndIndex = tuple[int, int]


@dataclass
class Batch:
    """A batch of network inputs.

    Attributes:
        images: float32 [N, 3, S, S], normalised, zeros at the bottom and the right.
        targets: in training one dictionary an image, as the task's model takes it; empty in
            evaluation.
        image_ids: the images' ids in the annotation file.
        scales: float32 [N, 2], input pixels per original pixel, down and across; NaN for the
            random crops of photographs.
        sizes: original height and width of every image.
    """

    images: Tensor
    targets: list[Target]
    image_ids: tuple[int, ...]
    scales: Tensor
    sizes: list[tuple[int, int]]

    def to(self, device: torch.device | str) -> Batch:
        """The batch with images and targets on `device`."""
        targets = [
            {name: value.to(device, non_blocking=True) for name, value in target.items()}
            for target in self.targets
        ]
        return replace(self, images=self.images.to(device, non_blocking=True), targets=targets)

    def pin_memory(self) -> Batch:
        """The batch with its images in page-locked memory (called by torch's loader)."""
        return replace(self, images=self.images.pin_memory())


class _Item(NamedTuple):
    pixels: Tensor  # uint8, or float32 where they are normalised already
    target: Target | None
    image_id: int
    scales: tuple[float, float]
    size: tuple[int, int]


def _collate(items: Sequence[_Item], image_size: int, pad_targets: int | None = None) -> Batch:
    images = torch.zeros(len(items), 3, image_size, image_size)
    for item, canvas in zip(items, images, strict=True):
        if item.pixels.dtype == torch.uint8:
            normalise(item.pixels, canvas)
        else:
            canvas.copy_(item.pixels)
    targets = [item.target for item in items if item.target is not None]
    if pad_targets is not None:
        targets = [pad_target(target, pad_targets) for target in targets]
    scales = torch.tensor([item.scales for item in items], dtype=torch.float32)
    ids, sizes = tuple(item.image_id for item in items), [item.size for item in items]
    return Batch(images, targets, ids, scales, sizes)


@dataclass(frozen=True)
class _TrainingItems(TorchDataset[_Item]):
    dataset: Dataset
    image_size: int
    augmentation: Augmentation
    seed: int
    task: str
    policy: str

    def __getitem__(self, key: EpochAndIndex) -> _Item:
        epoch, index = key
        sample = self.dataset.load(index, self.task)
        height, width = sample.image.shape[:2]
        generator = _generator(_AUGMENTATION_STREAM, self.seed, epoch, index)
        if self.dataset.photographs:
            flip = self.augmentation.flip_probability
            pixels = random_crop(sample.image, self.image_size, flip, generator)
            crop = CropParams(math.nan)  # each axis has a scale of its own
        else:
            crop = draw_crop(height, width, self.image_size, self.augmentation, generator)
            pixels = crop_image(sample.image, crop, self.image_size)
        target = training_target(sample, crop, self.image_size, self.task)
        if self.policy:
            pixels = auto_augment(pixels, self.policy, generator)
        return _Item(pixels, target, sample.image_id, (crop.scale, crop.scale), (height, width))


@dataclass(frozen=True)
class _EvaluationItems(TorchDataset[_Item]):
    dataset: Dataset
    image_size: int
    preprocessing: str

    def __getitem__(self, index: int) -> _Item:
        sample = self.dataset.load(index)
        if self.dataset.photographs and self.preprocessing != RELEASED:
            pixels, scale = centre_crop(sample.image, self.image_size)
            scales = scale, scale
        else:
            pixels, scales = fit_image(sample.image, self.image_size, self.preprocessing)
        return _Item(pixels, None, sample.image_id, scales, sample.image.shape[:2])


def _generator(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


@dataclass(frozen=True)
class TrainingOrder(Sampler[list[EpochAndIndex]]):
    """Which images each step sees; a pure function of its fields and the step.

    An epoch is one permutation of the data set, cut into whole batches. A data set smaller than
    a batch is repeated as often as a batch needs, one permutation after the other.
    """

    images: int
    batch_size: int
    seed: int
    start_step: int
    total_steps: int
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def __iter__(self) -> Iterator[list[EpochAndIndex]]:
        # Whole batches only, except where not even one batch fits into an epoch.
        used = max(self.images - self.images % self.batch_size, min(self.images, self.batch_size))
        known, order = -1, np.empty(0, np.int64)
        for step in range(self.start_step, self.total_steps):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                epoch, place = divmod(position, used)
                if epoch != known:
                    known = epoch
                    order = _generator(_ORDER_STREAM, self.seed, epoch).permutation(self.images)
                batch.append((epoch, int(order[place])))
            yield batch[self.rank :: self.world_size]


def training_loader(
    dataset: Dataset,
    image_size: int,
    batch_size: int,
    augmentation: Augmentation,
    seed: int,
    start_step: int,
    total_steps: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    task: str = "detection",
    auto_augment: str = "",
    pad_targets: int | None = None,
) -> Batches:
    """The batches of steps `start_step` to `total_steps - 1`.

    The batch of a step is a pure function of the data set, the seed and the step: neither the
    number of workers nor the step that the loader starts from changes it.

    Args:
        dataset: what to train on.
        image_size: side of the square input in pixels.
        batch_size: images a step; each of `world_size` processes gets its equal share.
        augmentation: the random changes.
        seed: of order and augmentation.
        start_step: the first step, where a run resumes.
        total_steps: steps of the whole run.
        workers: worker processes; 0 loads in this process.
        rank: this process among `world_size`.
        world_size: training processes.
        task: what the targets are for.
        auto_augment: an AutoAugment policy of torchvision's, for classification; "" for none.
        pad_targets: rows that the targets of detection are padded to, so that all batches have
            the same shapes; None: as many as there are objects.

    Raises:
        UserError: an empty data set, a batch that `world_size` does not divide, or AutoAugment
            for a task with boxes or masks, which it would not move.
        DataError: the data set lacks what the task needs.
    """
    if len(dataset) == 0:
        raise UserError(f"{dataset.name} has no images to train on")
    if batch_size < 1 or batch_size % world_size:
        raise UserError(
            f"a batch of {batch_size} images cannot be shared equally by {world_size} processes"
        )
    if auto_augment and task != "classification":
        raise UserError(f"AutoAugment is for classification, not for {task}; leave it out")
    order = TrainingOrder(len(dataset), batch_size, seed, start_step, total_steps, rank, world_size)
    dataset.prepare(task)
    items = _TrainingItems(dataset, image_size, augmentation, seed, task, auto_augment)
    rows = pad_targets if task == "detection" else None
    collate = partial(_collate, image_size=image_size, pad_targets=rows)
    return _loader(items, order, collate, workers)


def evaluation_loader(
    dataset: Dataset,
    image_size: int,
    batch_size: int,
    workers: int = 0,
    start: int = 0,
    preprocessing: str = FITTED,
    end: int | None = None,
) -> Batches:
    """All images from `start` to before `end` once, in index order, unchanged but for resizing.

    The last batch may be short. `preprocessing` is one of `augment.PREPROCESSINGS`.

    Raises:
        UnknownName: no such preprocessing.
    """
    if preprocessing not in PREPROCESSINGS:
        raise UnknownName("preprocessing", preprocessing, PREPROCESSINGS)
    images = list(range(start, len(dataset) if end is None else end))
    order = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
    items = _EvaluationItems(dataset, image_size, preprocessing)
    return _loader(items, order, partial(_collate, image_size=image_size), workers)


def _loader(
    items: TorchDataset[_Item],
    order: Sampler[list[EpochAndIndex]] | list[list[int]],
    collate: Callable[[Sequence[_Item]], Batch],
    workers: int,
) -> Batches:
    # A generator of its own keeps the loader from drawing on torch's global one, which would
    # make a resumed run's random numbers differ. It seeds the workers; the batches draw only on
    # seeds of their own.
    return Batches(
        items,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_prepare_worker,
        prefetch_factor=_PREFETCH if workers else None,
        pin_memory=torch.accelerator.is_available(),
        generator=torch.Generator().manual_seed(0),
    )


def _prepare_worker(worker: int) -> None:
    """One thread a worker: there are as many workers as cores that they may use.

    A signal to the whole job is the main process's to handle, which still needs batches.
    """
    del worker
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_loader, daemon=True).start()


def _end_with_loader() -> None:
    """Obey SIGTERM of the main process alone, which sends it to workers that it is done with."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Batches(DataLoader[Any]):
    """torch's loader, with errors that say in one line what happened and what to do."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with worker_errors():
            try:
                yield from super().__iter__()
            except (EOFError, OSError) as error:
                # The connection to a worker broke before torch noticed that it died.
                if not self.num_workers or str(error).startswith(_RAISED_IN_WORKER):
                    raise
                raise RuntimeError(f"{_WORKER_DIED} was lost: {error!r}") from error


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn what torch reports of a worker that died or failed into one clear line.

    The loaders use it. A loop over one needs it too: torch reports a death by a signal handler,
    which interrupts the main process wherever it is.

    Raises:
        DataError: a worker died, or raised a `DataError`.
    """
    try:
        yield
    except DataError as error:
        # From a worker the message is its whole traceback, with the message itself last.
        lines = str(error).strip().splitlines() or [""]
        if len(lines) == 1:
            raise
        raise DataError(lines[-1].split("Error: ", 1)[-1]) from error
    except RuntimeError as error:
        if not str(error).startswith(_WORKER_DIED):
            raise
        reason = str(error).splitlines()[0].strip()
        raise DataError(
            f"a data loading worker died ({reason}); if memory ran out, use fewer workers; the "
            "same command resumes from the last checkpoint"
        ) from error
