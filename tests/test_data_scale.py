"""Data at scale: shared annotation stores, memory of real loader workers, held-out parts."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from effspinenet_lib.data import DataConfig, Dataset, folders, open_dataset
from effspinenet_lib.data import coco as coco_layout
from effspinenet_lib.data.augment import Augmentation
from effspinenet_lib.data.loader import evaluation_loader, training_loader, worker_errors
from effspinenet_lib.data.splits import HeldOutSplit
from effspinenet_lib.errors import DataError, UserError

NAMES = [f"{number:012d}.jpg" for number in (9, 25, 30, 34, 36, 42, 49, 61, 64, 71)]


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which annotation files of any size are kept."""
    monkeypatch.setenv("EFFSPINENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "LEAST_CACHED_BYTES", 0)
    return tmp_path / "cache" / "annotations"


def coco_folder(root: Path, names: list[str] = NAMES) -> Path:
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for name in names:
        Image.fromarray(np.full((8, 10, 3), 90, np.uint8)).save(root / "train2017" / name)
    write_annotations(root, names)
    return root


def write_annotations(root: Path, names: list[str], **changes: Any) -> None:
    content = {
        "images": [
            {"id": n, "file_name": name, "width": 10, "height": 8} for n, name in enumerate(names)
        ],
        "annotations": [
            {"id": n + 1, "image_id": n // 2, "category_id": 1, "bbox": [1, 1, 2 + n % 3, 4],
             "segmentation": [[1, 1, 4, 1, 4, 5]]}
            for n in range(2 * len(names))
        ],
        "categories": [{"id": 1, "name": "thing"}],
        **changes,
    }  # fmt: skip
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))


def opened(root: Path, split: str = "train2017", images: int | None = None) -> Dataset:
    return open_dataset(DataConfig("coco", str(root), split, train_images=images), "train")


def names_of(dataset: Dataset) -> list[str]:
    return [dataset.annotations.file_name(index) for index in range(len(dataset))]


# The store


def test_cached_annotations_are_those_of_the_file(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and in parts; the annotation file is read once for boxes and once for masks."""
    folder, read = coco_folder(tmp_path / "data"), []
    original = coco_layout.read_json
    monkeypatch.setattr(
        coco_layout, "read_json", lambda *args: (read.append(1), original(*args))[1]
    )
    for split, limit in (("train2017", None), ("train2017-held-3", None), ("train2017-rest-3", 2)):
        monkeypatch.setattr(folders, "LEAST_CACHED_BYTES", 0)
        cached = opened(folder, split, limit)
        cached.prepare("instances")
        assert len(read) == 2
        monkeypatch.setattr(folders, "LEAST_CACHED_BYTES", 10**9)
        plain = opened(folder, split, limit)
        for name, value in vars(plain.annotations).items():
            assert np.array_equal(vars(cached.annotations)[name], value)
            assert vars(cached.annotations)[name].dtype == value.dtype
        assert cached.categories == plain.categories
        assert all((cached.masks(i) == plain.masks(i)).all() for i in range(len(plain)))
        assert cached.masks(1).any()
        assert len(cached.ground_truth()["annotations"]) == len(plain.annotations.boxes)
        del read[2:]
    assert len(list(stores.glob("*.npz"))) == 2


def test_a_changed_annotation_file_is_read_again(stores: Path, tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "data")
    assert len(opened(folder).annotations.boxes) == 20
    path = folder / "annotations" / "instances_train2017.json"
    before = path.stat()
    write_annotations(folder, NAMES, categories=[{"id": 1, "name": "other"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert opened(folder).categories[0].name == "other"


def test_a_cache_that_cannot_be_written_says_how_to_choose_another(
    stores: Path, tmp_path: Path
) -> None:
    folder = coco_folder(tmp_path / "data")
    stores.parent.write_text("")
    with pytest.raises(
        UserError, match=r"cannot write in .*environment variable EFFSPINENET_CACHE"
    ):
        opened(folder)


# Memory


# Opens a generated data set with one worker for two epochs and prints the worker's memory after
# each quarter of an epoch. A program of its own: a worker shares the pages of the process that
# started it, and a test runner's are not a training run's.
MEMORY_PROBE = """
import json, sys
from pathlib import Path
import psutil
from effspinenet_lib.data import DataConfig, open_dataset
from effspinenet_lib.data.augment import Augmentation
from effspinenet_lib.data.loader import training_loader

root, images, batch = sys.argv[1], int(sys.argv[2]), 25
dataset = open_dataset(DataConfig("coco", root, "train2017"), "train")
steps = 2 * images // batch
loader = iter(training_loader(dataset, 8, batch, Augmentation((0.5, 2.0), 0.5), 0, 0, steps, 1))
for step, _ in enumerate(loader, start=1):
    if step % (steps // 8) == 0:
        (worker,) = psutil.Process().children()
        memory = worker.memory_full_info()
        print(json.dumps({"rss": memory.rss, "uss": memory.uss, "pss": memory.pss}), flush=True)
"""


def test_a_workers_memory_stays_small_and_does_not_grow(tmp_path: Path) -> None:
    """120,000 annotations of 600 images, two epochs, a real worker."""
    images, per_image = 600, 200
    root = tmp_path / "data"
    names = coco_folder(root, NAMES[:1]) and [f"{n:012d}.jpg" for n in range(images)]
    for name in names:
        if not (root / "train2017" / name).exists():
            os.link(root / "train2017" / NAMES[0], root / "train2017" / name)
    write_annotations(
        root,
        names,
        annotations=[
            {"id": n + 1, "image_id": n // per_image, "category_id": 1, "bbox": [1, 1, 5, 4],
             "segmentation": [[1, 1, 4, 1, 4, 5]]}
            for n in range(images * per_image)
        ],
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(root), str(images)],
        env={**os.environ, "EFFSPINENET_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(seen) == 8
    assert max(memory["rss"] for memory in seen) < 400 * 2**20
    # What is the worker's own does not grow from the first epoch's middle to the second's end.
    assert seen[-1]["uss"] - seen[1]["uss"] < 8 * 2**20


# The held-out part


@pytest.mark.parametrize("count", [1, 4, 9])
def test_the_held_out_part_is_the_lowest_digests(tmp_path: Path, count: int) -> None:
    folder = coco_folder(tmp_path / "data")
    held = opened(folder, HeldOutSplit("train2017", "held", count).name)
    rest = opened(folder, HeldOutSplit("train2017", "rest", count).name)
    by_digest = sorted(NAMES, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert sorted(names_of(held)) == sorted(by_digest[:count])
    assert sorted(names_of(rest)) == sorted(by_digest[count:])
    truth = held.ground_truth()
    assert sorted(image["file_name"] for image in truth["images"]) == sorted(names_of(held))
    assert len(truth["annotations"]) == 2 * count
    few, all_of_it = (opened(folder, "train-rest-4", images) for images in (2, None))
    assert few.image_id(0) == all_of_it.image_id(0)
    write_annotations(folder, NAMES[::-1])  # whose order does not decide
    again = opened(folder, HeldOutSplit("train2017", "held", count).name)
    assert sorted(names_of(again)) == sorted(by_digest[:count])


def test_names_that_are_no_utf8_are_cut_by_their_bytes(stores: Path, tmp_path: Path) -> None:
    raw = [b"caf\xe9.jpg", b"\xff.jpg", *(name.encode() for name in NAMES[:3])]
    folder = coco_folder(tmp_path / "data", [os.fsdecode(name) for name in raw])
    held = opened(folder, "train2017-held-3")
    by_digest = sorted(raw, key=lambda name: hashlib.sha256(name).hexdigest())
    assert sorted(map(os.fsencode, names_of(held))) == sorted(by_digest[:3])
    assert len(list(evaluation_loader(held, 16, 3, workers=1))) == 1


def test_names_of_parts(tmp_path: Path) -> None:
    assert HeldOutSplit.parse("train2017-held-7392") == HeldOutSplit("train2017", "held", 7392)
    assert HeldOutSplit.parse("a-rest-1-rest-2") == HeldOutSplit("a-rest-1", "rest", 2)
    for whole in ("train2017", "train-held", "held-3", "train-held-0", "train-held-x"):
        assert HeldOutSplit.parse(whole) is None
    with pytest.raises(UserError, match="train2017 has 10 images, too few to hold 10 out"):
        opened(coco_folder(tmp_path / "data"), "train2017-held-10")


# Workers that die or fail


class Fragile(Dataset):
    """A data set whose worker dies, or meets an error, at one image."""

    def __init__(self, whole: Dataset, kill: bool) -> None:
        super().__init__(whole.name, whole.categories, whole.annotations)
        self.whole, self.kill = whole, kill

    def load_image(self, index: int) -> np.ndarray:
        if index == 7 and multiprocessing.parent_process() is not None:
            if self.kill:
                time.sleep(0.1)  # what it has done before is mostly sent by then
                os.kill(os.getpid(), signal.SIGKILL)
            raise DataError("seven.jpg: the image cannot be decoded")
        return self.whole.load_image(index)

    def ground_truth(self) -> dict[str, Any]:
        return self.whole.ground_truth()


@pytest.fixture
def whole(tmp_path: Path) -> Dataset:
    return opened(coco_folder(tmp_path / "data"))


DEATH = r"a data loading worker died \(.*fewer workers.*the same command resumes"


def test_a_worker_that_is_killed_ends_in_one_clear_line(whole: Dataset) -> None:
    with pytest.raises(DataError, match=DEATH) as caught:
        list(evaluation_loader(Fragile(whole, kill=True), 16, 2, workers=1))
    assert "\n" not in str(caught.value)
    loader = training_loader(Fragile(whole, kill=True), 16, 4, Augmentation(), 0, 0, 10, workers=2)
    with pytest.raises(DataError, match=DEATH):
        list(loader)


@pytest.mark.parametrize("looks", [1, 0])
def test_a_death_is_told_as_clearly_where_its_signal_does_not_come(
    whole: Dataset, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """Batch 1 is on its way when the worker dies at batch 2: to fetch it ends in a broken line.

    One look at a worker, as torch takes it then, may find it alive on its way out.
    """
    alive, found = BaseProcess.is_alive, [True] * looks
    monkeypatch.setattr(
        BaseProcess, "is_alive", lambda process: found.pop() if found else alive(process)
    )

    def slow_loop() -> None:
        for _ in evaluation_loader(Fragile(whole, kill=True), 16, 3, workers=1):
            connection.wait([child.sentinel for child in multiprocessing.active_children()], 60)

    list(evaluation_loader(whole, 16, 3, workers=1))  # torch takes the signal from here on
    taken = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with pytest.raises(DataError, match=DEATH):
            slow_loop()
    finally:
        signal.signal(signal.SIGCHLD, taken)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_the_same_line_from_a_worker(tmp_path: Path, workers: int) -> None:
    folder = coco_folder(tmp_path / "data")
    broken = folder / "train2017" / NAMES[3]
    broken.write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        list(evaluation_loader(opened(folder), 16, 2, workers))
    assert str(caught.value) == f"{broken}: is not an image that can be decoded"


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), worker_errors():
        raise RuntimeError("shapes do not fit")
