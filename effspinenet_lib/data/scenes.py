"""ShapeScenes as a data set: made once, memory-mapped, exportable as a COCO folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from effspinenet_lib.data.dataset import Annotations, AnnotationsBuilder, Dataset
from effspinenet_lib.data.shapes import (
    CATEGORIES,
    VERSION,
    Scene,
    SceneSettings,
    annotation_record,
    render_scene,
)
from effspinenet_lib.data.store import making
from effspinenet_lib.files import atomic_write, cache_folder, ensure_folder, read_json

DEFAULT_SETTINGS = SceneSettings()


def generator_key(settings: SceneSettings = DEFAULT_SETTINGS) -> str:
    """What besides seed, split and size decides the bytes: the version and the settings."""
    return f"v{VERSION}-{_digest(asdict(settings))}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _file_name(index: int) -> str:
    return f"{index:06d}.png"


class ShapeScenes(Dataset):
    """A split of ShapeScenes in the cache.

    Image i has the id i + 1. A longer split of the same seed starts with the same images.
    """

    def __init__(
        self,
        split: str,
        images: int,
        image_size: int,
        seed: int = 0,
        settings: SceneSettings = DEFAULT_SETTINGS,
    ) -> None:
        """Open the split; makes it first if the cache has it not.

        Raises:
            UserError: the cache folder cannot be written.
        """
        self.split, self.image_size, self.seed, self.settings = split, image_size, seed, settings
        self.folder = _ensure_split(split, images, image_size, seed, settings)
        self._images: NDArray[np.uint8] | None = None
        self._semantic: NDArray[np.uint8] | None = None
        super().__init__(f"ShapeScenes {split}", CATEGORIES, _read_annotations(self.ground_truth()))

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as a copy of all images; workers map the file anew.
        return {**self.__dict__, "_images": None, "_semantic": None}

    def load_image(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as uint8 [S, S, 3], RGB."""
        if self._images is None:
            self._images = np.load(self.folder / "images.npy", mmap_mode="r")
        return np.array(self._images[index])

    def prepare(self, task: str) -> None:
        """Make the semantic labels if the cache has them not; masks are in the annotations."""
        if task != "segmentation":
            super().prepare(task)
            return
        path = self.folder / "semantic.npy"
        if not path.exists():
            with making(self.folder):
                if not path.exists():
                    self._make_semantic(path)

    def _make_semantic(self, path: Path) -> None:
        progress = tqdm(range(len(self)), desc=f"{self.name}, labels", unit="image", disable=None)
        header = {"descr": "|u1", "fortran_order": False, "shape": self._shape()}
        with atomic_write(path, "wb") as labels:
            np.lib.format.write_array_header_1_0(labels, header)
            for index in progress:
                labels.write(self.scene(index).semantic.tobytes())

    def _shape(self) -> tuple[int, int, int]:
        return len(self), self.image_size, self.image_size

    def semantic(self, index: int) -> NDArray[np.uint8]:
        """The semantic labels of image `index`, [S, S]; 255: objects too hidden to be annotated."""
        if self._semantic is None:
            self.prepare("segmentation")
            self._semantic = np.load(self.folder / "semantic.npy", mmap_mode="r")
        return np.array(self._semantic[index])

    def scene(self, index: int) -> Scene:
        """Scene `index` drawn anew, with masks and semantic labels; objects as in `load`."""
        return render_scene(self.settings, self.seed, self.split, index, self.image_size)

    def ground_truth(self) -> dict[str, Any]:
        """The annotations as a COCO dictionary; masks are compressed run lengths."""
        return dict(read_json(self.folder / "annotations.json"))


def _ensure_split(
    split: str, images: int, image_size: int, seed: int, settings: SceneSettings
) -> Path:
    key = _digest([generator_key(settings), split, images, image_size, seed])
    folder = cache_folder() / "shapescenes" / f"{split}-{images}-{image_size}px-{key}"
    # The annotations are written last: where they are, the images are whole.
    files = [folder / "images.npy", folder / "annotations.json"]
    if all(path.exists() for path in files):
        return folder
    with making(folder):
        if all(path.exists() for path in files):
            return folder
        ensure_folder(folder)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        _make_split(folder, split, images, image_size, seed, settings)
    return folder


def _scenes(
    split: str, images: int, image_size: int, seed: int, settings: SceneSettings
) -> Iterator[Scene]:
    progress = tqdm(range(images), desc=f"ShapeScenes {split}", unit="image", disable=None)
    for index in progress:
        yield render_scene(settings, seed, split, index, image_size)


def _make_split(
    folder: Path, split: str, images: int, image_size: int, seed: int, settings: SceneSettings
) -> None:
    header = {
        "descr": "|u1",
        "fortran_order": False,
        "shape": (images, image_size, image_size, 3),
    }
    # Left in reverse order: the annotations take their place last.
    with (
        atomic_write(folder / "annotations.json") as records,
        atomic_write(folder / "images.npy", "wb") as pixels,
    ):
        np.lib.format.write_array_header_1_0(pixels, header)
        writer = _RecordWriter(records, image_size)
        for scene in _scenes(split, images, image_size, seed, settings):
            pixels.write(scene.image.tobytes())
            writer.add(scene)
        writer.close()


class _RecordWriter:
    """Writes COCO annotations as they come, so that memory does not grow with their number."""

    def __init__(self, handle: IO[str], image_size: int) -> None:
        self._handle, self._size = handle, image_size
        self._images = self._annotations = 0
        handle.write('{"annotations": [')

    def add(self, scene: Scene) -> None:
        self._images += 1
        for scene_object in scene.objects:
            separator = ",\n" if self._annotations else "\n"
            self._annotations += 1
            record = annotation_record(scene_object, self._annotations, self._images, self._size)
            self._handle.write(separator + json.dumps(record))

    def close(self) -> None:
        images = ",\n".join(
            json.dumps(
                {
                    "id": index + 1,
                    "file_name": _file_name(index),
                    "width": self._size,
                    "height": self._size,
                }
            )
            for index in range(self._images)
        )
        categories = json.dumps(
            [
                {
                    "id": category.id,
                    "name": category.name,
                    "supercategory": category.name.split()[1],
                }
                for category in CATEGORIES
            ]
        )
        self._handle.write(f'\n],\n"categories": {categories},\n"images": [\n{images}\n],\n')
        self._handle.write('"info": {"description": "ShapeScenes"},\n"licenses": []}\n')


def _read_annotations(truth: dict[str, Any]) -> Annotations:
    builder = AnnotationsBuilder()
    for image in truth["images"]:
        builder.add_image(image["id"], image["file_name"], image["height"], image["width"])
    for record in truth["annotations"]:
        x, y, width, height = record["bbox"]
        builder.add_box(
            record["image_id"] - 1,
            (x, y, x + width, y + height),
            record["category_id"] - 1,
            bool(record["iscrowd"]),
            record["area"],
        )
    return builder.build()


def export_split(
    folder: str | os.PathLike[str],
    split: str,
    images: int,
    image_size: int,
    seed: int = 0,
    settings: SceneSettings = DEFAULT_SETTINGS,
) -> Path:
    """Write a split as a COCO folder: `<split>/*.png`, `annotations/instances_<split>.json`.

    Returns:
        The annotation file, which is written last.

    Raises:
        UserError: the folder cannot be written.
    """
    pictures = ensure_folder(Path(folder) / split)
    path = ensure_folder(Path(folder) / "annotations") / f"instances_{split}.json"
    with atomic_write(path) as records:
        writer = _RecordWriter(records, image_size)
        for index, scene in enumerate(_scenes(split, images, image_size, seed, settings)):
            with atomic_write(pictures / _file_name(index), "wb") as handle:
                Image.fromarray(scene.image).save(handle, format="PNG")
            writer.add(scene)
        writer.close()
    return path
