"""Which data a run uses, how a folder's layout is recognised, and how data is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from effspinenet_lib.data.coco import COCO
from effspinenet_lib.data.dataset import Dataset, ObjectCrops
from effspinenet_lib.data.folders import Layout
from effspinenet_lib.data.imagenet import IMAGENET
from effspinenet_lib.data.pictures import is_picture, visible
from effspinenet_lib.data.shapescenes import (
    KINDS,
    MAX_IMAGE_SIZE,
    ShapeScenes,
    export_split,
)
from effspinenet_lib.data.splits import find_part, names_alike, part_names
from effspinenet_lib.data.voc import VOC, VOC_SEGMENTATION
from effspinenet_lib.data.yolo import YOLO
from effspinenet_lib.errors import DataError, UnknownName, UserError

# Every folder layout, in the order in which `detect_format` tries them.
LAYOUTS: Mapping[str, Layout] = {
    "coco": COCO,
    "voc_segmentation": VOC_SEGMENTATION,
    "voc": VOC,
    "yolo": YOLO,
    "imagenet": IMAGENET,
}
FORMATS = (*KINDS, *LAYOUTS)
UNKNOWN_ROOT = "data"  # a folder that is not given yet; the root is not part of a run's key
# The proxy profile's set (our choice): its runs see each training image two to three times.
SCENE_TRAIN_IMAGES = 8000
SCENE_EVAL_IMAGES = 500
SCENE_IMAGE_SIZE = 128
SCENE_SMALLEST_SIZE = 32

Role = Literal["train", "eval"]  # of a part of the data, in a run


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Attributes:
        format: "shapescenes" or "shapegrid", which are drawn (scenes); for a folder "coco", "voc",
            "voc_segmentation" (label maps), "yolo" or "imagenet" (a folder a class).
        root: the folder; None for scenes.
        train_split: name of the split to train on. `train2017-rest-7392` is train2017 without
            the 7392 images of `train2017-held-7392` (see `splits.HeldOutSplit`). Where a folder
            is not split, `train` and `val` are made (see `splits.MadeSplit`), and `all` is both.
        eval_split: name of the split to evaluate on.
        train_images: scenes: how many are made (8,000 if None); folders: use only the first
            so many in id order (ImageNet: spread evenly over the classes).
        eval_images: the same for evaluation (500 if None).
        seed: of scenes, and of a split that is made.
        image_size: side of the images in pixels, scenes only (128 if None).

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
        if self.format not in KINDS and not self.root:
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
                f"the scenes' image_size is {size}; "
                f"it must be from {SCENE_SMALLEST_SIZE} to {MAX_IMAGE_SIZE}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything that decides the data, defaults filled in, for run keys and records.

        Scenes add `generator`, which changes with the drawing code and its settings.
        """
        values = asdict(self)
        if self.format in KINDS:
            values.update(
                root=None,
                train_images=self.part_of("train")[1],
                eval_images=self.part_of("eval")[1],
                image_size=self.image_size or SCENE_IMAGE_SIZE,
                generator=KINDS[self.format].key(),
            )
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """The configuration that `to_dict` gave `values` of; `generator` is this version's."""
        return cls(**{name: value for name, value in values.items() if name != "generator"})

    def part_of(self, role: Role) -> tuple[str, int | None]:
        """The split that a run trains or is evaluated on, and how many images of it; None: all."""
        if role == "train":
            split, count, scenes = self.train_split, self.train_images, SCENE_TRAIN_IMAGES
        else:
            split, count, scenes = self.eval_split, self.eval_images, SCENE_EVAL_IMAGES
        return split, scenes if count is None and self.format in KINDS else count


def only_task(layout: str) -> str | None:
    """The task of a format that serves one task alone; None for the others."""
    return LAYOUTS[layout].only_task if layout in LAYOUTS else None


def detect_format(root: str | os.PathLike[str], task: str = "detection") -> str:
    """The layout of a data folder, one of `DataConfig`'s formats.

    VOC's folder holds boxes and label maps: `task` decides which are meant.

    Raises:
        DataError: the folder is missing or has no known layout; says what was found in it and
            what would make it usable.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found = [name for name, layout in LAYOUTS.items() if layout.parts(folder)]
    if not found:
        raise DataError(_not_understood(folder))
    return next((name for name in found if only_task(name) in (None, task)), found[0])


def _not_understood(folder: Path) -> str:
    """What a folder of no known layout holds, and what would make it usable."""
    names = visible(folder)
    folders = [name for name in names if (folder / name).is_dir()]
    for name in folders:
        for layout in LAYOUTS.values():
            if layout.parts(folder / name):
                return (
                    f"{folder}: has no known layout, but {folder / name} is a {layout.hint}: give "
                    "that folder"
                )
    pictures = sum(is_picture(name) for name in names)
    holds = [f"{pictures} pictures"] if pictures else []
    others = [name for name in names if name not in folders and not is_picture(name)]
    for kind, some in (("folders", folders), ("other files", others)):
        if some:
            holds.append(f"the {kind} {', '.join(some[:5])}{', ...' if len(some) > 5 else ''}")
    ways = " nor a ".join(layout.hint for layout in LAYOUTS.values())
    inside = [
        name for name in folders if name.lower() == "labels" or "labels" in visible(folder / name)
    ]
    way = (
        "write a data.yaml with `names`, `train` and `val` for its labels"
        if inside
        else "export the annotations in one of these layouts"
    )
    return (
        f"{folder}: holds {'; '.join(holds) or 'nothing'}; this is neither a {ways}. Way out: {way}"
    )


def split_names(config: DataConfig) -> list[str]:
    """The parts of a folder: those to train and evaluate on, then the others."""
    assert config.root is not None
    found = part_names(LAYOUTS[config.format].parts(Path(config.root)))
    asked = [config.train_split, config.eval_split]
    known = {other for name in asked for other in names_alike(name)}
    return list(dict.fromkeys([*asked, *(name for name in found if name not in known)]))


def open_part(
    config: DataConfig, name: str, images: int | None, task: str, skip_bad: bool = False
) -> Dataset:
    """Open a part of the data by its name, without cutting objects out for classification.

    Args:
        config: format, folder and seed.
        name: of the part.
        images: how many; None: all of a folder.
        task: what the data is for.
        skip_bad: leave missing pictures out.

    Raises:
        UserError: the format does not serve the task, or the cache cannot be written.
        DataError: the data is invalid; names files and records.
    """
    only = only_task(config.format)
    if only not in (None, task):
        raise UserError(f"data in the format {config.format!r} serves {only}, not {task}")
    if config.format in KINDS:
        assert images is not None
        size = config.image_size or SCENE_IMAGE_SIZE
        return ShapeScenes(name, images, size, config.seed, config.format)
    assert config.root is not None
    root, layout = Path(config.root), LAYOUTS[config.format]
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    part = find_part(layout.parts(root), name, config.seed, root)
    return layout.open(root, part, images, skip_bad)


def open_dataset(config: DataConfig, role: Role, task: str = "detection") -> Dataset:
    """Open the training or the evaluation part of the data, without decoding its pictures.

    For `classification` it is crops of the single objects, except where each image shows one.

    Raises:
        UserError: the format does not serve the task, or the cache cannot be written.
        DataError: an annotation file is invalid; names the file and the record.
    """
    dataset = open_part(config, *config.part_of(role), task)
    return crops_for(dataset, task)


def crops_for(dataset: Dataset, task: str) -> Dataset:
    """The objects of a data set as images of their own, where the task classifies them."""
    return ObjectCrops(dataset) if task == "classification" and not dataset.photographs else dataset


def export_coco(config: DataConfig, folder: str | os.PathLike[str]) -> list[Path]:
    """Write both splits of scenes as a COCO folder.

    Returns:
        The annotation files.

    Raises:
        UserError: the configuration is of a folder, or the folder cannot be written.
    """
    if config.format not in KINDS:
        raise UserError(f"only scenes can be exported, not {config.format!r}")
    size = config.image_size or SCENE_IMAGE_SIZE
    splits = dict([config.part_of("train"), config.part_of("eval")])
    return [
        export_split(folder, split, images or 0, size, config.seed, config.format)
        for split, images in splits.items()
    ]
