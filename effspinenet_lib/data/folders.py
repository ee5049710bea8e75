"""What data folders share: checked records, image files on disk, a cache of what files hold.

Every layout turns its files into the records of a COCO dictionary, which `check_records` checks
for all of them and with all their faults at once.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from effspinenet_lib.data.dataset import (
    Annotations,
    Category,
    Dataset,
    InvalidData,
    Truth,
    collect_faults,
)
from effspinenet_lib.errors import DataError
from effspinenet_lib.files import CACHE_VARIABLE, atomic_write, cache_folder, ensure_folder, locked

# A box whose part inside the image is thinner than this many pixels is degenerate (our choice;
# the thinnest real boxes of COCO are about a pixel).
SMALLEST_SIDE = 0.01
# Smaller annotation files are read each time, in less than a second (our choice).
LEAST_CACHED_BYTES = 4 * 2**20
CACHE_VERSION = 3  # raise it when what is cached, or how it is read from its source, changes
_HASHED_BYTES = 1 << 20

Named = Iterable[tuple[str, Any]]  # records, each with the words that name it in messages


class DataWarning(UserWarning):
    """Records of a data file that are left out."""


def check_records(
    source: Path, images: Named, annotations: Named, categories: Named
) -> tuple[Truth, NDArray[np.str_]]:
    """Check the records of a COCO dictionary, whatever layout they were read from.

    Returns:
        The dictionary, images and categories in the order of their ids, degenerate boxes left
        out; and these boxes, an image id and a name each, str [D, 2].

    Raises:
        InvalidData: records are invalid; holds every fault.
    """
    classes = _by_id(source, "categories", categories, _category)
    pictures = _by_id(source, "images", images, _image)
    kept, dropped = [], []

    def check(named: tuple[str, Any]) -> None:
        where, record = named[0], _annotation(*named, pictures, classes)
        image = pictures[record["image_id"]]
        if is_degenerate(record["bbox"], image["width"], image["height"]):
            name = where.removeprefix(str(source)).lstrip(":/ ")
            dropped.append((str(image["id"]), f"{name}, {image['file_name']}"))
        else:
            kept.append(record)

    collect_faults(check, annotations)
    ids = {record["id"] for record in kept if isinstance(record["id"], int) and record["id"] > 0}
    if len(ids) < len(kept):  # the COCO evaluation takes the id 0 for "unmatched"
        for number, record in enumerate(kept, start=1):
            record["id"] = number
    tables = {
        "images": [*pictures.values()],
        "annotations": kept,
        "categories": [*classes.values()],
    }
    return tables, np.array(dropped, np.str_).reshape(-1, 2)


def _by_id(
    source: Path, table: str, records: Named, check: Callable[[str, Any], Truth]
) -> dict[int, Truth]:
    """The checked records of a table by their ids, in order."""
    found: dict[int, Truth] = {}

    def add(named: tuple[str, Any]) -> None:
        record = check(*named)
        if found.setdefault(record["id"], record) is not record:
            raise DataError(f"{named[0]}: the id occurs twice")

    collect_faults(add, records)
    if not found:
        raise DataError(f"{source}: lists no {table}")
    return dict(sorted(found.items()))


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
        and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
    )


def relative_name(name: Any, where: str) -> str:
    """Check that a file name stays inside the folder that it is relative to.

    Raises:
        DataError: it is absolute or leaves the folder with "..".
    """
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where}: the file name {name!r} is not a name")
    path = PureWindowsPath(name)  # knows both slashes
    if path.anchor or ".." in path.parts:
        raise DataError(f"{where}: the file name {name!r} leads out of the data folder")
    return name


def _integer(record: Any, key: str, where: str) -> int:
    value = need(record, key, where)
    if not isinstance(value, int):
        raise DataError(f"{where}: {key} is {value!r:.40}; an integer is needed")
    return value


def _category(where: str, record: Any) -> Truth:
    return {"id": _integer(record, "id", where), "name": str(need(record, "name", where))}


def _image(where: str, record: Any) -> Truth:
    sides = {side: _integer(record, side, where) for side in ("width", "height")}
    for side, value in sides.items():
        if value < 1:
            raise DataError(f"{where}: {side} is {value}; it must be 1 or more")
    name = relative_name(need(record, "file_name", where), where)
    return {"id": _integer(record, "id", where), "file_name": name, **sides}


def _annotation(
    where: str, record: Any, images: Mapping[int, Truth], categories: Mapping[int, Truth]
) -> Truth:
    annotation = {}
    for table, known in (("image", images), ("category", categories)):
        number = annotation[f"{table}_id"] = _integer(record, f"{table}_id", where)
        if number not in known:
            raise DataError(f"{where}: {table} {number} is not listed")
    bbox = need(record, "bbox", where)
    if not finite(bbox, 4):
        raise DataError(f"{where}: bbox is {bbox!r:.80}; four finite numbers are needed")
    area = record.get("area", bbox[2] * bbox[3])
    if not finite([area], 1):
        raise DataError(f"{where}: area is {area!r:.40}; a finite number is needed")
    crowd = record.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise DataError(f"{where}: iscrowd is {crowd!r:.40}; it must be 0 or 1")
    rest = {"id": record.get("id"), "bbox": bbox, "area": area, "iscrowd": int(crowd)}
    if record.get("segmentation"):
        rest["segmentation"] = record["segmentation"]
    return {**annotation, **rest}


def is_degenerate(bbox: Sequence[float], width: int, height: int) -> bool:
    """True if less than `SMALLEST_SIDE` of a box (x, y, width, height) is inside the image."""
    x, y, box_width, box_height = bbox
    across = min(max(x + box_width, 0.0), width) - min(max(x, 0.0), width)
    down = min(max(y + box_height, 0.0), height) - min(max(y, 0.0), height)
    return min(box_width, box_height) <= 0 or min(across, down) < SMALLEST_SIDE


def split_list(path: Path) -> list[str]:
    """The names in a list of images, each once, sorted.

    Raises:
        DataError: the list is missing or empty, or a name leaves the folder.
    """
    if not path.is_file():
        found = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt")))
        raise DataError(f"{path}: no such split; splits found: {found or 'none'}")
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    names = {relative_name(line.split()[0], str(path)) for line in lines if line.strip()}
    if not names:
        raise DataError(f"{path}: lists no images")
    return sorted(names)


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file for the block, in which Pillow's errors become one line.

    Raises:
        DataError: the file is missing, truncated or not an image.
    """
    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: is not an image that can be decoded") from error
    # Pillow's decoders raise these for damaged files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: the image cannot be decoded ({error})") from error


def decode_image(path: Path) -> NDArray[np.uint8]:
    """Decode an image to uint8 [H, W, 3], RGB; errors as in `open_image`.

    EXIF rotation is not applied: the boxes of COCO and VOC are given in stored pixels.
    """
    with open_image(path) as picture:
        return np.array(picture.convert("RGB"))


@contextmanager
def cache_lock(path: Path) -> Iterator[None]:
    """Hold the lock under which `path` of the cache is made.

    Raises:
        UserError: the cache cannot be written; names the variable that moves it.
    """
    remedy = f"free it, or set the environment variable {CACHE_VARIABLE} to another folder"
    ensure_folder(path.parent, remedy)
    with locked(path):
        yield


def cached_arrays(
    source: Path, kind: str, read: Callable[[], dict[str, NDArray[Any]]]
) -> dict[str, NDArray[Any]]:
    """The arrays that `read` makes of an annotation file; kept in the cache if it is large.

    The name in the cache is the SHA-256 of the file and `kind`, which says which arrays they are.

    Raises:
        UserError: the cache cannot be written.
    """
    if source.stat().st_size < LEAST_CACHED_BYTES:
        return read()
    digest = hashlib.sha256()
    with open(source, "rb") as handle:
        while piece := handle.read(_HASHED_BYTES):
            digest.update(piece)
    name = f"{digest.hexdigest()}-{kind}-{CACHE_VERSION}.npz"
    path = cache_folder() / "annotations" / name
    if not path.exists():
        with cache_lock(path):
            if not path.exists():
                arrays = read()
                with atomic_write(path, "wb") as handle:
                    np.savez(handle, allow_pickle=False, **arrays)
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


class FolderDataset(Dataset):
    """Image files in a folder of one layout, with the annotations that a subclass reads.

    Attributes:
        layout: what such a folder holds, for messages.
        only_task: the task that the layout serves, if it serves one alone.
    """

    layout: ClassVar[str]
    only_task: ClassVar[str | None] = None

    def __init__(
        self,
        name: str,
        categories: Sequence[Category],
        annotations: Annotations,
        image_folder: Path,
        source: Path | None = None,
        dropped: Sequence[str] = (),
    ) -> None:
        """Warn once of degenerate boxes that were dropped; check that images exist.

        File names are relative to `image_folder`; `source` is the file that names them, None
        where they were found in the folder.

        Raises:
            InvalidData: image files are missing.
        """
        super().__init__(name, categories, annotations, source or image_folder)
        self.image_folder = image_folder
        self.dropped = tuple(dropped)
        if dropped:
            count = f"{len(dropped)} degenerate box{'es' if len(dropped) > 1 else ''}"
            text = f"{source}: dropped {count} (first: {dropped[0]})"
            warnings.warn(text, DataWarning, stacklevel=4)
        if source is not None:
            # Listing the folder once is much faster than asking for each of 100,000 files.
            present = set(os.listdir(image_folder)) if image_folder.is_dir() else set()
            missing = [
                (file, f"{source}: names the image {file:.200}, not found in {image_folder}")
                for file in annotations.file_names.tolist()
                if file not in present and not os.path.isfile(image_folder / file)
            ]
            if missing:
                raise InvalidData(missing, "missing")

    @classmethod
    @abstractmethod
    def splits(cls, folder: Path) -> list[str]:
        """The names of the splits, sorted; none if the folder does not have this layout."""

    def load_image(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as uint8 [H, W, 3], RGB.

        Raises:
            DataError: the file is missing, truncated or of another size than annotated.
        """
        path = self.image_folder / self.annotations.file_name(index)
        pixels = decode_image(path)
        height, width = self.annotations.sizes[index].tolist()
        if height and pixels.shape != (height, width, 3):
            found = f"{pixels.shape[1]} x {pixels.shape[0]}"
            raise DataError(f"{path}: is {found} pixels, its annotations say {width} x {height}")
        return pixels
