"""The form that every layout's files take: records of a COCO dictionary, checked all at once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from effspinenet_lib.data.pictures import find_files, picture_size
from effspinenet_lib.errors import DataError

# A box whose part inside the image is thinner than this many pixels is degenerate (our choice;
# the thinnest real boxes of COCO are about a pixel).
SMALLEST_SIDE = 0.01
# Boxes that stick out further are counted: tools that count pixels from 0 or from 1 differ by one.
OUTSIDE = 1.0
SHOWN_FAULTS = 20
MISSING, UNREADABLE, INVALID = "missing", "unreadable", "invalid"
_LARGEST_ID = 2**63 - 1

Truth = dict[str, Any]  # a COCO dictionary: images, annotations, categories
Named = tuple[str, Any]  # a record, behind the words that name it in messages


class DataWarning(UserWarning):
    """What is left out of a data set, or looks wrong in it."""


@dataclass(frozen=True)
class Fault:
    """Something wrong with a data set.

    Attributes:
        text: what, with the file and the record.
        file: the picture that it is about, if it is about one.
        kind: `MISSING` or `UNREADABLE` pictures, or `INVALID` annotations.
        part: of the data set.
    """

    text: str
    file: str = ""
    kind: str = INVALID
    part: str = ""


class InvalidData(DataError):  # noqa: N818 - it says what is wrong
    """Faults of a data set; the message gives the first and how many there are.

    Attributes:
        faults: all of them.
        report: the file that lists them; "" if there is none.
    """

    def __init__(self, faults: Sequence[Fault], report: str = "") -> None:
        super().__init__(faults, report)
        self.faults, self.report = list(faults), report

    @property
    def details(self) -> list[str]:
        """A line for each of the first faults, if there are several."""
        return fault_lines(self.faults) if len(self.faults) > 1 else []

    def __str__(self) -> str:
        first, count = self.faults[0].text, len(self.faults)
        where = f"all in {self.report}" if self.report else "`effspinenet data check` lists them"
        return first + (f" ({count} faults; {where})" if count > 1 else "")


def fault_lines(faults: Sequence[Fault]) -> list[str]:
    """A line for each of the first `SHOWN_FAULTS` faults, and one that counts the others."""
    lines = [
        f"problem: {f'{fault.part}: ' if fault.part else ''}{fault.text}"
        for fault in faults[:SHOWN_FAULTS]
    ]
    more = len(faults) - len(lines)
    return [*lines, f"problem: and {more} more"] if more else lines


def collect(check: Callable[[Any], Any], records: Iterable[Any]) -> tuple[list[Any], list[Fault]]:
    """`check` of every record, and the faults of those for which it raises `DataError`."""
    good, faults = [], []
    for record in records:
        try:
            good.append(check(record))
        except InvalidData as error:
            faults += error.faults
        except DataError as error:
            faults.append(Fault(str(error)))
    return good, faults


@dataclass
class Records:
    """What the files of a part hold, in the terms of COCO, unchecked.

    Attributes:
        source: the file or folder that they come from.
        folder: what the images' names are relative to.
        images: records of `file_name` and, where they are known, `id`, `width` and `height`.
        annotations: records of objects.
        categories: records of classes.
        faults: what could not be read.
        notes: what should be said once.
    """

    source: Path
    folder: Path
    images: list[Named] = field(default_factory=list)
    annotations: list[Named] = field(default_factory=list)
    categories: list[Named] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class CheckedRecords:
    """The records that can be used, and what is wrong with the others.

    Attributes:
        truth: images and categories in the order of their ids; each image has its size, each
            annotation a box with area in its image.
        dropped: degenerate boxes, the image's id and a name each.
        outside: the same of boxes that stick out of their image.
        faults: of the records.
        unreadable: pictures whose size nothing else says and that cannot be opened; they and
            their annotations are left out.
        sized: sizes of images were read from their files.
    """

    truth: Truth
    dropped: list[tuple[int, str]]
    outside: list[tuple[int, str]]
    faults: list[Fault]
    unreadable: list[Fault]
    sized: bool


def check_records(records: Records) -> CheckedRecords:
    """Check the records of a part, whatever layout they were read from."""
    faults, unreadable = list(records.faults), []
    categories = _by_key(records, "categories", records.categories, _category, faults)
    images = _by_key(records, "images", records.images, _image, faults)
    unsized = [key for key, image in images.items() if not image["width"]]
    files = find_files([images[key]["file_name"] for key in unsized], records.folder)
    ignored = set()
    for key, file in zip(unsized, files, strict=True):
        name = images[key]["file_name"]
        try:
            height, width = picture_size(records.folder / (file or name))
            images[key].update(height=height, width=width)
        except DataError as error:
            kind = UNREADABLE if file else MISSING
            text = str(error) if file else f"{records.source}: names the image {name:.200}, "
            text += "" if file else f"not found in {records.folder}"
            unreadable.append(Fault(text, name, kind))
            del images[key]
            ignored.add(key)
    kept, dropped, outside = [], [], []

    def check(named: Named) -> None:
        where, record = named
        if isinstance(record, Mapping) and _key(record.get("image_id")) in ignored:
            return
        annotation = _annotation(where, record, images, categories)
        image = images[_key(record["image_id"])]
        name = where.removeprefix(str(records.source)).lstrip(":/ ")
        mark = (image["id"], f"{name}, {image['file_name']}")
        box, overhang = _clip(annotation["bbox"], image["width"], image["height"])
        if min(box[2:]) < SMALLEST_SIDE or min(annotation["bbox"][2:]) <= 0:
            dropped.append(mark)
            return
        if overhang > OUTSIDE:
            outside.append(mark)
            annotation["area"] = min(annotation["area"], box[2] * box[3])
        kept.append(annotation)

    faults += collect(check, records.annotations)[1]
    truth = {
        "images": sorted(images.values(), key=lambda image: image["id"]),
        "annotations": kept,
        "categories": sorted(categories.values(), key=lambda category: category["id"]),
    }
    return CheckedRecords(truth, dropped, outside, faults, unreadable, bool(unsized))


def _by_key(
    records: Records,
    table: str,
    named: Sequence[Named],
    check: Callable[[str, Any], Truth],
    faults: list[Fault],
) -> dict[int | str | None, Truth]:
    """The checked records of a table by their ids as `_key` has them; adds their faults.

    Ids that are not all integers of 64 bits are replaced by numbers from 1.
    """
    found: dict[int | str | None, Truth] = {}

    def add(one: Named) -> None:
        where, record = one
        key = _key(need(record, "id", where))
        if key is None:
            raise DataError(f"{where}: id is {record['id']!r:.40}; a number or a text is needed")
        checked = {**check(where, record), "id": key}
        if found.setdefault(key, checked) is not checked:
            raise DataError(f"{where}: the id occurs twice")

    wrong = collect(add, named)[1]
    faults += wrong
    if not found and not wrong and not records.faults:
        faults.append(Fault(f"{records.source}: lists no {table}"))
    if not all(isinstance(key, int) and abs(key) <= _LARGEST_ID for key in found):
        for number, record in enumerate(found.values(), start=1):
            record["id"] = number
    return found


def _key(value: Any) -> int | str | None:
    """An id that is the same whether it is written as a number or as text; None if it is none."""
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdecimal() else value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def need(record: Any, key: str, where: str) -> Any:
    """`record[key]`.

    Raises:
        DataError: `record` is not an object or lacks the key; `where` names it.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: must be an object, not {type(record).__name__}")
    if key not in record:
        raise DataError(f"{where}: lacks the key {key!r}")
    return record[key]


def finite(values: Any, count: int) -> bool:
    """True for a list of `count` finite numbers."""
    return (
        isinstance(values, list)
        and len(values) == count
        # `math.isfinite` raises for integers that no float holds
        and all(type(v) in (int, float) and abs(v) <= sys.float_info.max for v in values)
    )


def relative_name(name: Any, where: str) -> str:
    """Check that a file name stays inside the folder that it is relative to.

    Raises:
        DataError: it is absolute, leaves the folder with "..", or is no name.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DataError(f"{where}: the file name {name!r:.200} is not a name")
    path = PureWindowsPath(name)  # knows both slashes
    if path.anchor or ".." in path.parts:
        raise DataError(f"{where}: the file name {name!r:.200} leads out of the data folder")
    return name


def _category(where: str, record: Any) -> Truth:
    name = need(record, "name", where)
    if not isinstance(name, str | int | float):
        raise DataError(f"{where}: its name is {name!r:.40}; a text is needed")
    return {"name": str(name).encode("utf-8", "replace").decode()}


def _image(where: str, record: Any) -> Truth:
    sides = {}
    for side in ("width", "height"):
        given = record.get(side)
        value = 0 if given is None else _key(given)
        if not isinstance(value, int):
            raise DataError(f"{where}: {side} is {given!r:.40}; an integer is needed")
        if given is not None and not 1 <= value <= _LARGEST_ID:
            raise DataError(f"{where}: {side} is {given!r:.40}; it must be 1 or more")
        sides[side] = value
    if not all(sides.values()):  # the picture says both
        sides = dict.fromkeys(sides, 0)
    return {"file_name": relative_name(need(record, "file_name", where), where), **sides}


def _annotation(
    where: str,
    record: Any,
    images: Mapping[int | str | None, Truth],
    categories: Mapping[int | str | None, Truth],
) -> Truth:
    annotation: Truth = {}
    for table, known in (("image", images), ("category", categories)):
        given = need(record, f"{table}_id", where)
        if _key(given) not in known:
            raise DataError(f"{where}: {table} {given!r:.40} is not listed")
        annotation[f"{table}_id"] = known[_key(given)]["id"]
    bbox = need(record, "bbox", where)
    if not finite(bbox, 4):
        raise DataError(f"{where}: bbox is {bbox!r:.80}; four finite numbers are needed")
    area = record.get("area", bbox[2] * bbox[3])
    if not finite([area], 1):
        raise DataError(f"{where}: area is {area!r:.40}; a finite number is needed")
    crowd = record.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise DataError(f"{where}: iscrowd is {crowd!r:.40}; it must be 0 or 1")
    annotation |= {"where": where, "bbox": bbox, "area": area, "iscrowd": int(crowd)}
    if record.get("segmentation"):
        annotation["segmentation"] = record["segmentation"]
    return annotation


def _clip(bbox: Sequence[float], width: int, height: int) -> tuple[list[float], float]:
    """The part of a box (x, y, width, height) in the image, and how far it sticks out."""
    x, y, across, down = bbox
    left, top = min(max(x, 0.0), width), min(max(y, 0.0), height)
    right, bottom = min(max(x + across, 0.0), width), min(max(y + down, 0.0), height)
    overhang = max(-x, -y, x + across - width, y + down - height)
    return [left, top, right - left, bottom - top], overhang


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]
