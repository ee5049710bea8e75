"""What every data set here has in common: compact annotations and one way to load.

Annotations lie in a few NumPy arrays rather than in one Python object a box, so that worker
processes share them and a set the size of COCO costs megabytes.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from effspinenet_lib.data.masks import RunLengths, encode_masks, paint_semantic
from effspinenet_lib.data.store import Shared
from effspinenet_lib.errors import DataError

# COCO's area limits, in original pixels: small below the first, large above the second.
SIZE_LIMITS = (32**2, 96**2)
SIZE_NAMES = ("small", "medium", "large")


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
        semantic: uint8 [H, W], 0 for the background, 1 more than the label for objects, 255
            where it does not count; loaded for segmentation.
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
class Annotations(Shared):
    """The images and boxes of a data set; boxes of image i are rows `starts[i]:starts[i + 1]`.

    Attributes:
        image_ids: int64 [N].
        file_names: str [N], or bytes [N] (as the file system has them) where their number calls
            for a quarter of the space.
        sizes: int64 [N, 2], height and width; 0 where they are not known before the file is read.
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

    def rows(self, index: int) -> slice:
        """Rows of the boxes of image `index`."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def file_name(self, index: int) -> str:
        """The name of image `index`; bytes that are no text stand in it as `os.fsdecode` has it."""
        name = self.file_names[index]
        return os.fsdecode(name) if isinstance(name, bytes) else str(name)


class AnnotationsBuilder:
    """Collects images, then boxes in any order, into `Annotations`."""

    def __init__(self) -> None:
        self._images: list[tuple[int, str, int, int]] = []
        self._owners: list[int] = []
        self._boxes: list[tuple[float, float, float, float]] = []
        self._facts: list[tuple[int, bool, float]] = []

    def add_image(self, image_id: int, file_name: str, height: int, width: int) -> int:
        """Append an image; returns its index."""
        self._images.append((image_id, file_name, height, width))
        return len(self._images) - 1

    def add_box(
        self,
        image: int,
        box: tuple[float, float, float, float],
        label: int,
        iscrowd: bool,
        area: float,
    ) -> None:
        """Append a box (x1 y1 x2 y2) of the image with index `image`."""
        self._owners.append(image)
        self._boxes.append(box)
        self._facts.append((label, iscrowd, area))

    def build(self) -> Annotations:
        """The arrays; boxes of one image keep the order in which they were added."""
        owners = np.asarray(self._owners, np.int64)
        order = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=len(self._images))
        ids, names, heights, widths = _columns(self._images, 4)
        labels, iscrowd, area = _columns(self._facts, 3)
        return Annotations(
            image_ids=np.asarray(ids, np.int64),
            file_names=np.asarray(names, np.str_),
            sizes=np.stack([np.asarray(heights, np.int64), np.asarray(widths, np.int64)], axis=1),
            starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes=np.asarray(self._boxes, np.float32).reshape(-1, 4)[order],
            labels=np.asarray(labels, np.int64)[order],
            iscrowd=np.asarray(iscrowd, np.bool_)[order],
            area=np.asarray(area, np.float32)[order],
        )


def _columns(rows: list[Any], count: int) -> list[tuple[Any, ...]]:
    return list(zip(*rows, strict=True)) if rows else [()] * count


class Dataset(ABC):
    """Images with boxes, read one at a time by index.

    Attributes:
        name: the data set and split, for messages and results.
        categories: the classes; `Sample.labels` index into them.
        annotations: the boxes as arrays.
        photographs: True where an image shows one object in whatever place, and is cropped for
            the network (see `photographs`) rather than fitted into its input.
        dropped: the annotations that are left out because they are degenerate, by name.
    """

    photographs: ClassVar[bool] = False
    dropped: tuple[str, ...] = ()

    def __init__(self, name: str, categories: Sequence[Category], annotations: Annotations) -> None:
        self.name = name
        self.categories = tuple(categories)
        self.annotations = annotations
        self._run_lengths: RunLengths | None = None

    @property
    def origin(self) -> str:
        """Where the annotations come from, for messages about one of them."""
        return self.name

    @abstractmethod
    def load_image(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as uint8 [H, W, 3], RGB.

        Raises:
            DataError: the file is missing or cannot be decoded.
        """

    @abstractmethod
    def ground_truth(self) -> dict[str, Any]:
        """The annotations as a COCO dictionary, with the original category ids.

        Segmentations are included where the data has them.
        """

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
            self._run_lengths = self._encode_masks()

    def _encode_masks(self) -> RunLengths:
        return encode_masks(self.ground_truth(), self.origin)

    def masks(self, index: int) -> NDArray[np.bool_]:
        """The masks of the boxes of image `index`, [M, H, W].

        Raises:
            DataError: the data set has none.
        """
        self.prepare("instances")
        assert self._run_lengths is not None
        rows = self.annotations.rows(index)
        height, width = self.annotations.sizes[index].tolist()
        return self._run_lengths.decode(rows, height, width, self.origin)

    def semantic(self, index: int) -> NDArray[np.uint8]:
        """The semantic labels of image `index`, [H, W]; see `Sample.semantic`.

        Raises:
            DataError: the data set has none.
        """
        rows = self.annotations.rows(index)
        return paint_semantic(
            self.masks(index), self.annotations.labels[rows], self.annotations.area[rows]
        )

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
        sizes = np.searchsorted(SIZE_LIMITS, table.area[objects], side="left")
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


def image_labels_truth(dataset: Dataset) -> dict[str, Any]:
    """The COCO dictionary of a data set of one box an image."""
    table = dataset.annotations
    return {
        "images": [
            {"id": int(number), "file_name": table.file_name(index), "height": h, "width": w}
            for index, (number, (h, w)) in enumerate(
                zip(table.image_ids, table.sizes.tolist(), strict=True)
            )
        ],
        "annotations": [
            {
                "id": row + 1,
                "image_id": int(table.image_ids[row]),
                "category_id": dataset.categories[label].id,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": area,
                "iscrowd": 0,
            }
            for row, (label, (x1, y1, x2, y2), area) in enumerate(
                zip(table.labels.tolist(), table.boxes.tolist(), table.area.tolist(), strict=True)
            )
        ],
        "categories": [{"id": c.id, "name": c.name} for c in dataset.categories],
    }


def classes_of(dataset: Dataset, task: str) -> int:
    """Classes that a model for `task` needs; in segmentation the background is one."""
    return len(dataset.categories) + (task == "segmentation")


def require_same_categories(first: Dataset, second: Dataset) -> None:
    """Check that labels mean the same in two data sets.

    Raises:
        DataError: the category lists differ; names the first difference.
    """
    if first.categories == second.categories:
        return
    pairs = zip_longest(first.categories, second.categories)
    here, there = next(pair for pair in pairs if pair[0] != pair[1])
    raise DataError(
        f"{first.name} and {second.name} do not list the same categories in the same order "
        f"({_name(here)} against {_name(there)}); give both the same list"
    )


def _name(category: Category | None) -> str:
    return f"id {category.id} {category.name!r}" if category else "none"
