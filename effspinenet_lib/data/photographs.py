"""Photographs of one object, for classification: random crops, AutoAugment, the centre crop.

As EfficientNet's released preprocessing does it, which the paper follows (section 5.2).
torchvision's transforms are loaded where they are used: the other tasks' loading processes would
carry them for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effspinenet_lib.errors import UnknownName

# Share of the picture's area and ratio of the sides of a random crop (EfficientNet's code).
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
# The centre crop has this many pixels less than the short side, which is scaled so that the crop
# is the input (EfficientNet's code): at 224 pixels 0.875 of the short side.
CROP_PADDING = 32
# What AutoAugment moves into a picture from beyond its edges (EfficientNet's code).
FILL = 128
# As in EfficientNet's code; antialiased too (our choice: it shrinks large pictures).
_INTERPOLATION = "bicubic"
# AutoAugment's policies: EfficientNet's is the one found on ImageNet.
POLICIES = ("imagenet",)


def check_policy(name: str) -> None:
    """Check the name of an AutoAugment policy; "" stands for none.

    Raises:
        UnknownName: there is none of that name.
    """
    if name and name not in POLICIES:
        raise UnknownName("AutoAugment policy", name, POLICIES)


def random_view(
    picture: NDArray[np.uint8],
    image_size: int,
    flip_probability: float,
    generator: np.random.Generator,
) -> Tensor:
    """A random crop of a picture, uint8 [H, W, 3], on the whole input, uint8 [3, S, S]."""
    from torchvision.transforms import InterpolationMode, v2

    interpolation = InterpolationMode(_INTERPOLATION)
    steps = v2.Compose(
        [
            v2.RandomResizedCrop(image_size, CROP_AREA, CROP_RATIO, interpolation),
            v2.RandomHorizontalFlip(flip_probability),
        ]
    )
    with _seeded(generator):
        view: Tensor = steps(_channels_first(picture))
    return view


def auto_augment(pixels: Tensor, policy: str, generator: np.random.Generator) -> Tensor:
    """Change a picture, uint8 [3, H, W], by one of a policy's 25 rules, drawn at random."""
    if not policy:
        return pixels
    from torchvision.transforms import v2

    with _seeded(generator):
        changed: Tensor = v2.AutoAugment(v2.AutoAugmentPolicy(policy), fill=FILL)(pixels)
    return changed


def centre_view(picture: NDArray[np.uint8], image_size: int) -> tuple[Tensor, float]:
    """The middle of a picture, uint8 [H, W, 3], on the whole input.

    Returns:
        uint8 [3, S, S], and the input's pixels per pixel of the picture.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    height, width = picture.shape[:2]
    side = max(1, round(min(height, width) * image_size / (image_size + CROP_PADDING)))
    top, left = (height - side) // 2, (width - side) // 2
    middle = picture[top : top + side, left : left + side]
    interpolation = InterpolationMode(_INTERPOLATION)
    view: Tensor = functional.resize(
        _channels_first(middle), [image_size, image_size], interpolation, antialias=True
    )
    return view, image_size / side


def _channels_first(picture: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


@contextmanager
def _seeded(generator: np.random.Generator) -> Iterator[None]:
    """Let torchvision's transforms draw from a seed of `generator`, and nothing else notice."""
    state = torch.random.get_rng_state()
    torch.default_generator.manual_seed(int(generator.integers(2**63)))
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
