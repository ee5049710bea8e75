"""What two implementations of a released detector are compared by."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from effspinenet_lib.models.retinanet import BOX_CODE, RetinaNet
from effspinenet_lib.models.specs import OUTPUT_LEVELS

Arrays = dict[str, NDArray[Any]]
SCORE_TIE = 5e-6  # twice what rounding moves the scores of the largest detector by


def outputs_by_level(model: RetinaNet, images: NDArray[np.float32]) -> Arrays:
    """Run the network of a detector in evaluation mode.

    Args:
        model: with outputs P3 to P7.
        images: [N, 3, S, S], normalised.

    Returns:
        For each level: `level_3` [N, C, H, W], what enters the heads; `class_3` [N, A, classes],
        logits; `box_3` [N, A, 4], codes of x, y, width, height.
    """
    arrays: Arrays = {}
    with torch.inference_mode():
        features = model.backbone(torch.from_numpy(images)).values()
        pairs = zip(OUTPUT_LEVELS, model.lateral, features, strict=True)
        for number, (level, lateral, feature) in enumerate(pairs):
            projected = lateral(feature)
            arrays[f"level_{level}"] = projected.numpy()
            for name, branch, width in (
                ("class", model.class_head, model.logits),
                ("box", model.box_head, BOX_CODE),
            ):
                output = branch(projected, number).permute(0, 2, 3, 1)
                arrays[f"{name}_{level}"] = output.reshape(len(images), -1, width).numpy()
    return arrays


def training_losses(
    model: RetinaNet,
    images: NDArray[np.floating[Any]],
    objects: list[tuple[NDArray[np.float32], NDArray[np.int64]]],
) -> dict[str, float]:
    """Losses of one training step; the model is left in evaluation mode.

    Args:
        model: with a drop rate of 0, or the losses are random.
        images: [N, 3, S, S], normalised; float32 or float64, as the model is.
        objects: for each image boxes [M, 4] as x1 y1 x2 y2 in pixels, and labels [M] from 0.
    """
    targets = [
        {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}
        for boxes, labels in objects
    ]
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    with torch.no_grad():
        losses = model(torch.from_numpy(images), targets)
    model.eval()
    for name, buffer in model.named_buffers():
        buffer.copy_(statistics[name])
    assert isinstance(losses, dict)
    return {name: float(loss) for name, loss in losses.items()}


def detection_differences(
    model: RetinaNet, images: NDArray[np.float32], expected: Arrays
) -> dict[str, float]:
    """Compare final detections, which must be in the same order.

    Rounding alone decides the order of scores that differ by less than `SCORE_TIE`: detections
    of such scores are paired by class and place.

    Args:
        model: a detector.
        images: [N, 3, S, S], normalised.
        expected: `boxes` [N, K, 4] as x1 y1 x2 y2, `scores` and `labels` [N, K], and `count` [N],
            how many of the K an image has.

    Returns:
        `class`: how many detections are of another class, or missing or too many; `box`: the
        largest difference of a coordinate in pixels; `score`: of a score. The last two are
        infinite where the numbers of detections differ.
    """
    with torch.inference_mode():
        found = model(torch.from_numpy(images))
    worst = {"class": 0.0, "box": 0.0, "score": 0.0}
    for image, one in enumerate(found):
        count = int(expected["count"][image])
        ours = {name: values.numpy() for name, values in one.items()}
        theirs = {name: expected[name][image, :count] for name in ours}
        if len(ours["scores"]) != count:
            worst["class"] += abs(len(ours["scores"]) - count)
            worst["box"] = worst["score"] = float("inf")
            continue
        order = _settle_ties(ours, theirs)
        worst["class"] += float((ours["labels"][order] != theirs["labels"]).sum())
        for name, values in (("box", "boxes"), ("score", "scores")):
            difference = np.abs(ours[values][order] - theirs[values]).max(initial=0.0)
            worst[name] = max(worst[name], float(difference))
    return worst


def _settle_ties(ours: Arrays, theirs: Arrays) -> list[int]:
    """Numbers of our detections in the expected order."""
    order: list[int] = []
    breaks = np.flatnonzero(-np.diff(theirs["scores"]) >= SCORE_TIE) + 1
    for group in np.split(np.arange(len(theirs["scores"])), breaks):
        left = group.tolist()
        for number in group:
            box, label = theirs["boxes"][number], theirs["labels"][number]
            near = [
                (bool(ours["labels"][n] != label), float(np.abs(ours["boxes"][n] - box).max()), n)
                for n in left
            ]
            order.append(min(near)[2])
            left.remove(order[-1])
    return order


def relative_difference(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """L2 norm of the difference over that of the expected values; infinite if shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    expected = theirs.astype(np.float64)
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))
