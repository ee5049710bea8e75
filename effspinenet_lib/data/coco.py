"""Folders in COCO's layout: `annotations/instances_<split>.json` and a folder of images."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

from effspinenet_lib.data.dataset import Annotations, Category
from effspinenet_lib.data.formats import (
    FolderDataset,
    Truth,
    annotations_of,
    check_images,
    finite_numbers,
    is_degenerate,
    need,
    need_integer,
    relative_name,
    warn_degenerate,
)
from effspinenet_lib.data.heldout import Part, parse_part, part_mask
from effspinenet_lib.data.masks import RunLengths
from effspinenet_lib.data.store import file_digest, stored
from effspinenet_lib.errors import DataError
from effspinenet_lib.files import read_json

PREFIX = "instances_"
# COCO 2017's splits are known as train and val, its files carry the year.
YEAR = "2017"
# What smaller annotation files hold is read each time, in less than a second (our choice).
LEAST_STORED_BYTES = 4 * 2**20


class CocoFolder(FolderDataset):
    """A split of a folder in COCO's layout.

    "train" also finds `instances_train2017.json`. Images are looked for in `<split>/`,
    `<split>2017/`, the same below `images/`, `images/` itself and the folder itself. Segmentations
    are passed on in `ground_truth`, and read where a task needs masks. `train-held-100` and
    `train-rest-100` are the two sides of the split that `heldout` cuts.

    What a large annotation file holds is kept in the cache, where processes map it.
    """

    def __init__(self, root: str | os.PathLike[str], split: str, images: int | None = None) -> None:
        """Open the split; `images` limits it to the first so many images in id order.

        Raises:
            DataError: the annotation file cannot be used or an image is missing; names the file
                and the record.
            UserError: the cache cannot be written, or a part is asked for that has no images.
        """
        self.part = parse_part(split)
        if self.part is not None:
            split = self.part.split
        self.path = _annotation_file(Path(root), split)
        self.images = images
        self._key: list[Any] | None = None
        if self.path.stat().st_size >= LEAST_STORED_BYTES:
            self._key = [file_digest(self.path), self.part, images]
        annotations, facts = self._listing()
        self.dropped = tuple(facts["dropped"])
        warn_degenerate(self.path, self.dropped)
        names = [annotations.file_name(index) for index in range(len(annotations.image_ids))]
        folder = _image_folder(Path(root), split, names[0], self.path)
        check_images(folder, names, self.path)
        categories = [Category(*entry) for entry in facts["categories"]]
        shown = split if self.part is None else self.part.name
        super().__init__(f"{Path(root).name} {shown}", categories, annotations, folder)

    @property
    def origin(self) -> str:
        """The annotation file."""
        return str(self.path)

    def ground_truth(self) -> Truth:
        """The annotations as a COCO dictionary, read from the file again."""
        truth, _ = _read(self.path, self.images, self.part)
        return truth

    def _listing(self) -> tuple[Annotations, dict[str, Any]]:
        """The images and boxes; the categories and the dropped boxes."""

        def make() -> tuple[Annotations, dict[str, Any]]:
            truth, dropped = _read(self.path, self.images, self.part, masks=False)
            categories = [[entry["id"], entry["name"]] for entry in truth["categories"]]
            return annotations_of(truth), {"dropped": dropped, "categories": categories}

        return make() if self._key is None else stored(Annotations, self._key, make)

    def _encode_masks(self) -> RunLengths:
        def make() -> tuple[RunLengths, dict[str, Any]]:
            return super(CocoFolder, self)._encode_masks(), {}

        return (make() if self._key is None else stored(RunLengths, self._key, make))[0]


def splits_of(root: Path) -> list[str]:
    """The names of the splits that the annotation files are of, sorted.

    Where there are `instances_*.json`, the other files (captions, keypoints) are none of a split.
    """
    stems = [path.stem for path in (root / "annotations").glob("*.json")]
    instances = [stem.removeprefix(PREFIX) for stem in stems if stem.startswith(PREFIX)]
    return sorted(instances or stems)


def _annotation_file(root: Path, split: str) -> Path:
    folder = root / "annotations"
    for name in (f"{PREFIX}{split}", f"{PREFIX}{split}{YEAR}", split, f"{split}{YEAR}"):
        path = folder / f"{name}.json"
        if path.is_file():
            return path
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    found = ", ".join(splits_of(root)) or "none"
    raise DataError(f"{folder}: has no {PREFIX}{split}.json; splits found: {found}")


def _image_folder(root: Path, split: str, first_image: str, source: Path) -> Path:
    stem = source.stem.removeprefix(PREFIX)
    names = dict.fromkeys((split, stem, f"{split}{YEAR}"))
    folders = [root / name for name in names] + [root / "images" / name for name in names]
    folders += [root / "images", root]
    for folder in folders:
        if os.path.isfile(folder / first_image):
            return folder
    existing = [folder for folder in folders if folder.is_dir()]
    return existing[0]


def _read(
    path: Path, limit: int | None, part: Part | None, masks: bool = True
) -> tuple[Truth, list[str]]:
    """The checked content of an annotation file or a part of it; what was degenerate in it.

    Without masks, which are nearly all of such a file, it takes a quarter of the memory.
    """
    content = read_json(path, None if masks else _without_masks)
    tables = {}
    for key in ("images", "annotations", "categories"):
        tables[key] = need(content, key, str(path))
        if not isinstance(tables[key], list):
            raise DataError(f"{path}: {key} must be a list")
    categories = _categories(tables["categories"], path)
    images = _images(tables["images"], path)
    kept = dict(sorted(images.items()))
    if part is not None:
        mask = part_mask([image["file_name"] for image in kept.values()], part)
        kept = {number: kept[number] for number, keep in zip(kept, mask, strict=True) if keep}
    kept = dict(islice(kept.items(), limit))
    known = {category["id"] for category in categories}
    annotations, dropped = [], []
    for index, record in enumerate(tables["annotations"]):
        annotation = _annotation(record, _name(record, "annotation", index, path), images, known)
        image = kept.get(annotation["image_id"])
        if image is None:
            continue
        if is_degenerate(annotation["bbox"], image["width"], image["height"]):
            dropped.append(f"first: {_name(record, 'annotation', index)}, {image['file_name']}")
        else:
            annotations.append(annotation)
    _give_ids(annotations)
    truth = {
        "info": {"description": path.name},
        "images": list(kept.values()),
        "annotations": annotations,
        "categories": categories,
    }
    return truth, dropped


def _without_masks(record: dict[str, Any]) -> dict[str, Any]:
    record.pop("segmentation", None)
    return record


def _name(record: Any, kind: str, index: int, path: Path | None = None) -> str:
    known = isinstance(record, dict) and "id" in record
    name = f"{kind} {record['id']}" if known else f"{kind} number {index + 1}"
    return name if path is None else f"{path}: {name}"


def _categories(records: list[Any], path: Path) -> list[dict[str, Any]]:
    categories: dict[int, dict[str, Any]] = {}
    for index, record in enumerate(records):
        where = _name(record, "category", index, path)
        number = need_integer(record, "id", where)
        if number in categories:
            raise DataError(f"{where}: the id occurs twice")
        categories[number] = {"id": number, "name": str(need(record, "name", where))}
    if not categories:
        raise DataError(f"{path}: lists no categories")
    return [categories[number] for number in sorted(categories)]


def _images(records: list[Any], path: Path) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    for index, record in enumerate(records):
        where = _name(record, "image", index, path)
        number = need_integer(record, "id", where)
        if number in images:
            raise DataError(f"{where}: the id occurs twice")
        images[number] = {
            "id": number,
            "file_name": relative_name(need(record, "file_name", where), where),
            "width": need_integer(record, "width", where, least=1),
            "height": need_integer(record, "height", where, least=1),
        }
    if not images:
        raise DataError(f"{path}: lists no images")
    return images


def _annotation(
    record: Any, where: str, images: dict[int, dict[str, Any]], categories: set[int]
) -> dict[str, Any]:
    image_id = need_integer(record, "image_id", where)
    if image_id not in images:
        raise DataError(f"{where}: image {image_id} is not listed under images")
    category_id = need_integer(record, "category_id", where)
    if category_id not in categories:
        raise DataError(f"{where}: category {category_id} is not listed under categories")
    bbox = need(record, "bbox", where)
    if not finite_numbers(bbox, 4):
        raise DataError(f"{where}: bbox is {bbox!r}; four finite numbers x, y, w, h are needed")
    area = record.get("area", bbox[2] * bbox[3])
    if not finite_numbers([area], 1):
        raise DataError(f"{where}: area is {area!r}; a finite number is needed")
    crowd = record.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise DataError(f"{where}: iscrowd is {crowd!r}; it must be 0 or 1")
    annotation = {
        "id": record.get("id"),
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "area": area,
        "iscrowd": int(crowd),
    }
    if record.get("segmentation"):
        annotation["segmentation"] = record["segmentation"]
    return annotation


def _give_ids(annotations: list[dict[str, Any]]) -> None:
    """Number the annotations anew unless their ids are distinct positive integers.

    The COCO evaluation takes the id 0 for "unmatched".
    """
    ids = [record["id"] for record in annotations]
    usable = all(isinstance(number, int) and number > 0 for number in ids)
    if not usable or len(set(ids)) < len(ids):
        for number, record in enumerate(annotations, start=1):
            record["id"] = number
