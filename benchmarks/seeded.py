"""Seeded weights, and how two implementations of a released detector are compared by them.

The weights are trained by nobody: every tensor, the norms' statistics and gains too, is drawn from
the seed and its name, so both frameworks and all machines have the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from effspinenet_lib.models.anchors import BOX_CODE
from effspinenet_lib.models.retinanet import RetinaNet
from effspinenet_lib.models.specs import COCO_CLASSES, OUTPUT_LEVELS

Arrays = dict[str, NDArray[Any]]

# Weights are uniform in +-sqrt(3 / fan in), a variance of 1 / fan in, which keeps activations of
# the order of one. Those of the classes' last layer are this much larger, so that with this bias a
# few in a hundred scores pass the threshold.
CLASS_GAIN = 10.0
CLASS_BIAS = -4.5
OBJECTS = 7  # an image
LEAST_SIDE = 24.0  # pixels; the smallest anchor's
LARGEST_SHARE = 0.6  # of the image's side
RANGES: dict[str, tuple[float, float]] = {
    "gain": (0.5, 1.5),
    "running_mean": (-0.2, 0.2),
    "running_var": (0.5, 1.5),
    "bias": (-0.2, 0.2),
}


def seeded_state(shapes: Mapping[str, Iterable[int]], seed: int) -> dict[str, NDArray[np.float32]]:
    """Draw a released detector's state dict.

    Args:
        shapes: name -> shape of every tensor.
        seed: any whole number.

    Returns:
        Name -> values; 0 for the norms' counters of batches.
    """
    return {name: _draw(name, tuple(shape), seed) for name, shape in shapes.items()}


def seeded_images(count: int, side: int, seed: int) -> NDArray[np.float32]:
    """Draw images [count, 3, side, side], uniform over the range of normalised pixels."""
    generator = np.random.default_rng([seed, count, side])
    values = generator.random((count, 3, side, side)) * 4 - 2
    return values.astype(np.float32)


def seeded_objects(
    count: int, side: int, seed: int
) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Draw the objects of `count` images: boxes [7, 4] as x1 y1 x2 y2, and labels [7] from 0.

    Each overlaps an anchor well. A small object inside several anchors is as near to one as to
    another, and rounding, which differs between frameworks, would choose the one that it gets.
    """
    objects = []
    for image in range(count):
        generator = np.random.default_rng([seed, image])
        size = LEAST_SIDE * (LARGEST_SHARE * side / LEAST_SIDE) ** generator.random(OBJECTS)
        ratio = 2 ** (generator.random(OBJECTS) - 0.5)
        sides = np.stack([size * ratio, size / ratio], axis=1)
        corners = generator.random((OBJECTS, 2)) * (side - sides)
        labels = (generator.random(OBJECTS) * COCO_CLASSES).astype(np.int64)
        boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
        objects.append((boxes, labels))
    return objects


def seeded_places(name: str, size: int, count: int, seed: int) -> NDArray[np.int64]:
    """Draw `count` ascending places in a flat tensor of `size` values; all of a smaller one."""
    if size <= count:
        return np.arange(size)
    uniform = np.random.default_rng([seed, zlib.crc32(name.encode())]).random(count)
    return np.sort((uniform * size).astype(np.int64))


def load_seeded(model: torch.nn.Module, seed: int) -> None:
    """Put the drawn weights into a model."""
    state = model.state_dict()
    drawn = seeded_state({name: tensor.shape for name, tensor in state.items()}, seed)
    model.load_state_dict(
        {name: torch.from_numpy(drawn[name]).to(state[name].dtype) for name in state}
    )


def _draw(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if len(shape) > 1:
        bound = float(np.sqrt(3 / np.prod(shape[1:])))
        if name in ("class_head.predict.weight", "class_head.predict.pointwise.weight"):
            bound *= CLASS_GAIN
        low, high = -bound, bound
    else:
        low, high = RANGES["gain" if leaf == "weight" else leaf]
    uniform = np.random.default_rng([seed, zlib.crc32(name.encode())]).random(shape)
    values = low + (high - low) * uniform
    if name in ("class_head.predict.bias", "class_head.predict.pointwise.bias"):
        values += CLASS_BIAS
    return values.astype(np.float32)


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
