"""Preprocessing as the released detectors were evaluated with."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from effspinenet_lib.data.augment import (
    MEAN,
    STD,
    Placement,
    fitting_scale,
    normalise,
    place_image,
)

# How a picture becomes an input in evaluation: by `augment`, or by `fit_released`.
FITTED, RELEASED = "fitted", "released"
PREPROCESSINGS = (FITTED, RELEASED)


def fit_released(picture: NDArray[np.uint8], image_size: int) -> tuple[Tensor, tuple[float, float]]:
    """Normalise a picture, resize its long side to the input, pad with zeros (released code).

    It differs from `augment`: the sides are rounded to the nearest pixel, each axis has the scale
    that this gives, and the bilinear resizing of the normalised pixels is not antialiased.

    Args:
        picture: uint8 [H, W, 3], RGB.
        image_size: side of the square input in pixels.

    Returns:
        The input float32 [3, S, S], and its pixels per pixel of the picture, down and across.
    """
    height, width = picture.shape[:2]
    sides = np.array([height, width], np.float32)
    scaled = np.rint(sides * (np.float32(image_size) / sides).min())
    rows, columns = (int(side) for side in scaled)
    pixels = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    resized = functional.interpolate(pixels[None], (rows, columns), mode="bilinear")[0]
    down, across = scaled / sides
    padding = (0, image_size - columns, 0, image_size - rows)
    return functional.pad(resized, padding), (float(down), float(across))


def fit_picture(
    picture: NDArray[np.uint8], image_size: int, preprocessing: str
) -> tuple[Tensor, tuple[float, float]]:
    """The input that evaluation makes of a picture, and its scales, as `fit_released` gives them.

    Args:
        picture: uint8 [H, W, 3], RGB.
        image_size: side of the square input in pixels.
        preprocessing: one of `PREPROCESSINGS`.
    """
    if preprocessing == RELEASED:
        return fit_released(picture, image_size)
    height, width = picture.shape[:2]
    scale = fitting_scale(height, width, image_size)
    canvas = torch.zeros(3, image_size, image_size)
    normalise(place_image(picture, Placement(scale), image_size), canvas)
    return canvas, (scale, scale)
