"""Looks a data folder over: what it holds, what it should hold, what cannot be read."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import repeat
from pathlib import Path

from tqdm.auto import tqdm

from effspinenet_lib.data import coco
from effspinenet_lib.data.catalogue import ExpectedPart, KnownSet
from effspinenet_lib.data.dataset import Dataset
from effspinenet_lib.data.formats import MissingImages
from effspinenet_lib.data.imagenet import class_folders
from effspinenet_lib.data.source import ONLY_TASK, DataConfig, open_dataset
from effspinenet_lib.data.voc_segmentation import LISTS
from effspinenet_lib.errors import DataError
from effspinenet_lib.files import atomic_write, write_json

REPORT_SUFFIXES = (".json", ".csv")
_PICTURES_AT_ONCE = 64  # that a process is given: our choice, to make the sharing cheap


@dataclass(frozen=True)
class Row:
    """One line of a report.

    Attributes:
        part: the split.
        what: "images", "annotations" or "classes" with their number; "unusable", "missing" or
            "unreadable" with a problem.
        file: which one, where it is about one.
        found: the number.
        expected: what it should be, where that is known.
        problem: what is wrong, with the file where it is about one; "" if nothing is.
    """

    part: str
    what: str
    file: str = ""
    found: int | None = None
    expected: int | None = None
    problem: str = ""


@dataclass(frozen=True)
class CheckedPart:
    """A part of a data folder: its data set (None where it cannot be opened) and the rows."""

    split: str
    dataset: Dataset | None
    rows: tuple[Row, ...]


def splits_of(folder: Path, layout: str) -> list[str]:
    """Names of the parts that a data folder has.

    Raises:
        DataError: it has none.
    """
    if layout == "imagenet":
        found = class_folders(folder)
    elif layout == "coco":
        found = coco.splits_of(folder)
    else:
        lists = folder / LISTS if layout == "voc_segmentation" else folder / "ImageSets" / "Main"
        found = sorted(path.stem for path in lists.glob("*.txt"))
    if not found:
        raise DataError(f"{folder}: a {layout.upper()} layout without any split")
    return found


def check_folder(
    folder: Path, layout: str, known: KnownSet | None, pictures: bool, workers: int
) -> Iterator[CheckedPart]:
    """Check every part of a data folder, one after the other.

    Args:
        folder: the data folder.
        layout: of `DataConfig.format`.
        known: the data set that it should be; None: its own parts are counted.
        pictures: decode every picture, and every label map.
        workers: processes that decode; fewer than two: this one does.

    Raises:
        DataError: the folder has no parts, or a process died.
    """
    expected = {part.split: part for part in known.parts} if known else {}
    for split in expected or splits_of(folder, layout):
        yield _check_part(folder, layout, split, expected.get(split), pictures, workers)


def _check_part(
    folder: Path,
    layout: str,
    split: str,
    expected: ExpectedPart | None,
    pictures: bool,
    workers: int,
) -> CheckedPart:
    task = ONLY_TASK.get(layout, "detection")
    try:
        config = DataConfig(layout, str(folder), train_split=split)
        dataset = open_dataset(config, "train", task)
    except MissingImages as error:
        rows = [
            Row(split, "missing", name, problem=problem) for name, problem in error.problems.items()
        ]
        return CheckedPart(split, None, tuple(rows))
    except DataError as error:
        return CheckedPart(split, None, (Row(split, "unusable", problem=str(error)),))
    rows = _counts(split, dataset, expected)
    if pictures:
        rows += _unreadable(split, dataset, task, workers)
    return CheckedPart(split, dataset, tuple(rows))


def _counts(split: str, dataset: Dataset, expected: ExpectedPart | None) -> list[Row]:
    boxes = len(dataset.annotations.boxes) + len(dataset.dropped)
    found = {"images": len(dataset), "annotations": boxes, "classes": len(dataset.categories)}
    rows = []
    for what, number in found.items():
        wanted = getattr(expected, what) if expected else None
        wrong = wanted is not None and wanted != number
        problem = f"{number} {what}, {wanted} are expected" if wrong else ""
        rows.append(Row(split, what, found=number, expected=wanted, problem=problem))
    return rows


def _unreadable(split: str, dataset: Dataset, task: str, workers: int) -> list[Row]:
    """A row for each picture or label map that cannot be decoded."""
    indices = range(len(dataset))
    with _problems(dataset, task, indices, workers) as problems:
        found = [
            Row(split, "unreadable", dataset.annotations.file_name(index), problem=problem)
            for index, problem in tqdm(
                zip(indices, problems, strict=True),
                desc=dataset.name,
                total=len(indices),
                unit="picture",
                disable=None,
            )
            if problem
        ]
    return found


@contextmanager
def _problems(
    dataset: Dataset, task: str, indices: Sequence[int], workers: int
) -> Iterator[Iterator[str]]:
    """What is wrong with each picture, "" for nothing, from one process or several."""
    if workers < 2:
        yield map(_problem, indices, repeat(dataset), repeat(task))
        return
    try:
        with ProcessPoolExecutor(workers, initializer=_take, initargs=(dataset, task)) as pool:
            yield pool.map(_problem, indices, chunksize=_PICTURES_AT_ONCE)
    except BrokenProcessPool as error:
        raise DataError(
            f"{dataset.name}: a process that decodes pictures died; if memory ran out, use fewer"
        ) from error


# What a decoding process works on, set when it starts.
_taken: list[tuple[Dataset, str]] = []


def _take(dataset: Dataset, task: str) -> None:
    _taken[:] = [(dataset, task)]


def _problem(index: int, dataset: Dataset | None = None, task: str = "detection") -> str:
    if dataset is None:
        ((dataset, task),) = _taken
    try:
        dataset.load(index, task)
    except DataError as error:
        return str(error)
    return ""


def write_report(path: str | os.PathLike[str], folder: Path, rows: Sequence[Row]) -> None:
    """Write the rows with the folder's name (a name in .json) or as a table.

    Raises:
        UserError: the file cannot be written.
    """
    if Path(path).suffix == ".json":
        write_json(path, {"folder": str(folder), "rows": [asdict(row) for row in rows]})
        return
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    with atomic_write(path, "wb") as handle:
        # Bytes of a name that are no UTF-8 are written as JSON has them: `\udcff`.
        handle.write(table.getvalue().encode("utf-8", "backslashreplace"))
