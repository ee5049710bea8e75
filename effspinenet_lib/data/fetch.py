"""Fetches COCO 2017 and VOC 2012 with SBD, lays out the user's own ImageNet archives.

Everything is made in `.fetching/` inside the data folder: archives, what they unpack to, and a
note of what is done. Only when all of it is there do the finished folders take their places, so
that a data folder is whole or visibly unfinished, and the same command goes on with it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from tqdm.auto import tqdm

from effspinenet_lib.data.archives import Place, unpack, unpack_nested
from effspinenet_lib.data.catalogue import KNOWN_SETS, Archive, KnownSet
from effspinenet_lib.data.download import check_archive, download, need_space
from effspinenet_lib.data.matfile import read_mat
from effspinenet_lib.data.voc_segmentation import AUGMENTED_LABELS, LABELS, LISTS, read_list
from effspinenet_lib.errors import DataError, UnknownName, UserError
from effspinenet_lib.files import atomic_write, ensure_folder, read_json, write_json

_WORK, _DONE, _STATE = ".fetching", ".fetched.json", "state.json"
_VOC_FOLDER = "VOCdevkit/VOC2012/"
_SBD_FOLDER, _SBD = "benchmark_RELEASE/dataset/", ".sbd/"
_DEVKIT = ".devkit/"
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def fetch(
    name: str,
    folder: Path,
    source: str | None = None,
    archives: Path | None = None,
) -> bool:
    """Make the data folder of a public data set, or go on with it.

    Args:
        name: one of `catalogue.KNOWN_SETS`.
        folder: the data folder; what it holds besides is left alone.
        source: URL of a folder that has the archives, instead of their publishers.
        archives: folder with archives that the user got; they are checked and kept.

    Returns:
        False if it was fetched before.

    Raises:
        UnknownName: there is no such data set.
        UserError: the folder cannot be used or is too small, or archives are missing.
        DataError: an archive cannot be fetched, is damaged or is not what it should be.
    """
    if name not in KNOWN_SETS:
        raise UnknownName("data set to fetch", name, KNOWN_SETS)
    job = _Fetch(KNOWN_SETS[name], ensure_folder(folder), source, archives)
    try:
        with FileLock(ensure_folder(job.work) / "fetch.lock", timeout=0):
            return job.run()
    except Timeout as error:
        raise UserError(f"{folder}: another process fetches into it; wait for it") from error


class _Fetch:
    """One data set on its way into one folder."""

    def __init__(
        self, known: KnownSet, folder: Path, source: str | None, archives: Path | None
    ) -> None:
        self.known, self.folder, self.source, self.archives = known, folder, source, archives
        self.work = folder / _WORK
        self.tree = self.work / "tree"

    def run(self) -> bool:
        """Do what is missing; False if nothing is."""
        done = self.folder / _DONE
        if done.exists():
            if (found := read_json(done)["set"]) != self.known.name:
                raise UserError(f"{self.folder}: holds {found}; choose another folder")
            shutil.rmtree(self.work)
            return False
        state = self._state()
        if not state["placing"]:
            self._prepare(state)
            _LAYOUTS[self.known.name](self)
            self._note(placing=True)
        for finished in self.known.folders:
            if (self.tree / finished).exists():
                (self.tree / finished).rename(self.folder / finished)
        missing = [name for name in self.known.folders if not (self.folder / name).is_dir()]
        if missing:
            raise DataError(f"{self.folder}: the archives had no {', '.join(missing)}")
        sums = {archive.name: archive.checksum for archive in self.known.archives}
        write_json(done, {"set": self.known.name, "archives": sums})
        shutil.rmtree(self.work)
        return True

    def _prepare(self, state: dict[str, Any]) -> None:
        """Check, before anything is fetched, that it can be finished."""
        for name in self.known.folders:
            if (self.folder / name).exists():
                raise UserError(
                    f"{self.folder / name}: is there already and was not fetched by this command; "
                    "choose another folder, or move it away"
                )
        if self.known.terms:
            self._require_archives()
        left = [archive for archive in self.known.archives if archive.name not in state["unpacked"]]
        have = sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())
        content = sum(archive.unpacked for archive in left)
        largest = 0 if self.archives else max((archive.size for archive in left), default=0)
        need_space(self.folder, max(0, content + largest - have))

    def _require_archives(self) -> None:
        names = [archive.name for archive in self.known.archives]
        if self.archives is None:
            raise UserError(
                f"{self.known.title} is not fetched: get {', '.join(names)} from "
                f"{self.known.terms}, and give their folder with --archives"
            )
        missing = [name for name in names if not (self.archives / name).is_file()]
        if missing:
            raise UserError(
                f"{self.archives}: lacks {', '.join(missing)}; get them from {self.known.terms}"
            )

    def _state(self) -> dict[str, Any]:
        path = self.work / _STATE
        known = {"set": self.known.name, "unpacked": [], "checked": [], "placing": False}
        state = {**known, **(read_json(path) if path.exists() else {})}
        if state["set"] != self.known.name:
            raise UserError(
                f"{self.folder}: an unfinished fetch of {state['set']} is there; finish it, or "
                f"remove {self.work}"
            )
        return state

    def _note(self, **changes: Any) -> None:
        write_json(self.work / _STATE, {**self._state(), **changes})

    def obtain(self, archive: Archive) -> Path:
        """The archive, fetched and checked."""
        if self.archives is None or not (self.archives / archive.name).is_file():
            return download(archive, self.work / archive.name, self.source)
        path = self.archives / archive.name
        checked = self._state()["checked"]
        if archive.name not in checked:
            check_archive(archive, path, str(path))
            self._note(checked=[*checked, archive.name])
        return path

    def unpack(self, archive: Archive, place: Place, how: Callable[..., int] = unpack) -> None:
        """Unpack an archive into the tree, once; a fetched one is removed then."""
        unpacked = self._state()["unpacked"]
        if archive.name in unpacked:
            return
        path = self.obtain(archive)
        if how(path, self.tree, place, archive.unpacked) == 0:
            raise DataError(f"{path}: has none of the files that {self.known.title} consists of")
        self._note(unpacked=[*unpacked, archive.name])
        (self.work / archive.name).unlink(missing_ok=True)


def _coco(job: _Fetch) -> None:
    def place(name: str) -> str | None:
        top, _, rest = name.partition("/")
        wanted = top in job.known.folders and (
            top != "annotations" or rest.startswith("instances_")
        )
        return name if wanted else None

    for archive in job.known.archives:
        job.unpack(archive, place)


def _voc(job: _Fetch) -> None:
    def place(name: str) -> str | None:
        inside = name.removeprefix(_VOC_FOLDER)
        wanted = inside != name and inside.split("/")[0] in job.known.folders
        return inside if wanted else None

    def place_sbd(name: str) -> str | None:
        inside = name.removeprefix(_SBD_FOLDER)
        wanted = inside in ("train.txt", "val.txt") or re.fullmatch(r"cls/[^/]+\.mat", inside)
        return _SBD + inside if wanted else None

    voc, sbd = job.known.archives
    job.unpack(voc, place)
    job.unpack(sbd, place_sbd)
    augmented = augmented_list(job.tree, job.tree / _SBD)
    expected = {part.split: part.images for part in job.known.parts}["train_aug"]
    if len(augmented) != expected:
        raise DataError(f"{job.work}: train_aug has {len(augmented)} images, not {expected}")
    _convert_sbd(job.tree, augmented)
    with atomic_write(job.tree / LISTS / "train_aug.txt") as handle:
        handle.write("".join(f"{stem}\n" for stem in augmented))


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
    listed = {*read_list(sbd / "train.txt"), *read_list(sbd / "val.txt")}
    listed |= set(read_list(voc / LISTS / "train.txt"))
    return sorted(listed - set(read_list(voc / LISTS / "val.txt")))


def _convert_sbd(tree: Path, stems: list[str]) -> None:
    """Write SBD's label maps as pictures, of the images that VOC has no label map of."""
    folder = ensure_folder(tree / AUGMENTED_LABELS)
    for stem in tqdm(stems, desc="SBD's label maps", unit="image", disable=None):
        if (tree / LABELS / f"{stem}.png").exists() or (folder / f"{stem}.png").exists():
            continue
        with atomic_write(folder / f"{stem}.png", "wb") as handle:
            Image.fromarray(sbd_labels(tree / _SBD / "cls" / f"{stem}.mat")).save(handle, "PNG")


def sbd_labels(path: Path) -> np.ndarray:
    """The label map of one of SBD's files, uint8 [H, W].

    Raises:
        DataError: the file cannot be read or holds no label map.
    """
    content = read_mat(path).get("GTcls")
    labels = content[0].get("Segmentation") if isinstance(content, list) and content else None
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.dtype != np.uint8:
        raise DataError(f"{path}: has no label map (GTcls.Segmentation)")
    return np.ascontiguousarray(labels)


def _imagenet(job: _Fetch) -> None:
    def place_devkit(name: str) -> str | None:
        file = PurePosixPath(name).name
        wanted = file in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
        return _DEVKIT + file if wanted else None

    devkit, val, train = job.known.archives
    job.unpack(devkit, place_devkit)
    classes = validation_classes(job.tree / _DEVKIT)

    def place_val(name: str) -> str | None:
        match = _VAL_IMAGE.fullmatch(name)
        if match is None:
            return None
        if not 1 <= int(match[1]) <= len(classes):
            raise DataError(f"{val.name}: {name} has no class in the development kit")
        return f"val/{classes[int(match[1]) - 1]}/{name}"

    job.unpack(val, place_val)
    job.unpack(train, lambda name: f"train/{name}", unpack_nested)


def validation_classes(devkit: Path) -> list[str]:
    """The WordNet id of each validation image in order, by ImageNet's development kit.

    Raises:
        DataError: its files cannot be read or do not fit each other.
    """
    path = devkit / "meta.mat"
    names = {}
    for record in read_mat(path).get("synsets", []):
        try:
            names[int(record["ILSVRC2012_ID"].item())] = str(record["WNID"])
        except (KeyError, AttributeError, ValueError) as error:
            raise DataError(f"{path}: a synset lacks its id or name") from error
    path = devkit / "ILSVRC2012_validation_ground_truth.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").split()
    unknown = [line for line in lines if not line.isdigit() or int(line) not in names]
    if unknown or not lines:
        raise DataError(f"{path}: names the class {unknown[:1] or 'of no image'}, not in meta.mat")
    return [names[int(line)] for line in lines]


_LAYOUTS: dict[str, Callable[[_Fetch], None]] = {"coco": _coco, "voc": _voc, "imagenet": _imagenet}
