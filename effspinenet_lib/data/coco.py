"""Folders in COCO's layout: `annotations/instances_<split>.json` and a folder of images."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from effspinenet_lib.data.dataset import Annotations, Category, RunLengths, Truth
from effspinenet_lib.data.folders import FolderDataset, cached_arrays, check_records, need
from effspinenet_lib.errors import DataError, UserError
from effspinenet_lib.files import read_json

PREFIX = "instances_"
YEAR = "2017"  # COCO 2017's splits are known as train and val, its files carry the year
TABLES = {"images": "image", "annotations": "annotation", "categories": "category"}


class HeldOutSplit(NamedTuple):
    """One side of a split cut in two, by a rule that anyone can repeat.

    Of the split's file names (the last part of a path, such as `000000000009.jpg`) those with the
    lowest SHA-256 are held out; the rest is trained on. So neither the order of the annotation
    file nor a random generator decides it.

    Attributes:
        split: the name of the whole.
        side: "held" or "rest".
        size: images held out.
    """

    split: str
    side: str
    size: int

    @property
    def name(self) -> str:
        """The name as `DataConfig` takes it: `train2017-held-7392`."""
        return f"{self.split}-{self.side}-{self.size}"

    @classmethod
    def parse(cls, name: str) -> HeldOutSplit | None:
        """What a split's name stands for; None for the name of a whole split."""
        match = re.fullmatch(r"(.+)-(held|rest)-([1-9][0-9]*)", name)
        return cls(match[1], match[2], int(match[3])) if match else None

    def select(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """Which of a split's images belong to this side, bool [N].

        Images of the same name in different folders are told apart by their whole path.

        Raises:
            UserError: the split has no more images than are to be held out.
        """
        if self.size >= len(names):
            raise UserError(
                f"{self.split} has {len(names)} images, too few to hold {self.size} out"
            )
        files = [os.fsencode(PurePosixPath(name).name) for name in names]
        digests = [hashlib.sha256(file).digest() for file in files]
        order = sorted(range(len(names)), key=lambda index: (digests[index], names[index]))
        held = np.zeros(len(names), np.bool_)
        held[order[: self.size]] = True
        return held if self.side == "held" else ~held


class CocoFolder(FolderDataset):
    """A split of a folder in COCO's layout.

    "train" also finds `instances_train2017.json`. Images are looked for in `<split>/`,
    `<split>2017/`, the same below `images/`, `images/` itself and the folder itself.
    Segmentations are read where a task needs masks. `train-held-100` and `train-rest-100` are the
    two sides of a split (`HeldOutSplit`).
    """

    layout = "COCO folder (annotations/instances_<split>.json, <split>/)"

    def __init__(self, root: str | os.PathLike[str], split: str, images: int | None = None) -> None:
        """Open the split; `images` limits it to the first so many images in id order.

        Raises:
            DataError: the annotation file is invalid or images are missing; names the records.
            UserError: the cache cannot be written, or all images would be held out.
        """
        part = HeldOutSplit.parse(split)
        whole = part.split if part else split
        self.path = _annotation_file(Path(root), whole)
        arrays = cached_arrays(self.path, "boxes", self._read_boxes)
        categories, dropped = arrays.pop("categories"), arrays.pop("dropped")
        annotations = Annotations(**arrays)
        names = annotations.file_names.tolist()
        keep = part.select(names) if part else np.ones(len(names), np.bool_)
        if images is not None:
            keep[np.flatnonzero(keep)[images:]] = False
        annotations, self._rows = annotations.select(keep)
        kept = set(annotations.image_ids.tolist())
        super().__init__(
            f"{Path(root).name} {split}",
            [Category(int(n), str(name)) for n, name in categories],
            annotations,
            _image_folder(Path(root), whole, annotations.file_name(0), self.path),
            self.path,
            [str(name) for number, name in dropped if int(number) in kept],
        )

    @classmethod
    def splits(cls, folder: Path) -> list[str]:
        """The names of the splits, sorted.

        Where there are `instances_*.json`, other files (captions, keypoints) are not splits.
        """
        stems = [path.stem for path in (folder / "annotations").glob("*.json")]
        instances = [stem.removeprefix(PREFIX) for stem in stems if stem.startswith(PREFIX)]
        return sorted(instances or stems)

    def ground_truth(self) -> Truth:
        """The annotations as a COCO dictionary, read from the file again."""
        truth, _ = _read(self.path)
        kept = set(self.annotations.image_ids.tolist())
        truth["images"] = [image for image in truth["images"] if image["id"] in kept]
        truth["annotations"] = [r for r in truth["annotations"] if r["image_id"] in kept]
        return truth

    def _read_boxes(self) -> dict[str, NDArray[Any]]:
        truth, dropped = _read(self.path, masks=False)
        categories = [(str(entry["id"]), entry["name"]) for entry in truth["categories"]]
        arrays = vars(Annotations.from_coco(truth))
        return {**arrays, "categories": np.array(categories), "dropped": dropped}

    def _read_masks(self) -> RunLengths:
        def read() -> dict[str, NDArray[Any]]:
            return vars(RunLengths.from_coco(_read(self.path)[0], self.origin))

        return RunLengths(**cached_arrays(self.path, "masks", read)).select(self._rows)


def _annotation_file(root: Path, split: str) -> Path:
    folder = root / "annotations"
    for name in (f"{PREFIX}{split}", f"{PREFIX}{split}{YEAR}", split, f"{split}{YEAR}"):
        path = folder / f"{name}.json"
        if path.is_file():
            return path
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    found = ", ".join(CocoFolder.splits(root)) or "none"
    raise DataError(f"{folder}: has no {PREFIX}{split}.json; splits found: {found}")


def _image_folder(root: Path, split: str, first_image: str, source: Path) -> Path:
    """The folder that has the first image; the first one that exists if none has."""
    names = dict.fromkeys((split, source.stem.removeprefix(PREFIX), f"{split}{YEAR}"))
    folders = [parent / name for parent in (root, root / "images") for name in names]
    folders += [root / "images", root]
    for folder in folders:
        if os.path.isfile(folder / first_image):
            return folder
    return next(folder for folder in folders if folder.is_dir())


def _read(path: Path, masks: bool = True) -> tuple[Truth, NDArray[np.str_]]:
    """The checked content of an annotation file, and what was degenerate in it.

    Without masks, which are nearly all of such a file, it takes a quarter of the memory.
    """

    def without_masks(record: Truth) -> Truth:
        record.pop("segmentation", None)
        return record

    content = read_json(path, None if masks else without_masks)

    def named(table: str, kind: str) -> Iterator[tuple[str, Any]]:
        for number, record in enumerate(content[table], start=1):
            known = isinstance(record, dict) and "id" in record
            yield f"{path}: {kind} {record['id'] if known else f'number {number}'}", record

    for table in TABLES:
        if not isinstance(need(content, table, str(path)), list):
            raise DataError(f"{path}: {table} must be a list")
    truth, dropped = check_records(path, *(named(*table) for table in TABLES.items()))
    return {"info": {"description": path.name}, **truth}, dropped
