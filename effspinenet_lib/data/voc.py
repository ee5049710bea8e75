"""Folders in PASCAL VOC's layout: Annotations/*.xml, ImageSets/Main/<split>.txt, JPEGImages/.

Coordinates in the files are 1-based and name the first and the last pixel of a box. Here a box
begins at xmin - 1 and ends at xmax, so that its width is xmax - xmin + 1 pixels.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from effspinenet_lib.data.formats import (
    FolderDataset,
    Truth,
    annotations_of,
    categories_of,
    check_images,
    finite_numbers,
    is_degenerate,
    relative_name,
    warn_degenerate,
)
from effspinenet_lib.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


class VocFolder(FolderDataset):
    """A split of a folder in VOC's layout.

    The classes are all names that occur in any annotation file of the folder, sorted, with ids
    from 1, so that the splits agree. Images have ids from 1 in the order of their names. Objects
    marked difficult count as crowds: ignored in training, neither right nor wrong in evaluation.
    """

    def __init__(self, root: str | os.PathLike[str], split: str, images: int | None = None) -> None:
        """Open the split; `images` limits it to the first so many in the order of names.

        Raises:
            DataError: a file is missing or cannot be used; names the file and the object.
        """
        self.root = Path(root)
        self.stems = _split_stems(self.root, split)[:images]
        self.class_names = _class_names(self.root / "Annotations")
        truth, dropped = self._read()
        self.dropped = tuple(dropped)
        warn_degenerate(self.root / "Annotations", dropped)
        folder = self.root / "JPEGImages"
        names = [image["file_name"] for image in truth["images"]]
        check_images(folder, names, _split_file(self.root, split))
        super().__init__(
            f"{self.root.name} {split}", categories_of(truth), annotations_of(truth), folder
        )

    def ground_truth(self) -> Truth:
        """The annotations as a COCO dictionary, read from the files again."""
        truth, _ = self._read()
        return truth

    def _read(self) -> tuple[Truth, list[str]]:
        ids = {name: number for number, name in enumerate(self.class_names, start=1)}
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        dropped: list[str] = []
        pictures = self.root / "JPEGImages"
        present = set(os.listdir(pictures)) if pictures.is_dir() else set()
        for number, stem in enumerate(self.stems, start=1):
            path = self.root / "Annotations" / f"{stem}.xml"
            tree = parse_xml(path)
            width, height = (_side(tree, name, path) for name in ("width", "height"))
            file_name = _image_name(tree, stem, path, present)
            images.append({"id": number, "file_name": file_name, "width": width, "height": height})
            for index, element in enumerate(tree.findall("object"), start=1):
                where = f"{path}: object {index}"
                record = _annotation(element, where, ids, number)
                if is_degenerate(record["bbox"], width, height):
                    dropped.append(f"first: object {index} of {path.name}")
                    continue
                annotations.append({"id": len(annotations) + 1, **record})
        truth = {
            "info": {"description": self.root.name},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in ids.items()],
        }
        return truth, dropped


class _Builder(ElementTree.TreeBuilder):
    """Refuses document types: they can define entities that expand without limit."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError("declares a document type, which is not read; remove the declaration")


def parse_xml(path: Path) -> ElementTree.Element:
    """The root element of an XML file.

    Raises:
        DataError: the file is missing, is not XML or declares a document type.
    """
    parser = ElementTree.XMLParser(target=_Builder())
    try:
        with open(path, "rb") as handle:
            return ElementTree.parse(handle, parser).getroot()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: is not XML ({error})") from error
    except (OSError, ValueError, LookupError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason})") from error


def _split_file(root: Path, split: str) -> Path:
    return root / "ImageSets" / "Main" / f"{split}.txt"


def _split_stems(root: Path, split: str) -> list[str]:
    path = _split_file(root, split)
    if not path.is_file():
        found = sorted(other.stem for other in path.parent.glob("*.txt"))
        raise DataError(f"{path}: no such split; splits found: {', '.join(found) or 'none'}")
    stems = set()
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        # Class-wise lists have a second column.
        stem = relative_name(line.split()[0], f"{path}: line {number}")
        if not os.path.isfile(root / "Annotations" / f"{stem}.xml"):
            raise DataError(
                f"{path}: line {number} names {stem:.200}, but Annotations has no {stem}.xml"
            )
        stems.add(stem)
    if not stems:
        raise DataError(f"{path}: lists no images")
    return sorted(stems)


def _class_names(folder: Path) -> list[str]:
    names = set()
    for path in sorted(folder.glob("*.xml")):
        for index, element in enumerate(parse_xml(path).findall("object"), start=1):
            names.add(_text(element, "name", f"{path}: object {index}"))
    if not names:
        raise DataError(f"{folder}: no annotation file has an object")
    return sorted(names)


def _text(element: ElementTree.Element, name: str, where: str) -> str:
    text = (element.findtext(name) or "").strip()
    if not text:
        raise DataError(f"{where}: lacks {name}")
    return text


def _number(element: ElementTree.Element, name: str, where: str) -> float:
    text = _text(element, name, where)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not finite_numbers([value], 1):
        raise DataError(f"{where}: {name} is {text!r}; a number is needed")
    return value


def _side(tree: ElementTree.Element, name: str, path: Path) -> int:
    side = _number(tree, f"size/{name}", str(path))
    if side < 1 or side != int(side):
        raise DataError(f"{path}: size/{name} is {side:g}; a whole number from 1 is needed")
    return int(side)


def _image_name(tree: ElementTree.Element, stem: str, path: Path, present: set[str]) -> str:
    for suffix in IMAGE_SUFFIXES:
        if stem + suffix in present:
            return stem + suffix
    return relative_name(_text(tree, "filename", str(path)), str(path))


def _annotation(
    element: ElementTree.Element, where: str, ids: dict[str, int], image_id: int
) -> dict[str, Any]:
    box = element.find("bndbox")
    if box is None:
        raise DataError(f"{where}: lacks bndbox")
    left, top, right, bottom = (
        _number(box, name, f"{where}: bndbox") for name in ("xmin", "ymin", "xmax", "ymax")
    )
    # One point given twice marks no object, although it would be one pixel wide.
    width = right - left + 1 if right > left else 0
    height = bottom - top + 1 if bottom > top else 0
    return {
        "image_id": image_id,
        "category_id": ids[_text(element, "name", where)],
        "bbox": [left - 1, top - 1, width, height],
        "area": width * height,
        "iscrowd": int((element.findtext("difficult") or "0").strip() == "1"),
    }
