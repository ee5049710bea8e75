"""A trained model for use: norms folded into convolutions, programs without this library."""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from effspinenet_lib.errors import UserError
from effspinenet_lib.files import atomic_write
from effspinenet_lib.models.anchors import clip_boxes, decode_boxes
from effspinenet_lib.models.base import TaskModel
from effspinenet_lib.models.dense import Segmenter, resize
from effspinenet_lib.models.mask_rcnn import MaskRCNN
from effspinenet_lib.models.retinanet import OneStageDetector

Model = TypeVar("Model", bound=nn.Module)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}  # of the files, by format


def inference_copy(model: Model) -> Model:
    """A copy of a model in evaluation mode, with norms folded into the convolutions before them.

    Folded are norms that follow a convolution in an `nn.Sequential`. Those of heads, one a level
    after convolutions that the levels share, and those inside timm's blocks stay. Outputs differ
    by rounding.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for module in copied.modules():
        if isinstance(module, nn.Sequential):
            _fold_norms(module)
    return copied


def _fold_norms(sequence: nn.Sequential) -> None:
    layers: list[Any] = list(sequence)
    for index, (layer, norm) in enumerate(itertools.pairwise(layers)):
        convolution = getattr(layer, "pointwise", layer)  # the last of a separable one
        # timm's norms may hold an activation
        folds = isinstance(norm, NORMS) and not hasattr(norm, "act")
        if folds and isinstance(convolution, nn.Conv2d):
            fused = fuse_conv_bn_eval(convolution, norm)
            convolution.weight, convolution.bias = fused.weight, fused.bias
            sequence[index + 1] = nn.Identity()


class _Network(nn.Module):
    """The layers, without decoding."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model.network(images)


def export_model(model: TaskModel, image_size: int, path: str | os.PathLike[str]) -> Path:
    """Write the network of a model with `torch.export`, for images [1, 3, S, S].

    `torch.export.load(path).module()` maps normalised images to what the model's `network`
    gives.

    Args:
        model: of any task; on the CPU.
        image_size: S, in pixels.
        path: the file to write; `.pt2` is torch's ending.

    Raises:
        UserError: the image size is too small, or the file cannot be written.
    """
    images = torch.zeros(1, 3, image_size, image_size)
    network = _Network(inference_copy(model)).eval()
    with torch.no_grad():
        network(images)  # refuses a wrong size, and caches what it needs for this one
        program = torch.export.export(network, (images,))
    with atomic_write(path, "wb") as handle:
        torch.export.save(program, handle)
    return Path(path)


# --- ONNX ----------------------------------------------------------------------------------------


def export_onnx(
    model: TaskModel,
    image_size: int,
    path: str | os.PathLike[str],
    decode: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model as an ONNX file for `images` [N, 3, S, S], normalised; N may vary.

    Decoded outputs: of detection `boxes` [N, K, 4] (x1 y1 x2 y2 in input pixels), `scores` [N, K]
    falling, 0 behind the last detection, and `labels` int64 [N, K]; of classification `scores`
    [N, C], which sum to 1; of segmentation `logits` [N, C, S, S].

    Args:
        model: on the CPU; not of the task instances.
        image_size: S, in pixels.
        path: the file to write.
        decode: whether detections are decoded and suppressed inside; else the outputs are those
            of `network`, of detection `logits`, `codes` and `anchors`.
        metadata: kept in the file, each value as JSON.

    Raises:
        UserError: onnx is not installed, the image size is too small, the task is instances, or
            the file cannot be written.
    """
    if isinstance(model, MaskRCNN):
        raise UserError(
            "ONNX has no fixed shapes for the regions of the task instances; use --format torch"
        )
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise UserError("ONNX needs more packages: pip install -e '.[onnx]'") from error
    detector = isinstance(model, OneStageDetector)
    names = ["boxes", "scores", "labels"] if detector else ["scores"]
    if not decode:
        names = ["logits", "codes", "anchors"] if detector else ["logits"]
    elif isinstance(model, Segmenter):
        names = ["logits"]
    network = (_Decoded if decode else _Network)(inference_copy(model)).eval()
    images = torch.zeros(2, 3, image_size, image_size)
    with torch.no_grad():
        network(images)  # refuses a wrong size, and caches what it needs for this one
        program = torch.onnx.export(
            network,
            (images,),
            input_names=["images"],
            output_names=names,
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            custom_translation_table={torch.ops.effspinenet.suppress.default: _suppress_in_onnx},
            opset_version=18,
            verbose=False,
        )
    assert program is not None
    exported = program.model_proto
    for name, value in (metadata or {}).items():
        exported.metadata_props.add(key=name, value=json.dumps(value))
    with atomic_write(path, "wb") as handle:
        handle.write(exported.SerializeToString())
    return Path(path)


class _Decoded(_Network):
    """The layers and what follows them, of shapes that depend on the image size alone."""

    def forward(self, images: Tensor) -> Any:
        model = self.model
        if isinstance(model, OneStageDetector):
            return _decoded_batch(model, images)
        logits = model.network(images)
        if isinstance(model, Segmenter):
            return resize(logits, (images.shape[-2], images.shape[-1]))
        return logits.softmax(1)


def _decoded_batch(model: OneStageDetector, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `OneStageDetector.detections`, but of a batch: boxes, scores and labels [N, K, ..]."""
    settings = model.settings
    logits, codes, anchors = model.network(images)
    scores, boxes = model.scores(logits), decode_boxes(codes, anchors, settings.box_scale)
    boxes, extended = clip_boxes(boxes, (images.shape[-2], images.shape[-1]))
    scores = scores * extended[..., None]
    count, classes = scores.shape[1:]
    if settings.candidates_by_class:
        values, anchor = scores.mT.topk(min(settings.candidates, count))  # [N, C, k]
        labels = torch.arange(classes)[:, None].expand_as(anchor).flatten(1)
        values, anchor = values.flatten(1), anchor.flatten(1)
    else:
        values, order = scores.flatten(1).topk(min(settings.candidates, count * classes))
        labels, anchor = order % classes, order.div(classes, rounding_mode="floor")
    boxes = boxes.gather(1, anchor[..., None].expand(-1, -1, 4))
    own = labels[:, None] == torch.arange(classes)[:, None]  # [N, C, candidates]
    spread = values[:, None].where(own, 0)
    limits = (settings.nms_iou, settings.score_threshold, settings.detections)
    kept = values * torch.ops.effspinenet.suppress(boxes, spread, *limits)
    values, best = kept.topk(min(settings.detections, kept.shape[1]))
    return boxes.gather(1, best[..., None].expand(-1, -1, 4)), values, labels.gather(1, best)


@torch.library.custom_op("effspinenet::suppress", mutates_args=())
def _suppress(
    boxes: Tensor, scores: Tensor, iou: float, threshold: float, detections: int
) -> Tensor:
    """1 where a box [N, K, 4] with scores [N, C, K] leaves the suppression of a class, else 0.

    Only the shape matters: `_suppress_in_onnx` takes this one's place.
    """
    return scores.amax(1)


@_suppress.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, threshold: float, detections: int) -> Tensor:
    return scores.new_empty(scores.shape[0], scores.shape[2])


def _suppress_in_onnx(
    boxes: Any, scores: Any, iou: float, threshold: float, detections: int
) -> Any:
    """`_suppress` in ONNX's operations."""
    from onnxscript import opset18 as op

    limits = (op.Constant(value_floats=[limit]) for limit in (iou, threshold))
    most = op.Constant(value_ints=[detections])
    found = op.NonMaxSuppression(boxes, scores, most, *limits)  # rows of image, class, box
    places = op.Gather(found, op.Constant(value_ints=[0, 2]), axis=1)
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(places, start=0, end=1))
    classes = op.Constant(value_ints=[1])
    nothing = op.ReduceMax(op.Mul(scores, op.Constant(value_float=0.0)), classes, keepdims=0)
    return op.ScatterND(nothing, places, ones)
