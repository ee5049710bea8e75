"""Parts of a data folder: the names they go by, and parts that are made by a rule."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from effspinenet_lib.errors import DataError, UserError

WHOLE = ""  # the one part of a folder that is not split
ALL = "all"  # how the whole of such a folder is asked for
# Where a folder has no split, this share of its pictures is held out for evaluation (our choice).
EVAL_SHARE = 0.2
YEAR = "2017"  # COCO 2017's splits are known as train and val, its files carry the year
TRAIN, VAL = "train", "val"
NAMES = (
    (TRAIN, "training", f"{TRAIN}{YEAR}"),
    (VAL, "valid", "validation", "dev", f"{VAL}{YEAR}"),
    ("test", "testing", f"test{YEAR}"),
)


def names_alike(name: str) -> tuple[str, ...]:
    """`name`, then the other names that stand for the same part."""
    others = next((names for names in NAMES if name.lower() in names), ())
    return (name, *(other for other in others if other != name))


def part_in(name: str) -> str | None:
    """The part that a file's or folder's name speaks of (`annotations_valid`); None if none."""
    known = {other for names in NAMES for other in names}
    return next((word for word in re.split(r"[\W_]+", name.lower()) if word in known), None)


class HeldOutSplit(NamedTuple):
    """One side of a split cut in two, by a rule that anyone can repeat.

    Of the split's file names (the last part of a path, such as `000000000009.jpg`) those with the
    lowest SHA-256 are held out; the rest is trained on. So neither the order of the annotation
    file nor a random generator decides it.

    Attributes:
        split: the name of the whole.
        side: "held" or "rest".
        size: images held out.
    """

    split: str
    side: str
    size: int

    @property
    def name(self) -> str:
        """The name as `DataConfig` takes it: `train2017-held-7392`."""
        return f"{self.split}-{self.side}-{self.size}"

    @classmethod
    def parse(cls, name: str) -> HeldOutSplit | None:
        """What a split's name stands for; None for the name of a whole split."""
        match = re.fullmatch(r"(.+)-(held|rest)-([1-9][0-9]*)", name)
        return cls(match[1], match[2], int(match[3])) if match else None

    def select(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """Which of a split's images belong to this side, bool [N].

        Images of the same name in different folders are told apart by their whole path.

        Raises:
            UserError: the split has no more images than are to be held out.
        """
        if self.size >= len(names):
            raise UserError(
                f"{self.split} has {len(names)} images, too few to hold {self.size} out"
            )
        held = _lowest(names, self.size)
        return held if self.side == "held" else ~held


def _lowest(names: Sequence[str], size: int, prefix: str = "") -> NDArray[np.bool_]:
    """The `size` names whose last parts, behind `prefix`, have the lowest SHA-256; bool [N]."""
    files = [os.fsencode(prefix + PurePosixPath(name).name) for name in names]
    digests = [hashlib.sha256(file).digest() for file in files]
    order = sorted(range(len(names)), key=lambda index: (digests[index], names[index]))
    held = np.zeros(len(names), np.bool_)
    held[order[:size]] = True
    return held


@dataclass(frozen=True)
class MadeSplit:
    """One side of a split that is made where a folder has none.

    Of each class of class folders, else of all pictures, the share `EVAL_SHARE` with the lowest
    SHA-256 of seed and name is held out. One picture alone is not split.

    Attributes:
        side: `TRAIN` or `VAL`.
        seed: of the choice.
    """

    side: str
    seed: int

    def select(self, names: Sequence[str], labels: NDArray[np.int64] | None) -> NDArray[np.bool_]:
        """Which pictures belong to this side, bool [N]; `labels` [N] are their classes."""
        held = np.zeros(len(names), np.bool_)
        groups = np.zeros(len(names), np.int64) if labels is None else labels
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            size = max(1, round(EVAL_SHARE * len(rows))) if len(rows) > 1 else 0
            held[rows] = _lowest([names[row] for row in rows.tolist()], size, f"{self.seed} ")
        return held if self.side == VAL else ~held

    def describe(self) -> dict[str, Any]:
        """The rule, as it is recorded with a run."""
        return {"side": self.side, "share": EVAL_SHARE, "seed": self.seed}


@dataclass(frozen=True)
class Part:
    """A part of a data folder.

    Attributes:
        name: as it was asked for.
        key: its name in the folder.
        place: its file or folder.
        cut: which of its pictures are meant, if not all.
    """

    name: str
    key: str
    place: Path
    cut: HeldOutSplit | MadeSplit | None = None

    def select(
        self, names: Sequence[str], labels: NDArray[np.int64] | None = None
    ) -> NDArray[np.bool_]:
        """Which pictures of the place belong to it, bool [N].

        Raises:
            DataError: none does.
        """
        if isinstance(self.cut, MadeSplit):
            keep = self.cut.select(names, labels)
            if len(names) and not keep.any():
                raise DataError(
                    f"{self.place}: has too few pictures to hold some out for {self.name!r}; "
                    "add pictures, or split them yourself"
                )
            return keep
        return self.cut.select(names) if self.cut else np.ones(len(names), np.bool_)


def is_unsplit(parts: Mapping[str, Path]) -> bool:
    """Whether a folder's parts are one whole, or pictures to train on alone."""
    return list(parts) in ([WHOLE], [TRAIN], ["training"])


def part_names(parts: Mapping[str, Path]) -> list[str]:
    """The names by which a folder's parts are asked for, made ones included."""
    return [TRAIN, VAL] if is_unsplit(parts) else list(parts)


def find_part(parts: Mapping[str, Path], name: str, seed: int, root: Path) -> Part:
    """The part of a folder that a name stands for.

    Args:
        parts: the folder's own parts.
        name: of a part or one alike (`valid` for `val`), of a `HeldOutSplit`, or `ALL`.
        seed: of a split that is made.
        root: the folder, for messages.

    Raises:
        DataError: there is no such part; lists those found.
    """
    if is_unsplit(parts):
        ((key, place),) = parts.items()
        side = next((side for side in (TRAIN, VAL) if side in names_alike(name)), None)
        if side is not None:
            return Part(name, key, place, MadeSplit(side, seed))
        if name == ALL:
            return Part(name, key, place)
    held = None if name in parts else HeldOutSplit.parse(name)
    whole = held.split if held else name
    for key in names_alike(whole):
        if key in parts:
            return Part(name, key, parts[key], held)
    found = ", ".join(sorted(part_names(parts))) or "none"
    raise DataError(f"{root}: has no split {name!r}: no such split; splits found: {found}")
