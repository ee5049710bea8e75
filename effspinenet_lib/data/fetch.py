"""Fetches COCO 2017 and VOC 2012 with SBD; lays out the user's own ImageNet archives.

Everything is made in a hidden folder inside the data folder: archives, what they unpack to, and a
marker for each archive that is done. Only when all are done are the finished folders moved into
place, so that a data folder is complete or visibly unfinished, and the same command resumes.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import tarfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from gzip import BadGzipFile
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any

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

Place = Callable[[str, Path], "str | None"]
# A file of an archive: its name, its size, and what writes it to a place in a folder.
Member = tuple[str, int, Callable[[str, Path], object]]


@dataclass(frozen=True)
class Archive:
    """A file to fetch and unpack.

    Attributes:
        url: where its publisher offers it.
        size: in bytes, as its server says.
        checksum: `sha1:` or `md5:` and hexadecimal digits.
    """

    url: str
    size: int
    checksum: str

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
        format: of `DataConfig`.
        archives: in the order in which they are unpacked.
        folders: what the finished data folder holds.
        parts: what it should contain.
        place: where in the folder a member of an archive goes; None where it is not needed.
        terms: where the archives come from if the user has to get them; "" if they are fetched.
    """

    name: str
    format: str
    archives: tuple[Archive, ...]
    folders: tuple[str, ...]
    parts: tuple[ExpectedPart, ...]
    place: Place
    terms: str = ""


# Where each member of an archive goes.

_VOC_FOLDER, _SBD_FOLDER = "VOCdevkit/VOC2012/", "benchmark_RELEASE/dataset/"
_SBD, _DEVKIT = ".sbd", ".devkit"
_SYNSETS, _VAL_LABELS = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
_COCO_FOLDERS = ("annotations", "train2017", "val2017")
_VOC_FOLDERS = ("Annotations", "ImageSets", "JPEGImages", LABELS)


def _place_coco(name: str, tree: Path) -> str | None:
    del tree
    top, _, rest = name.partition("/")
    wanted = top in _COCO_FOLDERS and (top != "annotations" or rest.startswith("instances_"))
    return name if wanted else None


def _place_voc(name: str, tree: Path) -> str | None:
    del tree
    if name.startswith(_VOC_FOLDER):
        inside = name.removeprefix(_VOC_FOLDER)
        return inside if inside.split("/")[0] in _VOC_FOLDERS else None
    inside = name.removeprefix(_SBD_FOLDER)
    wanted = inside in ("train.txt", "val.txt") or re.fullmatch(r"cls/[^/]+\.mat", inside)
    return f"{_SBD}/{inside}" if wanted else None


def _place_imagenet(name: str, tree: Path) -> str | None:
    file = PurePosixPath(name).name
    if file in (_SYNSETS, _VAL_LABELS):
        return f"{_DEVKIT}/{file}"
    if match := re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name):
        return f"val/{validation_classes(tree / _DEVKIT)[int(match[1]) - 1]}/{name}"
    return f"train/{name}" if "/" in name and name.endswith(".JPEG") else None


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
    "coco",
    (
        Archive(f"{_COCO_URL}/annotations/annotations_trainval2017.zip", 252_907_541,
                "sha1:8551ee4bb5860311e79dace7e79cb91e432e78b3"),
        Archive(f"{_COCO_URL}/zips/val2017.zip", 815_585_330,
                "sha1:4950dc9d00dbe1c933ee0170f5797584351d2a41"),
        Archive(f"{_COCO_URL}/zips/train2017.zip", 19_336_861_798,
                "sha1:10ad623668ab00c62c096f0ed636d6aff41faca5"),
    ),
    _COCO_FOLDERS,
    (
        ExpectedPart("train2017", 118_287, 860_001, 80),
        ExpectedPart("val2017", 5_000, 36_781, 80),
    ),
    _place_coco,
)  # fmt: skip
VOC = KnownSet(
    "voc",
    "voc_segmentation",
    (
        Archive(f"{_VOC_URL}/VOCtrainval_11-May-2012.tar", 1_999_639_040,
                "md5:6cd6e144f989b92b3379bac3b3de84fd"),
        Archive(f"{_SBD_URL}/benchmark.tgz", 1_419_539_633,
                "md5:82b4d87ceb2ed10f6038a1cba92111cb"),
    ),
    (*_VOC_FOLDERS, AUGMENTED_LABELS),
    (
        ExpectedPart("train", 1_464, None, 20),
        ExpectedPart("val", 1_449, None, 20),
        ExpectedPart("train_aug", 10_582, None, 20),
    ),
    _place_voc,
)  # fmt: skip
IMAGENET = KnownSet(
    "imagenet",
    "imagenet",
    (
        Archive(f"{_IMAGENET_URL}/ILSVRC2012_devkit_t12.tar.gz", 2_568_145,
                "md5:fa75699e90414af021442c21a62c3abf"),
        Archive(f"{_IMAGENET_URL}/ILSVRC2012_img_val.tar", 6_744_924_160,
                "md5:29b22e2961454d5413ddabcf34fc5622"),
        Archive(f"{_IMAGENET_URL}/ILSVRC2012_img_train.tar", 147_897_477_120,
                "md5:1d675b47d978889d74fa0da5fadfb00e"),
    ),
    ("train", "val"),
    (
        ExpectedPart("train", 1_281_167, None, 1000),
        ExpectedPart("val", 50_000, None, 1000),
    ),
    _place_imagenet,
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
    done = folder / ".fetched.json"
    if done.exists():
        if (found := read_json(done)["set"]) != name:
            raise UserError(f"{folder}: holds {found}; choose another folder")
        return False
    work = ensure_folder(folder / f".fetching-{name}")
    try:
        with FileLock(work / "lock", timeout=0):
            _make(KNOWN_SETS[name], folder, work, source, archives)
            write_json(done, {"set": name})
            shutil.rmtree(work)
    except Timeout as error:
        raise UserError(f"{folder}: another process fetches into it; wait for it") from error
    except OSError as error:
        where, reason = error.filename or folder, error.strerror or error
        raise UserError(
            f"{where}: {reason}; what is there is kept: fix that and run the same command again"
        ) from error
    return True


def _make(
    known: KnownSet, folder: Path, work: Path, source: str | None, archives: Path | None
) -> None:
    """Fetch and unpack what has no marker yet, then move the finished folders into place."""

    def own(archive: Archive) -> Path | None:
        path = archives / archive.name if archives else None
        return path if path and path.is_file() else None

    left = [one for one in known.archives if not (work / f"{one.name}.done").exists()]
    if left:
        _check_start(known, folder, work, left, [one for one in left if not own(one)])
    for archive in left:
        if path := own(archive):
            check_archive(archive, path, str(path))
        else:
            path = download(archive, work / archive.name, source)
        if unpack(path, work / "tree", known.place) == 0:
            raise DataError(f"{path}: has none of the files that {known.name} consists of")
        if known.name == "voc" and archive == known.archives[-1]:
            _add_sbd(work / "tree", {part.split: part.images for part in known.parts}["train_aug"])
        (work / f"{archive.name}.done").touch()
        (work / archive.name).unlink(missing_ok=True)
    for finished in known.folders:
        if not (folder / finished).exists():
            (work / "tree" / finished).rename(folder / finished)


def _check_start(
    known: KnownSet, folder: Path, work: Path, left: list[Archive], missing: list[Archive]
) -> None:
    """Check, before anything is fetched, that it can be finished."""
    for name in known.folders:
        if (folder / name).exists():
            raise UserError(f"{folder / name}: exists; choose another folder, or move it away")
    if known.terms and missing:
        names = ", ".join(archive.name for archive in missing)
        raise UserError(f"get {names} from {known.terms}, and give their folder with --archives")
    # Pictures take as much space as their archive, and one fetched archive is kept at a time.
    have = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    largest = max((archive.size for archive in missing), default=0)
    needed = sum(archive.size for archive in left) + largest - have
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(
            f"{folder}: {needed / _GB:.1f} GB are needed, {free / _GB:.1f} GB are free; free some, "
            "or choose another folder"
        )


def download(archive: Archive, path: Path, source: str | None = None) -> Path:
    """Fetch an archive to `path`, or resume from what `path`.part holds of it.

    It is moved to `path`, which is returned, once it is complete and its checksum is right.
    `source` is the URL of a folder that has it too.

    Raises:
        UserError: the URL is neither http nor https.
        DataError: the server does not have it, does not answer, or gives another file.
    """
    url = archive.url if source is None else f"{source.rstrip('/')}/{archive.name}"
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url}: only http:// and https:// are fetched from")
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
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
            except ConnectionError as error:
                reason = str(error)
            failures = 0 if handle.tell() > have else failures + 1
            if failures == ATTEMPTS:
                raise DataError(
                    f"{url}: cannot be fetched ({reason}); what is there is kept: the same command "
                    "resumes from it"
                )
            if failures:
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (failures - 1))
    try:
        check_archive(archive, part, url)
    except DataError:
        part.unlink()
        raise
    part.replace(path)
    return path


def _stream(url: str, have: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The pieces of a file of `size` bytes from byte `have` on, or from 0, each with its place.

    Raises:
        ConnectionError: the server or the way to it failed, which another try may mend.
        DataError: the server does not have the file.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "effspinenet"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            start = have if response.status == HTTPStatus.PARTIAL_CONTENT else 0
            total = start + int(response.headers.get("Content-Length", size - start))
            if total != size:
                raise DataError(f"{url}: the server's file has {total} bytes, not {size}")
            while piece := response.read(_PIECE_BYTES):
                yield start, piece
                start += len(piece)
    except (http.client.HTTPException, OSError) as error:  # urllib's are among the latter
        code = getattr(error, "code", HTTPStatus.INTERNAL_SERVER_ERROR)
        if code < HTTPStatus.INTERNAL_SERVER_ERROR:
            raise DataError(f"{url}: {error}") from error
        raise ConnectionError(str(getattr(error, "reason", error))) from error


def _bar(title: str, size: int) -> tqdm:
    return tqdm(desc=title, total=size, unit="B", unit_scale=True, disable=None)


def check_archive(archive: Archive, path: Path, origin: str) -> None:
    """Check size and checksum of a file that should be `archive`.

    Raises:
        DataError: it is another file; says what was expected and found.
    """
    if (size := path.stat().st_size) != archive.size:
        raise DataError(f"{origin}: has {size} bytes, {archive.size} are expected")
    kind, _, expected = archive.checksum.partition(":")
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as handle, _bar(f"{path.name}, checksum", size) as bar:
        while piece := handle.read(_PIECE_BYTES):
            digest.update(piece)
            bar.update(len(piece))
    if digest.hexdigest() != expected:
        raise DataError(
            f"{origin}: wrong checksum: {kind} {digest.hexdigest()}, expected {expected}; fetch it "
            "again, or from another source"
        )


def unpack(archive: Path, tree: Path, place: Place) -> int:
    """Unpack the members of a tar (compressed or not) or zip file that are needed.

    Members of tar files in a tar file are named `<inner file without .tar>/<member>`. A file that
    exists with its size is not written again, so that interrupted unpacking resumes.

    Returns:
        How many members are needed.

    Raises:
        DataError: the archive is damaged, or a member would be written outside the tree.
    """
    needed = 0
    tree.mkdir(parents=True, exist_ok=True)
    try:
        members = tqdm(_members(archive), desc=archive.name, unit="file", disable=None)
        for name, size, extract in members:
            if (target := place(name, tree)) is not None:
                needed += 1
                path = tree / target
                if not path.is_file() or path.stat().st_size != size:
                    extract(target, tree)
    except (tarfile.TarError, zipfile.BadZipFile, BadGzipFile, zlib.error, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{archive}: is damaged or unsafe ({reason}); remove it and fetch it again"
        ) from error
    return needed


def _members(archive: Path) -> Iterator[Member]:
    if archive.suffix != ".zip":
        with tarfile.open(archive, "r:*") as tar:
            yield from _tar_members(tar, "")
        return

    def extract(entry: zipfile.ZipInfo, target: str, tree: Path) -> None:
        entry.filename = target
        packed.extract(entry, tree)  # drops what leads out of the tree

    with zipfile.ZipFile(archive) as packed:
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
    """The WordNet id of each validation image in order, by ImageNet's development kit."""
    synsets = _read_mat(devkit / _SYNSETS, "synsets")[["ILSVRC2012_ID", "WNID"]]
    names = {int(number): str(name) for number, name in synsets.tolist()}
    labels = (devkit / _VAL_LABELS).read_text(encoding="utf-8").split()
    return [names[int(label)] for label in labels]


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
    *used, left_out = (set(split_list(path)) for path in paths)
    return sorted(set().union(*used) - left_out)


def _add_sbd(tree: Path, expected: int) -> None:
    """Write the list `train_aug`, and SBD's label maps of the images that VOC has none of."""
    names = augmented_list(tree, tree / _SBD)
    if len(names) != expected:
        raise DataError(f"{tree}: train_aug has {len(names)} images, not {expected}")
    folder = ensure_folder(tree / AUGMENTED_LABELS)
    for name in tqdm(names, desc="SBD's label maps", unit="image", disable=None):
        path = folder / f"{name}.png"
        if not path.exists() and not (tree / LABELS / path.name).exists():
            labels = sbd_labels(tree / _SBD / "cls" / f"{name}.mat")
            with atomic_write(path, "wb") as handle:
                Image.fromarray(labels).save(handle, "PNG")
    with atomic_write(tree / LABEL_LISTS / "train_aug.txt") as handle:
        handle.write("".join(f"{name}\n" for name in names))


def sbd_labels(path: Path) -> NDArray[np.uint8]:
    """The label map of one of SBD's files, uint8 [H, W].

    Raises:
        DataError: the file cannot be read as a MATLAB file or holds no label map.
    """
    content = _read_mat(path, "GTcls")
    if "Segmentation" not in (content.dtype.names or ()):
        raise DataError(f"{path}: has no label map (GTcls.Segmentation)")
    return np.ascontiguousarray(content["Segmentation"].item(), np.uint8)
