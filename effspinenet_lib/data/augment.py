"""From a sample to a square network input, and from annotations to training targets.

Detection, instances and segmentation resize an image by one scale on both axes, crop or pad it,
and flip it. The resized image is at the top left of the input; what is left over is zero after
normalisation, as in the paper's section 5.1.1. Photographs of one object are cropped instead, as
EfficientNet's released code does it, which the paper follows (section 5.2). Released detectors
are evaluated with preprocessing of their own (`fit_released`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from effspinenet_lib.data.dataset import SEMANTIC_IGNORE, Sample

# ImageNet's channel means and deviations for inputs in 0..1, as torchvision publishes them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_GAIN = torch.tensor([1 / (255 * std) for std in STD]).view(3, 1, 1)
_BIAS = torch.tensor([-mean / std for mean, std in zip(MEAN, STD, strict=True)]).view(3, 1, 1)
# A box that a crop leaves less than this share of its area of is dropped, as ShapeScenes drops
# objects that are hidden as much; crowds stay as long as anything is left. Our choice.
LEAST_VISIBLE_SHARE = 0.25
# Boxes thinner than this many input pixels are dropped in training. Our choice.
LEAST_SIDE = 1.0
# Keeps floor(side * scale) from losing a pixel to rounding where the product is an integer.
_SCALE_NUDGE = 1 + 1e-9

# Photographs, as in EfficientNet's code: share of the area and ratio of the sides of a random
# crop; pixels that the centre crop has less than the short side, which is scaled so that the crop
# is the input (at 224 pixels 0.875 of the short side); what AutoAugment moves into an image from
# beyond its edges; the interpolation, antialiased too (our choice: it shrinks large images).
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_PADDING = 32
FILL = 128
_INTERPOLATION = "bicubic"

# How an image becomes an input in evaluation: by `crop_image`, or by `fit_released`.
FITTED, RELEASED = "fitted", "released"
PREPROCESSINGS = (FITTED, RELEASED)

# Label of a target's row that holds no object. Its box is 0, 0, 0, 0, which overlaps nothing.
PADDING_LABEL = -1
# Rows of an image's padded target (Model Garden's RetinaNet config; COCO's images have fewer).
MAX_OBJECTS = 100

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Augmentation:
    """Random changes in training, from the recipe, which checks them.

    Attributes:
        scale_jitter: range of a factor on the fitting scale, drawn uniformly for every image.
        flip_probability: of a horizontal flip.
    """

    scale_jitter: tuple[float, float] = (1.0, 1.0)
    flip_probability: float = 0.0


@dataclass(frozen=True)
class CropParams:
    """How an image becomes an input: scaled, then cut at `left`, `top`, then flipped or not."""

    scale: float
    left: int = 0
    top: int = 0
    flip: bool = False


def draw_crop(
    height: int,
    width: int,
    image_size: int,
    augmentation: Augmentation,
    generator: np.random.Generator,
) -> CropParams:
    """Draw the random crop of one image."""
    low, high = augmentation.scale_jitter
    factor = float(generator.uniform(low, high)) if high > low else low
    scale = fitting_scale(height, width, image_size) * factor
    rows, columns = scaled_size(height, width, scale)
    top = int(generator.integers(0, max(0, rows - image_size), endpoint=True))
    left = int(generator.integers(0, max(0, columns - image_size), endpoint=True))
    flip = bool(generator.random() < augmentation.flip_probability)
    return CropParams(scale, left, top, flip)


def fitting_scale(height: int, width: int, image_size: int) -> float:
    """The scale at which the long side fills the input."""
    return image_size / max(height, width)


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Height and width at `scale`: the pixels that the image covers completely, at least one."""
    return (
        max(1, int(height * scale * _SCALE_NUDGE)),
        max(1, int(width * scale * _SCALE_NUDGE)),
    )


def _channels_first(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def resize(image: NDArray[np.uint8], scale: float) -> Tensor:
    """Resize uint8 [H, W, 3] to uint8 [3, floor(H * scale), floor(W * scale)], antialiased."""
    height, width = image.shape[:2]
    pixels = _channels_first(image)[None]
    if scale == 1:
        return pixels[0]
    target: dict[str, Any] = {"scale_factor": scale * _SCALE_NUDGE, "recompute_scale_factor": False}
    if min(height, width) * scale < 1:
        target = {"size": scaled_size(height, width, scale)}
    return functional.interpolate(pixels, **target, mode="bilinear", antialias=True)[0]


def normalise(pixels: Tensor, canvas: Tensor) -> None:
    """Write uint8 [3, h, w], normalised, to the top left of `canvas` float32 [3, S, S]."""
    window = canvas[:, : pixels.shape[1], : pixels.shape[2]]
    window.copy_(pixels)
    window.mul_(_GAIN).add_(_BIAS)


def crop_image(image: NDArray[np.uint8], crop: CropParams, image_size: int) -> Tensor:
    """The part of the image that the input shows, uint8 [3, h, w] with h, w <= image_size.

    A flip mirrors this part, so that the padding stays at the bottom and the right.
    """
    rows = slice(crop.top, crop.top + image_size)
    columns = slice(crop.left, crop.left + image_size)
    pixels = resize(image, crop.scale)[:, rows, columns]
    return pixels.flip(2) if crop.flip else pixels


def crop_boxes(
    sample: Sample, crop: CropParams, image_size: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes [M, 4] in input pixels, clipped to what the input shows, and which of them to keep.

    Kept are boxes with at least `LEAST_VISIBLE_SHARE` of their area left (crowds: any) and both
    sides at least `LEAST_SIDE`.
    """
    height, width = sample.image.shape[:2]
    rows, columns = scaled_size(height, width, crop.scale)
    shown = (min(image_size, columns - crop.left), min(image_size, rows - crop.top))
    whole = sample.boxes.astype(np.float64) * crop.scale - np.array([crop.left, crop.top] * 2)
    boxes = np.clip(whole, 0, np.array(shown * 2))
    if crop.flip:
        boxes[:, [0, 2]] = shown[0] - boxes[:, [2, 0]]
    sides, whole_sides = boxes[:, 2:] - boxes[:, :2], whole[:, 2:] - whole[:, :2]
    visible = sides.prod(axis=1) >= LEAST_VISIBLE_SHARE * whole_sides.prod(axis=1)
    keep = (visible | sample.iscrowd) & (sides >= LEAST_SIDE).all(axis=1)
    return boxes.astype(np.float32), keep


def crop_masks(masks: NDArray[np.bool_], crop: CropParams, image_size: int) -> NDArray[np.bool_]:
    """Masks [M, H, W] on the input, [M, S, S]: the pixels that an object covers half or more of."""
    cropped = np.zeros((len(masks), image_size, image_size), np.bool_)
    for mask, canvas in zip(masks, cropped, strict=True):
        pixels = crop_image(mask[:, :, None] * np.uint8(255), crop, image_size)[0].numpy()
        canvas[: pixels.shape[0], : pixels.shape[1]] = pixels > 127
    return cropped


def crop_semantic(
    labels: NDArray[np.uint8], crop: CropParams, image_size: int
) -> NDArray[np.uint8]:
    """Semantic labels [H, W] on the input, [S, S], by the nearest pixel; padding is ignored."""

    def nearest(start: int, scaled: int, side: int) -> NDArray[np.int64]:
        shown = np.arange(start, min(scaled, start + image_size))
        return np.minimum(((shown + 0.5) / crop.scale).astype(np.int64), side - 1)

    height, width = labels.shape
    rows, columns = scaled_size(height, width, crop.scale)
    down, across = nearest(crop.top, rows, height), nearest(crop.left, columns, width)
    shown = labels[down[:, None], across]
    cropped = np.full((image_size, image_size), SEMANTIC_IGNORE, np.uint8)
    cropped[: len(down), : len(across)] = shown[:, ::-1] if crop.flip else shown
    return cropped


def training_target(sample: Sample, crop: CropParams, image_size: int, task: str) -> Target:
    """The target of one cropped sample, as the task's model takes it."""
    if task == "classification":
        return {"label": torch.tensor(int(sample.labels[0]))}
    if task == "segmentation":
        assert sample.semantic is not None
        semantic = crop_semantic(sample.semantic, crop, image_size)
        return {"semantic": torch.from_numpy(semantic.astype(np.int64))}
    boxes, keep = crop_boxes(sample, crop, image_size)
    target = {
        "boxes": torch.from_numpy(boxes[keep]),
        "labels": torch.from_numpy(sample.labels[keep]),
        "iscrowd": torch.from_numpy(sample.iscrowd[keep]),
    }
    if task == "instances":
        assert sample.masks is not None
        target["masks"] = torch.from_numpy(crop_masks(sample.masks[keep], crop, image_size))
    return target


def pad_target(target: Target, rows: int) -> Target:
    """A detection target with `rows` rows, for compilers that build a program for every shape.

    Rows of `PADDING_LABEL` are added at the end; of more objects the largest are kept, in order.

    Args:
        target: `boxes` [M, 4], `labels` int64 [M] and, if there are crowds, `iscrowd` bool [M].
        rows: how many the result has.
    """
    if len(target["labels"]) > rows:
        boxes = target["boxes"]
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        largest = areas.argsort(descending=True, stable=True)[:rows].sort().values
        target = {name: values[largest] for name, values in target.items()}
    padded = {}
    for name, values in target.items():
        widths = [0, 0] * (values.dim() - 1) + [0, rows - len(values)]
        filler = PADDING_LABEL if name == "labels" else 0
        padded[name] = functional.pad(values, widths, value=filler)
    return padded


# torchvision's transforms are imported where they are used: the workers of tasks other than the
# classification of photographs would carry them for nothing.


@contextmanager
def _seeded(generator: np.random.Generator) -> Iterator[None]:
    """Let torchvision's transforms draw from a seed of `generator`; restore torch's own state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(generator.integers(2**63)))
        yield


def random_crop(
    image: NDArray[np.uint8],
    image_size: int,
    flip_probability: float,
    generator: np.random.Generator,
) -> Tensor:
    """A random crop of a photograph, uint8 [H, W, 3], as the whole input, uint8 [3, S, S]."""
    from torchvision.transforms import InterpolationMode, v2

    interpolation = InterpolationMode(_INTERPOLATION)
    crop = v2.RandomResizedCrop(image_size, CROP_AREA, CROP_RATIO, interpolation)
    with _seeded(generator):
        cropped: Tensor = v2.RandomHorizontalFlip(flip_probability)(crop(_channels_first(image)))
    return cropped


def auto_augment(pixels: Tensor, policy: str, generator: np.random.Generator) -> Tensor:
    """Change an image, uint8 [3, H, W], by one of a policy's 25 rules, drawn at random."""
    from torchvision.transforms import v2

    with _seeded(generator):
        changed: Tensor = v2.AutoAugment(v2.AutoAugmentPolicy(policy), fill=FILL)(pixels)
    return changed


def centre_crop(image: NDArray[np.uint8], image_size: int) -> tuple[Tensor, float]:
    """The middle of a photograph, uint8 [H, W, 3], as the whole input.

    Returns:
        uint8 [3, S, S], and input pixels per pixel of the image.
    """
    from torchvision.transforms import InterpolationMode, v2

    height, width = image.shape[:2]
    side = max(1, round(min(height, width) * image_size / (image_size + CROP_PADDING)))
    top, left = (height - side) // 2, (width - side) // 2
    middle = _channels_first(image[top : top + side, left : left + side])
    interpolation = InterpolationMode(_INTERPOLATION)
    cropped: Tensor = v2.functional.resize(
        middle, [image_size, image_size], interpolation, antialias=True
    )
    return cropped, image_size / side


def fit_released(image: NDArray[np.uint8], image_size: int) -> tuple[Tensor, tuple[float, float]]:
    """Normalise an image, resize its long side to the input, pad with zeros (released code).

    Other than in `crop_image` the sides are rounded to the nearest pixel, each axis has the scale
    that this gives, and the bilinear resizing of the normalised pixels is not antialiased.

    Args:
        image: uint8 [H, W, 3], RGB.
        image_size: side of the square input in pixels.

    Returns:
        The input float32 [3, S, S], and its pixels per pixel of the image, down and across.
    """
    sides = np.array(image.shape[:2], np.float32)
    scaled = np.rint(sides * (np.float32(image_size) / sides).min())
    rows, columns = (int(side) for side in scaled)
    pixels = _channels_first(image).float() / 255
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    resized = functional.interpolate(pixels[None], (rows, columns), mode="bilinear")[0]
    down, across = scaled / sides
    padding = (0, image_size - columns, 0, image_size - rows)
    return functional.pad(resized, padding), (float(down), float(across))


def fit_image(
    image: NDArray[np.uint8], image_size: int, preprocessing: str = FITTED
) -> tuple[Tensor, tuple[float, float]]:
    """The input that evaluation makes of an image, and its scales, as `fit_released` gives them.

    `preprocessing` is one of `PREPROCESSINGS`.
    """
    if preprocessing == RELEASED:
        return fit_released(image, image_size)
    height, width = image.shape[:2]
    scale = fitting_scale(height, width, image_size)
    canvas = torch.zeros(3, image_size, image_size)
    normalise(crop_image(image, CropParams(scale), image_size), canvas)
    return canvas, (scale, scale)
