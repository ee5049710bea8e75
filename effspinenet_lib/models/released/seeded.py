"""Weights from a seed, the same on every machine, in either framework.

Two implementations of a network are compared with weights that nobody trained: every tensor,
the statistics and gains of the norms too, is drawn anew from the seed and its name.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

# Weights are uniform in +-sqrt(3 / fan in), a variance of 1 / fan in, which keeps activations of
# the order of one. Those of the classes' last layer are this much larger, so that with this bias a
# few in a hundred scores pass the threshold.
CLASS_GAIN = 10.0
CLASS_BIAS = -4.5
OBJECTS = 7  # an image
LEAST_SIDE = 24.0  # pixels; the smallest anchor's
LARGEST_SHARE = 0.6  # of the image's side
COCO_CLASSES = 90
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
