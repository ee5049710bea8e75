"""Anchors, their matching to objects, and the coding of boxes.

Boxes are float [.., 4] as x1, y1, x2, y2 in input pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from effspinenet_lib.specs import OUTPUT_LEVELS

NEGATIVE = -1
IGNORED = -2
# As in torchvision: an object cannot be decoded to more than 1000/16 times its anchor.
MAXIMUM_LOG_SCALE = math.log(1000 / 16)


@dataclass(frozen=True)
class AnchorSettings:
    """Anchors of every location, and when one belongs to an object.

    Attributes:
        size: side over stride of the smallest square anchor (released SpineNet configs: 3).
        octave_scales: anchors an octave (released configs: 3).
        aspect_ratios: width over height (released configs).
        match_iou: an anchor of at least this IoU is positive, one below negative (released
            code: both thresholds 0.5, and each object's best anchor is positive regardless).
        crowd_overlap: an anchor with at least this share of its area in a crowd region is
            neither (our choice; the released code drops crowds).
    """

    size: float = 3.0
    octave_scales: int = 3
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    match_iou: float = 0.5
    crowd_overlap: float = 0.5

    @property
    def per_location(self) -> int:
        """Anchors of one location."""
        return self.octave_scales * len(self.aspect_ratios)


def make_anchors(
    sides: Sequence[tuple[int, int]], settings: AnchorSettings, device: torch.device
) -> Tensor:
    """Make the anchors of P3 to P7.

    Args:
        sides: (height, width) of each level's features, P3 first.
        settings: sizes and ratios.
        device: where the anchors are made.

    Returns:
        [A, 4]; by level, row, column, scale, ratio. Centres lie in the middle of the cells.
    """
    levels = [
        _level_anchors(2**level, height, width, settings)
        for level, (height, width) in zip(OUTPUT_LEVELS, sides, strict=True)
    ]
    return torch.cat(levels).to(device)


def _level_anchors(stride: int, height: int, width: int, settings: AnchorSettings) -> Tensor:
    scales = 2 ** (torch.arange(settings.octave_scales) / settings.octave_scales)
    ratios = torch.tensor(settings.aspect_ratios).sqrt()
    side = stride * settings.size * scales
    half = torch.stack([side[:, None] * ratios, side[:, None] / ratios], -1).reshape(-1, 2) / 2
    rows = (torch.arange(height) + 0.5) * stride
    columns = (torch.arange(width) + 0.5) * stride
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    centres = torch.stack([x, y], -1).reshape(-1, 1, 2)
    return torch.cat([centres - half, centres + half], -1).reshape(-1, 4)


def match_anchors(
    anchors: Tensor, boxes: Tensor, iscrowd: Tensor, settings: AnchorSettings
) -> Tensor:
    """Match each anchor to an object.

    Args:
        anchors: [A, 4].
        boxes: [M, 4] of one image.
        iscrowd: bool [M]; crowd regions are never matched.
        settings: thresholds.

    Returns:
        int64 [A]: the object's index, `NEGATIVE`, or `IGNORED`.
    """
    matches = torch.full((len(anchors),), NEGATIVE, device=anchors.device)
    crowds, objects = boxes[iscrowd], boxes[~iscrowd]
    if len(crowds):
        inside = _share_inside(anchors, crowds).amax(1) >= settings.crowd_overlap
        matches[inside] = IGNORED
    if len(objects):
        numbers = torch.arange(len(boxes), device=anchors.device)[~iscrowd]
        iou = box_iou(anchors, objects)
        best, which = iou.max(1)
        positive = best >= settings.match_iou
        matches[positive] = numbers[which[positive]]
        best_anchors = iou.argmax(0)
        overlapping = iou.amax(0) > 0
        matches[best_anchors[overlapping]] = numbers[overlapping]
    return matches


def _share_inside(anchors: Tensor, regions: Tensor) -> Tensor:
    """Share [A, R] of each anchor's area that lies in each region."""
    corner = torch.maximum(anchors[:, None, :2], regions[:, :2])
    opposite = torch.minimum(anchors[:, None, 2:], regions[:, 2:])
    overlap = (opposite - corner).clamp(min=0).prod(-1)
    return overlap / (anchors[:, 2:] - anchors[:, :2]).prod(-1)[:, None]


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Code boxes [.., 4] as offsets to anchors of the same shape: dx, dy, dw, dh."""
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    anchor_centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    return torch.cat([(centre - anchor_centre) / anchor_size, (size / anchor_size).log()], -1)


def decode_boxes(codes: Tensor, anchors: Tensor) -> Tensor:
    """Undo `encode_boxes`; sizes are bounded so that a wild code stays finite."""
    anchor_centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = anchor_centre + codes[..., :2] * anchor_size
    half = anchor_size * codes[..., 2:].clamp(max=MAXIMUM_LOG_SCALE).exp() / 2
    return torch.cat([centre - half, centre + half], -1)
