"""Folders in PASCAL VOC 2012's layout for segmentation.

`ImageSets/Segmentation/<split>.txt` lists the images of `JPEGImages/`; `SegmentationClass/*.png`
holds VOC's label maps and `SegmentationClassAug/*.png` those of the images that only SBD labels
(`effspinenet data fetch voc` makes both). A pixel is 0 for the background, a class from 1 to 20,
or 255 where it does not count.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from effspinenet_lib.data.dataset import AnnotationsBuilder, Category
from effspinenet_lib.data.formats import (
    FolderDataset,
    Truth,
    check_images,
    decode_image,
    relative_name,
)
from effspinenet_lib.data.masks import SEMANTIC_IGNORE
from effspinenet_lib.errors import DataError

# VOC 2012's classes in the order of its label maps (its development kit, VOCinit.m).
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
LISTS = Path("ImageSets") / "Segmentation"
IMAGES = "JPEGImages"
# Where an image has label maps in both, VOC's own counts: it marks the objects' edges as void.
LABELS, AUGMENTED_LABELS = "SegmentationClass", "SegmentationClassAug"


class VocSegmentationFolder(FolderDataset):
    """A split of a folder in VOC's segmentation layout, for segmentation.

    Images have ids from 1 in the order of their names. There are no boxes.
    """

    def __init__(self, root: str | os.PathLike[str], split: str, images: int | None = None) -> None:
        """Open the split; `images` limits it to the first so many in the order of names.

        Raises:
            DataError: a list, an image or a label map is missing; names the file.
        """
        self.root = Path(root)
        path = self.root / LISTS / f"{split}.txt"
        stems = read_list(path)[:images]
        names = [f"{stem}.jpg" for stem in stems]
        check_images(self.root / IMAGES, names, path)
        self._labels = np.array(_label_files(self.root, stems, path))
        builder = AnnotationsBuilder()
        for number, (name, file) in enumerate(zip(names, self._labels, strict=True), start=1):
            height, width = _size(self.root / str(file))
            builder.add_image(number, name, height, width)
        categories = [Category(number, name) for number, name in enumerate(VOC_CLASSES, start=1)]
        super().__init__(
            f"{self.root.name} {split}", categories, builder.build(), self.root / IMAGES
        )

    def ground_truth(self) -> Truth:
        """The images and categories as a COCO dictionary, without annotations."""
        table = self.annotations
        return {
            "images": [
                {
                    "id": self.image_id(index),
                    "file_name": table.file_name(index),
                    "height": int(table.sizes[index, 0]),
                    "width": int(table.sizes[index, 1]),
                }
                for index in range(len(self))
            ],
            "annotations": [],
            "categories": [{"id": c.id, "name": c.name} for c in self.categories],
        }

    def prepare(self, task: str) -> None:
        """Nothing is read before it is needed: a label map is read with its image."""
        del task

    def semantic(self, index: int) -> NDArray[np.uint8]:
        """The label map of image `index`, uint8 [H, W].

        Raises:
            DataError: the file cannot be decoded or holds values that are no class; names it.
        """
        path = self.root / str(self._labels[index])
        labels = decode_image(path, mode=None)
        if labels.ndim != 2 or labels.dtype != np.uint8:
            raise DataError(f"{path}: a label map has one value a pixel (a palette, or grey)")
        wrong = labels[(labels > len(self.categories)) & (labels != SEMANTIC_IGNORE)]
        if wrong.size:
            raise DataError(
                f"{path}: has the label {wrong[0]}; 0 to {len(self.categories)} and "
                f"{SEMANTIC_IGNORE} are known"
            )
        return labels


def read_list(path: Path) -> list[str]:
    """The names that a list of images holds, sorted, each once.

    Raises:
        DataError: the list is missing or empty, or a name leads out of the folder.
    """
    if not path.is_file():
        found = sorted(other.stem for other in path.parent.glob("*.txt"))
        raise DataError(f"{path}: no such split; splits found: {', '.join(found) or 'none'}")
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    stems = {
        relative_name(line.split()[0], f"{path}: line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    }
    if not stems:
        raise DataError(f"{path}: lists no images")
    return sorted(stems)


def _label_files(root: Path, stems: list[str], source: Path) -> list[str]:
    """The label map of each image, relative to the root."""
    present = {
        folder: set(os.listdir(root / folder)) if (root / folder).is_dir() else set()
        for folder in (LABELS, AUGMENTED_LABELS)
    }
    files = []
    for stem in stems:
        name = f"{stem}.png"
        folders = [folder for folder, names in present.items() if name in names]
        if not folders:
            raise DataError(
                f"{source}: names {stem:.200}, but neither {LABELS} nor {AUGMENTED_LABELS} has "
                f"{name:.200}"
            )
        files.append(f"{folders[0]}/{name}")
    return files


def _size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, from its first bytes."""
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: the image cannot be decoded ({error})") from error
