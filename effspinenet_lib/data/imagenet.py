"""Folders in ImageNet's layout: `<split>/<class>/*.JPEG`, one folder a class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effspinenet_lib.data.dataset import Annotations, Category
from effspinenet_lib.data.folders import FolderDataset
from effspinenet_lib.errors import DataError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")


class ImageNetFolder(FolderDataset):
    """A split of a folder in ImageNet's layout, for classification.

    The classes are the names of the class folders, sorted, with ids from 1; images have ids from
    1 in the order of class and name. Each image has one box, which only carries its label: it is
    empty, since sizes are not read before an image is loaded (opening 1.28 million files would
    take longer than many a run).
    """

    layout = "ImageNet folder (train/<class>/*.JPEG, val/<class>/*.JPEG)"
    only_task = "classification"
    photographs = True

    def __init__(self, root: str | os.PathLike[str], split: str, images: int | None = None) -> None:
        """Open the split.

        `images` limits it to so many: the first of each class, then the second of each, and so on.

        Raises:
            DataError: the split or its classes are missing, or a class has no images.
        """
        folder = Path(root) / split
        if not folder.is_dir():
            found = ", ".join(_folders(folder.parent)) or "none"
            raise DataError(f"{folder}: no such split; splits found: {found}")
        classes = _folders(folder)
        if not classes:
            raise DataError(f"{folder}: has no folders of classes; <class>/*.JPEG are expected")
        names = [_image_names(folder, name) for name in classes]
        counts = [len(files) for files in names]
        labels = np.repeat(np.arange(len(names)), counts)
        ranks = np.concatenate([np.arange(count) for count in counts])
        kept = np.sort(np.lexsort((labels, ranks))[:images])
        sizes = np.zeros((len(kept), 2), np.int64)
        annotations = Annotations.of_images(
            kept + 1, np.concatenate(names)[kept], sizes, labels=labels[kept]
        )
        categories = [Category(number, name) for number, name in enumerate(classes, start=1)]
        super().__init__(f"{Path(root).name} {split}", categories, annotations, folder)

    @classmethod
    def splits(cls, folder: Path) -> list[str]:
        """The names of the folders with classes, sorted; none without one that is called train."""
        names = [name for name in _folders(folder) if _folders(folder / name)]
        return names if "train" in names else []


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


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
