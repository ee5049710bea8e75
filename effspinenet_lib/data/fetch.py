"""Fetches COCO 2017 and VOC 2012 with SBD; lays out the user's own ImageNet archives.

Everything is made in a hidden folder inside the data folder: archives, what they unpack to, and a
marker for each step that is done. Only when all of it is complete are the finished folders moved
into place, so that a data folder is complete or visibly unfinished, and the same command resumes.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from effspinenet_lib.data.folders import split_list
from effspinenet_lib.data.voc import AUGMENTED_LABELS, LABEL_LISTS, LABELS
from effspinenet_lib.errors import DataError, UnknownName, UserError
from effspinenet_lib.files import atomic_write, ensure_folder, read_json, write_json

# Our choices: how long a server may be silent, and how often in a row it is asked without giving
# anything, after a wait that doubles each time.
TIMEOUT_SECONDS = 60.0
ATTEMPTS = 6
FIRST_WAIT_SECONDS = 1.0
_PIECE_BYTES = 1 << 20
_GB = 10**9


@dataclass(frozen=True)
class Archive:
    """A file to fetch and unpack.

    Attributes:
        url: where its publisher offers it.
        size: in bytes, as its server says.
        checksum: `sha1:` or `md5:` and hexadecimal digits.
        unpacked: bytes to keep free for its content.
    """

    url: str
    size: int
    checksum: str
    unpacked: int

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class ExpectedPart:
    """What a split should hold: images, boxes (crowds and degenerate ones too), classes."""

    split: str
    images: int
    annotations: int | None
    classes: int


@dataclass(frozen=True)
class KnownSet:
    """A public data set.

    Attributes:
        name: for `effspinenet data fetch`.
        title: for people.
        format: of `DataConfig`.
        archives: in the order in which they are unpacked.
        folders: what the finished data folder holds.
        parts: what it should contain.
        terms: where the archives come from if the user has to get them; "" if they are fetched.
    """

    name: str
    title: str
    format: str
    archives: tuple[Archive, ...]
    folders: tuple[str, ...]
    parts: tuple[ExpectedPart, ...]
    terms: str = ""


# Sizes are what the servers announce. COCO publishes no checksums: these are GluonCV's SHA-1; the
# others are the MD5 of torchvision.datasets. The numbers of images and annotations are the
# publishers': cocodataset.org, VOC 2012's development kit, SBD's page, the ILSVRC 2012 challenge;
# 10,582 is the paper's (section 5) and everyone's for VOC's train joined with SBD, less VOC's val.
_COCO_URL = "http://images.cocodataset.org"
_VOC_URL = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012"
_SBD_URL = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours"
_IMAGENET_URL = "https://image-net.org/data/ILSVRC/2012"
COCO = KnownSet(
    "coco",
    "COCO 2017",
    "coco",
    (
        Archive(f"{_COCO_URL}/annotations/annotations_trainval2017.zip", 252_907_541,
                "sha1:8551ee4bb5860311e79dace7e79cb91e432e78b3", 1 * _GB),
        Archive(f"{_COCO_URL}/zips/val2017.zip", 815_585_330,
                "sha1:4950dc9d00dbe1c933ee0170f5797584351d2a41", 1 * _GB),
        Archive(f"{_COCO_URL}/zips/train2017.zip", 19_336_861_798,
                "sha1:10ad623668ab00c62c096f0ed636d6aff41faca5", 21 * _GB),
    ),
    ("annotations", "train2017", "val2017"),
    (
        ExpectedPart("train2017", 118_287, 860_001, 80),
        ExpectedPart("val2017", 5_000, 36_781, 80),
    ),
)  # fmt: skip
VOC = KnownSet(
    "voc",
    "PASCAL VOC 2012 with SBD's label maps",
    "voc_segmentation",
    (
        Archive(f"{_VOC_URL}/VOCtrainval_11-May-2012.tar", 1_999_639_040,
                "md5:6cd6e144f989b92b3379bac3b3de84fd", 2 * _GB),
        Archive(f"{_SBD_URL}/benchmark.tgz", 1_419_539_633,
                "md5:82b4d87ceb2ed10f6038a1cba92111cb", 2 * _GB),
    ),
    ("Annotations", "ImageSets", "JPEGImages", LABELS, AUGMENTED_LABELS),
    (
        ExpectedPart("train", 1_464, None, 20),
        ExpectedPart("val", 1_449, None, 20),
        ExpectedPart("train_aug", 10_582, None, 20),
    ),
)  # fmt: skip
IMAGENET = KnownSet(
    "imagenet",
    "ImageNet ILSVRC 2012",
    "imagenet",
    (
        Archive(f"{_IMAGENET_URL}/ILSVRC2012_devkit_t12.tar.gz", 2_568_145,
                "md5:fa75699e90414af021442c21a62c3abf", 1 * _GB),
        Archive(f"{_IMAGENET_URL}/ILSVRC2012_img_val.tar", 6_744_924_160,
                "md5:29b22e2961454d5413ddabcf34fc5622", 7 * _GB),
        Archive(f"{_IMAGENET_URL}/ILSVRC2012_img_train.tar", 147_897_477_120,
                "md5:1d675b47d978889d74fa0da5fadfb00e", 148 * _GB),
    ),
    ("train", "val"),
    (
        ExpectedPart("train", 1_281_167, None, 1000),
        ExpectedPart("val", 50_000, None, 1000),
    ),
    terms="https://image-net.org/download-images (an account and its terms are needed)",
)  # fmt: skip
KNOWN_SETS = {known.name: known for known in (COCO, VOC, IMAGENET)}


def fetch(name: str, folder: Path, source: str | None = None, archives: Path | None = None) -> bool:
    """Make the data folder of a public data set, or resume making it.

    Args:
        name: one of `KNOWN_SETS`.
        folder: the data folder; what it holds besides is left alone.
        source: URL of a folder that has the archives, instead of their publishers.
        archives: folder with archives that the user has; they are checked and kept.

    Returns:
        False if it was fetched before.

    Raises:
        UnknownName: there is no such data set.
        UserError: the folder cannot be used or is too small, or archives are missing.
        DataError: an archive cannot be fetched, is damaged or is another file.
    """
    if name not in KNOWN_SETS:
        raise UnknownName("data set to fetch", name, KNOWN_SETS)
    known, done = KNOWN_SETS[name], folder / ".fetched.json"
    if done.exists():
        if (found := read_json(done)["set"]) != name:
            raise UserError(f"{folder}: holds {found}; choose another folder")
        return False
    work = ensure_folder(folder / f".fetching-{name}")
    try:
        with FileLock(work / "lock", timeout=0):
            if not (work / "laid-out").exists():
                _lay_out(known, folder, work, source, archives)
                (work / "laid-out").touch()
            for finished in known.folders:
                if (work / "tree" / finished).exists():
                    (work / "tree" / finished).rename(folder / finished)
            missing = [part for part in known.folders if not (folder / part).is_dir()]
            if missing:
                raise DataError(f"{folder}: the archives had no {', '.join(missing)}")
            sums = {archive.name: archive.checksum for archive in known.archives}
            write_json(done, {"set": name, "archives": sums})
            shutil.rmtree(work)
    except Timeout as error:
        raise UserError(f"{folder}: another process fetches into it; wait for it") from error
    return True


def _lay_out(
    known: KnownSet, folder: Path, work: Path, source: str | None, archives: Path | None
) -> None:
    """Make the finished folders in `work`/tree."""

    def own(archive: Archive) -> Path | None:
        path = None if archives is None else archives / archive.name
        return path if path and path.is_file() else None

    left = [one for one in known.archives if not (work / f"{one.name}.done").exists()]
    _check_start(known, folder, work, left, [one for one in left if not own(one)])
    for archive in left:
        if path := own(archive):
            check_archive(archive, path, str(path))
        else:
            path = download(archive, work / archive.name, source)
        if unpack(path, work / "tree", _PLACES[known.name]) == 0:
            raise DataError(f"{path}: has none of the files that {known.title} consists of")
        (work / f"{archive.name}.done").touch()
        (work / archive.name).unlink(missing_ok=True)
    if known.name == "voc":
        _add_sbd(work / "tree", {part.split: part.images for part in known.parts}["train_aug"])


def _check_start(
    known: KnownSet, folder: Path, work: Path, left: list[Archive], missing: list[Archive]
) -> None:
    """Check, before anything is fetched, that it can be finished."""
    for name in known.folders:
        if (folder / name).exists():
            raise UserError(
                f"{folder / name}: is there already and was not fetched by this command; "
                "choose another folder, or move it away"
            )
    if known.terms and missing:
        raise UserError(
            f"{known.title} is not fetched: get {', '.join(one.name for one in missing)} from "
            f"{known.terms}, and give their folder with --archives"
        )
    have = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    largest = max((archive.size for archive in missing), default=0)
    needed = sum(archive.unpacked for archive in left) + largest - have
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(
            f"{folder}: {needed / _GB:.1f} GB are needed, {free / _GB:.1f} GB are free; free some, "
            "or choose another folder"
        )


# Download


class _NetworkError(Exception):
    """The server or the way to it failed, which another try may mend."""


@contextmanager
def _local(path: Path) -> Iterator[None]:
    """Around what works on a file of this machine: another try would not help."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else f"cannot be used ({error.strerror or error})"
        raise UserError(
            f"{path}: {reason}; what is there is kept: fix that and run the same command again"
        ) from error


def download(archive: Archive, path: Path, source: str | None = None) -> Path:
    """Fetch an archive to `path`, or resume from what `path`.part holds of it.

    Args:
        archive: what to fetch.
        path: where it is moved once it is complete and its checksum is right.
        source: URL of a folder that has it too, instead of the publisher's.

    Returns:
        `path`.

    Raises:
        UserError: the file cannot be written, or the URL is neither http nor https.
        DataError: the server does not have it, does not answer, or gives another file.
    """
    url = archive.url if source is None else f"{source.rstrip('/')}/{archive.name}"
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url}: only http:// and https:// are fetched from")
    part = path.with_name(path.name + ".part")
    with _local(part):
        if not path.exists():
            _complete(url, archive, part)
            try:
                check_archive(archive, part, url)
            except DataError:
                part.unlink()
                raise
            part.replace(path)
    return path


def _complete(url: str, archive: Archive, part: Path) -> None:
    """Bring `part` to the archive's size, over as many requests as it takes."""
    failures = 0
    with open(part, "ab") as handle, _bar(archive.name, archive.size) as bar:
        while (have := handle.tell()) < archive.size:
            reason = "the connection broke off"
            try:
                for start, piece in _stream(url, have, archive.size):
                    if start != handle.tell():  # a server that knows no ranges begins again
                        handle.seek(start)
                        handle.truncate()
                    handle.write(piece)
                    bar.update(handle.tell() - bar.n)
            except _NetworkError as error:
                reason = str(error)
            failures = 0 if handle.tell() > have else failures + 1
            if failures == ATTEMPTS:
                raise DataError(
                    f"{url}: cannot be fetched ({reason}); what is there is kept: the same command "
                    "resumes from it"
                )
            if failures:
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (failures - 1))


def _stream(url: str, have: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The pieces of a file of `size` bytes from byte `have` on, or from 0, each with its place."""
    request = urllib.request.Request(url, headers={"User-Agent": "effspinenet"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            start = have if response.status == http.client.PARTIAL_CONTENT else 0
            total = start + int(response.headers.get("Content-Length", size - start))
            if total != size:
                raise DataError(f"{url}: the server's file has {total} bytes, not {size}")
            while piece := response.read(_PIECE_BYTES):
                yield start, piece
                start += len(piece)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            yield 0, b""  # what is there is of another file
        else:
            final = http.client.BAD_REQUEST <= error.code < http.client.INTERNAL_SERVER_ERROR
            message = f"{url}: the server says {error.code} {error.reason}"
            raise (DataError if final else _NetworkError)(message) from error
    except (http.client.HTTPException, OSError) as error:  # urllib's are among the latter
        raise _NetworkError(str(getattr(error, "reason", None) or error)) from error


def _bar(title: str, size: int) -> tqdm:
    return tqdm(desc=title, total=size, unit="B", unit_scale=True, disable=None)


def check_archive(archive: Archive, path: Path, origin: str) -> None:
    """Check size and checksum of a file that should be `archive`.

    Raises:
        DataError: it is another file; says what was expected and found.
        UserError: it cannot be read.
    """
    if (size := path.stat().st_size) != archive.size:
        raise DataError(f"{origin}: has {size} bytes, {archive.size} are expected")
    kind, _, expected = archive.checksum.partition(":")
    digest = hashlib.new(kind, usedforsecurity=False)
    with _local(path), open(path, "rb") as handle, _bar(f"{path.name}, checksum", size) as bar:
        while piece := handle.read(_PIECE_BYTES):
            digest.update(piece)
            bar.update(len(piece))
    if digest.hexdigest() != expected:
        raise DataError(
            f"{origin}: wrong checksum: {kind} {digest.hexdigest()}, expected {expected}; fetch it "
            "again, or from another source"
        )


# Archives

Place = Callable[[str, Path], "str | None"]  # where in the tree a member goes; None: not needed
Member = tuple[str, int, Callable[[str, Path], Any]]  # name, size, and what writes it


def unpack(archive: Path, tree: Path, place: Place) -> int:
    """Unpack the members of a tar (compressed or not) or zip file that are needed.

    Members of tar files in a tar file are named `<inner file without .tar>/<member>`. A file that
    exists with its size is not written again, so that interrupted unpacking resumes.

    Returns:
        How many members are needed.

    Raises:
        DataError: the archive is damaged, or a member would be written outside the tree.
        UserError: a file cannot be written.
    """
    needed = 0
    tree.mkdir(parents=True, exist_ok=True)
    try:
        with tqdm(desc=archive.name, unit="file", disable=None) as bar:
            for name, size, extract in _members(archive):
                bar.update()
                if (target := place(name, tree)) is not None:
                    needed += 1
                    path = tree / target
                    if not path.is_file() or path.stat().st_size != size:
                        extract(target, tree)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # gzip's own has none
            with _local(Path(error.filename or tree)):
                raise
        reason = str(error).partition("\n")[0]
        message = f"{archive}: is damaged or unsafe ({reason}); remove it and fetch it again"
        raise DataError(message) from error
    return needed


def _members(archive: Path) -> Iterator[Member]:
    if archive.suffix != ".zip":
        with tarfile.open(archive, "r:*") as tar:
            yield from _tar_members(tar, "")
        return
    with zipfile.ZipFile(archive) as packed:

        def extract(entry: zipfile.ZipInfo, target: str, tree: Path) -> None:
            entry.filename = target
            packed.extract(entry, tree)  # drops what leads out of the tree

        for entry in packed.infolist():
            if not entry.is_dir():
                yield entry.filename, entry.file_size, partial(extract, entry)


def _tar_members(tar: tarfile.TarFile, prefix: str) -> Iterator[Member]:
    def extract(entry: tarfile.TarInfo, target: str, tree: Path) -> None:
        tar.extract(entry.replace(name=target, deep=False), tree, filter="data")

    for entry in tar:
        if entry.name.endswith(".tar"):
            with tarfile.open(fileobj=tar.extractfile(entry), mode="r:") as inner:
                yield from _tar_members(inner, f"{prefix}{entry.name.removesuffix('.tar')}/")
        elif not entry.isdir():
            yield prefix + entry.name, entry.size, partial(extract, entry)


# The layouts

_VOC_FOLDER, _SBD_FOLDER = "VOCdevkit/VOC2012/", "benchmark_RELEASE/dataset/"
_SBD, _DEVKIT = ".sbd", ".devkit"
_SYNSETS, _VAL_LABELS = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"


def _place_coco(name: str, tree: Path) -> str | None:
    del tree
    top, _, rest = name.partition("/")
    wanted = top in COCO.folders and (top != "annotations" or rest.startswith("instances_"))
    return name if wanted else None


def _place_voc(name: str, tree: Path) -> str | None:
    del tree
    if name.startswith(_VOC_FOLDER):
        inside = name.removeprefix(_VOC_FOLDER)
        return inside if inside.split("/")[0] in VOC.folders else None
    inside = name.removeprefix(_SBD_FOLDER)
    wanted = inside in ("train.txt", "val.txt") or re.fullmatch(r"cls/[^/]+\.mat", inside)
    return f"{_SBD}/{inside}" if wanted else None


def _place_imagenet(name: str, tree: Path) -> str | None:
    file = PurePosixPath(name).name
    if file in (_SYNSETS, _VAL_LABELS):
        return f"{_DEVKIT}/{file}"
    if match := re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name):
        classes = validation_classes(tree / _DEVKIT)
        if not 1 <= int(match[1]) <= len(classes):
            raise DataError(f"{name} has no class in the development kit")
        return f"val/{classes[int(match[1]) - 1]}/{name}"
    return f"train/{name}" if "/" in name and name.endswith(".JPEG") else None


_PLACES: dict[str, Place] = {"coco": _place_coco, "voc": _place_voc, "imagenet": _place_imagenet}


def _read_mat(path: Path, variable: str) -> NDArray[Any]:
    """A variable of a MATLAB file."""
    from scipy.io import loadmat

    try:
        value: NDArray[Any] = loadmat(path, variable_names=[variable], squeeze_me=True)[variable]
    except Exception as error:  # SciPy raises a dozen kinds for damaged files
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: cannot be read as a MATLAB file ({reason})") from error
    return value


@lru_cache(maxsize=1)
def validation_classes(devkit: Path) -> list[str]:
    """The WordNet id of each validation image in order, by ImageNet's development kit.

    Raises:
        DataError: its files cannot be read or do not fit each other.
    """
    synsets = _read_mat(devkit / _SYNSETS, "synsets")[["ILSVRC2012_ID", "WNID"]]
    names = {int(number): str(name) for number, name in synsets.tolist()}
    labels = (devkit / _VAL_LABELS).read_text(encoding="utf-8").split()
    try:
        return [names[int(label)] for label in labels]
    except (KeyError, ValueError) as error:
        message = f"{devkit / _VAL_LABELS}: names a class that is not in {_SYNSETS} ({error})"
        raise DataError(message) from error


def augmented_list(voc: Path, sbd: Path) -> list[str]:
    """The augmented training images: VOC's train and all of SBD, without VOC's val; sorted.

    With the released lists they are the paper's 10,582. (SBD's train and val, 8,498 and 2,857
    images, are cut differently from VOC's: without the last step, VOC's val would be trained on.)

    Args:
        voc: folder in VOC's layout.
        sbd: folder with SBD's `train.txt` and `val.txt`.

    Raises:
        DataError: a list is missing or empty.
    """
    lists = voc / LABEL_LISTS
    paths = (sbd / "train.txt", sbd / "val.txt", lists / "train.txt", lists / "val.txt")
    *used, left_out = (dict(split_list(path)) for path in paths)
    return sorted(set().union(*used) - set(left_out))


def _add_sbd(tree: Path, expected: int) -> None:
    """Write the list `train_aug`, and SBD's label maps of the images that VOC has none of."""
    names = augmented_list(tree, tree / _SBD)
    if len(names) != expected:
        raise DataError(f"{tree}: train_aug has {len(names)} images, not {expected}")
    folder = ensure_folder(tree / AUGMENTED_LABELS)
    for name in tqdm(names, desc="SBD's label maps", unit="image", disable=None):
        path = folder / f"{name}.png"
        if not path.exists() and not (tree / LABELS / path.name).exists():
            with atomic_write(path, "wb") as handle:
                labels = sbd_labels(tree / _SBD / "cls" / f"{name}.mat")
                Image.fromarray(labels).save(handle, "PNG")
    with atomic_write(tree / LABEL_LISTS / "train_aug.txt") as handle:
        handle.write("".join(f"{name}\n" for name in names))


def sbd_labels(path: Path) -> NDArray[np.uint8]:
    """The label map of one of SBD's files, uint8 [H, W].

    Raises:
        DataError: the file cannot be read or holds no label map.
    """
    content = _read_mat(path, "GTcls")
    labels = content["Segmentation"].item() if "Segmentation" in (content.dtype.names or ()) else 0
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.dtype != np.uint8:
        raise DataError(f"{path}: has no label map (GTcls.Segmentation)")
    return np.ascontiguousarray(labels)
