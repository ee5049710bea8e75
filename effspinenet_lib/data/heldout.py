"""A part of a split that is held out, by a rule that anyone can redo.

Of the split's file names (the last part of a path, such as `000000000009.jpg`) those with the
lowest SHA-256 are held out; the rest is trained on. So neither the order of the annotation file
nor a generator of random numbers decides it, and any tool that computes SHA-256 gives the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from effspinenet_lib.errors import UserError

HELD, REST = "held", "rest"
_NAME = re.compile(rf"(?P<split>.+)-(?P<side>{HELD}|{REST})-(?P<size>[1-9][0-9]*)")


class Part(NamedTuple):
    """One side of a split cut in two.

    Attributes:
        split: the name of the whole.
        side: "held" or "rest".
        size: images held out.
    """

    split: str
    side: Literal["held", "rest"]
    size: int

    @property
    def name(self) -> str:
        """The name of the part, as `DataConfig` takes it: `train2017-held-7392`."""
        return f"{self.split}-{self.side}-{self.size}"


def parse_part(name: str) -> Part | None:
    """The part that a split's name stands for; None for the name of a whole split."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    side: Literal["held", "rest"] = "held" if match["side"] == HELD else "rest"
    return Part(match["split"], side, int(match["size"]))


def part_mask(names: Sequence[str], part: Part) -> NDArray[np.bool_]:
    """Which of a split's images belong to the part, bool [N]; see the module's rule.

    Images of the same name (in different folders) are told apart by their whole path.

    Raises:
        UserError: the split has no more images than are to be held out.
    """
    if part.size >= len(names):
        raise UserError(
            f"{part.name}: {part.split} has {len(names)} images, too few to hold {part.size} out"
        )
    files = [PurePosixPath(name).name.encode(errors="surrogateescape") for name in names]
    digests = [hashlib.sha256(file).digest() for file in files]
    order = sorted(range(len(names)), key=lambda index: (digests[index], names[index]))
    held = np.zeros(len(names), np.bool_)
    held[order[: part.size]] = True
    return held if part.side == HELD else ~held
