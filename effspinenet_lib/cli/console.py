"""What the commands share: messages, tables, options, pictures with boxes."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effspinenet_lib.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

FAILED_CHECK = 1  # exit code of a check that found problems
PIPED_WIDTH = 160  # columns where the output is no terminal, so that no cell is folded
SHORTEST_SIDE = 480  # smaller pictures are enlarged, so that names can be read
LINE_SHARE, TEXT_SHARE = 0.003, 0.022  # of the picture's long side
LEAST_LINE, LEAST_TEXT = 2, 10  # pixels
MASK_OPACITY = 0.45
TILE, GAP = 320, 8  # pixels: side of a picture on a contact sheet, and between two

ResultsDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the CSV files are. [default: the checkout's results]"),
]


def set_up_messages() -> None:
    """Send the library's log messages and its warnings to stderr, one line each.

    Of several processes (`torchrun`) only the first prints; the others print errors alone.
    """
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
        logging.basicConfig(format="%(message)s", level=logging.ERROR)
        warnings.simplefilter("ignore")
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names that are not UTF-8
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("effspinenet_lib").setLevel(logging.INFO)
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str, category: type[Warning], *_where: Any, **_more: Any
) -> None:
    print(f"warning: {message}", file=sys.stderr)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows as a table on stdout; columns of numbers are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    texts = [[_cell(value) for value in row] for row in rows]
    table = Table()
    for index, column in enumerate(columns):
        numeric = bool(texts) and all(_is_number(row[index]) for row in texts)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in texts:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    console = Console(width=width, highlight=False, markup=False)
    console.print(title)
    console.print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.1f}"
    return str(value)


def _is_number(text: str) -> bool:
    return text in ("", "–") or text.replace(".", "", 1).lstrip("-").isdecimal()


def print_metrics(title: str, task: str, metrics: dict[str, float]) -> None:
    """Print a task's metrics; one without anything to measure shows as a dash."""
    from effspinenet_lib.training.evaluate import TASK_METRICS

    rows = [(name, metrics[name]) for name in TASK_METRICS[task]]
    print_table(title, ("metric", "value (%)"), rows)


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Read `key=value` texts; values are YAML scalars (`true`, `0.2`, `relu`).

    Raises:
        UserError: a text has no `=`, or its value is not one word or number.
    """
    import yaml

    parsed: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"option {text!r} is not of the form key=value")
        try:
            parsed[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"option {text!r}: the value {value!r} cannot be read") from error
        if not isinstance(parsed[key.strip()], (str, bool, int, float)):
            raise UserError(f"option {text!r}: the value {value!r} is not one word or number")
    return parsed


def given_options(context: typer.Context) -> dict[str, Any]:
    """The options that the command line names, with their values."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {
        name: context.params[name]
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    }


def pass_down(context: typer.Context) -> bool:
    """Hand the options given to a group to the command that is called in it.

    Returns:
        Whether a command is called.

    Raises:
        UserError: the command does not have one of the options.
    """
    name = context.invoked_subcommand
    if name is None:
        return False
    given = given_options(context)
    known = {parameter.name for parameter in context.command.commands[name].params}  # type: ignore[attr-defined]
    for option in given:
        if option not in known:
            raise UserError(f"`{context.command_path} {name}` has no {option_name(option)}")
    context.default_map = {name: given}
    return True


def option_name(parameter: str) -> str:
    """A parameter as it is written on the command line."""
    return f"--{parameter.replace('_', '-')}"


# Pictures


@lru_cache
def font_for(text: str) -> str:
    """A font file that has the letters of a text: Matplotlib's own, or one of the machine's.

    Where no font has all of them, the one that has most.
    """
    from matplotlib import font_manager, get_data_path
    from matplotlib.ft2font import FT2Font

    wanted = {ord(letter) for letter in text if not letter.isspace()}
    own = os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    best, most = own, -1
    for path in (own, *sorted(font.fname for font in font_manager.fontManager.ttflist)):
        if "LastResort" in path:  # draws boxes for letters
            continue
        try:
            has = len(wanted & FT2Font(path).get_charmap().keys())
        except (OSError, RuntimeError, ValueError):
            continue
        if has > most:
            best, most = path, has
        if has == len(wanted):
            return path
    return best


def readable(name: str, label: int) -> str:
    """A class's name as it is drawn: its number where no font has its letters."""
    from matplotlib.ft2font import FT2Font

    letters = {ord(letter) for letter in name if not letter.isspace()}
    has = letters <= FT2Font(font_for(name)).get_charmap().keys()
    return name if has else f"class {label}"


def draw(
    image: NDArray[np.uint8],
    boxes: Tensor,
    labels: Sequence[int],
    names: Sequence[str],
    masks: Tensor | None = None,
) -> Tensor:
    """Draw objects on a picture; a small one is enlarged, so that names can be read.

    Args:
        image: uint8 [H, W, 3].
        boxes: [M, 4], x1 y1 x2 y2 in pixels of `image`.
        labels: M classes, which choose the colours.
        names: M texts, written at the boxes.
        masks: bool [M, H, W].

    Returns:
        uint8 [3, zoom × H, zoom × W].
    """
    import torch
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    from effspinenet_lib.report.style import FAMILY_COLOURS

    picture = torch.from_numpy(image).permute(2, 0, 1)
    if not len(names):
        return picture
    palette = list(FAMILY_COLOURS.values())
    colours = [palette[label % len(palette)] for label in labels]
    if masks is not None:
        picture = draw_segmentation_masks(picture, masks, MASK_OPACITY, colours)
    zoom = -(-SHORTEST_SIDE // max(picture.shape))
    if zoom > 1:
        picture = picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    side = max(picture.shape)
    return draw_bounding_boxes(
        picture,
        boxes * zoom,
        list(names),
        colours,
        width=max(LEAST_LINE, round(LINE_SHARE * side)),
        font=font_for("".join(names)),
        font_size=max(LEAST_TEXT, round(TEXT_SHARE * side)),
        fill_labels=True,
    )


def sheet(pictures: Sequence[Tensor], columns: int) -> Tensor:
    """Lay pictures, uint8 [3, H, W], out in rows of square tiles; uint8 [3, H, W]."""
    from PIL import ImageOps
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image
    from torchvision.utils import make_grid

    tiles = [
        pil_to_tensor(ImageOps.pad(to_pil_image(one), (TILE, TILE), color="white"))
        for one in pictures
    ]
    return make_grid(tiles, nrow=columns, padding=GAP, pad_value=255)


def save_picture(picture: Tensor, path: Path) -> None:
    """Write a picture, uint8 [3, H, W], atomically in the format of its suffix.

    Raises:
        UserError: the suffix is of no known format, or the file cannot be written.
    """
    from PIL import Image
    from torchvision.transforms.functional import to_pil_image

    from effspinenet_lib.files import atomic_write, ensure_folder

    known = Image.registered_extensions()
    if path.suffix.lower() not in known:
        raise UserError(f"{path}: unknown picture format {path.suffix!r}; use .png or .jpg")
    ensure_folder(path.parent)
    with atomic_write(path, "wb") as handle:
        to_pil_image(picture).save(handle, format=known[path.suffix.lower()])
