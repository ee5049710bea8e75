"""What every data set here is: annotations in a few arrays, and one way to load an image.

Arrays rather than a Python object per box: a set the size of COCO costs megabytes, and forked
workers share the pages, since no reference counts in them are ever written to.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from effspinenet_lib.data.records import Fault, InvalidData, Truth, collect, finite
from effspinenet_lib.errors import DataError

# COCO's area limits, in original pixels: small below the first, large above the second.
SIZE_LIMITS = (32**2, 96**2)
SIZE_NAMES = ("small", "medium", "large")
# Semantic labels: 0 is the background, then the categories in order; this one is ignored.
SEMANTIC_IGNORE = 255
LEAST_POLYGON = 6  # numbers: three corners
CROP_CONTEXT = 1.25  # side of an object crop over the long side of the object (our choice)

ABSENT = -1  # the id of a category that a data set does not have (`Dataset.relabel`)


@dataclass(frozen=True)
class Category:
    """A class of objects, with its id in the annotation file."""

    id: int
    name: str


@dataclass
class Sample:
    """One image with its annotations.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        boxes: float32 [M, 4], x1 y1 x2 y2 in pixels of `image`, within the image.
        labels: int64 [M], index into the data set's `categories`.
        iscrowd: bool [M], regions to ignore rather than single objects.
        area: float32 [M], the annotated area in pixels (of the mask where there is one).
        image_id: the image's id in the annotation file.
        file_name: the image's name in the annotation file.
        masks: bool [M, H, W], the pixels of each box's object; loaded for instances.
        semantic: uint8 [H, W], 0 for the background, label + 1 for objects, 255 where pixels are
            ignored; loaded for segmentation.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    iscrowd: NDArray[np.bool_]
    area: NDArray[np.float32]
    image_id: int
    file_name: str
    masks: NDArray[np.bool_] | None = None
    semantic: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Annotations:
    """The images and boxes of a data set; boxes of image i are rows `starts[i]:starts[i + 1]`.

    Attributes:
        image_ids: int64 [N].
        file_names: str [N], or bytes [N] (as the file system has them), a quarter of the size.
        sizes: int64 [N, 2], height and width; 0 where they are unknown before the file is read.
        starts: int64 [N + 1].
        boxes: float64 [B, 4], x1 y1 x2 y2 in pixels, within the image.
        labels: int64 [B].
        iscrowd: bool [B].
        area: float64 [B].
    """

    image_ids: NDArray[np.int64]
    file_names: NDArray[np.str_] | NDArray[np.bytes_]
    sizes: NDArray[np.int64]
    starts: NDArray[np.int64]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    iscrowd: NDArray[np.bool_]
    area: NDArray[np.float64]

    @classmethod
    def from_coco(cls, truth: Mapping[str, Any]) -> Annotations:
        """The arrays of a COCO dictionary; boxes are clipped to their images, grouped by image."""
        images, records = truth["images"], truth["annotations"]
        index = {image["id"]: number for number, image in enumerate(images)}
        label = {category["id"]: number for number, category in enumerate(truth["categories"])}
        owners = np.array([index[record["image_id"]] for record in records], np.int64)
        order = np.argsort(owners, kind="stable")
        sizes = np.array([(i["height"], i["width"]) for i in images], np.int64).reshape(-1, 2)
        boxes = np.array([record["bbox"] for record in records], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = np.clip(boxes, 0, sizes[owners][:, [1, 0, 1, 0]])
        counts = np.bincount(owners, minlength=len(images))
        return cls(
            image_ids=np.array([image["id"] for image in images], np.int64),
            file_names=np.array([image["file_name"] for image in images], np.str_),
            sizes=sizes,
            starts=np.cumsum([0, *counts], dtype=np.int64),
            boxes=boxes[order],
            labels=np.array([label[r["category_id"]] for r in records], np.int64)[order],
            iscrowd=np.array([r.get("iscrowd", 0) for r in records], np.bool_)[order],
            area=np.array([r["area"] for r in records], np.float64)[order],
        )

    @classmethod
    def of_images(
        cls, ids: NDArray[np.int64], names: NDArray[Any], sizes: NDArray[np.int64], **boxes: Any
    ) -> Annotations:
        """Images with one box each (`labels`, `boxes`, `area`), or without any."""
        count = len(ids) if boxes else 0
        columns = {
            "boxes": np.zeros((count, 4), np.float64),
            "labels": np.zeros(count, np.int64),
            "iscrowd": np.zeros(count, np.bool_),
            "area": np.zeros(count, np.float64),
            **boxes,
        }
        return cls(ids, names, sizes, np.minimum(np.arange(len(ids) + 1), count), **columns)

    def rows(self, index: int) -> slice:
        """Rows of the boxes of image `index`."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def file_name(self, index: int) -> str:
        """The name of image `index`; bytes that are not UTF-8 are escaped as `os.fsdecode` does."""
        name = self.file_names[index]
        return os.fsdecode(name) if isinstance(name, bytes) else str(name)

    def select(self, keep: NDArray[np.bool_]) -> tuple[Annotations, NDArray[np.bool_]]:
        """The images where `keep` [N] is true; also which rows of boxes [B] these have."""
        counts = np.diff(self.starts)
        rows = np.repeat(keep, counts)
        starts = np.cumsum([0, *counts[keep]], dtype=np.int64)
        images = (self.image_ids[keep], self.file_names[keep], self.sizes[keep])
        columns = ("boxes", "labels", "iscrowd", "area")
        boxes = {column: getattr(self, column)[rows] for column in columns}
        return Annotations(*images, starts, **boxes), rows


@dataclass(frozen=True)
class RunLengths:
    """The masks of a data set as COCO's compressed run lengths, in the order of `Annotations`.

    Attributes:
        counts: uint8 [C], the run lengths of all, one after the other.
        starts: int64 [B + 1], where those of each begin.
    """

    counts: NDArray[np.uint8]
    starts: NDArray[np.int64]

    @classmethod
    def from_coco(cls, truth: Mapping[str, Any]) -> RunLengths:
        """Encode the `segmentation` of every annotation of a COCO dictionary.

        An annotation's `where` names it in messages.

        Raises:
            InvalidData: segmentations are missing or invalid; names each annotation.
        """
        order = {image["id"]: number for number, image in enumerate(truth["images"])}
        records = sorted(truth["annotations"], key=lambda record: order[record["image_id"]])

        def encode(record: Mapping[str, Any]) -> bytes:
            image = truth["images"][order[record["image_id"]]]
            where = str(record.get("where", f"annotation {record.get('id')}"))
            return _encode(record.get("segmentation"), image["height"], image["width"], where)

        encoded, faults = collect(encode, records)
        if faults:
            raise InvalidData(faults)
        counts = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(counts, np.cumsum([0, *map(len, encoded)], dtype=np.int64))

    def select(self, rows: NDArray[np.bool_]) -> RunLengths:
        """Those of the annotations where `rows` [B] is true."""
        lengths = np.diff(self.starts)
        starts = np.cumsum([0, *lengths[rows]], dtype=np.int64)
        return RunLengths(self.counts[np.repeat(rows, lengths)], starts)

    def of(self, row: int) -> bytes:
        """The run lengths of one annotation."""
        return self.counts[self.starts[row] : self.starts[row + 1]].tobytes()

    def decode(self, rows: slice, height: int, width: int) -> NDArray[np.bool_]:
        """The masks of rows of the annotations, [M, height, width]."""
        masks = np.zeros((rows.stop - rows.start, height, width), np.bool_)
        for mask, row in zip(masks, range(rows.start, rows.stop), strict=True):
            mask[:] = coco_mask.decode({"size": [height, width], "counts": self.of(row)})
        return masks


def encode_mask(mask: NDArray[np.bool_]) -> str:
    """COCO's compressed run lengths of a mask [H, W]."""
    counts: bytes = coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]
    return counts.decode("ascii")


def _encode(shape: Any, height: int, width: int, where: str) -> bytes:
    """The compressed run lengths of a segmentation: polygons, run lengths, compressed or not.

    Raises:
        DataError: there is none, or pycocotools would refuse it or take it for something else.
    """
    if not shape or (isinstance(shape, dict) and not shape.get("counts")):
        raise DataError(f"{where}: has no segmentation, which this task needs")
    if isinstance(shape, list):
        for polygon in shape:
            if not isinstance(polygon, list):
                raise DataError(
                    f"{where}: its segmentation is a list of {type(polygon).__name__}; a list of "
                    "polygons [[x1, y1, x2, y2, x3, y3, ...], ...] is needed"
                )
            if (
                len(polygon) < LEAST_POLYGON
                or len(polygon) % 2
                or not finite(polygon, len(polygon))
            ):
                raise DataError(
                    f"{where}: its segmentation has a polygon of {len(polygon)} values; 6 or more "
                    "finite numbers are needed, two a corner"
                )
    elif not isinstance(shape, dict):
        raise DataError(
            f"{where}: its segmentation is {shape!r:.40}; polygons or run lengths are needed"
        )
    elif shape.get("size") != [height, width]:
        raise DataError(
            f"{where}: its segmentation is of the size {shape.get('size')!r:.40}, the image has "
            f"{height} rows and {width} columns"
        )
    try:
        if isinstance(shape, dict) and isinstance(shape["counts"], str):
            encoded = shape
            coco_mask.decode(encoded)
        else:
            if isinstance(shape, dict) and sum(shape["counts"]) != height * width:
                raise ValueError(f"its counts do not sum to {height * width} pixels")
            parts = coco_mask.frPyObjects(shape, height, width)
            encoded = coco_mask.merge(parts) if isinstance(shape, list) else parts
    except Exception as error:  # pycocotools raises bare ones too
        raise DataError(f"{where}: its segmentation is invalid ({error})") from error
    counts = encoded["counts"]
    return counts.encode("ascii") if isinstance(counts, str) else bytes(counts)


def paint_semantic(
    masks: NDArray[np.bool_], labels: NDArray[np.int64], areas: NDArray[Any]
) -> NDArray[np.uint8]:
    """Semantic labels uint8 [H, W] of instance masks [M, H, W]: 0, then the categories from 1.

    Smaller objects are painted over larger ones (our choice).
    """
    painted = np.zeros(masks.shape[1:], np.uint8)
    for index in np.argsort(-areas, kind="stable"):
        painted[masks[index]] = labels[index] + 1
    return painted


class Dataset(ABC):
    """Images with boxes, read one at a time by index.

    Attributes:
        name: the data set and split, for messages and results.
        categories: the classes; `Sample.labels` index into them.
        annotations: the boxes as arrays.
        image_folder: where the image files are; None where images are made.
        photographs: True where an image shows one object anywhere in it, and is cropped for the
            network rather than fitted into its input.
        record: what a run records of how the data came about: a split that was made, bad images
            that were left out.
    """

    photographs: ClassVar[bool] = False
    image_folder: Path | None = None

    def __init__(self, name: str, categories: Sequence[Category], annotations: Annotations) -> None:
        self.name = name
        self.categories = tuple(categories)
        self.annotations = annotations
        self.record: dict[str, Any] = {}
        self._run_lengths: RunLengths | None = None

    @abstractmethod
    def load_image(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as uint8 [H, W, 3], RGB.

        Raises:
            DataError: the file is missing or cannot be decoded.
        """

    def ground_truth(self, masks: bool = False) -> Truth:
        """The annotations as a COCO dictionary; boxes as they are trained on, within the images.

        With `masks` each has its `segmentation`, compressed run lengths.
        """
        table = self.annotations
        owners = np.repeat(np.arange(len(self)), np.diff(table.starts)).tolist()
        ids, sizes = table.image_ids.tolist(), table.sizes.tolist()
        boxes = np.concatenate([table.boxes[:, :2], table.boxes[:, 2:] - table.boxes[:, :2]], 1)
        columns = (owners, boxes.tolist(), table.labels.tolist(), table.area.tolist(),
                   table.iscrowd.tolist())  # fmt: skip
        annotations: list[Truth] = [
            {
                "id": number,
                "image_id": ids[owner],
                "category_id": self.categories[label].id,
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (owner, box, label, area, crowd) in enumerate(
                zip(*columns, strict=True), start=1
            )
        ]
        if masks:
            self.prepare("instances")
            assert self._run_lengths is not None
            for row, owner in enumerate(owners):
                counts = self._run_lengths.of(row).decode("ascii")
                annotations[row]["segmentation"] = {"size": sizes[owner], "counts": counts}
        images = [
            {"id": ids[n], "file_name": table.file_name(n), "height": h, "width": w}
            for n, (h, w) in enumerate(sizes)
        ]
        categories = [{"id": c.id, "name": c.name} for c in self.categories if c.id != ABSENT]
        return {
            "info": {"description": self.name},
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }

    def relabel(self, categories: Sequence[Category], whose: str) -> None:
        """Let labels index into the categories of other data or of weights, matched by name.

        Those of one name are told apart by their order. Categories that this data set lacks get
        the id `ABSENT`; those that have no objects in it are left out.

        Raises:
            InvalidData: objects are of categories that are not among `categories`.
        """
        if [c.name for c in categories] == [c.name for c in self.categories]:
            return
        places = {key: place for place, key in enumerate(_numbered(categories))}
        found = dict(zip(_numbered(self.categories), self.categories, strict=True))
        new = np.array([places.get(key, -1) for key in found], np.int64)
        counts = np.bincount(self.annotations.labels, minlength=len(new))
        unknown = [
            f"{counts[place]} of {category.name!r}"
            for place, category in enumerate(self.categories)
            if new[place] < 0 and counts[place]
        ]
        if unknown:
            raise InvalidData(
                [
                    Fault(
                        f"{self.name}: has objects of other categories than {whose}: "
                        f"{', '.join(unknown)}; rename or remove them, or add them to {whose}"
                    )
                ]
            )
        self.annotations = replace(self.annotations, labels=new[self.annotations.labels])
        self.categories = tuple(
            found.get(key, Category(ABSENT, key[0])) for key in _numbered(categories)
        )

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def image_id(self, index: int) -> int:
        """The id of image `index` in the annotation file."""
        return int(self.annotations.image_ids[index])

    def prepare(self, task: str) -> None:
        """Read what `task` needs besides boxes, before worker processes share it.

        Raises:
            DataError: the data set lacks it.
        """
        if task in ("instances", "segmentation") and self._run_lengths is None:
            self._run_lengths = self._read_masks()

    def _read_masks(self) -> RunLengths:
        raise DataError(f"{self.name} has no masks")

    def masks(self, index: int) -> NDArray[np.bool_]:
        """The masks of the boxes of image `index`, [M, H, W].

        Raises:
            DataError: the data set has none.
        """
        self.prepare("instances")
        assert self._run_lengths is not None
        height, width = self.annotations.sizes[index].tolist()
        return self._run_lengths.decode(self.annotations.rows(index), height, width)

    def semantic(self, index: int) -> NDArray[np.uint8]:
        """The semantic labels of image `index`, [H, W]; see `Sample.semantic`.

        Raises:
            DataError: the data set has none.
        """
        table, rows = self.annotations, self.annotations.rows(index)
        return paint_semantic(self.masks(index), table.labels[rows], table.area[rows])

    def load(self, index: int, task: str = "detection") -> Sample:
        """Image `index` with the annotations that `task` needs."""
        table, rows = self.annotations, self.annotations.rows(index)
        return Sample(
            image=self.load_image(index),
            boxes=table.boxes[rows].astype(np.float32),
            labels=table.labels[rows].copy(),
            iscrowd=table.iscrowd[rows].copy(),
            area=table.area[rows].astype(np.float32),
            image_id=self.image_id(index),
            file_name=table.file_name(index),
            masks=self.masks(index) if task == "instances" else None,
            semantic=self.semantic(index) if task == "segmentation" else None,
        )

    def files_digest(self) -> str:
        """A digest of names, sizes and times of the image files; "" where there are none."""
        return ""

    def masks_digest(self) -> str:
        """A digest of the masks; "" where none have been read."""
        masks = self._run_lengths
        return "" if masks is None else hashlib.sha256(masks.counts.tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Counts: images, empty images, objects, crowds, and objects by class and COCO size."""
        table = self.annotations
        objects = ~table.iscrowd
        sizes = np.searchsorted(SIZE_LIMITS, table.area[objects])
        counts = np.zeros((len(self.categories), len(SIZE_NAMES)), np.int64)
        np.add.at(counts, (table.labels[objects], sizes), 1)
        names = Counter(category.name for category in self.categories)
        unique = [
            c.name if names[c.name] == 1 else f"{c.name} (id {c.id})" for c in self.categories
        ]
        return {
            "name": self.name,
            "images": len(self),
            "images_without_boxes": int(np.count_nonzero(np.diff(table.starts) == 0)),
            "objects": int(objects.sum()),
            "crowds": int(table.iscrowd.sum()),
            "sizes": dict(zip(SIZE_NAMES, counts.sum(axis=0).tolist(), strict=True)),
            "classes": {
                name: dict(zip(SIZE_NAMES, row, strict=True))
                for name, row in zip(unique, counts.tolist(), strict=True)
            },
            **self.record,
        }


class ObjectCrops(Dataset):
    """Square crops of the single objects of a data set, for classification; crowds are left out.

    Each is an image with one box, that of its object; the label of the box is the image's. The
    side is `CROP_CONTEXT` times the long side of the object's box; beyond the edge of the image
    its outermost pixels are repeated.
    """

    def __init__(self, whole: Dataset) -> None:
        table = whole.annotations
        rows = np.flatnonzero(~table.iscrowd)
        boxes = table.boxes[rows].astype(np.float32)
        long_sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        self._whole = whole
        self._owners = np.searchsorted(table.starts, rows, side="right") - 1
        self._sides = np.maximum(1, np.round(CROP_CONTEXT * long_sides)).astype(np.int64)
        self._corners = centres.astype(np.int64) - self._sides[:, None] // 2  # left, top
        numbers = rows - table.starts[self._owners] + 1
        names = [f"{table.file_name(o)}#{n}" for o, n in zip(self._owners, numbers, strict=True)]
        annotations = Annotations.of_images(
            np.arange(1, len(rows) + 1),
            np.array(names, np.str_),
            np.stack([self._sides, self._sides], axis=1),
            boxes=boxes - np.tile(self._corners, 2),
            labels=table.labels[rows],
            area=table.area[rows],
        )
        super().__init__(f"objects of {whole.name}", whole.categories, annotations)
        self.record = whole.record

    def files_digest(self) -> str:
        """That of the data set whose objects these are."""
        return self._whole.files_digest()

    def load_image(self, index: int) -> NDArray[np.uint8]:
        """Crop `index` as uint8 [C, C, 3], RGB."""
        image = self._whole.load_image(int(self._owners[index]))
        left, top = self._corners[index]
        offsets = np.arange(self._sides[index])
        rows = np.clip(top + offsets, 0, image.shape[0] - 1)
        columns = np.clip(left + offsets, 0, image.shape[1] - 1)
        return image[rows[:, None], columns]


def classes_of(dataset: Dataset, task: str) -> int:
    """Classes that a model for `task` needs; in segmentation the background is one."""
    return len(dataset.categories) + (task == "segmentation")


def _numbered(categories: Sequence[Category]) -> list[tuple[str, int]]:
    """The name of each category, and how many of the name come before it."""
    seen: defaultdict[str, int] = defaultdict(int)
    numbered = []
    for category in categories:
        name = unicodedata.normalize("NFC", category.name)
        numbered.append((name, seen[name]))
        seen[name] += 1
    return numbered
