"""From a sample to a square network input: resize, crop or pad, flip, normalise.

One number, the scale, maps original to input pixels on both axes, whatever the image's sides.
The network's input holds the resized image at the top left; what is left over is zero after
normalisation, as in the paper's section 5.1.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from effspinenet_lib.data.dataset import Sample
from effspinenet_lib.data.masks import SEMANTIC_IGNORE
from effspinenet_lib.errors import UserError

# ImageNet's channel means and deviations for inputs in 0..1, as torchvision publishes them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# A box that a crop leaves less of than this share of its area is dropped, as ShapeScenes drops
# objects that are hidden as much; crowds stay as long as anything is left. Our choice.
LEAST_VISIBLE_SHARE = 0.25
# Boxes thinner than this many input pixels are dropped in training. Our choice.
LEAST_SIDE = 1.0
# Keeps floor(side * scale) from losing a pixel to rounding where the product is whole.
_SCALE_NUDGE = 1 + 1e-9

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Augmentation:
    """Random changes in training, from the recipe.

    Attributes:
        scale_jitter: range of a factor on the fitting scale, drawn uniformly for every image.
        flip_probability: of a horizontal flip.

    Raises:
        UserError: a range that is empty or not positive, a probability outside 0..1.
    """

    scale_jitter: tuple[float, float] = (1.0, 1.0)
    flip_probability: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.scale_jitter
        if not 0 < low <= high:
            raise UserError(f"scale_jitter is {low}..{high}; it must be positive and ascending")
        if not 0 <= self.flip_probability <= 1:
            raise UserError(f"flip_probability is {self.flip_probability}; it must be in 0..1")


@dataclass(frozen=True)
class Placement:
    """How an image lies on the input: scaled, then cut at `left`, `top`, then flipped or not."""

    scale: float
    left: int = 0
    top: int = 0
    flip: bool = False


def fitting_scale(height: int, width: int, image_size: int) -> float:
    """The scale at which the long side fills the input."""
    return image_size / max(height, width)


def draw_placement(
    height: int,
    width: int,
    image_size: int,
    augmentation: Augmentation,
    generator: np.random.Generator,
) -> Placement:
    """Draw the random placement of one image."""
    low, high = augmentation.scale_jitter
    scale = fitting_scale(height, width, image_size)
    if high > low:
        scale *= float(generator.uniform(low, high))
    else:
        scale *= low
    rows, columns = scaled_size(height, width, scale)
    top = int(generator.integers(0, max(0, rows - image_size), endpoint=True))
    left = int(generator.integers(0, max(0, columns - image_size), endpoint=True))
    flip = bool(generator.random() < augmentation.flip_probability)
    return Placement(scale, left, top, flip)


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Height and width at `scale`: the pixels that the image covers wholly, at least one."""
    return (
        max(1, int(height * scale * _SCALE_NUDGE)),
        max(1, int(width * scale * _SCALE_NUDGE)),
    )


def resize(image: NDArray[np.uint8], scale: float) -> Tensor:
    """Resize uint8 [H, W, 3] to uint8 [3, floor(H * scale), floor(W * scale)], antialiased."""
    height, width = image.shape[:2]
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    if scale == 1:
        return pixels
    size = scaled_size(height, width, scale)
    if min(height, width) * scale < 1:
        return functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
    return functional.interpolate(
        pixels[None],
        scale_factor=scale * _SCALE_NUDGE,
        mode="bilinear",
        antialias=True,
        recompute_scale_factor=False,
    )[0]


def normalise(pixels: Tensor, canvas: Tensor) -> None:
    """Write uint8 [3, h, w], normalised, to the top left of `canvas` float32 [3, S, S]."""
    window = canvas[:, : pixels.shape[1], : pixels.shape[2]]
    window.copy_(pixels)
    window.mul_(_GAIN).add_(_BIAS)


_GAIN = torch.tensor([1 / (255 * std) for std in STD]).view(3, 1, 1)
_BIAS = torch.tensor([-mean / std for mean, std in zip(MEAN, STD, strict=True)]).view(3, 1, 1)


def place_image(image: NDArray[np.uint8], placement: Placement, image_size: int) -> Tensor:
    """The part of the image that the input shows, uint8 [3, h, w] with h, w <= image_size.

    A flip mirrors this part, so that the padding stays at the bottom and the right.
    """
    pixels = resize(image, placement.scale)
    pixels = pixels[
        :,
        placement.top : placement.top + image_size,
        placement.left : placement.left + image_size,
    ]
    return pixels.flip(2) if placement.flip else pixels


def place_boxes(
    sample: Sample, placement: Placement, image_size: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes [M, 4] in input pixels, clipped to what the input shows, and which of them to keep.

    Kept are boxes with at least `LEAST_VISIBLE_SHARE` of their area left (crowds: any) and both
    sides at least `LEAST_SIDE`.
    """
    height, width = sample.image.shape[:2]
    rows, columns = scaled_size(height, width, placement.scale)
    shown_height = min(image_size, rows - placement.top)
    shown_width = min(image_size, columns - placement.left)
    offset = np.array([placement.left, placement.top] * 2, np.float64)
    whole = sample.boxes.astype(np.float64) * placement.scale - offset
    limits = np.array([shown_width, shown_height] * 2, np.float64)
    boxes = np.clip(whole, 0, limits)
    if placement.flip:
        boxes[:, [0, 2]] = shown_width - boxes[:, [2, 0]]
    sides, whole_sides = boxes[:, 2:] - boxes[:, :2], whole[:, 2:] - whole[:, :2]
    visible = sides.prod(axis=1) >= LEAST_VISIBLE_SHARE * whole_sides.prod(axis=1)
    keep = (visible | sample.iscrowd) & (sides >= LEAST_SIDE).all(axis=1)
    return boxes.astype(np.float32), keep


def place_masks(
    masks: NDArray[np.bool_], placement: Placement, image_size: int
) -> NDArray[np.bool_]:
    """Masks [M, H, W] on the input, [M, S, S]: the pixels that an object covers half or more of."""
    placed = np.zeros((len(masks), image_size, image_size), np.bool_)
    for mask, canvas in zip(masks, placed, strict=True):
        pixels = place_image(mask[:, :, None] * np.uint8(255), placement, image_size)[0].numpy()
        canvas[: pixels.shape[0], : pixels.shape[1]] = pixels > 127
    return placed


def place_semantic(
    labels: NDArray[np.uint8], placement: Placement, image_size: int
) -> NDArray[np.uint8]:
    """Semantic labels [H, W] on the input, [S, S], by the nearest pixel; padding does not count."""
    height, width = labels.shape
    rows, columns = scaled_size(height, width, placement.scale)
    down = np.arange(placement.top, min(rows, placement.top + image_size))
    across = np.arange(placement.left, min(columns, placement.left + image_size))
    nearest = [
        np.minimum(((positions + 0.5) / placement.scale).astype(np.int64), side - 1)
        for positions, side in ((down, height), (across, width))
    ]
    shown = labels[nearest[0][:, None], nearest[1]]
    placed = np.full((image_size, image_size), SEMANTIC_IGNORE, np.uint8)
    placed[: len(down), : len(across)] = shown[:, ::-1] if placement.flip else shown
    return placed


def training_target(sample: Sample, placement: Placement, image_size: int, task: str) -> Target:
    """The target of one placed sample, as `tasks.base` describes it for the task."""
    if task == "classification":
        return {"label": torch.tensor(int(sample.labels[0]))}
    if task == "segmentation":
        assert sample.semantic is not None
        placed = place_semantic(sample.semantic, placement, image_size)
        return {"semantic": torch.from_numpy(placed.astype(np.int64))}
    boxes, keep = place_boxes(sample, placement, image_size)
    target = {
        "boxes": torch.from_numpy(boxes[keep]),
        "labels": torch.from_numpy(sample.labels[keep]),
        "iscrowd": torch.from_numpy(sample.iscrowd[keep]),
    }
    if task == "instances":
        assert sample.masks is not None
        masks = place_masks(sample.masks[keep], placement, image_size)
        target["masks"] = torch.from_numpy(masks)
    return target
