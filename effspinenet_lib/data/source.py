"""Which data a run uses, and how it is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from effspinenet_lib.data.coco import CocoFolder
from effspinenet_lib.data.crops import ObjectCrops
from effspinenet_lib.data.dataset import Dataset
from effspinenet_lib.data.imagenet import ImageNetFolder, class_folders
from effspinenet_lib.data.scenes import ShapeScenes, export_split, generator_key
from effspinenet_lib.data.shapes import MAX_IMAGE_SIZE
from effspinenet_lib.data.voc import VocFolder
from effspinenet_lib.data.voc_segmentation import LISTS, VocSegmentationFolder
from effspinenet_lib.errors import DataError, UnknownName, UserError

FORMATS = ("shapescenes", "coco", "voc", "voc_segmentation", "imagenet")
# Tasks of the formats that serve one task alone.
ONLY_TASK = {"voc_segmentation": "segmentation", "imagenet": "classification"}
UNKNOWN_ROOT = "data"  # stands for a folder that is not given: it is no part of a run's key
_FOLDERS: Mapping[str, Callable[[str, str, int | None], Dataset]] = {
    "coco": CocoFolder,
    "voc": VocFolder,
    "voc_segmentation": VocSegmentationFolder,
    "imagenet": ImageNetFolder,
}
# The proxy profile's set (our choice): its runs see each training image two to three times.
SCENE_TRAIN_IMAGES = 8000
SCENE_EVAL_IMAGES = 500
SCENE_IMAGE_SIZE = 128
SCENE_SMALLEST_SIZE = 32


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Attributes:
        format: "shapescenes", or for a folder "coco", "voc", "voc_segmentation" (label maps) or
            "imagenet" (a folder a class).
        root: the folder; None for ShapeScenes.
        train_split: name of the split to train on. In COCO's layout `train2017-rest-7392` is
            train2017 without the 7392 images of `train2017-held-7392` (see `heldout`).
        eval_split: name of the split to evaluate on.
        train_images: ShapeScenes: how many are made (8,000 if None); folders: use only the first
            so many in id order (ImageNet: as evenly over the classes as can be).
        eval_images: the same for evaluation (500 if None).
        seed: ShapeScenes only.
        image_size: side of the images in pixels, ShapeScenes only (128 if None).

    Raises:
        UnknownName: there is no such format.
        UserError: a folder format without `root`, or a number out of range.
    """

    format: str
    root: str | None = None
    train_split: str = "train"
    eval_split: str = "val"
    train_images: int | None = None
    eval_images: int | None = None
    seed: int = 0
    image_size: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UnknownName("data format", self.format, FORMATS)
        if self.format != "shapescenes" and not self.root:
            raise UserError(f"data format {self.format!r} needs a folder: give its root")
        for name in ("train_images", "eval_images"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise UserError(f"{name} is {count}; it must be 1 or more")
        if self.seed < 0:
            raise UserError(f"the data seed is {self.seed}; it must be 0 or more")
        size = self.image_size
        if size is not None and not SCENE_SMALLEST_SIZE <= size <= MAX_IMAGE_SIZE:
            raise UserError(
                f"ShapeScenes image_size is {size}; "
                f"it must be from {SCENE_SMALLEST_SIZE} to {MAX_IMAGE_SIZE}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything that decides the data, defaults filled in, for run keys and records.

        ShapeScenes adds `generator`, which changes with the drawing code and its settings.
        """
        values = asdict(self)
        if self.format == "shapescenes":
            values.update(
                root=None,
                train_images=self.images_of("train"),
                eval_images=self.images_of("eval"),
                image_size=self.image_size or SCENE_IMAGE_SIZE,
                generator=generator_key(),
            )
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """The configuration that `to_dict` gave `values` of; `generator` is this version's."""
        return cls(**{name: value for name, value in values.items() if name != "generator"})

    def split_of(self, part: Literal["train", "eval"]) -> str:
        """The name of the split that `part` stands for."""
        return self.train_split if part == "train" else self.eval_split

    def images_of(self, part: Literal["train", "eval"]) -> int | None:
        """How many images `part` has; None means all that the folder has."""
        count = self.train_images if part == "train" else self.eval_images
        if count is None and self.format == "shapescenes":
            return SCENE_TRAIN_IMAGES if part == "train" else SCENE_EVAL_IMAGES
        return count


def detect_format(root: str | os.PathLike[str], task: str = "detection") -> str:
    """The layout of a data folder, one of `DataConfig`'s formats.

    VOC's folder holds boxes and label maps: `task` decides which are meant.

    Raises:
        DataError: the folder is missing or has no known layout.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if (folder / "annotations").is_dir() and any((folder / "annotations").glob("*.json")):
        return "coco"
    boxes = (folder / "Annotations").is_dir() and (folder / "ImageSets").is_dir()
    if (folder / LISTS).is_dir() and (task == "segmentation" or not boxes):
        return "voc_segmentation"
    if boxes:
        return "voc"
    if (folder / "train").is_dir() and class_folders(folder / "train"):
        return "imagenet"
    raise DataError(
        f"{folder}: neither a COCO folder (annotations/instances_<split>.json, <split>/) nor a "
        "VOC folder (Annotations/*.xml, ImageSets/Main/<split>.txt, JPEGImages/) nor an ImageNet "
        "folder (train/<class>/*.JPEG, val/<class>/*.JPEG)"
    )


def open_dataset(
    config: DataConfig, split: Literal["train", "eval"], task: str = "detection"
) -> Dataset:
    """Open the training or the evaluation part of the data.

    For `classification` it is the single objects, cut out, except where each image shows one.

    Raises:
        UserError: `split` is neither, the format does not serve the task, or the cache cannot be
            written.
        DataError: an annotation file cannot be used; names the file and the record.
    """
    if split not in ("train", "eval"):
        raise UnknownName("part of the data", split, ("train", "eval"))
    only = ONLY_TASK.get(config.format, task)
    if task != only:
        raise UserError(f"data in the format {config.format!r} serves {only}, not {task}")
    name, images = config.split_of(split), config.images_of(split)
    whole = _open(config, name, images)
    return ObjectCrops(whole) if task == "classification" and not whole.photographs else whole


def _open(config: DataConfig, name: str, images: int | None) -> Dataset:
    if config.format == "shapescenes":
        assert images is not None
        size = config.image_size or SCENE_IMAGE_SIZE
        return ShapeScenes(name, images, size, config.seed)
    assert config.root is not None
    return _FOLDERS[config.format](config.root, name, images)


def export_coco(config: DataConfig, folder: str | os.PathLike[str]) -> list[Path]:
    """Write both splits of a ShapeScenes configuration as a COCO folder.

    Returns:
        The annotation files.

    Raises:
        UserError: the configuration is not of ShapeScenes, or the folder cannot be written.
    """
    if config.format != "shapescenes":
        raise UserError(f"only ShapeScenes can be exported, not {config.format!r}")
    size = config.image_size or SCENE_IMAGE_SIZE
    written = []
    for part in ("train", "eval"):
        images = config.images_of(part)
        assert images is not None
        written.append(export_split(folder, config.split_of(part), images, size, config.seed))
    return written
