"""PASCAL VOC's layouts: boxes in XML files, and label maps."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from effspinenet_lib.data.dataset import SEMANTIC_IGNORE, Annotations, Category
from effspinenet_lib.data.folders import (
    FolderDataset,
    Layout,
    as_whole,
    open_records,
    read_lines,
    split_list,
)
from effspinenet_lib.data.pictures import (
    alike,
    files_ending,
    find_files,
    is_picture,
    picture_size,
    read_labels,
    visible,
)
from effspinenet_lib.data.records import (
    MISSING,
    UNREADABLE,
    Fault,
    InvalidData,
    Named,
    Records,
    Truth,
    collect,
    finite,
    relative_name,
)
from effspinenet_lib.data.splits import WHOLE, Part, part_in
from effspinenet_lib.errors import DataError

ANNOTATIONS, IMAGES = "Annotations", "JPEGImages"
CORNERS = ("xmin", "ymin", "xmax", "ymax")
BOX_LISTS, LABEL_LISTS = Path("ImageSets") / "Main", Path("ImageSets") / "Segmentation"
# Where an image has label maps in both, VOC's own is used: it marks the objects' edges as void.
LABELS, AUGMENTED_LABELS = "SegmentationClass", "SegmentationClassAug"
# What a list of a class has behind each name: whether the image has the class.
FLAG = re.compile(r"\s+(-1|0|1)$")
# VOC 2012's classes in the order of its label maps (its development kit, VOCinit.m).
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


def parts(root: Path) -> dict[str, Path]:
    """The list of each part, or the folder of its XML files.

    `ImageSets/Main/<part>.txt` beside `Annotations/`; else folders of XML files: `<part>/`, a
    single one of any name, or the folder itself.
    """
    if files_ending(root / ANNOTATIONS, ".xml"):
        lists = _lists(root / BOX_LISTS)
        return as_whole(lists or {WHOLE: root / ANNOTATIONS}, lambda name: name != "default")
    folders = {name: root / name for name in visible(root)}
    found = {name: folder for name, folder in folders.items() if files_ending(folder, ".xml")}
    for name, folder in folders.items():
        for inside in (ANNOTATIONS, "annotations"):
            if name not in found and part_in(name) and files_ending(folder / inside, ".xml"):
                found[name] = folder / inside
    if not found and files_ending(root, ".xml"):
        found = {WHOLE: root}
    return as_whole(found, lambda name: part_in(name) is not None)


def _lists(folder: Path) -> dict[str, Path]:
    """The lists of images; those of a class, `<class>_<part>.txt` with flags, are none."""
    lists = files_ending(folder, ".txt")
    return {
        name: path
        for name, path in lists.items()
        if not any(name.endswith(f"_{other}") for other in lists)
        or not all(FLAG.search(line) for line in read_lines(path))
    }


def read(root: Path, part: Part, masks: bool) -> Records:
    """The records of a part.

    Coordinates in the files are 1-based and name the first and the last pixel of a box. Here a
    box begins at xmin - 1 and ends at xmax, so that its width is xmax - xmin + 1 pixels.

    The classes are all names that occur in any XML file of the folder, sorted, with ids from 1.
    Images have ids from 1 in the order of their names. Objects marked difficult count as crowds:
    ignored in training, neither right nor wrong in evaluation.
    """
    del masks  # there are none
    listed = part.place.is_file()
    folder = root / ANNOTATIONS if listed else part.place
    files = files_ending(folder, ".xml")
    faults: list[Fault] = []
    wanted = list(files)
    if listed:
        wanted, faults = _listed(part.place, files, folder)
    numbers = {stem: number for number, stem in enumerate(wanted, start=1)}
    places = [root / IMAGES, folder, folder.parent / "images", root / "images", root / "Images"]
    pictures_in = _picture_folder(places, wanted)
    pictures: dict[str, str] = {}
    for name in visible(pictures_in):
        if is_picture(name):
            pictures.setdefault(alike(name.rpartition(".")[0]), name)
    records = Records(part.place if listed else folder, pictures_in, faults=faults)
    objects: list[Named] = []
    classes: set[str] = set()

    def add(path: Path) -> None:
        tree = parse_xml(path)
        found, wrong = collect(
            lambda pair: (pair[0], _object(*pair)),
            [
                (f"{path}: object {number}", element)
                for number, element in enumerate(tree.findall("object"), start=1)
            ],
        )
        faults.extend(wrong)
        classes.update(record["name"] for _, record in found)
        if image_id := numbers.get(path.stem):
            records.images.append((str(path), _image(tree, path.stem, image_id, pictures)))
            objects.extend((where, {**one, "image_id": image_id}) for where, one in found)

    faults += collect(add, files.values())[1]
    if not classes and not faults:
        faults.append(Fault(f"{folder}: no annotation file has an object"))
    ids = {name: number for number, name in enumerate(sorted(classes), start=1)}
    records.annotations = [
        (where, {**record, "category_id": ids[record["name"]]}) for where, record in objects
    ]
    records.categories = [("", {"id": number, "name": name}) for name, number in ids.items()]
    return records


def _listed(path: Path, files: dict[str, Path], folder: Path) -> tuple[list[str], list[Fault]]:
    """The stems of the XML files that a list names, sorted, and a fault for each without one."""

    def stem(line: str) -> str:
        name = relative_name(line, str(path))
        for one in (name, FLAG.sub("", name)):
            last = one.rpartition("/")[2]
            for found in (one, last, os.path.splitext(last)[0] if is_picture(last) else last):
                if found in files:
                    return found
        raise DataError(f"{path}: names {FLAG.sub('', name):.200}, but {folder} has no XML of it")

    lines = read_lines(path)
    if not lines:
        return [], [Fault(f"{path}: lists no images")]
    stems, faults = collect(stem, lines)
    return sorted(set(stems)), faults


def _picture_folder(folders: Sequence[Path], stems: Sequence[str]) -> Path:
    """The first folder that has a picture of one of the first stems; else the first there is."""
    few = {alike(stem) for stem in stems[:5]}
    for folder in folders:
        if any(is_picture(n) and alike(n.rpartition(".")[0]) in few for n in visible(folder)):
            return folder
    return next((folder for folder in folders if folder.is_dir()), folders[0])


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


def _image(tree: ElementTree.Element, stem: str, image_id: int, pictures: dict[str, str]) -> Truth:
    named = (tree.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
    sides = {side: _number(tree, f"size/{side}") for side in ("width", "height")}
    return {
        "id": image_id,
        "file_name": pictures.get(alike(stem)) or named or f"{stem}.jpg",
        # some tools write 0 or nothing where they do not know
        **{side: value or None for side, value in sides.items()},
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


VOC = Layout(
    "VOC folder (Annotations/*.xml and JPEGImages/, with lists ImageSets/Main/<part>.txt or "
    "without; or pictures and *.xml side by side, in <part>/ or not)",
    parts,
    lambda *arguments: open_records(read, *arguments),
)


class LabelMaps(FolderDataset):
    """A part of a folder in VOC 2012's segmentation layout.

    `ImageSets/Segmentation/<part>.txt` lists the images of `JPEGImages/`; `SegmentationClass/`
    holds VOC's label maps and `SegmentationClassAug/` those of the images that only SBD labels
    (`effspinenet data fetch voc` makes both), as PNG. A pixel is 0 for the background, a class
    from 1 to 20, or 255 where it is ignored. Images have ids from 1 in the order of their names.
    There are no boxes.
    """

    def __init__(self, root: Path, part: Part, images: int | None, skip_bad: bool) -> None:
        """Open the part; `images` limits it to the first so many in the order of names.

        Raises:
            InvalidData: a list, images or label maps are missing; names the files.
        """
        self.root = root
        names = split_list(part.place)
        names = [name for name, kept in zip(names, part.select(names), strict=True) if kept]
        names = names[:images]
        pictures = find_files([f"{name}.jpg" for name in names], root / IMAGES)
        rows: list[tuple[int, str, str, tuple[int, int]]] = []
        bad: list[Fault] = []
        for number, (name, picture) in enumerate(zip(names, pictures, strict=True), start=1):
            labels = self._label_map(name)
            if picture is None:
                text = f"names the image {name:.200}.jpg, not found in {root / IMAGES}"
                bad.append(Fault(f"{part.place}: {text}", f"{name}.jpg", MISSING))
            elif labels is None:
                text = f"names {name:.200}, but neither {LABELS} nor {AUGMENTED_LABELS} has its PNG"
                bad.append(Fault(f"{part.place}: {text}", f"{name}.png", MISSING))
            else:
                try:
                    rows.append((number, picture, labels, picture_size(root / labels)))
                except DataError as error:
                    bad.append(Fault(str(error), f"{name}.png", UNREADABLE))
        if bad and (not skip_bad or not rows):
            raise InvalidData(bad)
        self._labels = np.array([labels for _, _, labels, _ in rows], np.str_)
        super().__init__(
            f"{root.name} {part.name}",
            [Category(number, name) for number, name in enumerate(VOC_CLASSES, start=1)],
            Annotations.of_images(
                np.array([number for number, *_ in rows], np.int64),
                np.array([picture for _, picture, *_ in rows], np.str_),
                np.array([size for *_, size in rows], np.int64).reshape(-1, 2),
            ),
            root / IMAGES,
            part,
        )
        if bad:
            self.record["skipped"] = sorted(fault.file for fault in bad)

    def _label_map(self, name: str) -> str | None:
        """The label map of an image, relative to the root."""
        files = (f"{folder}/{name}.png" for folder in (LABELS, AUGMENTED_LABELS))
        return next((file for file in files if os.path.isfile(self.root / file)), None)

    def prepare(self, task: str) -> None:
        """Nothing is read ahead: a label map is read with its image."""
        del task

    def select(self, keep: NDArray[np.bool_]) -> None:
        """Keep the images where `keep` [N] is true."""
        self._labels = self._labels[keep]
        super().select(keep)

    def check_file(self, index: int) -> None:
        """Decode image `index` and its label map."""
        super().check_file(index)
        self.semantic(index)

    def files_of(self, index: int) -> list[Path]:
        """The image and its label map."""
        return [self.path(index), self.root / str(self._labels[index])]

    def semantic(self, index: int) -> NDArray[np.uint8]:
        """The label map of image `index`, uint8 [H, W].

        Raises:
            DataError: the file cannot be decoded or has values that are not classes; names it.
        """
        path = self.root / str(self._labels[index])
        labels = read_labels(path)
        wrong = labels[(labels > len(self.categories)) & (labels != SEMANTIC_IGNORE)]
        if wrong.size:
            known = f"0 to {len(self.categories)} and {SEMANTIC_IGNORE}"
            raise DataError(f"{path}: has the label {wrong[0]}; {known} are known")
        return labels


VOC_SEGMENTATION = Layout(
    "VOC folder of label maps (ImageSets/Segmentation/<part>.txt, SegmentationClass/)",
    lambda root: files_ending(root / LABEL_LISTS, ".txt"),
    LabelMaps,
    "segmentation",
)
