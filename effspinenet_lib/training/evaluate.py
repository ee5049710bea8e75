"""Predicting over a whole data set, and what the predictions are worth by the task's metrics."""

from __future__ import annotations

import json
import math
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from effspinenet_lib.data import Dataset, classes_of, evaluation_loader
from effspinenet_lib.data.augment import FITTED, RELEASED, scaled_size
from effspinenet_lib.errors import UserError
from effspinenet_lib.files import atomic_write
from effspinenet_lib.training.coco import METRICS, coco_metrics
from effspinenet_lib.training.metrics import Accuracy, ConfusionMatrix
from effspinenet_lib.training.prediction_log import PredictionLog

# Metrics of a task that are printed and compared, the most telling first.
MASK_METRICS = tuple(f"{name}_mask" for name in METRICS)
TASK_METRICS: dict[str, tuple[str, ...]] = {
    "detection": METRICS,
    "instances": (*METRICS, *MASK_METRICS),
    "classification": ("top1", "top5"),
    "segmentation": ("mIOU",),
}
Scales = Sequence[float]  # input pixels per original pixel, down and across
MASK_THRESHOLD = 0.5  # probability from which a pixel is the object's (Mask R-CNN)


@dataclass(frozen=True)
class Evaluation:
    """What a model predicts on a data set, and how well.

    Attributes:
        metrics: `TASK_METRICS` in percent; NaN where there is nothing to find.
        predictions: COCO result records: `image_id`, `category_id`, `score`; for detection and
            instances `bbox` (x, y, width, height in pixels of the original image), for instances
            `segmentation` (compressed run lengths). Empty for the task segmentation.
    """

    metrics: dict[str, float]
    predictions: list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """How weights from elsewhere are evaluated; the defaults fit what this library trains.

    Attributes:
        preprocessing: one of `data.augment.PREPROCESSINGS`. With "released" boxes are not cut
            off at the image's edges, as in the released code.
        category_ids: for detection and instances, the category id of each label, in the order of
            the labels; None for one that the data does not have, whose predictions are left out.
            By default the data set's own categories.
    """

    preprocessing: str = FITTED
    category_ids: Sequence[int | None] | None = None


OWN = Settings()


class _Evaluator(ABC):
    """Collects the predictions of one data set."""

    def __init__(self, dataset: Dataset, settings: Settings) -> None:
        self.dataset = dataset
        self.settings = settings
        self.predictions: list[dict[str, Any]] = []

    @abstractmethod
    def add(self, index: int, output: Mapping[str, Tensor], scales: Scales) -> None:
        """Take the prediction of image `index`, whose input was at `scales`."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """The metrics of all that was added, in percent."""

    def part(self) -> tuple[list[dict[str, Any]], Any]:
        """What was added here: the predictions, and the counts of a task that has them."""
        return self.predictions, None

    def merge(self, predictions: list[dict[str, Any]], counts: Any) -> None:
        """Add what another process has added, as its `part` gave it."""
        del counts
        self.predictions += predictions

    def category_id(self, label: int) -> int | None:
        """The category of a label; None for one that does not count.

        Raises:
            UserError: the model has more classes than the data set.
        """
        known = self.settings.category_ids or [c.id for c in self.dataset.categories]
        if label >= len(known):
            raise UserError(
                f"the model found class {label}, counted from 0, but {self.dataset.name} has "
                f"{len(known)} categories; create it with that num_classes"
            )
        return known[label]


class _Boxes(_Evaluator):
    def add(self, index: int, output: Mapping[str, Tensor], scales: Scales) -> None:
        height, width = self.dataset.annotations.sizes[index].tolist()
        released = self.settings.preprocessing == RELEASED
        corners = to_original(output["boxes"], scales, None if released else (height, width))
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
        categories = [self.category_id(label) for label in output["labels"].tolist()]
        records = [
            {
                "image_id": self.dataset.image_id(index),
                "category_id": category,
                "bbox": box,
                "score": score,
            }
            for box, score, category in zip(
                boxes, output["scores"].tolist(), categories, strict=True
            )
        ]
        if "masks" in output:
            masks = paste_masks(output["masks"], corners, (height, width))
            for record, mask in zip(records, masks, strict=True):
                record["segmentation"] = _run_lengths(mask)
        self.predictions += [record for record in records if record["category_id"] is not None]

    def metrics(self) -> dict[str, float]:
        return coco_metrics(self.dataset.ground_truth(), self.predictions)


class _Instances(_Boxes):
    def metrics(self) -> dict[str, float]:
        masks = coco_metrics(self.dataset.ground_truth(), self.predictions, "segm")
        return {**super().metrics(), **dict(zip(MASK_METRICS, masks.values(), strict=True))}


class _Classes(_Evaluator):
    def __init__(self, dataset: Dataset, settings: Settings) -> None:
        super().__init__(dataset, settings)
        self.accuracy = Accuracy()

    def add(self, index: int, output: Mapping[str, Tensor], scales: Scales) -> None:
        del scales
        scores = output["scores"].cpu()
        best = int(scores.argmax())
        category = self.category_id(best)
        row = self.dataset.annotations.rows(index).start
        label = torch.tensor([int(self.dataset.annotations.labels[row])])
        self.accuracy.add(scores[None], label)
        self.predictions.append(
            {
                "image_id": self.dataset.image_id(index),
                "category_id": category,
                "score": float(scores[best]),
            }
        )

    def metrics(self) -> dict[str, float]:
        return self.accuracy.metrics()

    def part(self) -> tuple[list[dict[str, Any]], Any]:
        return self.predictions, self.accuracy

    def merge(self, predictions: list[dict[str, Any]], counts: Any) -> None:
        self.predictions += predictions
        self.accuracy.merge(counts)


class _Pixels(_Evaluator):
    def __init__(self, dataset: Dataset, settings: Settings) -> None:
        super().__init__(dataset, settings)
        dataset.prepare("segmentation")
        self.confusion = ConfusionMatrix(classes_of(dataset, "segmentation"))

    def add(self, index: int, output: Mapping[str, Tensor], scales: Scales) -> None:
        height, width = self.dataset.annotations.sizes[index].tolist()
        rows, columns = scaled_size(height, width, scales[0])
        shown = output["logits"][None, :, :rows, :columns]
        logits = F.interpolate(shown.float(), (height, width), mode="bilinear")[0]
        self.category_id(len(logits) - 2)
        expected = torch.from_numpy(self.dataset.semantic(index)).long()
        self.confusion.add(logits.argmax(0).cpu(), expected)

    def metrics(self) -> dict[str, float]:
        return self.confusion.metrics()

    def part(self) -> tuple[list[dict[str, Any]], Any]:
        return [], self.confusion

    def merge(self, predictions: list[dict[str, Any]], counts: Any) -> None:
        del predictions
        self.confusion.merge(counts)


_EVALUATORS: dict[str, type[_Evaluator]] = {
    "detection": _Boxes,
    "instances": _Instances,
    "classification": _Classes,
    "segmentation": _Pixels,
}


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    task: str,
    image_size: int,
    batch_size: int,
    workers: int = 0,
    progress: bool = True,
    log: PredictionLog | None = None,
    settings: Settings = OWN,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """Predict every image of a data set and compute the task's metrics.

    The model computes on the device that its parameters lie on and is left in the mode
    (training or evaluation) in which it came. Boxes, masks and semantic labels are compared in
    the pixels of the original images.

    Args:
        model: a `tasks.base.TaskModel` of the task.
        dataset: what to predict.
        task: whose metrics to compute.
        image_size: side of the square input in pixels.
        batch_size: images at once.
        workers: processes that load images; 0: none beside this one.
        progress: show a bar where stderr is a terminal.
        log: keeps the predictions of each image as they come, and holds those of an interrupted
            evaluation, which are not made again; detection and instances only.
        settings: for weights from elsewhere.
        accelerator: of processes that share the images, each a run of neighbours, and that all
            call this with the same weights. Only the main one gets what was found, as a single
            process would have it; the others get an evaluation of nothing. Each has a log of its
            own, which counts for as many processes.

    Raises:
        UserError: the model has classes that the data set lacks.
        DataError: an image cannot be read, the data set lacks what the task needs, or the model
            gives numbers that are not finite.
    """
    evaluator = _EVALUATORS[task](dataset, settings)
    rank, processes = 0, 1
    if accelerator is not None:
        rank, processes = accelerator.process_index, accelerator.num_processes
    index, end = (len(dataset) * number // processes for number in (rank, rank + 1))
    if log is not None:
        evaluator.predictions += log.records
        index += log.images
    batches = evaluation_loader(
        dataset, image_size, batch_size, workers, index, settings.preprocessing, end
    )
    parameter = next(model.parameters(), None)
    with (
        _evaluation_mode(model),
        torch.inference_mode(),
        tqdm(
            desc="evaluate",
            total=end,
            initial=index,
            unit="image",
            disable=None if progress and rank == 0 else True,
        ) as bar,
    ):
        for batch in batches:
            images = batch.images if parameter is None else batch.images.to(parameter.device)
            for output, scales in zip(model(images), batch.scales.tolist(), strict=True):
                known = len(evaluator.predictions)
                evaluator.add(index, output, scales)
                if log is not None:
                    log.add(evaluator.predictions[known:])
                index += 1
            bar.update(len(images))
    if accelerator is not None and processes > 1:
        _, *others = _gather(evaluator.part(), accelerator)
        if rank > 0:
            return Evaluation({}, [])
        for part in others:
            evaluator.merge(*part)
    return Evaluation(evaluator.metrics(), evaluator.predictions)


def _gather(value: Any, accelerator: Accelerator) -> list[Any]:
    """The values of all processes, by rank.

    They travel as tensors, which every device can send; accelerate's own function for objects
    refuses TPUs.
    """
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    data = data.to(accelerator.device)
    lengths = accelerator.gather(torch.tensor([len(data)], device=accelerator.device)).tolist()
    gathered = accelerator.gather(accelerator.pad_across_processes(data)).cpu().numpy()
    rows = gathered.reshape(len(lengths), max(lengths))
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, then back in the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def to_original(boxes: Tensor, scales: Scales, size: tuple[int, int] | None) -> Tensor:
    """Map boxes from input pixels to the original image.

    Args:
        boxes: [K, 4], x1 y1 x2 y2 in input pixels.
        scales: input pixels per original pixel, down and across.
        size: height and width of the original image, whose edges cut boxes off; None: they do
            not.

    Returns:
        Boxes [K, 4] as float32 on the CPU, x1 y1 x2 y2 in original pixels.
    """
    down, across = scales
    original = boxes.detach().to("cpu", torch.float32) / torch.tensor([across, down, across, down])
    if size is None:
        return original
    height, width = size
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    return original.clamp(min=0).minimum(limits)


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring masks over boxes to the pixels of an image, bilinearly between their 28 x 28 values.

    A pixel is asked for at its middle, so that a full mask gives the pixels whose middles lie in
    the box. (torchvision's own pasting rounds boxes outwards, by up to a pixel at each side.)

    Args:
        masks: [K, 28, 28], probabilities over the boxes.
        boxes: [K, 4], x1 y1 x2 y2 in pixels of the image.
        size: height and width of the image.

    Returns:
        bool [K, H, W].
    """
    height, width = size
    pasted = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for canvas, mask, box in zip(pasted, masks.detach().cpu().float(), boxes.tolist(), strict=True):
        (left, right), across = _middles(box[0], box[2], width)
        (top, bottom), down = _middles(box[1], box[3], height)
        if left < right and top < bottom:
            grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)
            values = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
            canvas[top:bottom, left:right] = values >= MASK_THRESHOLD
    return pasted


def _middles(start: float, end: float, side: int) -> tuple[tuple[int, int], Tensor]:
    """The pixels of an axis whose middles lie in a box, and where, from -1 to 1 over the box."""
    first, last = max(0, math.ceil(start - 0.5)), min(side, math.ceil(end - 0.5))
    middles = torch.arange(first, last) + 0.5
    return (first, last), (middles - start) / (end - start) * 2 - 1


def _run_lengths(mask: Tensor) -> dict[str, Any]:
    encoded = coco_mask.encode(mask.numpy().astype("uint8", order="F"))
    counts = encoded["counts"]
    assert isinstance(counts, bytes)
    return {"size": list(encoded["size"]), "counts": counts.decode("ascii")}


def write_predictions(
    path: str | os.PathLike[str], predictions: Sequence[Mapping[str, Any]]
) -> None:
    """Write predictions in COCO's result format, one record a line, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as handle:
        lines = (json.dumps(record, allow_nan=False) for record in predictions)
        handle.write("[\n" + ",\n".join(lines) + "\n]\n" if predictions else "[]\n")
