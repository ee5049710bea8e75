"""Pictures in folders: a data set of one part of a folder, and the cache of what files hold."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from effspinenet_lib.data.dataset import Annotations, Category, Dataset, RunLengths
from effspinenet_lib.data.pictures import find_files, read_picture
from effspinenet_lib.data.records import (
    MISSING,
    UNREADABLE,
    DataWarning,
    Fault,
    InvalidData,
    Records,
    check_records,
    relative_name,
    repeated,
)
from effspinenet_lib.data.splits import WHOLE, MadeSplit, Part
from effspinenet_lib.errors import DataError
from effspinenet_lib.files import (
    CACHE_VARIABLE,
    atomic_write,
    cache_folder,
    ensure_folder,
    locked,
    read_json,
    write_json,
)

logger = logging.getLogger(__name__)
# Smaller annotation files are read each time, in less than a second (our choice).
LEAST_CACHED_BYTES = 4 * 2**20
# Raise them when what is cached, or how it is read from its source, changes.
CACHE_VERSION, PICTURES_VERSION = 4, 1
_HASHED_BYTES = 1 << 20


class Layout(NamedTuple):
    """A layout of data folders.

    Attributes:
        hint: what such a folder holds, for messages.
        parts: the file or folder of each part of a folder, by name; `WHOLE` for one that is not
            split; {} where the folder does not have this layout.
        open: opens a part: its folder, the part and how many images (None: all); raises
            `InvalidData`, unless only pictures are bad and the last argument says to leave
            these out.
        only_task: the task that the layout serves, if it serves one alone.
    """

    hint: str
    parts: Callable[[Path], dict[str, Path]]
    open: Callable[[Path, Part, int | None, bool], FolderDataset]
    only_task: str | None = None


class FolderDataset(Dataset):
    """Image files in a folder; names are relative to it."""

    image_folder: Path

    def __init__(
        self,
        name: str,
        categories: Sequence[Category],
        annotations: Annotations,
        folder: Path,
        part: Part,
        masks: _MaskReader | None = None,
    ) -> None:
        """A part of a data set; says it where its split is made. `masks` reads those of all."""
        super().__init__(name, categories, annotations)
        self.image_folder, self._masks = folder, masks
        self._digest = ""
        if isinstance(part.cut, MadeSplit):
            self.record["split"] = part.cut.describe()
            rule = ", ".join(f"{key} {value}" for key, value in self.record["split"].items())
            logger.info(
                "%s: no split was found, so one is made (%s): %d images", name, rule, len(self)
            )

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.image_folder / self.annotations.file_name(index)

    def load_image(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as uint8 [H, W, 3], RGB.

        Raises:
            DataError: the file is missing, truncated or of another size than annotated.
        """
        height, width = self.annotations.sizes[index].tolist()
        return read_picture(self.path(index), (height, width) if height else None)

    def select(self, keep: NDArray[np.bool_]) -> None:
        """Keep the images where `keep` [N] is true; before `prepare` reads their masks."""
        self.annotations, rows = self.annotations.select(keep)
        if self._masks is not None:
            self._masks = self._masks.narrowed(rows)
        self._digest = ""

    def check_file(self, index: int) -> None:
        """Decode image `index`, and what else is read of files with it.

        Raises:
            DataError: they cannot be used.
        """
        self.load_image(index)

    def files_of(self, index: int) -> list[Path]:
        """The files that image `index` is read from."""
        return [self.path(index)]

    def files_digest(self) -> str:
        """A digest of names, sizes and times of the image files."""
        if not self._digest:
            digest = hashlib.sha256()
            for index in range(len(self)):
                for path in self.files_of(index):
                    digest.update(os.fsencode(os.path.relpath(path, self.image_folder)))
                    try:
                        status = path.stat()
                        digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
                    except OSError:
                        digest.update(b" missing\n")
            self._digest = digest.hexdigest()
        return self._digest

    def _read_masks(self) -> RunLengths:
        return self._masks() if self._masks is not None else super()._read_masks()


def bad_pictures(dataset: FolderDataset, workers: int) -> dict[int, Fault]:
    """The images that cannot be decoded, by index.

    What was found is kept in the cache for as long as the files' names, sizes and times are the
    same, so that a set is decoded once.

    Args:
        dataset: whose images to decode.
        workers: threads (Pillow decodes without Python's lock).
    """
    words = (dataset.image_folder, dataset.files_digest(), dataset.annotations.sizes.tobytes())
    key = hashlib.sha256(repr((*words, PICTURES_VERSION)).encode()).hexdigest()
    stamp = cache_folder() / "pictures" / f"{key}.json"

    def problem(index: int) -> str:
        try:
            dataset.check_file(index)
        except DataError as error:
            return str(error)
        return ""

    with cache_lock(stamp):
        if not stamp.exists():
            with ThreadPoolExecutor(workers) as pool:
                problems = pool.map(problem, range(len(dataset)))
                bar = tqdm(
                    problems, f"check {dataset.name}", len(dataset), unit="image", disable=None
                )
                write_json(stamp, {str(n): text for n, text in enumerate(bar) if text})
    return {
        int(index): Fault(text, dataset.annotations.file_name(int(index)), UNREADABLE)
        for index, text in read_json(stamp).items()
    }


# Layouts of boxes


def open_records(
    read: Callable[[Path, Part, bool], Records],
    root: Path,
    part: Part,
    images: int | None,
    skip_bad: bool,
) -> FolderDataset:
    """Open a part whose files `read` turns into records: root, part, and whether with masks.

    Warns once of each kind of thing that is left out or changed.

    Raises:
        InvalidData: annotations are invalid or pictures are missing; holds every fault.
    """
    arrays = cached_arrays(part.place, "boxes", lambda: _boxes(read, root, part))
    faults, bad = arrays.pop("faults", []), arrays.pop("unreadable", [])
    found = {key: arrays.pop(key) for key in ("categories", "dropped", "outside", "notes")}
    folder = Path(os.fsdecode(arrays.pop("folder").tobytes()))
    annotations = Annotations(**arrays)
    names = annotations.file_names.tolist()
    keep = part.select(names)
    if images is not None:
        keep[np.flatnonzero(keep)[images:]] = False
    files = find_files(names, folder)
    bad += [
        Fault(f"{part.place}: names the image {name:.200}, not found in {folder}", name, MISSING)
        for name, file, kept in zip(names, files, keep, strict=True)
        if kept and file is None
    ]
    if faults or (bad and not skip_bad):
        raise InvalidData(faults + ([] if skip_bad else bad))
    keep &= np.array([file is not None for file in files], np.bool_)
    if not keep.any():
        raise InvalidData([Fault(f"{part.place}: none of its images can be used"), *bad])
    present = np.array([file or "" for file in files], np.str_)
    annotations, rows = Annotations(**{**vars(annotations), "file_names": present}).select(keep)
    categories = [Category(int(number), str(name)) for number, name in found["categories"]]
    kept_ids = set(annotations.image_ids.tolist())
    notes = [str(note) for note in found["notes"]]
    record = {}
    for key, what in (("dropped", "dropped {} degenerate"), ("outside", "clipped to the image {}")):
        marks = [str(name) for number, name in found[key] if int(number) in kept_ids]
        if marks:
            boxes = "boxes" if len(marks) > 1 else "box"
            notes.append(f"{what.format(len(marks))} {boxes} (first: {marks[0]})")
            record[f"{key}_boxes"] = len(marks)
    for name in repeated(category.name for category in categories):
        ids = ", ".join(str(c.id) for c in categories if c.name == name)
        notes.append(f"the categories {ids} are all named {name!r}; each counts for itself")
    if twice := repeated(annotations.file_names.tolist()):
        notes.append(f"{len(twice)} images are listed more than once (first: {twice[0]})")
    if not len(annotations.boxes):
        notes.append(f"none of the {len(annotations.image_ids)} images has a box")
    for note in notes:
        warnings.warn(f"{part.place}: {note}", DataWarning, stacklevel=4)
    dataset = FolderDataset(
        f"{root.name} {part.name}",
        categories,
        annotations,
        folder,
        part,
        _MaskReader(read, root, part, rows),
    )
    dataset.record |= record
    if bad:
        dataset.record["skipped"] = sorted(fault.file for fault in bad)
    return dataset


def _boxes(read: Callable[[Path, Part, bool], Records], root: Path, part: Part) -> dict[str, Any]:
    records = read(root, part, False)
    checked = check_records(records)
    if not checked.truth["images"] or not checked.truth["categories"]:
        raise InvalidData(
            checked.faults + checked.unreadable or [Fault(f"{records.source}: lists no images")]
        )
    truth = checked.truth
    arrays: dict[str, Any] = {
        **vars(Annotations.from_coco(truth)),
        "categories": np.array([(str(c["id"]), c["name"]) for c in truth["categories"]], np.str_),
        "folder": np.frombuffer(os.fsencode(records.folder), np.uint8),
        "notes": np.array(records.notes, np.str_),
    }
    for key in ("dropped", "outside"):
        marks = [(str(number), name) for number, name in getattr(checked, key)]
        arrays[key] = np.array(marks, np.str_).reshape(-1, 2)
    # what depends on more than the annotation file is not kept
    if checked.faults or checked.sized:
        arrays |= {"faults": checked.faults, "unreadable": checked.unreadable}
    return arrays


class _MaskReader(NamedTuple):
    """Reads the masks of a part again; a class, so that a spawned worker can be sent one."""

    read: Callable[[Path, Part, bool], Records]
    root: Path
    part: Part
    rows: NDArray[np.bool_]

    def narrowed(self, keep: NDArray[np.bool_]) -> _MaskReader:
        """Of the annotations that it reads, those where `keep` is true."""
        rows = self.rows.copy()
        rows[rows] = keep
        return self._replace(rows=rows)

    def __call__(self) -> RunLengths:
        def masks() -> dict[str, Any]:
            checked = check_records(self.read(self.root, self.part, True))
            return vars(RunLengths.from_coco(checked.truth))

        return RunLengths(**cached_arrays(self.part.place, "masks", masks)).select(self.rows)


@contextmanager
def cache_lock(path: Path) -> Iterator[None]:
    """Hold the lock under which `path` of the cache is made.

    Raises:
        UserError: the cache cannot be written; names the variable that moves it.
    """
    remedy = f"free it, or set the environment variable {CACHE_VARIABLE} to another folder"
    ensure_folder(path.parent, remedy)
    with locked(path):
        yield


def cached_arrays(source: Path, kind: str, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The arrays that `read` makes of an annotation file; kept in the cache if it is large.

    The name in the cache is the SHA-256 of the file's path and content, and `kind`, which says
    which arrays they are. Where a value is no array, such as a list of faults, nothing is kept.

    Raises:
        UserError: the cache cannot be written.
    """
    if not source.is_file() or source.stat().st_size < LEAST_CACHED_BYTES:
        return read()
    digest = hashlib.sha256(os.fsencode(source.resolve()))
    with open(source, "rb") as handle:
        while piece := handle.read(_HASHED_BYTES):
            digest.update(piece)
    name = f"{digest.hexdigest()}-{kind}-{CACHE_VERSION}.npz"
    path = cache_folder() / "annotations" / name
    if not path.exists():
        with cache_lock(path):
            if not path.exists():
                arrays = read()
                if not all(isinstance(value, np.ndarray) for value in arrays.values()):
                    return arrays
                with atomic_write(path, "wb") as handle:
                    np.savez(handle, allow_pickle=False, **arrays)
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


# What readers of several layouts use


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped; names that are not UTF-8 are escaped.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def split_list(path: Path) -> list[str]:
    """The names in a list of images, each once, sorted.

    Raises:
        DataError: the list is missing or empty, or a name leaves the folder.
    """
    if not path.is_file():
        found = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt")))
        raise DataError(f"{path}: no such split; splits found: {found or 'none'}")
    names = {relative_name(line, str(path)) for line in read_lines(path)}
    if not names:
        raise DataError(f"{path}: lists no images")
    return sorted(names)


def folder_with(folders: Sequence[Path], names: Sequence[str], root: Path) -> Path:
    """The first of `folders` that has one of the first few names; else any under `root`.

    Where none has, the first of `folders` that exists.
    """
    few = list(names[:5])
    for folder in folders:
        if folder.is_dir() and any(file is not None for file in find_files(few, folder)):
            return folder
    last = {name.replace("\\", "/").rpartition("/")[2] for name in few}
    for place, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if last & set(files) and not any("/" in name.replace("\\", "/") for name in few):
            return Path(place)
    return next((folder for folder in folders if folder.is_dir()), root)


def as_whole(parts: Mapping[str, Path], known: Callable[[str], bool]) -> dict[str, Path]:
    """`parts`, or `WHOLE` where they are one whose name is not that of a part."""
    if len(parts) == 1 and not known(next(iter(parts))):
        return {WHOLE: next(iter(parts.values()))}
    return dict(parts)
