"""Folders in COCO's layout, and the single COCO files that labelling tools export."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effspinenet_lib.data.folders import Layout, as_whole, folder_with, open_records
from effspinenet_lib.data.pictures import files_ending, visible
from effspinenet_lib.data.records import Fault, Named, Records, Truth, need
from effspinenet_lib.data.splits import YEAR, Part, part_in
from effspinenet_lib.errors import DataError
from effspinenet_lib.files import read_json

PREFIX = "instances_"
ROBOFLOW = "_annotations.coco.json"
TABLES = {"images": "image", "annotations": "annotation", "categories": "category"}


def parts(root: Path) -> dict[str, Path]:
    """The annotation file of each part.

    `annotations/instances_<part>.json` (where there are any, other files there, of captions or
    keypoints, are no parts), `annotations/<part>.json`, `<part>/*.json`, or files of the folder
    itself.
    """
    folder = root / "annotations"
    files = files_ending(folder, ".json")
    instances = {stem: path for stem, path in files.items() if stem.startswith(PREFIX)}
    found = {stem.removeprefix(PREFIX): path for stem, path in (instances or files).items()}
    if not found:
        for name in visible(root):
            inside = files_ending(root / name, ".json").values()
            # Roboflow's file first, if there are others
            jsons = sorted(inside, key=lambda path: path.name != ROBOFLOW)
            path = next((path for path in jsons if _is_coco(path)), None)
            if path is not None:
                found[name] = path
    if not found:
        files = files_ending(root, ".json")
        coco = {stem: path for stem, path in files.items() if _is_coco(path)}
        found = {part_in(stem) or stem: path for stem, path in coco.items()}
        if len(found) < len(coco):
            found = coco
    return as_whole(found, lambda name: part_in(name) is not None)


def _is_coco(path: Path) -> bool:
    """Whether a JSON file names COCO's tables; reads no more than it must."""
    if path.name == ROBOFLOW:
        return True
    try:
        with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ) as text:
            return text.find(b'"images"') >= 0 and text.find(b'"annotations"') >= 0
    except (OSError, ValueError):  # an empty file cannot be mapped
        return False


def read(root: Path, part: Part, masks: bool) -> Records:
    """The records of an annotation file.

    Without masks, which are nearly all of such a file, it takes a quarter of the memory.
    """
    path = part.place

    def without_masks(record: Truth) -> Truth:
        record.pop("segmentation", None)
        return record

    content = read_json(path, None if masks else without_masks)
    faults: list[Fault] = []

    def named(table: str) -> Iterator[Named]:
        rows = need(content, table, str(path))
        if not isinstance(rows, list):
            raise DataError(f"{path}: {table} must be a list")
        for number, record in enumerate(rows, start=1):
            known = isinstance(record, dict) and record.get("id") is not None
            name = f"{record['id']!s:.40}" if known else f"number {number}"
            yield f"{path}: {TABLES[table]} {name}", record

    tables: dict[str, list[Named]] = {}
    for table in TABLES:
        try:
            tables[table] = list(named(table))
        except DataError as error:
            tables[table] = []
            faults.append(Fault(str(error)))
    names = [_file_name(record) for _, record in tables["images"][:5]]
    records = Records(path, _image_folder(root, part, names), faults=faults)
    for table, rows in tables.items():
        setattr(records, table, rows)
    return records


def _file_name(record: Any) -> str:
    name = record.get("file_name") if isinstance(record, dict) else None
    return name if isinstance(name, str) and "\0" not in name else ""


def _image_folder(root: Path, part: Part, names: list[str]) -> Path:
    """The folder that has the first images."""
    stem, whole = part.place.stem.removeprefix(PREFIX), part.key or "default"
    subfolders = dict.fromkeys((whole, stem, f"{whole}{YEAR}"))
    folders = [parent / name for parent in (root, root / "images") for name in subfolders]
    inside = part.place.parent
    if inside not in (root, root / "annotations"):
        folders = [inside, inside / "images", inside / "data", *folders]
    folders += [root / "images", root / "data", root]
    return folder_with(folders, [name for name in names if name], root)


COCO = Layout(
    "COCO folder (annotations/instances_<part>.json and <part>/; <part>/_annotations.coco.json; "
    "or one COCO file and images/)",
    parts,
    lambda *arguments: open_records(read, *arguments),
)
