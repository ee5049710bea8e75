"""What every data set here is: annotations in a few arrays, and one way to load an image.

Arrays rather than a Python object per box: a set the size of COCO costs megabytes, and forked
workers share the pages, since no reference counts in them are ever written to.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from effspinenet_lib.errors import DataError

# COCO's area limits, in original pixels: small below the first, large above the second.
SIZE_LIMITS = (32**2, 96**2)
SIZE_NAMES = ("small", "medium", "large")
# Semantic labels: 0 is the background, then the categories in order; this one is ignored.
SEMANTIC_IGNORE = 255
CROP_CONTEXT = 1.25  # side of an object crop over the long side of the object (our choice)

Truth = dict[str, Any]  # a COCO dictionary: images, annotations, categories


class InvalidData(DataError):  # noqa: N818 - it says what is wrong
    """Faults of a data folder; the message gives the first and how many there are.

    Attributes:
        faults: the file that each is about ("" where it is in the message), and its message.
        kind: "missing" for image files, else "invalid".
    """

    def __init__(self, faults: Sequence[tuple[str, str]], kind: str = "invalid") -> None:
        super().__init__(faults, kind)
        self.faults, self.kind = faults, kind

    def __str__(self) -> str:
        first, count = self.faults[0][1], len(self.faults)
        more = f" ({count} faults; `effspinenet data check` lists them)"
        return first + (more if count > 1 else "")


def collect_faults(check: Callable[..., Any], records: Iterable[Any]) -> list[Any]:
    """`check` of every record.

    Raises:
        InvalidData: `check` raised `DataError` for some; holds all of them.
    """
    good, faults = [], []
    for record in records:
        try:
            good.append(check(record))
        except DataError as error:
            faults.append(("", str(error)))
    if faults:
        raise InvalidData(faults)
    return good


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
        boxes: float32 [B, 4], x1 y1 x2 y2 in pixels, within the image.
        labels: int64 [B].
        iscrowd: bool [B].
        area: float32 [B].
    """

    image_ids: NDArray[np.int64]
    file_names: NDArray[np.str_] | NDArray[np.bytes_]
    sizes: NDArray[np.int64]
    starts: NDArray[np.int64]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    iscrowd: NDArray[np.bool_]
    area: NDArray[np.float32]

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
            boxes=boxes.astype(np.float32)[order],
            labels=np.array([label[r["category_id"]] for r in records], np.int64)[order],
            iscrowd=np.array([r["iscrowd"] for r in records], np.bool_)[order],
            area=np.array([r["area"] for r in records], np.float32)[order],
        )

    @classmethod
    def of_images(
        cls, ids: NDArray[np.int64], names: NDArray[Any], sizes: NDArray[np.int64], **boxes: Any
    ) -> Annotations:
        """Images with one box each (`labels`, `boxes`, `area`), or without any."""
        count = len(ids) if boxes else 0
        columns = {
            "boxes": np.zeros((count, 4), np.float32),
            "labels": np.zeros(count, np.int64),
            "iscrowd": np.zeros(count, np.bool_),
            "area": np.zeros(count, np.float32),
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
    def from_coco(cls, truth: Mapping[str, Any], origin: str) -> RunLengths:
        """Encode the `segmentation` of every annotation of a COCO dictionary.

        Raises:
            InvalidData: segmentations are missing or invalid; names each annotation.
        """
        order = {image["id"]: number for number, image in enumerate(truth["images"])}
        records = sorted(truth["annotations"], key=lambda record: order[record["image_id"]])

        def encode(record: Mapping[str, Any]) -> bytes:
            image = truth["images"][order[record["image_id"]]]
            where = f"{origin}: annotation {record['id']}"
            return _encode(record.get("segmentation"), image["height"], image["width"], where)

        encoded = collect_faults(encode, records)
        counts = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(counts, np.cumsum([0, *map(len, encoded)], dtype=np.int64))

    def select(self, rows: NDArray[np.bool_]) -> RunLengths:
        """Those of the annotations where `rows` [B] is true."""
        lengths = np.diff(self.starts)
        starts = np.cumsum([0, *lengths[rows]], dtype=np.int64)
        return RunLengths(self.counts[np.repeat(rows, lengths)], starts)

    def decode(self, rows: slice, height: int, width: int) -> NDArray[np.bool_]:
        """The masks of rows of the annotations, [M, height, width]."""
        masks = np.zeros((rows.stop - rows.start, height, width), np.bool_)
        for mask, row in zip(masks, range(rows.start, rows.stop), strict=True):
            counts = self.counts[self.starts[row] : self.starts[row + 1]].tobytes()
            mask[:] = coco_mask.decode({"size": [height, width], "counts": counts})
        return masks


def encode_mask(mask: NDArray[np.bool_]) -> str:
    """COCO's compressed run lengths of a mask [H, W]."""
    counts: bytes = coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]
    return counts.decode("ascii")


def _encode(shape: Any, height: int, width: int, where: str) -> bytes:
    """The compressed run lengths of a segmentation: polygons, run lengths, compressed or not."""
    if not shape or (isinstance(shape, dict) and not shape.get("counts")):
        raise DataError(f"{where}: has no segmentation, which this task needs")
    try:
        if isinstance(shape, dict) and isinstance(shape["counts"], str | bytes):
            encoded = shape
            coco_mask.area(encoded)
        else:
            parts = coco_mask.frPyObjects(shape, height, width)
            encoded = coco_mask.merge(parts) if isinstance(shape, list) else parts
    except Exception as error:  # pycocotools raises bare ones too
        raise DataError(f"{where}: its segmentation is invalid ({error})") from error
    rows, columns = encoded["size"]
    if (rows, columns) != (height, width):
        raise DataError(
            f"{where}: its segmentation is of {columns} x {rows} pixels, the image of "
            f"{width} x {height}"
        )
    counts = encoded["counts"]
    return counts.encode("ascii") if isinstance(counts, str) else bytes(counts)


def paint_semantic(
    masks: NDArray[np.bool_], labels: NDArray[np.int64], areas: NDArray[np.float32]
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
        origin: where the annotations come from, for messages about one of them.
        photographs: True where an image shows one object anywhere in it, and is cropped for the
            network rather than fitted into its input.
        dropped: the annotations that are left out because they are degenerate, by name.
    """

    photographs: ClassVar[bool] = False
    dropped: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        categories: Sequence[Category],
        annotations: Annotations,
        origin: object = None,
    ) -> None:
        self.name = name
        self.categories = tuple(categories)
        self.annotations = annotations
        self.origin = str(origin or name)
        self._run_lengths: RunLengths | None = None

    @abstractmethod
    def load_image(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as uint8 [H, W, 3], RGB.

        Raises:
            DataError: the file is missing or cannot be decoded.
        """

    def ground_truth(self) -> Truth:
        """The annotations as a COCO dictionary, with the original ids; only where there are boxes.

        Boxes are as annotated; segmentations are included where the data has them.
        """
        raise NotImplementedError(f"{self.name} has no boxes")

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
        return RunLengths.from_coco(self.ground_truth(), self.origin)

    def masks(self, index: int) -> NDArray[np.bool_]:
        """The masks of the boxes of image `index`, [M, H, W].

        Raises:
            DataError: the data set has none, or one does not fill the image.
        """
        self.prepare("instances")
        assert self._run_lengths is not None
        height, width = self.annotations.sizes[index].tolist()
        try:
            return self._run_lengths.decode(self.annotations.rows(index), height, width)
        except ValueError as error:
            name = self.annotations.file_name(index)
            raise DataError(
                f"{self.origin}: {name}: a segmentation is invalid ({error})"
            ) from error

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
            boxes=table.boxes[rows].copy(),
            labels=table.labels[rows].copy(),
            iscrowd=table.iscrowd[rows].copy(),
            area=table.area[rows].copy(),
            image_id=self.image_id(index),
            file_name=table.file_name(index),
            masks=self.masks(index) if task == "instances" else None,
            semantic=self.semantic(index) if task == "segmentation" else None,
        )

    def describe(self) -> dict[str, Any]:
        """Counts: images, empty images, objects, crowds, and objects by class and COCO size."""
        table = self.annotations
        objects = ~table.iscrowd
        sizes = np.searchsorted(SIZE_LIMITS, table.area[objects])
        counts = np.zeros((len(self.categories), len(SIZE_NAMES)), np.int64)
        np.add.at(counts, (table.labels[objects], sizes), 1)
        return {
            "name": self.name,
            "images": len(self),
            "images_without_boxes": int(np.count_nonzero(np.diff(table.starts) == 0)),
            "objects": int(objects.sum()),
            "crowds": int(table.iscrowd.sum()),
            "sizes": dict(zip(SIZE_NAMES, counts.sum(axis=0).tolist(), strict=True)),
            "classes": {
                category.name: dict(zip(SIZE_NAMES, row, strict=True))
                for category, row in zip(self.categories, counts.tolist(), strict=True)
            },
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
        boxes = table.boxes[rows]
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
            boxes=(boxes - np.tile(self._corners, 2)).astype(np.float32),
            labels=table.labels[rows],
            area=table.area[rows],
        )
        super().__init__(f"objects of {whole.name}", whole.categories, annotations)

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


def require_same_categories(first: Dataset, second: Dataset) -> None:
    """Check that labels mean the same in two data sets.

    Raises:
        DataError: the category lists differ; names the first difference.
    """
    for one, two in zip_longest(first.categories, second.categories):
        if one != two:
            here, there = (f"id {c.id} {c.name!r}" if c else "none" for c in (one, two))
            raise DataError(
                f"{first.name} and {second.name} do not list the same categories in the same "
                f"order ({here} against {there}); give both the same list"
            )
