"""Anchors, their matching to objects, and the coding of boxes.

Boxes are float [.., 4] as x1, y1, x2, y2 in input pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from effspinenet_lib.models.base import Extents, Target, crowds
from effspinenet_lib.models.specs import OUTPUT_LEVELS

BOX_CODE = 4  # numbers of a box code
ANCHOR_SIZE = 3.0  # strides; released SpineNet configs
NEGATIVE = -1
IGNORED = -2
# As in torchvision: an object cannot be decoded to more than 1000/16 times its anchor.
MAXIMUM_LOG_SCALE = math.log(1000 / 16)

BoxScale = tuple[float, float]  # factors on dx, dy and on dw, dh of a box code


@dataclass(frozen=True)
class AnchorSettings:
    """Anchors of every location, and when one belongs to an object.

    Attributes:
        size: side over stride of the smallest square anchor.
        octave_scales: anchors an octave (released configs: 3).
        aspect_ratios: width over height (released configs).
        match_iou: an anchor of at least this IoU is positive, one below negative (released
            code: both thresholds 0.5, and each object's best anchor is positive regardless).
        crowd_overlap: an anchor with at least this share of its area in a crowd region is
            neither (our choice; the released code drops crowds).
    """

    size: float = ANCHOR_SIZE
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
    """Make the anchors of a pyramid.

    Args:
        sides: (height, width) of each level's features, P3 first; up to P7.
        settings: sizes and ratios.
        device: where the anchors are made.

    Returns:
        [A, 4]; by level, row, column, scale, ratio. Centres lie in the middle of the cells.
    """
    levels = [
        _level_anchors(2**level, height, width, settings)
        for level, (height, width) in zip(OUTPUT_LEVELS, sides, strict=False)
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


def inside(anchors: Tensor, extents: Extents) -> Tensor:
    """Which of the anchors [A, 4] have their middle in each image rather than its padding, [N, A].

    `extents` are the height and width of the images within their inputs.
    """
    x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2).T
    heights, widths = torch.tensor(list(extents), device=anchors.device).T[:, :, None]
    return (x < widths) & (y < heights)


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Boxes [.., 4] cut at an image (height, width), and which of them keep an area, bool [..]."""
    boxes = clip_boxes_to_image(boxes, size)
    return boxes, (boxes[..., 2:] > boxes[..., :2]).all(-1)


def match_anchors(
    anchors: Tensor, boxes: Tensor, iscrowd: Tensor, settings: AnchorSettings
) -> Tensor:
    """Match each anchor to an object.

    An object's best anchor is its own whatever their overlap; the last of several objects with
    the same best anchor gets it. All shapes depend on A and M alone.

    Args:
        anchors: [A, 4].
        boxes: [M, 4] of one image; a box without extent is never matched.
        iscrowd: bool [M]; crowd regions are never matched.
        settings: thresholds.

    Returns:
        int64 [A]: the object's index, `NEGATIVE`, or `IGNORED`.
    """
    matches = torch.full((len(anchors),), NEGATIVE, device=anchors.device)
    if not len(boxes):
        return matches
    shared, areas = _intersections(anchors, boxes), _areas(anchors)
    covered = (shared * iscrowd[:, None]).amax(0) / areas
    matches = matches.masked_fill(covered >= settings.crowd_overlap, IGNORED)
    # crowds get infinite area, so their IoU is 0
    areas_of_objects = _areas(boxes).masked_fill(iscrowd, torch.inf)
    iou = shared / (areas + areas_of_objects[:, None] - shared)
    best, which = iou.max(0)
    matches = which.where(best >= settings.match_iou, matches)
    overlap, best_anchors = iou.max(1)
    # objects that overlap no anchor write to one place behind the last
    places = best_anchors.where(overlap > 0, len(anchors))
    owners = torch.full((len(anchors) + 1,), NEGATIVE, device=anchors.device)
    numbers = torch.arange(len(boxes), device=anchors.device)
    owners = owners.scatter_reduce(0, places, numbers, "amax")[:-1]
    return owners.where(owners >= 0, matches)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _intersections(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Area [M, A] that each of M boxes shares with each of A anchors."""
    # one coordinate at a time: rows of A numbers are read in order
    left, top, right, bottom = anchors.T.contiguous()
    x1, y1, x2, y2 = boxes.T[:, :, None]
    width = (torch.minimum(right, x2) - torch.maximum(left, x1)).clamp(min=0)
    return width * (torch.minimum(bottom, y2) - torch.maximum(top, y1)).clamp(min=0)


@dataclass(frozen=True)
class Assignment:
    """What the anchors of a batch are to find.

    Attributes:
        positive: bool [N, A]: the anchor belongs to an object.
        ignored: bool [N, A]: it is neither positive nor negative.
        labels: int64 [N, A]: the object's label, or `NEGATIVE`.
        boxes: [N, A, 4]: the object's box, or the anchor itself.
    """

    positive: Tensor
    ignored: Tensor
    labels: Tensor
    boxes: Tensor


def assign_anchors(
    anchors: Tensor, targets: Sequence[Target], settings: AnchorSettings
) -> Assignment:
    """Assign the anchors [A, 4] to the objects of each image.

    Args:
        anchors: [A, 4].
        targets: one dict an image, as `TaskModel.forward` describes it for detection.
        settings: thresholds.
    """
    matches, labels, boxes = [], [], []
    for target in targets:
        image_boxes, image_labels, iscrowd = target["boxes"], target["labels"], crowds(target)
        if not len(image_labels):  # one row without extent, so that every anchor can read one
            image_boxes, image_labels = image_boxes.new_zeros(1, 4), image_labels.new_zeros(1)
            iscrowd = iscrowd.new_zeros(1)
        match = match_anchors(anchors, image_boxes, iscrowd, settings)
        row = match.clamp(min=0)
        matches.append(match)
        labels.append(image_labels[row])
        boxes.append(image_boxes[row])
    matched = torch.stack(matches)
    positive = matched >= 0
    return Assignment(
        positive=positive,
        ignored=matched == IGNORED,
        labels=torch.stack(labels).where(positive, NEGATIVE),
        boxes=torch.stack(boxes).where(positive[..., None], anchors),
    )


def encode_boxes(boxes: Tensor, anchors: Tensor, scale: BoxScale = (1.0, 1.0)) -> Tensor:
    """Code boxes [.., 4] as offsets to anchors of the same shape: dx, dy, dw, dh."""
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    anchor_centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    offset, growth = (centre - anchor_centre) / anchor_size, (size / anchor_size).log()
    return torch.cat([offset * scale[0], growth * scale[1]], -1)


def decode_boxes(codes: Tensor, anchors: Tensor, scale: BoxScale = (1.0, 1.0)) -> Tensor:
    """Undo `encode_boxes`; sizes are bounded so that a wild code stays finite."""
    anchor_centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    offset, growth = codes[..., :2] / scale[0], codes[..., 2:] / scale[1]
    centre = anchor_centre + offset * anchor_size
    half = anchor_size * growth.clamp(max=MAXIMUM_LOG_SCALE).exp() / 2
    return torch.cat([centre - half, centre + half], -1)
