"""Folders in PASCAL VOC's layout: boxes (`VocFolder`) and label maps (`VocSegmentationFolder`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from effspinenet_lib.data.dataset import (
    SEMANTIC_IGNORE,
    Annotations,
    Category,
    Truth,
    collect_faults,
)
from effspinenet_lib.data.folders import (
    FolderDataset,
    check_records,
    finite,
    open_image,
    split_list,
)
from effspinenet_lib.errors import DataError

IMAGES = "JPEGImages"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
BOX_LISTS, LABEL_LISTS = Path("ImageSets") / "Main", Path("ImageSets") / "Segmentation"
# Where an image has label maps in both, VOC's own is used: it marks the objects' edges as void.
LABELS, AUGMENTED_LABELS = "SegmentationClass", "SegmentationClassAug"
# VOC 2012's classes in the order of its label maps (its development kit, VOCinit.m).
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


class VocFolder(FolderDataset):
    """A split of a folder in VOC's layout: Annotations/*.xml, ImageSets/Main/<split>.txt.

    Coordinates in the files are 1-based and name the first and the last pixel of a box. Here a
    box begins at xmin - 1 and ends at xmax, so that its width is xmax - xmin + 1 pixels.

    The classes are all names that occur in any annotation file of the folder, sorted, with ids
    from 1, so that the splits agree. Images have ids from 1 in the order of their names. Objects
    marked difficult count as crowds: ignored in training, neither right nor wrong in evaluation.
    """

    layout = "VOC folder (Annotations/*.xml, ImageSets/Main/<split>.txt, JPEGImages/)"

    def __init__(self, root: str | os.PathLike[str], split: str, images: int | None = None) -> None:
        """Open the split; `images` limits it to the first so many in the order of names.

        Raises:
            DataError: files are missing or invalid; names the files and the objects.
        """
        self.root, self._limit = Path(root), images
        self._list = self.root / BOX_LISTS / f"{split}.txt"
        truth, dropped = self._read()
        super().__init__(
            f"{self.root.name} {split}",
            [Category(entry["id"], entry["name"]) for entry in truth["categories"]],
            Annotations.from_coco(truth),
            self.root / IMAGES,
            self._list,
            [str(name) for _, name in dropped],
        )

    @classmethod
    def splits(cls, folder: Path) -> list[str]:
        """The names of the lists, sorted; none without annotations."""
        found = (folder / "Annotations").is_dir()
        return sorted(path.stem for path in (folder / BOX_LISTS).glob("*.txt")) if found else []

    def ground_truth(self) -> Truth:
        """The annotations as a COCO dictionary, read from the files again."""
        return self._read()[0]

    def _read(self) -> tuple[Truth, NDArray[np.str_]]:
        folder, names = self.root / "Annotations", split_list(self._list)[: self._limit]
        for stem in names:
            if not os.path.isfile(folder / f"{stem}.xml"):
                raise DataError(f"{self._list}: names {stem:.200}, but {folder} has no XML of it")
        numbers = {stem: number for number, stem in enumerate(names, start=1)}
        present = set(os.listdir(self.root / IMAGES)) if (self.root / IMAGES).is_dir() else set()
        images: list[tuple[str, Truth]] = []
        objects: list[tuple[str, Truth]] = []
        classes: set[str] = set()

        def read(path: Path) -> None:
            tree = parse_xml(path)
            found = [
                (where := f"{path}: object {number}", _object(where, element))
                for number, element in enumerate(tree.findall("object"), start=1)
            ]
            classes.update(record["name"] for _, record in found)
            if image_id := numbers.get(path.stem):
                images.append((str(path), _image(tree, path.stem, image_id, present)))
                objects.extend((where, {**one, "image_id": image_id}) for where, one in found)

        collect_faults(read, sorted(folder.glob("*.xml")))
        if not classes:
            raise DataError(f"{folder}: no annotation file has an object")
        ids = {name: number for number, name in enumerate(sorted(classes), start=1)}
        for _, record in objects:
            record["category_id"] = ids[record.pop("name")]
        categories = [("", {"id": number, "name": name}) for name, number in ids.items()]
        truth, dropped = check_records(folder, images, objects, categories)
        return {"info": {"description": self.root.name}, **truth}, dropped


def parse_xml(path: Path) -> ElementTree.Element:
    """The root element of an XML file.

    Raises:
        DataError: the file cannot be read or is not XML.
    """
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
        raise DataError(f"{path}: is not XML ({error})") from error


def _number(element: ElementTree.Element, name: str) -> Any:
    """A number of the file, or the text where it is not one."""
    text = (element.findtext(name) or "").strip()
    try:
        return float(text)
    except ValueError:
        return text


def _image(tree: ElementTree.Element, stem: str, image_id: int, present: set[str]) -> Truth:
    names = [stem + suffix for suffix in IMAGE_SUFFIXES if stem + suffix in present]
    sides = {side: _number(tree, f"size/{side}") for side in ("width", "height")}
    return {
        "id": image_id,
        "file_name": names[0] if names else (tree.findtext("filename") or "").strip(),
        **{k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in sides.items()},
    }


def _object(where: str, element: ElementTree.Element) -> Truth:
    name = (element.findtext("name") or "").strip()
    box = element.find("bndbox")
    if not name or box is None:
        raise DataError(f"{where}: lacks {'bndbox' if name else 'name'}")
    corners = [_number(box, corner) for corner in CORNERS]
    if not finite(corners, 4):
        values = ", ".join(f"{k} {v!r:.40}" for k, v in zip(CORNERS, corners, strict=True))
        raise DataError(f"{where}: bndbox has {values}; four finite numbers are needed")
    left, top, right, bottom = corners
    # A corner given twice marks no object, although it would be one pixel wide.
    width = right - left + 1 if right > left else 0
    height = bottom - top + 1 if bottom > top else 0
    return {
        "name": name,
        "bbox": [left - 1, top - 1, width, height],
        "area": width * height,
        "iscrowd": int((element.findtext("difficult") or "0").strip() == "1"),
    }


class VocSegmentationFolder(FolderDataset):
    """A split of a folder in VOC 2012's segmentation layout.

    `ImageSets/Segmentation/<split>.txt` lists the images of `JPEGImages/`; `SegmentationClass/`
    holds VOC's label maps and `SegmentationClassAug/` those of the images that only SBD labels
    (`effspinenet data fetch voc` makes both), as PNG. A pixel is 0 for the background, a class
    from 1 to 20, or 255 where it is ignored. Images have ids from 1 in the order of their names.
    There are no boxes.
    """

    layout = "VOC folder of label maps (ImageSets/Segmentation/<split>.txt, SegmentationClass/)"
    only_task = "segmentation"

    def __init__(self, root: str | os.PathLike[str], split: str, images: int | None = None) -> None:
        """Open the split; `images` limits it to the first so many in the order of names.

        Raises:
            DataError: a list, images or label maps are missing; names the files.
        """
        self.root = Path(root)
        path = self.root / LABEL_LISTS / f"{split}.txt"
        names = split_list(path)[:images]
        self._labels = np.array(
            collect_faults(lambda name: self._label_map(name, path), names), np.str_
        )
        sizes = []
        for file in self._labels.tolist():
            with open_image(self.root / file) as picture:  # reads the header alone
                sizes.append((picture.height, picture.width))
        super().__init__(
            f"{self.root.name} {split}",
            [Category(number, name) for number, name in enumerate(VOC_CLASSES, start=1)],
            Annotations.of_images(
                np.arange(1, len(names) + 1), np.char.add(names, ".jpg"), np.array(sizes)
            ),
            self.root / IMAGES,
            path,
        )

    @classmethod
    def splits(cls, folder: Path) -> list[str]:
        """The names of the lists, sorted."""
        return sorted(path.stem for path in (folder / LABEL_LISTS).glob("*.txt"))

    def _label_map(self, name: str, source: Path) -> str:
        """The label map of an image, relative to the root."""
        for folder in (LABELS, AUGMENTED_LABELS):
            if os.path.isfile(self.root / folder / f"{name}.png"):
                return f"{folder}/{name}.png"
        folders = f"neither {LABELS} nor {AUGMENTED_LABELS}"
        raise DataError(f"{source}: names {name:.200}, but {folders} has its PNG")

    def prepare(self, task: str) -> None:
        """Nothing is read ahead: a label map is read with its image."""
        del task

    def semantic(self, index: int) -> NDArray[np.uint8]:
        """The label map of image `index`, uint8 [H, W].

        Raises:
            DataError: the file cannot be decoded or has values that are not classes; names it.
        """
        path = self.root / str(self._labels[index])
        with open_image(path) as picture:
            labels = np.array(picture)
        if labels.ndim != 2 or labels.dtype != np.uint8:
            raise DataError(f"{path}: a label map has one value a pixel (a palette, or grey)")
        wrong = labels[(labels > len(self.categories)) & (labels != SEMANTIC_IGNORE)]
        if wrong.size:
            known = f"0 to {len(self.categories)} and {SEMANTIC_IGNORE}"
            raise DataError(f"{path}: has the label {wrong[0]}; {known} are known")
        return labels
