"""Picture files: one function reads their pixels, for every task, command and sheet alike."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from effspinenet_lib.errors import DataError

# Files that are taken for pictures where no annotation names them.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".jfif")
# What undoes each EXIF orientation (EXIF 2.32, tag 274); those from 5 on swap the sides.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDES_SWAPPED = 5

Size = tuple[int, int]  # height, width


def read_picture(path: Path, size: Size | None = None) -> NDArray[np.uint8]:
    """The pixels of a picture as a viewer shows it, uint8 [H, W, 3], RGB.

    The EXIF orientation is applied, except where `size`, the annotated height and width, fits
    the stored pixels alone. Grey values of 16 bits keep their upper 8, as OpenCV reads them;
    other integers and floats are scaled to 0..255 (`_scaled`). Transparency is dropped.

    Raises:
        DataError: the file is missing, truncated, no picture, or of another size.
    """
    with _opened(path) as picture:
        stored, orientation = (picture.height, picture.width), _orientation(picture)
        picture.load()
        turned = stored[::-1] if orientation >= SIDES_SWAPPED else stored
        if orientation in TURNS and not (size == stored != turned):
            pixels = _rgb(picture.transpose(TURNS[orientation]))
        else:
            pixels = _rgb(picture)
    if size is not None and pixels.shape[:2] != size:
        height, width = pixels.shape[:2]
        exif = f" (turned by its EXIF orientation {orientation})" if orientation in TURNS else ""
        raise DataError(
            f"{path}: is {width} x {height} pixels{exif}, its annotations say "
            f"{size[1]} x {size[0]}; annotate this file, or put the annotated one here"
        )
    return pixels


def read_labels(path: Path) -> NDArray[np.uint8]:
    """The values of a label map, uint8 [H, W]: of a palette or grey picture as they are stored.

    Raises:
        DataError: the file cannot be decoded, or has more than one value a pixel.
    """
    with _opened(path) as picture:
        labels = np.array(picture)
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise DataError(f"{path}: a label map has one value a pixel (a palette, or grey)")
    return labels


def picture_size(path: Path) -> Size:
    """Height and width of a picture as a viewer shows it; reads the header alone.

    Raises:
        DataError: the file is missing or no picture.
    """
    with _opened(path) as picture:
        size = (picture.height, picture.width)
        return size[::-1] if _orientation(picture) >= SIDES_SWAPPED else size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture for the block, in which Pillow's errors become one line."""
    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: is not an image that can be decoded") from error
    # Pillow's decoders raise these for damaged files, and for modes that have no RGB.
    except (
        *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError),
        *(AttributeError, OverflowError, MemoryError, Image.DecompressionBombError),
    ) as error:
        raise DataError(
            f"{path}: the image cannot be decoded ({error}); save it again, or leave it out"
        ) from error


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation that is left to apply (Pillow turns TIFF files itself)."""
    if picture.format == "TIFF":
        return 1
    try:
        # the base class reads what the header had; that of PNG would load the whole picture
        value = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data leaves a picture as good as it was
        return 1
    return value if value in TURNS else 1


def _rgb(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.mode == "F" or picture.mode.startswith("I"):
        grey = _scaled(np.array(picture))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if "transparency" in picture.info and picture.mode == "P":
        picture = picture.convert("RGBA")
    return np.array(picture.convert("RGB"))


def _scaled(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Grey values [H, W] of more than 8 bits as uint8.

    16 bits: the upper 8. Other values: as they are if they fit 0..255 (floats up to 1 are shares
    of white), their upper 8 of 16 bits if they fit 0..65535, else stretched from their lowest to
    their highest.
    """
    if values.dtype.itemsize == 2:
        return (values.astype(np.uint16) >> 8).astype(np.uint8)
    numbers = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError("a pixel is not finite")
    low, high = float(numbers.min()), float(numbers.max())
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        numbers *= 255
    elif low < 0 or high > 65535:
        numbers = (numbers - low) * (255 / (high - low))
    elif high > 255:
        numbers //= 256
    return np.rint(numbers).astype(np.uint8)


def visible(folder: Path) -> list[str]:
    """The names in a folder, sorted, without hidden ones (`._*`, `.DS_Store`); [] if it is none."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []


def files_ending(folder: Path, suffix: str) -> dict[str, Path]:
    """The visible files of a folder with an ending in any case, by name without it, sorted."""
    names = [name for name in visible(folder) if name.lower().endswith(suffix)]
    return {name[: -len(suffix)]: folder / name for name in names}


def is_picture(name: str) -> bool:
    """Whether a file's name is that of a picture."""
    return name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")


def alike(name: str) -> str:
    """What names have in common that differ in case or Unicode form (NFC, NFD) alone."""
    return unicodedata.normalize("NFC", name).casefold()


def find_files(names: Sequence[str], folder: Path) -> list[str | None]:
    """The file of each name in a folder, relative to it; None where there is none.

    Where a name's own file is missing, one is taken that is `alike`, if it is the only one.
    Backslashes in names separate folders too.
    """
    # Listing the folder once is much faster than asking for each of 100,000 files.
    present = set(visible(folder))
    listings: dict[str, dict[str, list[str]]] = {}

    def other(name: str) -> str | None:
        parent, _, last = name.replace("\\", "/").rpartition("/")
        if parent not in listings:
            listings[parent] = {}
            for file in visible(folder / parent):
                listings[parent].setdefault(alike(file), []).append(file)
        found = listings[parent].get(alike(last), [])
        return (f"{parent}/{found[0]}" if parent else found[0]) if len(found) == 1 else None

    return [
        name if name in present or os.path.isfile(folder / name) else other(name) for name in names
    ]
