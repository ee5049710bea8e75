"""Folders in ImageNet's layout: `<split>/<class>/*.JPEG`, one folder a class.

Sizes and pixels are not looked at before an image is loaded: opening 1.28 million files would
take longer than many a run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effspinenet_lib.data.dataset import Annotations, Category, Dataset, image_labels_truth
from effspinenet_lib.data.formats import decode_image
from effspinenet_lib.errors import DataError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")


class ImageNetFolder(Dataset):
    """A split of a folder in ImageNet's layout, for classification.

    The classes are the names of the class folders, sorted, with ids from 1; images have ids from
    1 in the order of class and name. Each image has one box, which only carries its label: it is
    empty, since the size of the image is not known.
    """

    photographs = True

    def __init__(self, root: str | os.PathLike[str], split: str, images: int | None = None) -> None:
        """Open the split.

        `images` limits it to so many: the first of each class, then the second of each, and so on.

        Raises:
            DataError: the split or its classes are missing, or a class has no images.
        """
        self.folder = Path(root) / split
        classes = _class_names(self.folder)
        names = [_image_names(self.folder, name) for name in classes]
        categories = [Category(number, name) for number, name in enumerate(classes, start=1)]
        super().__init__(f"{Path(root).name} {split}", categories, _annotations(names, images))

    @property
    def origin(self) -> str:
        """The split's folder."""
        return str(self.folder)

    def image_path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.folder / self.annotations.file_name(index)

    def load_image(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as uint8 [H, W, 3], RGB.

        Raises:
            DataError: the file is missing or cannot be decoded.
        """
        return decode_image(self.image_path(index))

    def ground_truth(self) -> dict[str, Any]:
        """The annotations as a COCO dictionary: one empty box an image."""
        return image_labels_truth(self)


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in `folder` that may hold a class, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        found = class_folders(folder.parent) if folder.parent.is_dir() else []
        raise DataError(f"{folder}: no such split; splits found: {', '.join(found) or 'none'}")
    names = class_folders(folder)
    if not names:
        raise DataError(f"{folder}: has no folders of classes; <class>/*.JPEG are expected")
    return names


def _image_names(folder: Path, name: str) -> NDArray[np.bytes_]:
    """The images of a class, sorted, relative to `folder`: bytes [N], a fraction of Python's."""
    with os.scandir(folder / name) as entries:
        files = sorted(
            os.fsencode(f"{name}/{entry.name}")
            for entry in entries
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith(".")
        )
    if not files:
        raise DataError(f"{folder / name}: the class has no images ({', '.join(IMAGE_SUFFIXES)})")
    return np.array(files)


def _annotations(names: list[NDArray[np.bytes_]], limit: int | None) -> Annotations:
    counts = [len(files) for files in names]
    labels = np.repeat(np.arange(len(names)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    kept = np.sort(np.lexsort((labels, ranks))[:limit])
    return Annotations(
        image_ids=kept + 1,
        file_names=np.concatenate(names)[kept],
        sizes=np.zeros((len(kept), 2), np.int64),
        starts=np.arange(len(kept) + 1),
        boxes=np.zeros((len(kept), 4), np.float32),
        labels=labels[kept],
        iscrowd=np.zeros(len(kept), np.bool_),
        area=np.zeros(len(kept), np.float32),
    )
