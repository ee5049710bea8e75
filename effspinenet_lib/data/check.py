"""The check of data that `data check`, `train` and `evaluate` share, and its report."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from effspinenet_lib.data.config import DataConfig, crops_for, open_part
from effspinenet_lib.data.dataset import Dataset
from effspinenet_lib.data.fetch import ExpectedPart
from effspinenet_lib.data.folders import FolderDataset, bad_pictures
from effspinenet_lib.data.records import DataWarning, Fault, InvalidData
from effspinenet_lib.errors import DataError
from effspinenet_lib.files import atomic_write, write_json

REPORT_SUFFIXES = (".json", ".csv")
Wanted = tuple[str, "int | None"]  # the name of a part, and how many images (None: all)


def check_parts(
    config: DataConfig,
    wanted: Sequence[Wanted],
    task: str,
    skip_bad: bool = False,
    pictures: bool = True,
    workers: int | None = None,
) -> tuple[list[Dataset | None], list[Fault]]:
    """Open parts of the data and find everything that is wrong with them.

    Records, masks where the task needs them, every picture, and the parts against the first:
    their labels index into its categories afterwards, matched by name. Warns of what is no fault.

    Args:
        config: format, folder and seed.
        wanted: the parts; the one to train on first.
        task: what the data is for.
        skip_bad: leave out pictures that are missing or cannot be decoded; the data set's
            `record` names them.
        pictures: decode every picture.
        workers: threads that decode; None: one a core.

    Returns:
        The data sets, None for those that cannot be opened, and the faults.

    Raises:
        UserError: the data does not serve the task, or the cache cannot be written.
    """

    def open_one(part: Wanted) -> tuple[Dataset | None, list[Fault]]:
        found: list[Fault] = []
        dataset = None
        try:
            dataset = open_part(config, *part, task, skip_bad)
            if pictures and isinstance(dataset, FolderDataset):
                bad = bad_pictures(dataset, workers or os.cpu_count() or 1)
                if bad and skip_bad:
                    _leave_out(dataset, bad)
                else:
                    found += bad.values()
            dataset.prepare(task)
        except InvalidData as error:
            found += error.faults
        except DataError as error:
            found.append(Fault(str(error)))
        return dataset, [replace(fault, part=part[0]) for fault in found]

    opened: dict[Wanted, Dataset | None] = {}
    faults: list[Fault] = []
    for part in wanted:
        if part not in opened:
            opened[part], found = open_one(part)
            faults += found
    first = opened[wanted[0]]
    for (name, _), other in list(opened.items())[1:]:
        if first is not None and other is not None:
            try:
                _compare(first, other)
                other.relabel(first.categories, first.name)
            except InvalidData as error:
                faults += [replace(fault, part=name) for fault in error.faults]
    datasets = [opened[part] for part in wanted]
    crops = [None if dataset is None else crops_for(dataset, task) for dataset in datasets]
    return crops, list(dict.fromkeys(faults))


def open_checked(
    config: DataConfig, wanted: Sequence[Wanted], task: str, skip_bad: bool = False
) -> list[Dataset]:
    """The data sets of `check_parts`.

    Raises:
        InvalidData: they have faults.
    """
    datasets, faults = check_parts(config, wanted, task, skip_bad)
    if faults:
        raise InvalidData(faults)
    return [dataset for dataset in datasets if dataset is not None]


def _leave_out(dataset: FolderDataset, bad: dict[int, Fault]) -> None:
    keep = np.ones(len(dataset), np.bool_)
    keep[list(bad)] = False
    if not keep.any():
        raise InvalidData(list(bad.values()))
    skipped = [*dataset.record.get("skipped", []), *(fault.file for fault in bad.values())]
    dataset.record["skipped"] = sorted(skipped)
    dataset.select(keep)


def _compare(first: Dataset, other: Dataset) -> None:
    """Warn of what looks wrong between two parts."""
    if first.image_folder is not None and first.image_folder == other.image_folder:
        both = set(first.annotations.file_names.tolist()) & set(
            other.annotations.file_names.tolist()
        )
        if both:
            _warn(other, f"{len(both)} of its images are in {first.name} too (first: {min(both)})")
    counts = [
        dict(
            zip(
                (category.name for category in data.categories),
                np.bincount(data.annotations.labels, minlength=len(data.categories)).tolist(),
                strict=True,
            )
        )
        for data in (first, other)
    ]
    untrained = [name for name, count in counts[1].items() if count and counts[0].get(name) == 0]
    if untrained:
        _warn(other, f"has objects of {', '.join(untrained)}, of which {first.name} has none")


def _warn(dataset: Dataset, text: str) -> None:
    warnings.warn(f"{dataset.name}: {text}", DataWarning, stacklevel=2)


def mask_faults(datasets: Mapping[str, Dataset | None]) -> list[Fault]:
    """What is wrong with the masks of parts that have some, which detection does not need."""
    faults: list[Fault] = []
    for part, dataset in datasets.items():
        try:
            if dataset is not None:
                dataset.prepare("instances")
        except InvalidData as error:
            wrong = [fault for fault in error.faults if "its segmentation" in fault.text]
            faults += [replace(fault, part=part) for fault in wrong]
        except DataError:
            continue
    return faults


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


def count_rows(part: str, dataset: Dataset, expected: ExpectedPart | None) -> list[Row]:
    """The rows of a part's counts, beside what is expected of it."""
    boxes = len(dataset.annotations.boxes) + dataset.record.get("dropped_boxes", 0)
    found = {"images": len(dataset), "annotations": boxes, "classes": len(dataset.categories)}
    rows = []
    for what, number in found.items():
        wanted = getattr(expected, what, None)
        wrong = wanted not in (None, number)
        problem = f"{number} {what}, {wanted} are expected" if wrong else ""
        rows.append(Row(part, what, found=number, expected=wanted, problem=problem))
    return rows


def write_report(
    path: str | os.PathLike[str], folder: str, faults: Sequence[Fault], counts: Sequence[Row] = ()
) -> None:
    """Write rows of counts and faults with the folder's name (a name in .json) or as a table.

    Raises:
        UserError: the file cannot be written.
    """
    rows = [*counts, *(Row(f.part, f.kind, f.file, problem=f.text) for f in faults)]
    records = [asdict(row) for row in rows]
    if Path(path).suffix == ".json":
        write_json(path, {"folder": folder, "rows": records})
        return
    table = pd.DataFrame(records).astype({"found": "Int64", "expected": "Int64"})
    with atomic_write(path, "wb") as handle:
        # Bytes of a name that are not UTF-8 are written as JSON has them: `\udcff`.
        text = table.to_csv(index=False, lineterminator="\n")
        handle.write(text.encode("utf-8", "backslashreplace"))
