"""Boxes with class names, and masks, drawn on pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from effspinenet_lib.errors import UserError
from effspinenet_lib.files import atomic_write, ensure_folder
from effspinenet_lib.report.style import FAMILY_COLOURS

COLOURS = tuple(FAMILY_COLOURS.values())
SHORTEST_SIDE = 480  # smaller pictures are enlarged, so that names can be read
LINE_SHARE, TEXT_SHARE = 0.003, 0.022  # of the picture's long side
LEAST_TEXT = 10  # pixels
MASK_OPACITY = 0.45
TILE = 320  # side of a picture on a sheet
GAP = 8


def draw_boxes(
    image: NDArray[np.uint8],
    boxes: NDArray[np.float32],
    labels: Iterable[int],
    names: Sequence[str],
) -> Image.Image:
    """Draw boxes on a picture.

    Args:
        image: uint8 [H, W, 3].
        boxes: [M, 4], x1 y1 x2 y2 in pixels of `image`.
        labels: M numbers of classes, which choose the colours.
        names: M texts, written at the boxes.
    """
    picture = Image.fromarray(image)
    zoom = max(1, -(-SHORTEST_SIDE // max(picture.size)))
    size = (picture.width * zoom, picture.height * zoom)
    picture = picture.resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(LINE_SHARE * max(picture.size)))
    font = ImageFont.load_default(max(LEAST_TEXT, round(TEXT_SHARE * max(picture.size))))
    for box, label, name in zip(boxes * zoom, labels, names, strict=True):
        left, top, right, bottom = (float(value) for value in box)
        colour = COLOURS[label % len(COLOURS)]
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=line)
        _write(draw, (left, top), name, colour, font)
    return picture


def tint(
    image: NDArray[np.uint8], masks: NDArray[np.bool_], labels: Iterable[int]
) -> NDArray[np.uint8]:
    """Lay the colours of classes over masks [M, H, W] of a picture uint8 [H, W, 3]."""
    tinted = image.astype(np.float32)
    for mask, label in zip(masks, labels, strict=True):
        colour = np.array(ImageColor.getrgb(COLOURS[label % len(COLOURS)])[:3], np.float32)
        tinted[mask] = (1 - MASK_OPACITY) * tinted[mask] + MASK_OPACITY * colour
    return tinted.round().astype(np.uint8)


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Write a text above a box's corner, or inside where the picture ends there."""
    _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
    x, y = corner
    y = y - bottom if y >= bottom else y
    draw.rectangle((x, y, x + right, y + bottom), fill=colour)
    luminance = np.dot(ImageColor.getrgb(colour)[:3], (0.299, 0.587, 0.114))
    draw.text((x, y), text, fill="black" if luminance > 128 else "white", font=font)


def sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay pictures out in rows, each fitted into a square tile."""
    rows = -(-len(pictures) // columns)
    step = TILE + GAP
    page = Image.new("RGB", (columns * step + GAP, rows * step + GAP), "white")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        scale = TILE / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        page.paste(picture.resize(size), (GAP + column * step, GAP + row * step))
    return page


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all, in the format of its suffix.

    Raises:
        UserError: the suffix is of no known format, or the file cannot be written.
    """
    known = Image.registered_extensions()
    if path.suffix.lower() not in known:
        raise UserError(f"{path}: unknown picture format {path.suffix!r}; use .png or .jpg")
    ensure_folder(path.parent)
    with atomic_write(path, "wb") as handle:
        picture.save(handle, format=known[path.suffix.lower()])
