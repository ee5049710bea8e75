"""What instances, classification and segmentation need of the data, against pycocotools."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torchvision.transforms.v2 import functional as reference

from effspinenet_lib.data import (
    Augmentation,
    DataConfig,
    ObjectCrops,
    ShapeScenes,
    classes_of,
    open_dataset,
    training_loader,
)
from effspinenet_lib.data.augment import CropParams, crop_boxes, crop_masks, crop_semantic
from effspinenet_lib.data.dataset import SEMANTIC_IGNORE, RunLengths, paint_semantic
from effspinenet_lib.errors import DataError

SCENES = DataConfig("shapescenes", train_images=30, eval_images=2, image_size=64)


@pytest.fixture(scope="module")
def scenes() -> ShapeScenes:
    dataset = open_dataset(SCENES, "train")
    assert isinstance(dataset, ShapeScenes)
    return dataset


def test_scene_masks_and_labels_are_those_that_were_drawn(scenes: ShapeScenes) -> None:
    for index in range(len(scenes)):
        scene = scenes.scene(index)
        assert np.array_equal(scenes.load(index, "instances").masks, scene.masks())
        assert np.array_equal(scenes.load(index, "segmentation").semantic, scene.semantic)
    assert scenes.load(0).masks is None
    assert scenes.load(0).semantic is None


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
        ([[1, 2]], "is invalid"),
        ([[1, 2, 3, "x", 5, 6]], "is invalid"),
        ({"size": [6, 8], "counts": 5}, "is invalid"),
        ({"size": [6, 8]}, "has no segmentation"),
        (coco_mask.encode(np.ones((3, 3), np.uint8, order="F")), "is of 3 x 3 pixels"),
        ({"size": [6, 8], "counts": "zzzzz"}, "is invalid"),
    ],
)
def test_a_malformed_mask_names_its_annotation(shape: Any, message: str) -> None:
    truth = copy.deepcopy(TRUTH)
    truth["annotations"][0]["segmentation"] = shape
    with pytest.raises(DataError, match=f"file.json: annotation 9: .*{message}"):
        RunLengths.from_coco(truth, "file.json").decode(slice(0, 1), 6, 8, "file.json")


def test_a_folder_without_masks_says_so(tiny_coco: Path, tmp_path: Path) -> None:
    source = tiny_coco / "annotations" / "instances_val2017.json"
    content = json.loads(source.read_text())
    del content["annotations"][3]["segmentation"]
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(content))
    (tmp_path / "val2017").symlink_to(tiny_coco / "val2017")
    dataset = open_dataset(DataConfig("coco", str(tmp_path)), "eval")
    number = content["annotations"][3]["id"]
    with pytest.raises(DataError, match=rf"{path}: annotation {number}: has no segmentation"):
        dataset.prepare("instances")


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


def test_crops_are_a_data_set_of_one_box_an_image(scenes: ShapeScenes) -> None:
    crops = ObjectCrops(scenes)
    truth = crops.ground_truth()
    assert [len(crops), len(crops)] == [len(truth["images"]), len(truth["annotations"])]
    for index in range(0, len(crops), 9):
        sample = crops.load(index, "classification")
        height, width = crops.annotations.sizes[index].tolist()
        assert sample.image.shape == (height, width, 3)
        assert len(sample.boxes) == len(sample.labels) == 1
        x, y, w, h = truth["annotations"][index]["bbox"]
        assert sample.boxes[0].tolist() == [x, y, x + w, y + h]
        assert sample.file_name == truth["images"][index]["file_name"]
    assert crops.describe()["objects"] == scenes.describe()["objects"]
