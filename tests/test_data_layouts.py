"""ImageNet and VOC label maps, crops and AutoAugment of photographs, the check of a folder."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from typer.testing import CliRunner

from effspinenet_lib.cli import app
from effspinenet_lib.data import (
    DataConfig,
    Dataset,
    classes_of,
    detect_format,
    export_coco,
    open_dataset,
)
from effspinenet_lib.data.augment import (
    CROP_PADDING,
    Augmentation,
    auto_augment,
    centre_crop,
    random_crop,
)
from effspinenet_lib.data.fetch import KNOWN_SETS, ExpectedPart, KnownSet
from effspinenet_lib.data.loader import Batch, evaluation_loader, training_loader
from effspinenet_lib.errors import DataError, UnknownName, UserError

CLASSES = ("n01", "n02", "n03")


def noise(height: int, width: int, seed: int) -> np.ndarray:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes with 4, 2 and 3 training pictures, one of validation each."""
    root = tmp_path_factory.mktemp("photos")
    for split, counts in (("train", (4, 2, 3)), ("val", (1, 1, 1))):
        for name, count in zip(CLASSES, counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                picture = noise(40 + 4 * number, 60, 10 * number + len(name))
                Image.fromarray(picture).save(root / split / name / f"{name}_{number}.JPEG")
            (root / split / name / "notes.txt").write_text("no picture")
    return root


def imagenet(root: Path, images: int | None = None, part: Any = "train") -> Dataset:
    config = DataConfig("imagenet", str(root), train_images=images, eval_images=images)
    return open_dataset(config, part, "classification")


# ImageNet's layout


def test_imagenet_is_one_label_an_image(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert detect_format(photos) == detect_format(photos, "classification") == "imagenet"
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
        dataset = imagenet(photos)
    assert [c.name for c in dataset.categories] == list(CLASSES)
    assert classes_of(dataset, "classification") == 3
    names = [dataset.load(i).file_name for i in range(len(dataset))]
    assert names == [f"{c}/{c}_{n}.JPEG" for c, k in zip(CLASSES, (4, 2, 3), strict=True)
                     for n in range(k)]  # fmt: skip
    assert dataset.annotations.labels.tolist() == [0] * 4 + [1] * 2 + [2] * 3
    assert dataset.load(1).image.shape == (44, 60, 3)
    assert dataset.describe()["images"] == 9


@pytest.mark.parametrize(("images", "labels"), [(3, [0, 1, 2]), (5, [0, 0, 1, 1, 2]), (99, None)])
def test_a_few_images_are_spread_over_the_classes(
    photos: Path, images: int, labels: list[int] | None
) -> None:
    found = imagenet(photos, images).annotations.labels.tolist()
    assert found == (labels or [0] * 4 + [1] * 2 + [2] * 3)


def test_imagenet_layouts_that_cannot_be_used_say_so(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such split; splits found: train, val"):
        open_dataset(DataConfig("imagenet", str(photos), "test"), "train", "classification")
    with pytest.raises(UserError, match="'imagenet' serves classification, not detection"):
        open_dataset(DataConfig("imagenet", str(photos)), "train")
    (tmp_path / "train" / "empty").mkdir(parents=True)
    with pytest.raises(DataError, match="empty: the class has no images"):
        imagenet(tmp_path)
    (tmp_path / "train" / "empty" / "x.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"x\.jpg: is not an image that can be decoded"):
        imagenet(tmp_path).load(0)


# Crops and AutoAugment


def test_the_centre_crop_is_torchvisions_resize_and_centre_crop() -> None:
    picture = noise(300, 200, 0)
    view, scale = centre_crop(picture, 224)
    side = round(200 * 224 / (224 + CROP_PADDING))
    assert side == round(0.875 * 200)
    middle = v2.CenterCrop(side)(torch.from_numpy(picture).permute(2, 0, 1))
    resize = v2.Resize((224, 224), v2.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(view, resize(middle))
    assert scale == pytest.approx(224 / side)


def view_batches(dataset: Dataset, policy: str = "imagenet", **options: Any) -> list[Batch]:
    settings = {"seed": 3, "start_step": 0, "total_steps": 6, "workers": 0, **options}
    return list(
        training_loader(
            dataset, 32, 4, Augmentation(flip_probability=0.5), task="classification",
            auto_augment=policy, **settings,
        )
    )  # fmt: skip


def same(first: list[Batch], second: list[Batch]) -> bool:
    return all(
        torch.equal(a.images, b.images)
        and [t["label"].item() for t in a.targets] == [t["label"].item() for t in b.targets]
        for a, b in zip(first, second, strict=True)
    )


def test_auto_augment_is_decided_by_seed_epoch_and_image_alone(photos: Path) -> None:
    dataset = imagenet(photos)
    run = view_batches(dataset)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert same(run, view_batches(dataset, workers=2))
    assert same(run[2:], view_batches(dataset, start_step=2))
    assert same(run, view_batches(dataset))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not same(run, view_batches(dataset, seed=4))
    plain = view_batches(dataset, policy="")
    assert [b.image_ids for b in plain] == [b.image_ids for b in run]
    assert not same(run, plain)
    assert run[0].images.shape == (4, 3, 32, 32)
    assert all(math.isnan(scale) for scale in run[0].scales.flatten().tolist())
    for batch in run:
        labels = [int(dataset.annotations.labels[number - 1]) for number in batch.image_ids]
        assert [target["label"].item() for target in batch.targets] == labels


def test_crops_and_auto_augment_are_torchvisions() -> None:
    """From the seed that ours draw, torchvision's own transforms give the same pixels."""
    picture = noise(48, 32, 1)
    pixels, changed = torch.from_numpy(picture).permute(2, 0, 1), 0
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=128)
    bicubic = v2.InterpolationMode.BICUBIC
    cropped = v2.Compose(
        [
            v2.RandomResizedCrop(24, (0.08, 1), (3 / 4, 4 / 3), bicubic, antialias=True),
            v2.RandomHorizontalFlip(0.5),
        ]
    )
    for seed in range(30):
        first, second = (np.random.default_rng(seed) for _ in range(2))
        start = int(np.random.default_rng(seed).integers(2**63))
        augmented = auto_augment(pixels, "imagenet", first)
        torch.manual_seed(start)
        assert torch.equal(augmented, policy(pixels))
        changed += not torch.equal(augmented, pixels)
        view = random_crop(picture, 24, 0.5, second)
        torch.manual_seed(start)
        assert torch.equal(view, cropped(pixels))
    assert changed > 20


def test_auto_augment_elsewhere_is_refused(photos: Path) -> None:
    dataset = imagenet(photos)
    with pytest.raises(UserError, match="AutoAugment is for classification, not for detection"):
        training_loader(dataset, 32, 4, Augmentation(), 0, 0, 1, auto_augment="imagenet")


def test_evaluation_shows_the_middle_of_each_photograph(photos: Path) -> None:
    dataset = imagenet(photos, part="eval")
    (batch,) = evaluation_loader(dataset, 32, 8)
    assert len(batch.images) == 3
    assert batch.sizes == [(40, 60)] * 3
    side = round(40 * 32 / (32 + CROP_PADDING))
    assert batch.scales.flatten().tolist() == pytest.approx([32 / side] * 6)
    assert batch.images.std() > 0.1


# VOC's label maps


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (root / folder).mkdir(parents=True)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for number, stem in enumerate(("b", "a", "c")):
        size = (12 + number, 9)
        Image.new("RGB", size, (number * 50,) * 3).save(root / "JPEGImages" / f"{stem}.jpg")
        labels = np.zeros(size[::-1], np.uint8)
        labels[2:5, 3:8], labels[0] = number + 1, 255
        picture = Image.fromarray(labels)
        if stem != "c":  # VOC's own are palette pictures
            picture.putpalette(list(range(256)) * 3)
        folder = "SegmentationClassAug" if stem == "c" else "SegmentationClass"
        picture.save(root / folder / f"{stem}.png")
    (lists / "train.txt").write_text("b\na\n")
    (lists / "val.txt").write_text("a\n")
    (lists / "train_aug.txt").write_text("a\nb\nc\n")
    return root


def maps(root: Path, split: str = "train_aug", images: int | None = None) -> Dataset:
    config = DataConfig("voc_segmentation", str(root), split, train_images=images)
    return open_dataset(config, "train", "segmentation")


def test_label_maps_are_read_as_they_are_and_become_targets(voc: Path) -> None:
    assert detect_format(voc) == "voc_segmentation"
    dataset = maps(voc)
    assert classes_of(dataset, "segmentation") == 21
    assert [c.name for c in dataset.categories][::19] == ["aeroplane", "tvmonitor"]
    assert dataset.annotations.sizes.tolist() == [[9, 13], [9, 12], [9, 14]]
    sample = dataset.load(2, "segmentation")
    assert sample.image.shape == (9, 14, 3)
    assert sample.semantic is not None
    expected = np.zeros((9, 14), np.uint8)
    expected[2:5, 3:8], expected[0] = 3, 255
    assert (sample.semantic == expected).all()
    assert len(maps(voc, images=2)) == 2
    loader = training_loader(dataset, 32, 3, Augmentation(), 0, 0, 1, task="segmentation")
    (batch,) = loader
    for target, number in zip(batch.targets, batch.image_ids, strict=True):
        assert set(target["semantic"].unique().tolist()) == {0, {1: 2, 2: 1, 3: 3}[number], 255}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: (r / "JPEGImages/a.jpg").unlink(), r"train_aug\.txt: names the image a\.jpg"),
        (lambda r: (r / "SegmentationClass/a.png").unlink(), "neither SegmentationClass nor"),
        (lambda r: (r / "SegmentationClass/a.png").write_bytes(b"x"), r"a\.png: is not an image"),
        (lambda r: (r / "ImageSets/Segmentation/train_aug.txt").write_text("\n"), "lists no image"),
        (lambda r: (r / "ImageSets/Segmentation/train_aug.txt").write_text("../a"), "leads out"),
        (lambda r: (r / "ImageSets/Segmentation/train_aug.txt").unlink(), "splits found: train, v"),
    ],
)
def test_bad_label_folders_are_refused(voc: Path, spoil: Any, message: str) -> None:
    spoil(voc)
    with pytest.raises(DataError, match=message) as caught:
        maps(voc)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((9, 13), 21, np.uint8), r"a\.png: has the label 21; 0 to 20 and 255"),
        (np.zeros((9, 13, 3), np.uint8), "a label map has one value a pixel"),
        (np.zeros((5, 5), np.uint8), r"a\.jpg: is 13 x 9 pixels, its annotations say 5 x 5"),
    ],
)
def test_maps_that_do_not_fit_are_refused(voc: Path, labels: np.ndarray, message: str) -> None:
    Image.fromarray(labels).save(voc / "SegmentationClass" / "a.png")
    with pytest.raises(DataError, match=message):
        maps(voc).load(0, "segmentation")
    with pytest.raises(UserError, match="serves segmentation, not detection"):
        open_dataset(DataConfig("voc_segmentation", str(voc)), "train")


# The check


def checked(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["data", "check", *words])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def small_voc(monkeypatch: pytest.MonkeyPatch) -> KnownSet:
    """VOC with as many images as the folder of these tests has."""
    parts = (ExpectedPart("train", 2, None, 20), ExpectedPart("train_aug", 3, None, 20))
    small = replace(KNOWN_SETS["voc"], parts=parts)
    monkeypatch.setitem(KNOWN_SETS, "voc", small)
    return small


def test_a_whole_folder_passes(voc: Path, small_voc: KnownSet) -> None:
    for words, said in (
        (("--expect", "voc"), "train_aug: 3 images, 20 classes"),
        ((), "val: 1 images"),
    ):
        code, out, _ = checked(str(voc), "--workers", "2", *words)
        assert code == 0
        assert said in out


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_what_is_wrong_is_in_the_report(
    voc: Path, small_voc: KnownSet, tmp_path: Path, suffix: str
) -> None:
    Image.fromarray(np.full((9, 12), 40, np.uint8)).save(voc / "SegmentationClass" / "b.png")
    with open(voc / "ImageSets" / "Segmentation" / "train.txt", "a") as handle:
        handle.write("c\n")
    report = tmp_path / f"report{suffix}"
    code, _, err = checked(str(voc), "--expect", "voc", "--report", str(report))
    assert code == 1
    assert "problem: train: 3 images, 2 are expected" in err
    if suffix == ".json":
        rows = json.loads(report.read_text())["rows"]
    else:
        rows = list(csv.DictReader(report.read_text().splitlines()))
    assert {str(row["found"]) for row in rows if row["what"] == "images"} == {"3"}
    unreadable = [row for row in rows if row["what"] == "unreadable"]
    assert [(row["part"], row["file"]) for row in unreadable] == [
        ("train", "b.jpg"),
        ("train_aug", "b.jpg"),
    ]
    assert all("has the label 40" in row["problem"] for row in unreadable)


def test_every_missing_image_is_in_the_report(voc: Path, tmp_path: Path) -> None:
    for stem in "ac":
        (voc / "JPEGImages" / f"{stem}.jpg").unlink()
    report = tmp_path / "report.json"
    code, _, err = checked(str(voc), "--report", str(report))
    assert code == 1
    lists, folder = voc / "ImageSets" / "Segmentation", voc / "JPEGImages"
    wanted = [("train", "a.jpg"), ("val", "a.jpg"), ("train_aug", "a.jpg"), ("train_aug", "c.jpg")]
    assert err.splitlines() == [
        f"problem: {part}: {lists / part}.txt: names the image {file}, not found in {folder}"
        for part, file in wanted
    ]
    missing = [(r["part"], r["file"]) for r in json.loads(report.read_text())["rows"]
               if r["what"] == "missing"]  # fmt: skip
    assert missing == wanted


def test_a_coco_folder_that_is_not_coco_is_told(tiny_coco: Path) -> None:
    code, _, err = checked(str(tiny_coco), "--expect", "coco", "--no-pictures")
    assert code == 1
    assert "images, 118287 are expected" in err
    assert "annotations, 860001 are expected" in err
    assert "images, 5000 are expected" in err


def test_only_instances_are_splits_where_there_are_any(tmp_path: Path) -> None:
    """The files of a download of COCO 2017: those of other tasks have other keys and names."""
    config = DataConfig("shapescenes", train_images=3, eval_images=2, image_size=64)
    path, _ = export_coco(config, tmp_path)
    instances = json.loads(path.read_text())
    captions = {key: instances[key] for key in ("images", "annotations")}
    path.with_name("captions_train.json").write_text(json.dumps(captions))
    path.with_name("person_keypoints_train.json").write_text(json.dumps(instances))
    code, out, err = checked(str(tmp_path), "--workers", "1")
    assert code == 0
    assert "problem" not in err
    assert re.findall(r"(\S+): (\d) images,", out) == [("train", "3"), ("val", "2")]


def test_file_names_that_are_no_utf8_load_in_every_layout(voc: Path, tmp_path: Path) -> None:
    photos, name = tmp_path / "photos", os.fsdecode(b"caf\xe9")
    for folder in ("n01", name):
        (photos / "train" / folder).mkdir(parents=True)
        picture = Image.fromarray(noise(9, 12, 1))
        with open(photos / "train" / folder / f"{name}.jpg", "wb") as handle:
            picture.save(handle, "JPEG")
    dataset = imagenet(photos)
    assert [c.name for c in dataset.categories] == [name, "n01"]
    names = [dataset.load(i).file_name for i in range(2)]
    assert names == [f"{name}/{name}.jpg", f"n01/{name}.jpg"]
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (voc / folder / f"a.{suffix}").rename(voc / folder / f"{name}.{suffix}")
    for split in ("train", "val", "train_aug"):
        path = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.write_bytes(path.read_bytes().replace(b"a", os.fsencode(name)))
    assert sorted(maps(voc).load(i, "segmentation").file_name for i in range(3)) == [
        "b.jpg", "c.jpg", f"{name}.jpg",
    ]  # fmt: skip


def test_unknown_names_are_refused_before_any_work(photos: Path) -> None:
    for words, message in (
        (("--expect", "koko"), "unknown data set"),
        (("--report", "x.txt"), "unknown report format"),
    ):
        done = CliRunner().invoke(app, ["data", "check", str(photos), *words])
        assert isinstance(done.exception, UnknownName)
        assert message in str(done.exception)
