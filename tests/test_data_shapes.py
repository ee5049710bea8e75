"""ShapeScenes: the same bytes everywhere, and annotations that fit the pixels."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Polygon
from pycocotools.coco import COCO

from effspinenet_lib.data import DataConfig, ObjectCrops, ShapeScenes, export_coco, open_dataset
from effspinenet_lib.data.rendering import (
    ANGLES,
    SHAPES,
    SUBPIXELS,
    TEXTURES,
    Draws,
    Patch,
    draw,
    smooth_field,
)
from effspinenet_lib.data.shapescenes import (
    CATEGORIES,
    KINDS,
    MAX_IMAGE_SIZE,
    SEMANTIC_IGNORE,
    Scene,
    SceneSettings,
    render_scene,
)
from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.models.anchors import AnchorSettings, make_anchors, match_anchors
from effspinenet_lib.models.specs import OUTPUT_LEVELS, level_side

SIZE = 128
KIND = KINDS["shapescenes"]
SETTINGS = KIND.settings
# What the rasteriser drew when this test was written; NumPy, CPU and operating system must
# not change it. A change of the drawing code does, and then needs a new VERSION in shapescenes.py.
RASTER_DIGEST = "f38400d0dd329e65"
# Of the images and the annotation file of 24 scenes at 128 pixels with the seed 5.
SCENES_DIGEST = "82800bd2ff173caaf349d8a5f11b0b93efe66d82b5798867d5c1f47b3f433dd0"


def drawn(settings: SceneSettings, seed: int, index: int) -> Scene:
    return render_scene(replace(KIND, settings=settings), seed, "train", index, SIZE)


MAKE_AND_HASH = """
import hashlib, sys
from effspinenet_lib.data import ShapeScenes
scenes = ShapeScenes("train", 24, 128, seed=5)
digest = hashlib.sha256()
for name in ("images.npy", "annotations.json"):
    digest.update((scenes.folder / name).read_bytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def scenes() -> ShapeScenes:
    return ShapeScenes("train", 200, SIZE, seed=3)


def start_making(cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKE_AND_HASH],
        env={**os.environ, "EFFSPINENET_CACHE": str(cache), **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.strip()


def test_two_processes_make_the_same_bytes(tmp_path: Path) -> None:
    makers = [
        start_making(tmp_path / "a", PYTHONHASHSEED="1", OMP_NUM_THREADS="1"),
        start_making(tmp_path / "b", PYTHONHASHSEED="2", OMP_NUM_THREADS="2"),
        # These two want the same split at the same time.
        start_making(tmp_path / "c"),
        start_making(tmp_path / "c"),
    ]
    assert {finish(maker) for maker in makers} == {SCENES_DIGEST}
    assert len(list((tmp_path / "c" / "shapescenes").glob("*/images.npy"))) == 1
    assert not list(tmp_path.glob("**/*.tmp"))


def all_patches() -> list[Patch]:
    return [
        Patch(shape, texture, 30 * SUBPIXELS, 1000 + 700 * i, 1500 + 900 * j, 37 * i, 11 * j, 400,
              ((200, 30, 90), (20, 180, 250)))
        for i, shape in enumerate(SHAPES)
        for j, texture in enumerate(TEXTURES)
    ]  # fmt: skip


def test_the_rasteriser_draws_what_it_always_drew() -> None:
    canvas = smooth_field(Draws(1, 2, 3).octets(75).reshape(5, 5, 3), SIZE)
    for patch in all_patches():
        draw(canvas, patch)
    assert hashlib.sha256(canvas.astype("<i2").tobytes()).hexdigest()[:16] == RASTER_DIGEST


def polygon(shape: str, side: float) -> np.ndarray:
    """Corners of a shape of area side², from textbook formulas."""

    def circle(radius: float, count: int, start: float) -> np.ndarray:
        turns = start + 2 * math.pi * np.arange(count) / count
        return radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)

    if shape == "disc":
        return circle(side / math.sqrt(math.pi), 720, 0)
    if shape == "square":
        return circle(side / math.sqrt(2), 4, math.pi / 4)
    if shape == "triangle":
        # The normals point to 90 degrees and on, the corners lie opposite.
        return circle(2 * side / 27**0.25, 3, -math.pi / 2)
    arm, long = 0.42, side / (2 * math.sqrt(1 - 0.58**2))
    quarter = np.array([[1, -arm], [1, arm], [arm, arm]]) * long
    turned = [quarter]
    for _ in range(3):
        turned.append(turned[-1] @ np.array([[0, 1], [-1, 0]]))
    return np.concatenate(turned)


@pytest.mark.parametrize("shape", ["disc", "square", "triangle", "cross"])
@pytest.mark.parametrize("angle", [0, 23, 200])
@pytest.mark.parametrize(("size", "side"), [(128, 12), (128, 60), (MAX_IMAGE_SIZE, 400)])
def test_masks_are_the_shapes_they_are_called(shape: str, angle: int, size: int, side: int) -> None:
    half = size // 2
    patch = Patch(shape, "plain", side * SUBPIXELS, half * SUBPIXELS + 17, half * SUBPIXELS, angle,
                  0, 400, ((255, 255, 255),) * 2)  # fmt: skip
    drawn = draw(np.zeros((size, size, 3), np.int16), patch)
    mask = np.zeros((size, size), bool)
    mask[drawn.rows, drawn.columns] = drawn.mask
    turn = 2 * math.pi * angle / ANGLES
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    corners = polygon(shape, side) @ rotation + [half + 17 / SUBPIXELS, half]
    y, x = np.mgrid[:size, :size] + 0.5
    expected = Polygon(corners).contains_points(np.stack([x.ravel(), y.ravel()], 1))
    disagreeing = np.count_nonzero(mask.ravel() != expected)
    assert disagreeing <= 0.03 * side * side + 3
    assert expected.sum() > 0.8 * side * side


def test_splits_and_seeds_differ_and_longer_splits_begin_alike(scenes: ShapeScenes) -> None:
    longer, other_seed = ShapeScenes("train", 4, SIZE, seed=3), ShapeScenes("train", 4, SIZE, 4)
    validation = ShapeScenes("val", 4, SIZE, seed=3)
    for index in range(4):
        image = scenes.load_image(index)
        assert (image == longer.load_image(index)).all()
        assert (image != other_seed.load_image(index)).mean() > 0.5
        assert (image != validation.load_image(index)).mean() > 0.5


def test_boxes_are_tight_around_disjoint_masks(scenes: ShapeScenes) -> None:
    index = COCO()
    index.dataset = scenes.ground_truth(masks=True)
    index.createIndex()
    for number in range(60):
        owned = np.zeros((SIZE, SIZE), int)
        sample, scene = scenes.load(number, "instances"), scenes.scene(number)
        records = index.imgToAnns[sample.image_id]
        assert len(records) == len(sample.boxes)
        assert (sample.masks == scene.masks()).all()
        for row, record in enumerate(records):
            mask = index.annToMask(record)
            assert (mask == sample.masks[row]).all()
            y, x = np.nonzero(mask)
            box = [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
            assert record["bbox"] == box
            assert record["area"] == box[2] * box[3] == sample.area[row]
            assert sample.boxes[row].tolist() == [box[0], box[1], box[0] + box[2], box[1] + box[3]]
            assert CATEGORIES[sample.labels[row]].id == record["category_id"]
            assert (scene.semantic[mask == 1] == record["category_id"]).all()
            owned += mask
        assert owned.max(initial=0) <= 1
        assert set(np.unique(scene.semantic[owned == 0])) <= {0, SEMANTIC_IGNORE}
        assert (scene.image == sample.image).all()


def test_objects_are_drawn_where_the_annotations_say() -> None:
    """Without clutter, light and noise, objects are all that differs from the background."""
    bare = replace(
        SETTINGS, objects=(2, 4), distractors=(0, 0), clutter=(0, 0), crowd_permille=0,
        lighting_percent=(100, 100), contrast_percent=(100, 100), noise=(0, 0),
        visible_percent=0, visible_pixels=1, background_range=(10, 10), object_contrast=(60, 90),
    )  # fmt: skip
    for index in range(20):
        scene = drawn(bare, 0, index)
        changed = (scene.image != 10).any(axis=2)
        masks = scene.masks().any(axis=0)
        assert (changed | ~masks).all()
        # Antialiased edges are all that lies outside the masks.
        assert (changed & ~masks).mean() < 0.04


def test_hidden_objects_are_left_out_and_ignored() -> None:
    everything = replace(SETTINGS, visible_percent=0, visible_pixels=1, objects=(5, 6))
    hidden = 0
    for index in range(80):
        full = drawn(everything, 1, index)
        scene = drawn(replace(everything, visible_percent=25, visible_pixels=20), 1, index)
        assert (full.image == scene.image).all()
        assert set(scene.objects) <= set(full.objects)
        left_out = [
            mask for one, mask in zip(full.objects, full.masks(), strict=True)
            if one not in scene.objects
        ]  # fmt: skip
        for mask in left_out:
            assert (scene.semantic[mask] == SEMANTIC_IGNORE).all()
        hidden += len(left_out)
    assert hidden > 3


def test_sizes_spread_over_all_of_coco(scenes: ShapeScenes) -> None:
    counts = scenes.describe()
    share = {name: count / counts["objects"] for name, count in counts["sizes"].items()}
    assert 0.3 < share["small"] < 0.6
    assert 0.25 < share["medium"] < 0.55
    assert 0.08 < share["large"] < 0.25
    per_class = [sum(sizes.values()) for sizes in counts["classes"].values()]
    assert min(per_class) > 0.5 * max(per_class)
    assert counts["objects"] + counts["crowds"] == len(scenes.annotations.boxes)
    areas = scenes.annotations.area[~scenes.annotations.iscrowd]
    assert counts["sizes"]["small"] == sum(a <= 32 * 32 for a in areas)
    assert counts["sizes"]["large"] == sum(a > 96 * 96 for a in areas)


def test_a_few_images_have_crowds(scenes: ShapeScenes) -> None:
    assert 1 <= scenes.describe()["crowds"] <= 25
    always = replace(SETTINGS, crowd_permille=1000, objects=(1, 1), distractors=(0, 0))
    for index in range(10):
        scene = drawn(always, 0, index)
        (crowd,) = (one for one in scene.objects if one.iscrowd)
        # A group is wider than any of its members.
        assert max(crowd.box[2:]) > 2 * SETTINGS.crowd_member_side[1] * SIZE // 1000


@pytest.mark.parametrize(
    ("image_size", "levels"), [(128, {3, 4, 5}), (256, {3, 4, 5, 6}), (512, {4, 5, 6, 7})]
)
def test_objects_match_anchors_of_every_level_at_one_size_or_another(
    image_size: int, levels: set[int]
) -> None:
    """As the book says; the levels that get a tenth or more of the matched objects each."""
    settings, found = AnchorSettings(), Counter[int]()
    sides = [(level_side(image_size, level),) * 2 for level in OUTPUT_LEVELS]
    anchors = make_anchors(sides, settings, torch.device("cpu"))
    count = [settings.per_location * side**2 for side, _ in sides]
    level_of = torch.repeat_interleave(torch.tensor(OUTPUT_LEVELS), torch.tensor(count))
    for index in range(30):
        scene = render_scene(KIND, 0, "train", index, image_size)
        boxes = torch.tensor([o.box for o in scene.objects]).reshape(-1, 4).float()
        boxes[:, 2:] += boxes[:, :2]
        crowd = torch.tensor([o.iscrowd for o in scene.objects], dtype=torch.bool)
        matches = match_anchors(anchors, boxes, crowd, settings)
        pairs = torch.stack([level_of, matches])[:, matches >= 0].unique(dim=1)
        found.update(pairs[0].tolist())
    assert {level for level, n in found.items() if n >= 0.1 * found.total()} == levels
    assert set(found) == levels


def test_crops_show_single_objects(scenes: ShapeScenes) -> None:
    crops, table = ObjectCrops(scenes), scenes.annotations
    assert len(crops) == np.count_nonzero(~table.iscrowd)
    rows = np.flatnonzero(~table.iscrowd)
    for index in range(0, len(crops), 17):
        sample = crops.load(index)
        pixels, (label,) = sample.image, sample.labels
        x1, y1, x2, y2 = table.boxes[rows[index]].astype(int)
        owner = int(np.searchsorted(table.starts, rows[index], side="right")) - 1
        inside = scenes.load_image(owner)[y1:y2, x1:x2]
        assert pixels.shape[0] == pixels.shape[1] >= max(x2 - x1, y2 - y1)
        assert label == table.labels[rows[index]]
        # The object's own pixels are in the crop, unchanged.
        top = pixels.shape[0] // 2 - ((y1 + y2) // 2 - y1)
        left = pixels.shape[1] // 2 - ((x1 + x2) // 2 - x1)
        assert (pixels[top : top + y2 - y1, left : left + x2 - x1] == inside).all()
        assert sample.boxes[0].tolist() == [left, top, left + x2 - x1, top + y2 - y1]


def test_workers_get_the_file_not_a_copy_of_the_images(scenes: ShapeScenes) -> None:
    image = scenes.load_image(7)
    packed = pickle.dumps(scenes)
    assert len(packed) < len(scenes) * image.nbytes / 20
    assert (pickle.loads(packed).load_image(7) == image).all()


def test_an_interrupted_making_is_made_again() -> None:
    made = ShapeScenes("train", 6, 64, seed=8)
    image = made.load_image(5)
    (made.folder / "annotations.json").unlink()
    (made.folder / "images.npy").write_bytes(b"cut short")
    (made.folder / ".images.npy.x.tmp").write_bytes(b"left behind")
    again = ShapeScenes("train", 6, 64, seed=8)
    assert (again.load_image(5) == image).all()
    assert not list(again.folder.glob(".*.tmp"))


def test_an_unwritable_cache_is_an_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFSPINENET_CACHE", str(tmp_path / "file"))
    message = "cannot write in .*: .*environment variable EFFSPINENET_CACHE to another folder"
    with pytest.raises(UserError, match=message) as caught:
        ShapeScenes("train", 2, 64)
    assert "\n" not in str(caught.value)


def test_the_exported_folder_is_the_same_data_set(tmp_path: Path) -> None:
    config = DataConfig("shapescenes", train_images=5, eval_images=3, seed=2, image_size=96)
    files = export_coco(config, tmp_path)
    assert [path.name for path in files] == ["instances_train.json", "instances_val.json"]
    folder = DataConfig("coco", root=str(tmp_path))
    for part in ("train", "eval"):
        ours, theirs = open_dataset(config, part), open_dataset(folder, part)
        assert len(ours) == len(theirs)
        assert ours.categories == theirs.categories
        for index in range(len(ours)):
            one, two = ours.load(index), theirs.load(index)
            assert (one.image == two.image).all()
            assert (one.boxes == two.boxes).all()
            assert (one.labels == two.labels).all()
            assert one.file_name == two.file_name
    index = COCO(files[0])
    assert index.annToMask(index.loadAnns([1])[0]).shape == (96, 96)
    with pytest.raises(UserError, match="only scenes"):
        export_coco(folder, tmp_path)


def test_run_keys_change_with_everything_that_decides_the_data() -> None:
    base = DataConfig("shapescenes")
    filled = DataConfig("shapescenes", train_images=8000, eval_images=500, image_size=128)
    assert base.to_dict() == filled.to_dict()
    assert base.to_dict() != replace(base, seed=1).to_dict()
    assert "generator" in base.to_dict()
    assert DataConfig.from_dict(base.to_dict()).to_dict() == base.to_dict()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format": "shapescene"}, UnknownName, "did you mean shapescenes"),
        ({"format": "coco"}, UserError, "needs a folder"),
        ({"train_images": 0}, UserError, "train_images is 0"),
        ({"image_size": 4000}, UserError, "from 32 to 512"),
        ({"seed": -1}, UserError, "seed is -1"),
    ],
)
def test_bad_configurations_are_refused(
    changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DataConfig(**{"format": "shapescenes", **changes})


def test_shapegrid_has_every_look_as_a_class_and_draws_nothing_else() -> None:
    grid = open_dataset(DataConfig("shapegrid", eval_images=150), "eval", "classification")
    assert isinstance(grid, ObjectCrops)
    names = {category.name for category in grid.categories}
    assert names == {f"{texture} {shape}" for texture in TEXTURES for shape in SHAPES}
    assert set(grid.annotations.labels.tolist()) == set(range(len(names)))
    assert not grid.annotations.iscrowd.any()
    kind = KINDS["shapegrid"]
    plain = replace(
        kind.settings, lighting_percent=(100, 100), contrast_percent=(100, 100), noise=(0, 0),
        background_range=(10, 10), object_contrast=(60, 90), visible_percent=0, visible_pixels=1,
    )  # fmt: skip
    for index in range(10):
        scene = render_scene(replace(kind, settings=plain), 0, "val", index, SIZE)
        changed = (scene.image != 10).any(axis=2)
        assert (changed & ~scene.masks().any(axis=0)).mean() < 0.04  # antialiased edges
    # A configuration of six classes keeps its key beside it.
    assert DataConfig("shapegrid").to_dict() != DataConfig("shapescenes").to_dict()
