"""Looks a data folder over: what it holds, what it should hold, what cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from effspinenet_lib.data.config import LAYOUTS, DataConfig, only_task, open_dataset
from effspinenet_lib.data.dataset import Dataset, InvalidData
from effspinenet_lib.data.fetch import ExpectedPart, KnownSet
from effspinenet_lib.errors import DataError
from effspinenet_lib.files import atomic_write, write_json

REPORT_SUFFIXES = (".json", ".csv")


@dataclass(frozen=True)
class Row:
    """One line of a report.

    Attributes:
        part: the split.
        what: "images", "annotations" or "classes" with their number; "invalid", "missing" or
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


def check_folder(
    folder: Path, layout: str, known: KnownSet | None, pictures: bool, workers: int
) -> Iterator[tuple[str, Dataset | None, list[Row]]]:
    """Check every split of a data folder, one after the other.

    Args:
        folder: the data folder.
        layout: of `DataConfig.format`.
        known: the data set that it should be; None: its own splits are counted.
        pictures: decode every image, and every label map.
        workers: threads that decode.

    Yields:
        The split, its data set (None where it cannot be opened), and the rows.
    """
    expected = {part.split: part for part in known.parts} if known else {}
    task = only_task(layout) or "detection"
    for split in expected or LAYOUTS[layout].splits(folder):
        dataset = None
        try:
            dataset = open_dataset(DataConfig(layout, str(folder), split), "train", task)
            rows = _counts(split, dataset, expected.get(split))
            if pictures:
                rows += _unreadable(split, dataset, task, workers)
        except InvalidData as error:
            rows = [Row(split, error.kind, file, problem=fault) for file, fault in error.faults]
        except DataError as error:
            rows = [Row(split, "invalid", problem=str(error))]
        yield split, dataset, rows


def _counts(split: str, dataset: Dataset, expected: ExpectedPart | None) -> list[Row]:
    boxes = len(dataset.annotations.boxes) + len(dataset.dropped)
    found = {"images": len(dataset), "annotations": boxes, "classes": len(dataset.categories)}
    rows = []
    for what, number in found.items():
        wanted = getattr(expected, what, None)
        wrong = wanted not in (None, number)
        problem = f"{number} {what}, {wanted} are expected" if wrong else ""
        rows.append(Row(split, what, found=number, expected=wanted, problem=problem))
    return rows


def _unreadable(split: str, dataset: Dataset, task: str, workers: int) -> list[Row]:
    """A row for each image or label map that cannot be decoded (Pillow decodes without the GIL)."""

    def problem(index: int) -> str:
        try:
            dataset.load(index, task)
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(workers) as pool:
        problems = pool.map(problem, range(len(dataset)))
        bar = tqdm(problems, dataset.name, len(dataset), unit="image", disable=None)
        return [
            Row(split, "unreadable", dataset.annotations.file_name(index), problem=text)
            for index, text in enumerate(bar)
            if text
        ]


def write_report(path: str | os.PathLike[str], folder: Path, rows: Sequence[Row]) -> None:
    """Write the rows with the folder's name (a name in .json) or as a table.

    Raises:
        UserError: the file cannot be written.
    """
    records = [asdict(row) for row in rows]
    if Path(path).suffix == ".json":
        write_json(path, {"folder": str(folder), "rows": records})
        return
    table = pd.DataFrame(records).astype({"found": "Int64", "expected": "Int64"})
    with atomic_write(path, "wb") as handle:
        # Bytes of a name that are not UTF-8 are written as JSON has them: `\udcff`.
        text = table.to_csv(index=False, lineterminator="\n")
        handle.write(text.encode("utf-8", "backslashreplace"))
