"""What data folders have in common: checked records, images on disk, counted warnings.

The layouts themselves are in `coco`, `voc`, `voc_segmentation` and `imagenet`. The first two turn
their files into a COCO dictionary with the keys images, annotations and categories.
"""

from __future__ import annotations

import os
import sys
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from effspinenet_lib.data.dataset import Annotations, AnnotationsBuilder, Category, Dataset
from effspinenet_lib.errors import DataError

# A box whose part inside the image is thinner than this many pixels is degenerate (our choice;
# the thinnest real boxes of COCO are about a pixel).
SMALLEST_SIDE = 0.01
LARGEST_INTEGER = np.iinfo(np.int64).max

Truth = dict[str, Any]
Box = tuple[float, float, float, float]


class DataWarning(UserWarning):
    """Records of a data file that are left out."""


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


def need_integer(record: Any, key: str, where: str, least: int | None = None) -> int:
    """`record[key]` as an integer, at least `least`.

    Raises:
        DataError: it is missing, no integer or too small.
    """
    value = need(record, key, where)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > LARGEST_INTEGER:
        raise DataError(f"{where}: {key} is {value!r:.40}; an integer is needed")
    if least is not None and value < least:
        raise DataError(f"{where}: {key} is {value}; it must be {least} or more")
    return value


def finite_numbers(values: Any, count: int) -> bool:
    """True for a list of `count` finite numbers."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        and all(abs(v) <= sys.float_info.max for v in values)
    )


def relative_name(name: Any, where: str) -> str:
    """Check that a file name stays inside the folder that it is relative to.

    Raises:
        DataError: it is no text that can name a file, is absolute or climbs out with "..".
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name or not _encodes(name):
        raise DataError(f"{where}: the file name {name!r} is not a name")
    for flavour in (PurePosixPath(name), PureWindowsPath(name)):
        if flavour.is_absolute() or flavour.drive or ".." in flavour.parts:
            raise DataError(f"{where}: the file name {name!r} leads out of the data folder")
    return name


def _encodes(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def clipped(bbox: Sequence[float], width: int, height: int) -> Box:
    """The part of a box (x, y, width, height) inside the image, as x1 y1 x2 y2."""
    x, y, box_width, box_height = bbox
    return (
        min(max(x, 0.0), width),
        min(max(y, 0.0), height),
        min(max(x + box_width, 0.0), width),
        min(max(y + box_height, 0.0), height),
    )


def is_degenerate(bbox: Sequence[float], width: int, height: int) -> bool:
    """True if no part of a box (x, y, width, height) worth the name is inside the image."""
    if bbox[2] <= 0 or bbox[3] <= 0:
        return True
    left, top, right, bottom = clipped(bbox, width, height)
    return right - left < SMALLEST_SIDE or bottom - top < SMALLEST_SIDE


def warn_degenerate(path: Path, dropped: Sequence[str]) -> None:
    """Warn once of the degenerate boxes dropped from a file or folder; names the first."""
    if dropped:
        count = "1 degenerate box" if len(dropped) == 1 else f"{len(dropped)} degenerate boxes"
        warnings.warn(f"{path}: dropped {count} ({dropped[0]})", DataWarning, stacklevel=2)


def decode_image(path: Path, mode: str | None = "RGB") -> NDArray[np.uint8]:
    """Decode an image to uint8 [H, W, 3], or as it is stored if `mode` is None.

    The pixels are taken as they are stored, without turning by EXIF data: the boxes of COCO and
    VOC are given in stored pixels.

    Raises:
        DataError: the file is missing, truncated or not an image.
    """
    try:
        with Image.open(path) as picture:
            return np.array(picture if mode is None else picture.convert(mode))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: is not an image that can be decoded") from error
    # Pillow's decoders raise these for damaged files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: the image cannot be decoded ({error})") from error


def read_image(path: Path, height: int, width: int) -> NDArray[np.uint8]:
    """Decode an image to uint8 [height, width, 3], RGB.

    Raises:
        DataError: the file is missing, truncated, not an image or of another size.
    """
    pixels = decode_image(path)
    if pixels.shape != (height, width, 3):
        raise DataError(
            f"{path}: is {pixels.shape[1]} x {pixels.shape[0]} pixels, "
            f"its annotations say {width} x {height}"
        )
    return pixels


class MissingImages(DataError):  # noqa: N818 - it says what happened
    """Image files that are not there.

    Attributes:
        problems: what to tell of each, by its name.
    """

    def __init__(self, names: Sequence[str], folder: Path, source: Path) -> None:
        self.problems = {
            name: f"{source}: names the image {name:.200}, not found in {folder}" for name in names
        }
        others = f" ({len(names)} images are missing in all)" if len(names) > 1 else ""
        super().__init__(self.problems[names[0]] + others)


def check_images(folder: Path, names: Sequence[str], source: Path) -> None:
    """Check that every image file exists.

    Raises:
        MissingImages: those that do not; its message says the first and what names it.
    """
    # One listing of the folder is much faster than a question for each of 100,000 files.
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = [n for n in names if n not in present and not os.path.isfile(folder / n)]
    if missing:
        raise MissingImages(missing, folder, source)


class FolderDataset(Dataset):
    """Image files in a folder, with the annotations that a subclass reads."""

    def __init__(
        self,
        name: str,
        categories: Sequence[Category],
        annotations: Annotations,
        image_folder: Path,
    ) -> None:
        self.image_folder = image_folder
        super().__init__(name, categories, annotations)

    def load_image(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as uint8 [H, W, 3], RGB.

        Raises:
            DataError: the file is missing, truncated or of another size than annotated.
        """
        height, width = (int(side) for side in self.annotations.sizes[index])
        return read_image(self.image_path(index), height, width)

    def image_path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.image_folder / self.annotations.file_name(index)

    @abstractmethod
    def ground_truth(self) -> Truth:
        """The annotations as a COCO dictionary, read from the files again."""


def categories_of(truth: Truth) -> list[Category]:
    """The categories of a COCO dictionary, in its order."""
    return [Category(entry["id"], entry["name"]) for entry in truth["categories"]]


def annotations_of(truth: Truth) -> Annotations:
    """The images and boxes of a COCO dictionary; boxes are clipped to their images."""
    builder = AnnotationsBuilder()
    indices, sides = {}, {}
    for image in truth["images"]:
        sides[image["id"]] = image["width"], image["height"]
        indices[image["id"]] = builder.add_image(
            image["id"], image["file_name"], image["height"], image["width"]
        )
    labels = {entry["id"]: label for label, entry in enumerate(truth["categories"])}
    for record in truth["annotations"]:
        image_id = record["image_id"]
        builder.add_box(
            indices[image_id],
            clipped(record["bbox"], *sides[image_id]),
            labels[record["category_id"]],
            bool(record["iscrowd"]),
            record["area"],
        )
    return builder.build()
