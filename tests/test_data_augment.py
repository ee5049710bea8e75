"""Augmentation and targets: pixels, boxes and masks move together, as torchvision moves them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as reference

from effspinenet_lib.data import DataConfig, Sample, ShapeScenes, classes_of, open_dataset
from effspinenet_lib.data.augment import (
    MEAN,
    STD,
    Augmentation,
    CropParams,
    crop_boxes,
    crop_image,
    crop_masks,
    crop_semantic,
    draw_crop,
    fitting_scale,
    normalise,
    resize,
    training_target,
)
from effspinenet_lib.data.dataset import SEMANTIC_IGNORE, RunLengths, paint_semantic
from effspinenet_lib.data.loader import training_loader
from effspinenet_lib.errors import DataError


def sample_of(
    image: np.ndarray, boxes: list[list[float]], iscrowd: list[bool] | None = None
) -> Sample:
    count = len(boxes)
    return Sample(
        image=image,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.arange(count, dtype=np.int64),
        iscrowd=np.array(iscrowd or [False] * count, np.bool_),
        area=np.ones(count, np.float32),
        image_id=1,
        file_name="x",
    )


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def random_boxes(height: int, width: int, count: int = 60) -> list[list[float]]:
    points = np.random.default_rng(1).uniform(0, 1, (count, 2, 2)) * [width, height]
    low, high = points.min(axis=1), points.max(axis=1)
    return np.concatenate([low, high], axis=1).tolist()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "scale", "left", "top"),
    [(480, 640, 0.2, 0, 0), (480, 640, 0.4, 100, 64), (128, 96, 0.5, 0, 0), (64, 128, 2, 90, 0)],
)
def test_boxes_move_as_torchvision_moves_them(
    height: int, width: int, scale: float, left: int, top: int, flip: bool
) -> None:
    """At scales where both sides stay whole, so that torchvision uses the same scale."""
    side = 128
    sample = sample_of(noise(height, width), random_boxes(height, width))
    rows, columns = round(height * scale), round(width * scale)
    shown = (min(side, rows - top), min(side, columns - left))
    boxes = tv_tensors.BoundingBoxes(
        torch.from_numpy(sample.boxes), format="XYXY", canvas_size=(height, width)
    )
    boxes = reference.resize(boxes, [rows, columns])
    boxes = reference.clamp_bounding_boxes(reference.crop(boxes, top, left, *shown))
    image = torch.from_numpy(sample.image).permute(2, 0, 1)
    image = reference.crop(
        reference.resize(image, [rows, columns], antialias=True), top, left, *shown
    )
    if flip:
        boxes, image = reference.horizontal_flip(boxes), reference.horizontal_flip(image)

    crop = CropParams(scale, left, top, flip)
    ours, _ = crop_boxes(sample, crop, side)
    assert np.allclose(ours, boxes.numpy(), atol=1e-3)
    assert torch.equal(crop_image(sample.image, crop, side), image)


def painted(height: int, width: int, box: list[int]) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


def extent(pixels: torch.Tensor) -> np.ndarray:
    """Where a painted box is, to a part of a pixel: its edges by how bright they are."""
    light = pixels[0].numpy().astype(float) / 255
    ends = []
    for profile in (light.max(axis=0), light.max(axis=1)):
        bright = np.flatnonzero(profile >= 0.5)
        ends.append((bright[0], bright[-1] + 1))
    return np.array([ends[0][0], ends[1][0], ends[0][1], ends[1][1]])


def test_boxes_stay_on_what_they_surround() -> None:
    generator = np.random.default_rng(4)
    augmentation = Augmentation((0.4, 2.0), 0.5)
    seen = flips = crops = 0
    for _ in range(150):
        height, width = generator.integers(60, 300, 2).tolist()
        x, y = generator.integers(0, [width - 30, height - 30]).tolist()
        wide, high = generator.integers(25, 60, 2).tolist()
        box = [x, y, min(x + wide, width), min(y + high, height)]
        sample = sample_of(painted(height, width, box), [box])
        crop = draw_crop(height, width, 128, augmentation, generator)
        target = training_target(sample, crop, 128, "detection")
        if not len(target["boxes"]):
            continue
        pixels = crop_image(sample.image, crop, 128)
        assert max(pixels.shape) <= 128
        assert np.abs(extent(pixels) - target["boxes"][0].numpy()).max() <= 1.01
        seen += 1
        flips += crop.flip
        crops += crop.left > 0 or crop.top > 0
    assert seen > 80
    assert flips > 20
    assert crops > 20


@pytest.mark.parametrize(("height", "width"), [(427, 640), (500, 333), (3, 1000), (1, 1), (7, 900)])
@pytest.mark.parametrize("side", [128, 257])
def test_every_image_fits_the_input(height: int, width: int, side: int) -> None:
    scale = fitting_scale(height, width, side)
    pixels = resize(noise(height, width), scale)
    assert pixels.dtype == torch.uint8
    assert max(pixels.shape[1:]) == side
    assert pixels.shape[1:] == (
        max(1, int(height * side / max(height, width))),
        max(1, int(width * side / max(height, width))),
    )


def test_resizing_keeps_one_scale_on_both_axes() -> None:
    """A step edge at 2/3 of the short side stays at exactly scale times its place."""
    image = np.zeros((100, 640, 3), np.uint8)
    image[60:] = 255
    scale = fitting_scale(100, 640, 128 + 3)
    column = resize(image, scale)[0, :, 5].numpy().astype(float) / 255
    dark = column.shape[0] - column.sum()
    assert dark == pytest.approx(60 * scale, abs=0.05)


def test_normalisation_is_imagenets_and_padding_is_zero() -> None:
    pixels = torch.from_numpy(noise(50, 70)).permute(2, 0, 1)
    canvas = torch.zeros(3, 96, 96)
    normalise(pixels, canvas)
    expected = reference.normalize(pixels.float() / 255, list(MEAN), list(STD))
    assert torch.allclose(canvas[:, :50, :70], expected, atol=1e-5)
    assert not canvas[:, 50:].any()
    assert not canvas[:, :, 70:].any()


def test_boxes_mostly_cut_off_are_dropped_and_crowds_are_not() -> None:
    boxes = [[0, 0, 100, 100], [0, 0, 74, 50], [0, 0, 76, 50], [0, 0, 40, 40], [110, 0, 110.5, 9]]
    sample = sample_of(noise(200, 200), [*boxes, boxes[1]], [False] * 5 + [True])
    target = training_target(sample, CropParams(1.0, left=56), 128, "detection")
    # 44 %, 24.3 %, 26.3 % and nothing are left; the fifth is thinner than a pixel.
    assert target["labels"].tolist() == [0, 2, 5]
    assert target["iscrowd"].tolist() == [False, False, True]
    assert target["boxes"].tolist() == [[0, 0, 44, 100], [0, 0, 20, 50], [0, 0, 18, 50]]
    empty = training_target(sample_of(noise(9, 9), []), CropParams(2.0), 16, "detection")
    assert empty["boxes"].shape == (0, 4)
    dtypes = {name: values.dtype for name, values in empty.items()}
    assert dtypes == {"boxes": torch.float32, "labels": torch.int64, "iscrowd": torch.bool}


def test_crops_are_drawn_from_the_whole_range() -> None:
    generator = np.random.default_rng(0)
    drawn = [
        draw_crop(100, 200, 128, Augmentation((0.5, 2.0), 0.25), generator) for _ in range(2000)
    ]
    factors = np.array([crop.scale / fitting_scale(100, 200, 128) for crop in drawn])
    assert 0.5 <= factors.min() < 0.52
    assert 1.98 < factors.max() <= 2.0
    assert factors.mean() == pytest.approx(1.25, abs=0.04)
    assert np.mean([crop.flip for crop in drawn]) == pytest.approx(0.25, abs=0.04)
    lefts = [p.left for p in drawn if p.scale * 200 > 250]
    assert min(lefts) < 10
    assert max(lefts) > 110
    assert all(p.left == p.top == 0 for p in drawn if p.scale * 200 <= 128)


# Masks, labels and crops of each task

SCENES = DataConfig("shapescenes", train_images=30, eval_images=2, image_size=64)


@pytest.fixture(scope="module")
def scenes() -> ShapeScenes:
    dataset = open_dataset(SCENES, "train")
    assert isinstance(dataset, ShapeScenes)
    return dataset


def test_scene_labels_are_those_that_were_drawn(scenes: ShapeScenes) -> None:
    for index in range(len(scenes)):
        semantic = scenes.load(index, "segmentation").semantic
        assert np.array_equal(semantic, scenes.scene(index).semantic)
    plain = scenes.load(0)
    assert plain.masks is plain.semantic is None


def test_coco_masks_are_pycocotools_own(tiny_coco: Path) -> None:
    """Polygons, several parts and crowds' run lengths, in the order of the boxes."""
    dataset = open_dataset(DataConfig("coco", str(tiny_coco)), "train")
    truth = COCO(str(tiny_coco / "annotations" / "instances_train2017.json"))
    masks = 0
    for index in range(len(dataset)):
        sample = dataset.load(index, "instances")
        expected = [truth.annToMask(record) for record in truth.imgToAnns.get(sample.image_id, [])]
        assert sample.masks is not None
        assert len(sample.masks) == len(sample.boxes) == len(expected)
        assert all(np.array_equal(*pair) for pair in zip(sample.masks, expected, strict=True))
        masks += len(expected)
    assert masks > 300


TRUTH: dict[str, Any] = {
    "images": [{"id": 4, "height": 6, "width": 8}],
    "annotations": [{"id": 9, "image_id": 4, "segmentation": [[1, 1, 5, 1, 5, 4, 1, 4]]}],
}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (None, "has no segmentation"),
        ([], "has no segmentation"),
        ({"size": [6, 8], "counts": ""}, "has no segmentation"),
        ([[1, 2]], "a polygon of 2 values"),
        ([[1, 2, 3, "x", 5, 6]], "finite numbers are needed"),
        ({"size": [6, 8], "counts": 5}, "is invalid"),
        ({"size": [6, 8]}, "has no segmentation"),
        (coco_mask.encode(np.ones((3, 3), np.uint8, order="F")), r"of the size \[3, 3\]"),
    ],
)
def test_a_malformed_mask_names_its_annotation(shape: Any, message: str) -> None:
    truth = copy.deepcopy(TRUTH)
    truth["annotations"][0]["segmentation"] = shape
    with pytest.raises(DataError, match=f"annotation 9: .*{message}"):
        RunLengths.from_coco(truth)


def test_smaller_objects_lie_on_larger_ones() -> None:
    masks = np.zeros((2, 4, 4), np.bool_)
    masks[0, 1:3, 1:3] = True
    masks[1] = True
    painted = paint_semantic(masks, np.array([4, 0]), np.array([4, 16], np.float32))
    assert painted.tolist() == [[1, 1, 1, 1], [1, 5, 5, 1], [1, 5, 5, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("scale", "left", "top"), [(1.0, 0, 0), (0.5, 0, 0), (2.0, 30, 11)])
def test_masks_and_labels_are_placed_as_the_image_is(
    scenes: ShapeScenes, scale: float, left: int, top: int, flip: bool
) -> None:
    """Masks against torchvision's resize; labels against the placed masks, edges apart."""
    side, crop = 64, CropParams(scale, left, top, flip)
    sample = scenes.load(5, "instances")
    assert sample.masks is not None
    placed = crop_masks(sample.masks, crop, side)
    size = [round(64 * scale)] * 2
    whole = reference.resize(torch.from_numpy(sample.masks * np.uint8(255)), size, antialias=True)
    shown = whole[:, top : top + side, left : left + side]
    shown = reference.horizontal_flip(shown) if flip else shown
    expected = np.zeros_like(placed)
    expected[:, : shown.shape[1], : shown.shape[2]] = shown.numpy() > 127
    assert np.array_equal(placed, expected)
    # Every mask lies in its box.
    boxes, _ = crop_boxes(sample, crop, side)
    for mask, (x1, y1, x2, y2) in zip(placed, boxes, strict=True):
        rows, columns = np.nonzero(mask)
        if len(rows):
            assert (columns.min() >= x1 - 1, columns.max() <= x2) == (True, True)
            assert (rows.min() >= y1 - 1, rows.max() <= y2) == (True, True)
    labels = paint_semantic(sample.masks, sample.labels, sample.area)
    semantic = crop_semantic(labels, crop, side)
    inside = semantic != SEMANTIC_IGNORE
    assert inside.sum() == min(side, size[0] - top) * min(side, size[1] - left)
    repainted = paint_semantic(placed, sample.labels, sample.area)
    assert (semantic[inside] == repainted[inside]).mean() > 0.97


def test_training_targets_of_each_task(scenes: ShapeScenes) -> None:
    def targets(task: str) -> list[dict[str, torch.Tensor]]:
        dataset = open_dataset(SCENES, "train", task)
        jitter = Augmentation((0.6, 1.6), 0.5)
        loader = training_loader(dataset, 64, 16, jitter, 0, 0, 1, task=task)
        (batch,) = loader
        return list(batch.targets)

    for target in targets("instances"):
        assert target["masks"].shape == (len(target["boxes"]), 64, 64)
        assert target["masks"].dtype == torch.bool
    for target in targets("segmentation"):
        assert target["semantic"].shape == (64, 64)
        assert target["semantic"].dtype == torch.int64
        assert set(target["semantic"].unique().tolist()) <= {*range(7), SEMANTIC_IGNORE}
    labels = [int(target["label"]) for target in targets("classification")]
    assert set(labels) <= set(range(6))
    assert len(set(labels)) > 2
    assert classes_of(scenes, "classification") == 6
    assert classes_of(scenes, "segmentation") == 7
