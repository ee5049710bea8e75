"""Predicting over a whole data set, and the metrics of every task.

COCO's 12 metrics of boxes or masks are faster-coco-eval's, which gives pycocotools' numbers.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from effspinenet_lib.data import Dataset, classes_of
from effspinenet_lib.data.augment import FITTED, RELEASED, scaled_size
from effspinenet_lib.data.dataset import ABSENT, SEMANTIC_IGNORE
from effspinenet_lib.data.loader import Batch, evaluation_loader
from effspinenet_lib.errors import DataError, UserError
from effspinenet_lib.files import atomic_write
from effspinenet_lib.training.export import inference_copy

# In the order of COCO's summary: precision at 0.50:0.95, 0.50 and 0.75 and by object size, then
# recall at 1, 10 and 100 detections an image and by object size.
METRICS = (
    *("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"),
    *("AR_1", "AR_10", "AR_100", "AR_S", "AR_M", "AR_L"),
)
MASK_METRICS = tuple(f"{name}_mask" for name in METRICS)
TOP_K = (1, 5)  # Table 10
# Metrics of a task that are printed and compared, the most telling first.
TASK_METRICS: dict[str, tuple[str, ...]] = {
    "detection": METRICS,
    "instances": (*METRICS, *MASK_METRICS),
    "classification": tuple(f"top{k}" for k in TOP_K),
    "segmentation": ("mIOU",),
}
MASK_THRESHOLD = 0.5  # probability from which a pixel is the object's (Mask R-CNN)
Record = dict[str, Any]
Scales = Sequence[float]  # input pixels per original pixel, down and across


class Evaluation(NamedTuple):
    """What a model predicts on a data set, and how well.

    Attributes:
        metrics: `TASK_METRICS` in percent; NaN where there is nothing to find.
        predictions: COCO result records: `image_id`, `category_id`, `score`; for detection and
            instances `bbox` (x, y, width, height in pixels of the original image), for instances
            `segmentation` (compressed run lengths). Empty for the task segmentation.
    """

    metrics: dict[str, float]
    predictions: list[Record]


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    task: str,
    image_size: int,
    batch_size: int,
    workers: int = 0,
    progress: bool = True,
    accelerator: Accelerator | None = None,
    preprocessing: str = FITTED,
) -> Evaluation:
    """Predict every image of a data set and compute the task's metrics.

    An `inference_copy` of the model computes, on the device of its parameters. Boxes, masks and
    semantic labels are compared in the pixels of the original images.

    Args:
        model: a `models.base.TaskModel` of the task.
        dataset: what to predict.
        task: whose metrics to compute.
        image_size: side of the square input in pixels.
        batch_size: images at once.
        workers: processes that load images; 0: this one loads them.
        progress: show a bar where stderr is a terminal.
        accelerator: of processes that share the images and all call this with the same weights.
            The main one returns what a single process would; the others an empty evaluation.
        preprocessing: one of `data.augment.PREPROCESSINGS`. With "released" boxes are not cut
            off at the image's edges, as in the released code.

    Raises:
        UserError: the model has classes that the data set lacks.
        DataError: an image cannot be read, the data set lacks what the task needs, or the model
            gives numbers that are not finite.
    """
    if len(dataset) == 0:
        return Evaluation(dict.fromkeys(TASK_METRICS[task], math.nan), [])
    if task == "segmentation":
        dataset.prepare(task)
    padded = task in ("detection", "instances") and preprocessing == FITTED
    rank, processes = 0, 1
    if accelerator is not None:
        rank, processes = accelerator.process_index, accelerator.num_processes
    index, end = (len(dataset) * number // processes for number in (rank, rank + 1))
    batches = evaluation_loader(dataset, image_size, batch_size, workers, index, preprocessing, end)
    model = inference_copy(model)
    device = next((parameter.device for parameter in model.parameters()), None)
    bar = tqdm(
        desc="evaluate",
        total=end - index,
        unit="image",
        disable=None if progress and rank == 0 else True,
    )
    predictions: list[Record] = []
    counts = torch.zeros((), dtype=torch.int64)
    with torch.inference_mode(), bar:
        for batch in batches:
            images = batch.images.to(device)
            outputs = model(images, extents=extents_of(batch)) if padded else model(images)
            for output, scales in zip(outputs, batch.scales.tolist(), strict=True):
                image = _Image(dataset, index, scales, preprocessing != RELEASED)
                records, counted = _READ[task](output, image)
                predictions += records
                counts = counts + counted
                index += 1
            bar.update(len(outputs))
    if accelerator is not None and processes > 1:
        shares = _gather((predictions, counts), accelerator)
        if rank > 0:
            return Evaluation({}, [])
        predictions = [record for records, _ in shares for record in records]
        counts = sum(counted for _, counted in shares)
    return Evaluation(_measure(task, dataset, predictions, counts), predictions)


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


def extents_of(batch: Batch) -> list[tuple[int, int]]:
    """Height and width of the images within their fitted inputs."""
    return [
        scaled_size(height, width, scale)
        for (height, width), (scale, _) in zip(batch.sizes, batch.scales.tolist(), strict=True)
    ]


# --- One image -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Image:
    """An image whose prediction is read."""

    dataset: Dataset
    index: int
    scales: Scales
    cut: bool  # whether boxes end at its edges

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in original pixels."""
        height, width = self.dataset.annotations.sizes[self.index].tolist()
        return height, width

    def record(self, label: int, score: float, **more: Any) -> Record:
        """A COCO result record."""
        return {
            "image_id": self.dataset.image_id(self.index),
            "category_id": self.category_id(label),
            **more,
            "score": score,
        }

    def category_id(self, label: int) -> int | None:
        """The category of a label; None for one that does not count.

        Raises:
            UserError: the model has more classes than the data set.
        """
        categories = self.dataset.categories
        if label >= len(categories):
            raise UserError(
                f"the model found class {label}, counted from 0, but {self.dataset.name} has "
                f"{len(categories)} categories; create it with that num_classes"
            )
        found = categories[label].id
        return None if found == ABSENT else found


Output = Mapping[str, Tensor]
Read = tuple[list[Record], Tensor | int]  # records, and what the task's metrics count


def _read_boxes(output: Output, image: _Image) -> Read:
    corners = to_original(output["boxes"], image.scales, image.size if image.cut else None)
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    found = zip(output["labels"].tolist(), output["scores"].tolist(), boxes, strict=True)
    records = [image.record(label, score, bbox=box) for label, score, box in found]
    if "masks" in output:
        masks = paste_masks(output["masks"], corners, image.size).permute(1, 2, 0).byte().numpy()
        for record, encoded in zip(
            records, coco_mask.encode(np.asfortranarray(masks)), strict=True
        ):
            record["segmentation"] = {**encoded, "counts": encoded["counts"].decode("ascii")}
    return [record for record in records if record["category_id"] is not None], 0


def _read_class(output: Output, image: _Image) -> Read:
    scores = output["scores"].cpu()
    best = int(scores.argmax())
    row = image.dataset.annotations.rows(image.index).start
    label = int(image.dataset.annotations.labels[row])
    return [image.record(best, float(scores[best]))], count_hits(scores, label)


def _read_pixels(output: Output, image: _Image) -> Read:
    rows, columns = scaled_size(*image.size, image.scales[0])
    shown = output["logits"][None, :, :rows, :columns]
    logits = F.interpolate(shown.float(), image.size, mode="bilinear")[0]
    image.category_id(len(logits) - 2)
    expected = torch.from_numpy(image.dataset.semantic(image.index)).long()
    classes = classes_of(image.dataset, "segmentation")
    return [], count_pixels(logits.argmax(0).cpu(), expected, classes)


# How the prediction of one image is read.
_READ: dict[str, Callable[[Output, _Image], Read]] = {
    "detection": _read_boxes,
    "instances": _read_boxes,
    "classification": _read_class,
    "segmentation": _read_pixels,
}


def to_original(boxes: Tensor, scales: Scales, size: tuple[int, int] | None) -> Tensor:
    """Map boxes from input pixels to the original image.

    Args:
        boxes: [K, 4], x1 y1 x2 y2 in input pixels.
        scales: input pixels per original pixel, down and across.
        size: height and width of the original image, at whose edges boxes are cut off; None: they
            are not.

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

    A pixel is sampled at its middle, so that a full mask gives the pixels whose middles are in
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
    """The pixels of an axis whose middles are in a box, and where, from -1 to 1 over the box."""
    first, last = max(0, math.ceil(start - 0.5)), min(side, math.ceil(end - 0.5))
    middles = torch.arange(first, last) + 0.5
    return (first, last), (middles - start) / (end - start) * 2 - 1


# --- Metrics -------------------------------------------------------------------------------------


def _measure(
    task: str, dataset: Dataset, predictions: list[Record], counts: Tensor
) -> dict[str, float]:
    """The task's metrics of all images."""
    if task == "classification":
        return accuracy(counts)
    if task == "segmentation":
        return mean_iou(counts)
    truth = dataset.ground_truth(masks=task == "instances")
    boxes = coco_metrics(truth, predictions)
    if task == "detection":
        return boxes
    masks = coco_metrics(truth, predictions, "segm")
    return {**boxes, **dict(zip(MASK_METRICS, masks.values(), strict=True))}


def coco_metrics(
    ground_truth: Mapping[str, Any], detections: Sequence[Record], iou_type: str = "bbox"
) -> dict[str, float]:
    """Compute COCO's 12 metrics; the arguments are left as they are.

    Args:
        ground_truth: a COCO dictionary with `images`, `annotations` and `categories`.
        detections: COCO result records; with `bbox` for "bbox", `segmentation` (RLE) for "segm".
        iou_type: "bbox" or "segm".

    Returns:
        `METRICS` in percent; NaN where there is no object to find.

    Raises:
        DataError: a score or a box of a detection is not finite.
    """
    shape = "bbox" if iou_type == "bbox" else "segmentation"
    for number, record in enumerate(detections, start=1):
        numbers = [record["score"], *(record["bbox"] if iou_type == "bbox" else ())]
        if not all(map(math.isfinite, numbers)):
            raise DataError(
                f"detection {number}: a number of {numbers} is not finite; the model's weights "
                "are broken: use those of an earlier checkpoint"
            )
    truth = COCO()
    # COCO's matching reads id 0 as "no match", so annotations are numbered from 1
    numbered = enumerate(ground_truth["annotations"], start=1)
    annotations = [{**record, "id": number} for number, record in numbered]
    truth.dataset = {**ground_truth, "annotations": annotations}
    truth.createIndex()
    # without the other shape: where a record has a box, its area would be that of the box
    kept = ("image_id", "category_id", "score", shape)
    found = truth.loadRes([{name: record[name] for name in kept} for record in detections])
    evaluation = COCOeval_faster(truth, found, iou_type)
    evaluation.run()
    return {
        name: math.nan if value < 0 else 100.0 * float(value)
        for name, value in zip(METRICS, evaluation.stats, strict=True)
    }


def count_hits(scores: Tensor, label: int) -> Tensor:
    """One image, and whether its label is among the `TOP_K` highest of `scores` [C]; int64 [3]."""
    best = scores.topk(min(max(TOP_K), len(scores))).indices.tolist()
    return torch.tensor([1, *(label in best[:k] for k in TOP_K)])


def accuracy(counts: Tensor) -> dict[str, float]:
    """`top1` and `top5` in percent from summed `count_hits`; NaN where no image was counted."""
    images, *hits = counts.tolist()
    shares = [100.0 * hit / images if images else math.nan for hit in hits]
    return dict(zip(TASK_METRICS["classification"], shares, strict=True))


def count_pixels(predicted: Tensor, expected: Tensor, num_classes: int) -> Tensor:
    """The confusion matrix of semantic labels; where 255 is expected they do not count.

    Args:
        predicted: classes, integers [.., H, W].
        expected: semantic labels, integers of the same shape.
        num_classes: the background among them.

    Returns:
        int64 [C, C]; row: the expected class, column: the predicted one.
    """
    kept = expected != SEMANTIC_IGNORE
    rows, columns = expected[kept].long(), predicted[kept].long()
    counts = torch.bincount(rows * num_classes + columns, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).cpu()


def mean_iou(confusion: Tensor) -> dict[str, float]:
    """`mIOU` in percent, the mean over the classes that are expected or predicted anywhere.

    The counts are summed over all images first, as in PASCAL VOC. NaN where nothing counts.
    """
    both = confusion.diagonal().double()
    shares = both / (confusion.sum(0) + confusion.sum(1) - both)
    return {"mIOU": 100.0 * float(shares.nanmean())}


def write_predictions(
    path: str | os.PathLike[str], predictions: Sequence[Mapping[str, Any]]
) -> None:
    """Write predictions in COCO's result format, one record a line, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as handle:
        lines = (json.dumps(record, allow_nan=False) for record in predictions)
        handle.write("[\n" + ",\n".join(lines) + "\n]\n" if predictions else "[]\n")
