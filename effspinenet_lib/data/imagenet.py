"""Class folders: ImageNet's layout `<part>/<class>/*.JPEG`, or `<class>/*` without parts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effspinenet_lib.data.dataset import Annotations, Category
from effspinenet_lib.data.folders import FolderDataset, Layout
from effspinenet_lib.data.pictures import PICTURE_SUFFIXES, is_picture, visible
from effspinenet_lib.data.records import Fault, InvalidData
from effspinenet_lib.data.splits import WHOLE, Part, part_in

# Folders of these names belong to other layouts and are no classes.
NO_CLASSES = {"images", "labels", "annotations", "annots", "masks", "jpegimages", "imagesets"}


class ClassFolders(FolderDataset):
    """A part of a folder of classes, for classification.

    The classes are the names of the class folders, sorted, with ids from 1; images have ids from
    1 in the order of class and name. Each image has one box, which only carries its label: it is
    empty, since sizes are not read before an image is loaded (opening 1.28 million files would
    take longer than many a run).
    """

    photographs = True

    def __init__(self, root: Path, part: Part, images: int | None, skip_bad: bool) -> None:
        """Open the part.

        `images` limits it to so many: the first of each class, then the second of each, and so on.

        Raises:
            InvalidData: classes have no images.
        """
        del skip_bad  # images were found in the folder, and are not opened here
        folder = part.place
        classes = subfolders(folder)
        names = [_image_names(folder, name) for name in classes]
        empty = [name for name, files in zip(classes, names, strict=True) if not len(files)]
        if empty:
            suffixes = ", ".join(PICTURE_SUFFIXES)
            raise InvalidData(
                [Fault(f"{folder / n}: the class has no images ({suffixes})") for n in empty]
            )
        counts = [len(files) for files in names]
        labels = np.repeat(np.arange(len(names)), counts)
        files = np.concatenate(names)
        rows = np.arange(len(files))
        if part.cut:
            rows = np.flatnonzero(part.select([*map(os.fsdecode, files.tolist())], labels))
        ranks = np.concatenate([np.arange(count) for count in counts])[rows]
        rows = rows[np.sort(np.lexsort((labels[rows], ranks))[:images])]
        super().__init__(
            f"{root.name} {part.name}",
            [Category(number, name) for number, name in enumerate(classes, start=1)],
            Annotations.of_images(
                rows + 1, files[rows], np.zeros((len(rows), 2), np.int64), labels=labels[rows]
            ),
            folder,
            part,
        )


def subfolders(folder: Path) -> list[str]:
    """The folders in a folder, sorted, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError:
        return []


def _image_names(folder: Path, name: str) -> NDArray[np.bytes_]:
    """The images of a class, sorted, relative to `folder`: bytes [N], a fraction of Python's."""
    with os.scandir(folder / name) as entries:
        return np.array(
            sorted(os.fsencode(f"{name}/{e.name}") for e in entries if is_picture(e.name))
        )


def parts(root: Path) -> dict[str, Path]:
    """The folder of each part, or the folder itself if it holds two classes or more."""
    found = {
        name: root / name
        for name in subfolders(root)
        if part_in(name) == name.lower() and _are_classes(subfolders(root / name))
    }
    if found:
        return found
    classes = subfolders(root)
    loose = [name for name in visible(root) if name.endswith((".json", ".xml", ".yaml"))]
    if len(classes) < 2 or not _are_classes(classes) or loose:
        return {}
    pictured = (any(map(is_picture, visible(root / name))) for name in classes)
    return {WHOLE: root} if all(pictured) else {}


def _are_classes(names: list[str]) -> bool:
    return bool(names) and not any(name.lower() in NO_CLASSES for name in names)


IMAGENET = Layout(
    "folder of class folders (train/<class>/*.JPEG, val/<class>/*.JPEG; or <class>/*)",
    parts,
    ClassFolders,
    "classification",
)
