"""YOLO's layout: `data.yaml`, pictures, and a text file of boxes or polygons for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from effspinenet_lib.data.folders import Layout, as_whole, open_records, read_lines
from effspinenet_lib.data.pictures import (
    alike,
    files_ending,
    is_picture,
    picture_size,
    visible,
)
from effspinenet_lib.data.records import (
    Fault,
    Named,
    Records,
    Truth,
    collect,
    finite,
)
from effspinenet_lib.data.splits import WHOLE, Part, names_alike, part_in
from effspinenet_lib.errors import DataError

FILES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NAME_LISTS = ("classes.txt", "obj.names")
IMAGES, LABELS = "images", "labels"
BOX, LEAST_POLYGON = 5, 7  # values of a line: a class, and four numbers or three corners
# Coordinates are shares of the picture; larger ones are taken for pixels (our choice).
LARGEST_SHARE = 2.0


def parts(root: Path) -> dict[str, Path]:
    """The folder or list of pictures of each part, by data.yaml or as such folders usually are."""
    path = names_file(root)
    if path is None:
        return {}
    try:
        content = _settings(path) if path.name not in NAME_LISTS else {}
    except DataError:  # told when a part is read
        content = {}
    found: dict[str, Path] = {}
    for name in ("train", "val", "test"):
        for key in names_alike(name):
            place = _place(root, content.get("path"), content.get(key))
            if place is not None and key not in found:
                found[key] = place
                break
    if not found:
        for name in visible(root):
            if part_in(name) and (root / name / LABELS).is_dir():
                found[name] = root / name / IMAGES
        for name in visible(root / IMAGES):
            if part_in(name) and (root / LABELS / name).is_dir():
                found[name] = root / IMAGES / name
    if not found and (root / LABELS).is_dir():
        found = {WHOLE: root / IMAGES}
    if not found and path.name in FILES and any(map(is_picture, visible(root))):
        found = {WHOLE: root}
    return as_whole(found, lambda name: part_in(name) is not None)


def names_file(root: Path) -> Path | None:
    """The file that lists the classes."""
    present = visible(root)
    known = next((name for name in FILES if name in present), None)
    if known is not None:
        return root / known
    for name in (name for name in present if name.endswith((".yaml", ".yml"))):
        try:
            if "names" in _settings(root / name):
                return root / name
        except DataError:
            continue
    return next((root / name for name in NAME_LISTS if name in present), None)


def _settings(path: Path) -> dict[Any, Any]:
    """The content of a YAML file.

    Raises:
        DataError: it cannot be read, or is not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: is not YAML ({reason:.200})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be a mapping with `names`, `train` and `val`")
    return content


def _place(root: Path, base: Any, given: Any) -> Path | None:
    """The folder or list that data.yaml names, which tools write relative to several places.

    Raises:
        DataError: several are named.
    """
    if isinstance(given, list) and len(given) == 1:
        (given,) = given
    if isinstance(given, list) and given:
        raise DataError(
            f"{root}: its YAML file names {len(given)} folders for one part "
            f"({', '.join(map(str, given[:3]))}); one is needed: move their pictures together"
        )
    if not isinstance(given, str) or not given.strip() or "\0" in given:
        return None
    given = given.replace("\\", "/")
    bases = [root / base, root] if isinstance(base, str) and "\0" not in base else [root]
    inside = given
    while inside.startswith(("../", "./")):
        inside = inside.partition("/")[2]
    for place in (*(folder / given for folder in bases), root / inside):
        try:
            if place.exists():
                return place / IMAGES if (place / IMAGES).is_dir() else place
        except OSError:
            continue
    return None


def _names(path: Path) -> list[Named]:
    """The classes, as records; their ids are the numbers of the label files.

    Raises:
        DataError: there are none, or they are no list and no mapping from numbers.
    """
    if path.name in NAME_LISTS:
        names: Any = read_lines(path)
    else:
        content = _settings(path)
        names = content.get("names")
        count = content.get("nc")
        if isinstance(names, list | dict) and isinstance(count, int) and count != len(names):
            raise DataError(f"{path}: nc is {count}, but {len(names)} names are listed")
    if isinstance(names, list):
        names = dict(enumerate(names))
    numbers = (
        [int(key) if str(key).isdecimal() else -1 for key in names or {}]
        if isinstance(names, dict)
        else []
    )
    if not numbers or min(numbers) < 0:
        raise DataError(f"{path}: `names` must list the classes, or map their numbers to names")
    return [
        (f"{path}: class {number}", {"id": number, "name": name})
        for number, name in zip(numbers, names.values(), strict=True)
    ]


def read(root: Path, part: Part, masks: bool) -> Records:
    """The records of a part; a picture without a label file has no objects.

    A line is a class and a box (the middle, width and height) or a polygon, in shares of the
    picture's width and height as a viewer shows it.
    """
    path = names_file(root)
    assert path is not None
    faults: list[Fault] = []
    records = Records(part.place, root, faults=faults)
    try:
        records.categories = _names(path)
    except DataError as error:
        faults.append(Fault(str(error)))
    files, missing = _pictures(part.place)
    faults += missing
    if not files and not missing:
        faults.append(Fault(f"{part.place}: has no pictures"))

    @cache
    def texts(folder: Path) -> dict[str, Path]:
        return {alike(stem): path for stem, path in files_ending(folder, ".txt").items()}

    for number, file in enumerate(files, start=1):
        name = os.path.relpath(file, root)
        records.images.append((str(file), {"id": number, "file_name": name}))
        label = _label_file(file, texts)
        if label is None:
            continue
        try:
            lines, size = read_lines(label), picture_size(file)
        except DataError as error:
            if label.is_file() and str(error).startswith(str(label)):
                faults.append(Fault(str(error)))
            continue  # `check_records` reports a picture that cannot be opened
        records.images[-1][1].update(height=size[0], width=size[1])

        numbered = [(f"{label}: line {place}", line) for place, line in enumerate(lines, start=1)]
        objects, wrong = collect(partial(_object, size=size, masks=masks), numbered)
        faults += wrong
        records.annotations += [(where, {**one, "image_id": number}) for where, one in objects]
    if any(name.startswith("..") for name in (r["file_name"] for _, r in records.images)):
        return _outside(records, root)
    return records


def _outside(records: Records, root: Path) -> Records:
    """Pictures that data.yaml has elsewhere: names relative to the folder that has all of them."""
    files = [os.path.normpath(root / record["file_name"]) for _, record in records.images]
    records.folder = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
    for (_, record), file in zip(records.images, files, strict=True):
        record["file_name"] = os.path.relpath(file, records.folder)
    return records


def _pictures(place: Path) -> tuple[list[Path], list[Fault]]:
    """The pictures of a folder and those below it, or of a list; sorted."""
    if place.is_file():

        def find(line: str) -> Path:
            for base in (place.parent, place.parent.parent):
                if (base / line).is_file():
                    return base / line
            raise DataError(f"{place}: names the image {line:.200}, not found")

        files, faults = collect(find, read_lines(place))
        return sorted(set(files)), faults
    found = []
    for folder, below, names in os.walk(place):
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [Path(folder) / name for name in names if is_picture(name)]
    return sorted(found), []


def _label_file(picture: Path, texts: Callable[[Path], Mapping[str, Path]]) -> Path | None:
    """The label file of a picture: in `labels` for the last `images` of its path, or beside it."""
    words = picture.parent.parts
    images = [place for place, word in enumerate(words) if word.lower() == IMAGES][-1:]
    folders = [Path(*words[:place], LABELS, *words[place + 1 :]) for place in images]
    found = (texts(folder).get(alike(picture.stem)) for folder in (*folders, picture.parent))
    return next((path for path in found if path is not None), None)


def _object(named: tuple[str, str], size: tuple[int, int], masks: bool) -> Named:
    """The record of a line.

    Raises:
        DataError: it is neither a box nor a polygon.
    """
    where, line = named
    try:
        label, *values = [float(word) for word in line.split()]
    except ValueError as error:
        raise DataError(f"{where}: is {line!r:.60}; numbers are needed") from error
    count = len(values) + 1
    if count != BOX and (count < LEAST_POLYGON or count % 2 == 0):
        raise DataError(
            f"{where}: has {count} values; a class and 4 numbers of a box, or 3 or more corners, "
            "are needed"
        )
    if not finite([label, *values], count) or not label.is_integer():
        raise DataError(f"{where}: is {line!r:.60}; a class and finite numbers are needed")
    if max(map(abs, values)) > LARGEST_SHARE:
        raise DataError(
            f"{where}: has {max(values, key=abs):g}; coordinates are shares of the picture's "
            "sides, from 0 to 1, not pixels"
        )
    height, width = size
    record: Truth = {"category_id": int(label), "iscrowd": 0}
    if count == BOX:
        x, y, across, down = values
        corners = [x - across / 2, y - down / 2, across, down]
    else:
        xs, ys = values[::2], values[1::2]
        corners = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        if masks:
            pixels = [v * side for v, side in zip(values, (width, height) * len(xs), strict=False)]
            record["segmentation"] = [pixels]
    left, top, across, down = corners
    record["bbox"] = [left * width, top * height, across * width, down * height]
    return where, record


YOLO = Layout(
    "YOLO folder (data.yaml with names, train and val; images/ and labels/*.txt)",
    parts,
    lambda *arguments: open_records(read, *arguments),
)
