"""How pictures and tables look: colours, drawing defaults, inline SVG and HTML.

A picture's ink is the colour of the surrounding text and its background is transparent, so that it
reads in light and in dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

NOT_RUN = "not run"
NOT_PRINTED = "–"
_TEXT_CLASS = ' class="esn-text"'

# Okabe and Ito's palette, which readers with any common colour blindness can tell apart.
FAMILY_COLOURS = {
    "Eff-SpineNet": "#0072B2",
    "SP-EfficientNet": "#E69F00",
    "EfficientNet": "#009E73",
    "EfficientDet": "#CC79A7",
    "SpineNet": "#56B4E9",
    "ResNet": "#D55E00",
    "MobileNet": "#8C564B",  # a brown: the palette's yellow cannot be read on white
    "MnasNet": "#7830F0",  # outside the palette, which has no colour left
}
# After the viridis map, its ends drawn in so that each reads on white and on black. A level is
# always named as well, never told by colour alone.
LEVEL_COLOURS = {
    1: "#8A3F9E",
    2: "#5A5FC0",
    3: "#3A86BE",
    4: "#2F9F96",
    5: "#50B868",
    6: "#98C73C",
    7: "#E6C42E",
}
LEVEL_TEXT = {level: "#FFFFFF" if level <= 4 else "#1A1A1A" for level in LEVEL_COLOURS}

# Stands for "the colour of the text" until the SVG is written; a grey that reads on both
# backgrounds where a viewer does not know currentColor.
INK = "#767676"
NEUTRAL = "#808080"  # a filled area under white text, on both backgrounds
GROUND = "#EEEEEF"  # stands for the page's background in the same way
FONT_SIZE = 10.0
PIXELS_PER_INCH = 96  # of CSS
# A picture grows with the page up to one share of its size, and scrolls sideways rather than
# shrink below the other.
LARGEST_SCALE, LEAST_SCALE = 1.2, 0.8
WIDE, PANEL_WIDTH, PANEL_HEIGHT = 4.6, 4.2, 3.3  # inches; each fits the width of a phone
HOVER = "hover: "  # begins the SVG id of what shows a text under the pointer

_RC: Any = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE + 1,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE - 1,
    "ytick.labelsize": FONT_SIZE - 1,
    "legend.fontsize": FONT_SIZE - 1,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color", "grid.color"), INK),
    **dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "axes.titlecolor"), INK),
    "grid.alpha": 0.25,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.bottom": False,
    "ytick.left": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "DejaVu Sans", "Liberation Sans", "sans-serif"],
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Picture:
    """A drawing that shows itself in notebooks and in the book.

    Attributes:
        svg: the inline SVG element, or a line that says why there is none.
        alt: what the drawing shows, in words, for readers who cannot see it.
    """

    svg: str
    alt: str

    def _repr_html_(self) -> str:
        return f'<figure class="esn-picture" style="margin:0;overflow-x:auto">{self.svg}</figure>'

    def __repr__(self) -> str:
        return f"Picture: {self.alt}"


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side where there is room, below each other on a narrow screen."""

    pictures: tuple[Picture, ...]

    def _repr_html_(self) -> str:
        boxes = "".join(
            f'<div style="flex:1 1 20rem;min-width:0">{picture._repr_html_()}</div>'
            for picture in self.pictures
        )
        return (
            f'<div class="esn-gallery" style="display:flex;flex-wrap:wrap;gap:1rem">{boxes}</div>'
        )

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.pictures))


class Text(str):
    """A table cell of running words: left-aligned, and broken into lines."""


class Link(NamedTuple):
    """A table cell that leads to an address."""

    text: str
    target: str


@dataclass(frozen=True)
class Table:
    """A table that shows itself in notebooks and in the book, scrolling sideways where narrow.

    A row whose name begins with a model family carries the family's colour. Every name and cell is
    escaped; a missing value is an empty cell. Of a table without rows only the caption is shown.

    Attributes:
        frame: the cells; the index gives the row names.
        caption: what the table shows.
    """

    frame: pd.DataFrame
    caption: str

    def _repr_html_(self) -> str:
        if self.frame.empty:
            return f'<p class="esn-absent">{escape(self.caption)}</p>'
        head = "".join(_header_rows(self.frame))
        body = "".join(
            f"<tr>{_row_heading(name)}{''.join(map(_cell, row))}</tr>"
            for name, row in zip(self.frame.index, self.frame.itertuples(index=False), strict=True)
        )
        label = escape(self.caption)
        return (
            '<figure class="esn-table" style="margin:0"><div role="region" tabindex="0" '
            f'aria-label="{label}" style="overflow-x:auto"><table class="table">'
            f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
            f"<figcaption>{label}</figcaption></figure>"
        )

    def __repr__(self) -> str:
        return f"{self.caption}\n{self.frame.to_string(na_rep='')}"


def _header_rows(frame: pd.DataFrame) -> Iterable[str]:
    columns, corner = frame.columns, escape(str(frame.index.name or ""))
    if not isinstance(columns, pd.MultiIndex):
        cells = "".join(
            f'<th scope="col"{_TEXT_CLASS if isinstance(cells.iloc[0], Text) else ""}>'
            f"{escape(str(name))}</th>"
            for name, cells in frame.items()
        )
        yield f'<tr><th scope="col">{corner}</th>{cells}</tr>'
        return
    cells = "".join(
        f'<th scope="colgroup" colspan="{span}">{escape(str(group))}</th>'
        for group, span in columns.get_level_values(0).value_counts(sort=False).items()
    )
    yield f'<tr><th scope="col" rowspan="2">{corner}</th>{cells}</tr>'
    names = columns.get_level_values(1)
    yield "".join(["<tr>", *(f'<th scope="col">{escape(str(n))}</th>' for n in names), "</tr>"])


def _row_heading(name: Any) -> str:
    if isinstance(name, Text):
        return f'<th scope="row"{_TEXT_CLASS}>{escape(name)}</th>'
    colour = FAMILY_COLOURS.get(family_of(str(name)))
    mark = f' style="border-left:4px solid {colour}"' if colour else ""
    return f'<th scope="row"{mark}>{escape(str(name))}</th>'


def _cell(value: Any) -> str:
    if isinstance(value, Link):
        return f'<td><a href="{escape(value.target)}">{escape(value.text)}</a></td>'
    if isinstance(value, Text):
        return f"<td{_TEXT_CLASS}>{escape(value)}</td>"
    text = "" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)
    kind = ' class="esn-absent"' if text in (NOT_RUN, NOT_PRINTED) else ""
    return f"<td{kind}>{escape(text)}</td>"


@contextmanager
def drawing() -> Iterator[None]:
    """Drawing defaults for the block: transparent ground, text-coloured ink, small grids."""
    with mpl.rc_context(_RC):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A Matplotlib figure of `width` x `height` inches that no global state holds on to."""
    return Figure(figsize=(width, height), layout="constrained")


def to_picture(figure: Figure, alt: str) -> Picture:
    """Turn a Matplotlib figure into an inline SVG that carries `alt`.

    The same figure gives the same bytes. What was drawn with `gid=HOVER + text` shows the text
    under the pointer.

    Raises:
        ValueError: `alt` is empty.
    """
    if not alt.strip():
        raise ValueError("a picture needs alternative text")
    buffer = io.StringIO()
    with mpl.rc_context({**_RC, "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    opening, rest = body.split(">", 1)
    opening = re.sub(r'\s(width|height)="[^"]*"', "", opening)
    pixels = float(figure.get_size_inches()[0]) * PIXELS_PER_INCH
    largest, least = (round(scale * pixels) for scale in (LARGEST_SCALE, LEAST_SCALE))
    style = f"width:100%;max-width:{largest}px;min-width:{least}px"
    attributes = f' role="img" aria-label="{escape(alt)}" style="{style};height:auto"'
    # Markdown ends an HTML block at an empty line.
    lines = [line for line in rest.splitlines() if line.strip()]
    drawn = f"{opening}{attributes}>" + "\n".join(lines)
    drawn = re.sub(rf'<g id="{HOVER}([^"]*)">', r"<g><title>\1</title>", drawn)
    drawn = drawn.replace(INK.lower(), "currentColor")
    return Picture(drawn.replace(GROUND.lower(), "var(--pst-color-background, #eeeeef)"), alt)


def empty_picture(what: str, reason: str = NOT_RUN) -> Picture:
    """A line of text in place of a picture that there is nothing to draw for."""
    alt = f"{what}: {reason}"
    return Picture(f'<p class="esn-absent">{escape(alt)}</p>', alt)


def family_of(name: str) -> str:
    """The model family of a printed or library name; "" where it has no colour of its own.

    Table 9's "model 1" and "model 2" are Eff-SpineNet-D0 without one or two of its parts.
    """
    plain = re.sub(r"[\s_-]", "", name.lower())
    if re.match(r"model[12](\D|$)", plain):
        return "Eff-SpineNet"
    for family in sorted(FAMILY_COLOURS, key=len, reverse=True):
        if plain.startswith(family.lower().replace("-", "")):
            return family
    return ""


def family_colour(name: str) -> str:
    """The fixed colour of a model's family; the text's colour for a family without one."""
    return FAMILY_COLOURS.get(family_of(name), INK)


def words(items: Iterable[str]) -> str:
    """Join names as in a sentence: "a", "a and b", "a, b and c"."""
    *head, last = list(items)
    return f"{', '.join(head)} and {last}" if head else last
