"""ShapeScenes: scenes of textured shapes, made from a seed, and the data set of them.

Six classes, each one shape with one texture, chosen so that every shape and every texture
occurs in two classes: neither alone tells the class. Colours carry no information. Unlabelled
distractors show the shapes and textures in the combinations that are no class. ShapeGrid, for
classification, has the same drawing with every combination as a class.

A split is made once, kept in the cache, memory-mapped, and exportable as a COCO folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm.auto import tqdm

from effspinenet_lib.data.dataset import (
    SEMANTIC_IGNORE,
    Annotations,
    Category,
    Dataset,
    RunLengths,
    encode_mask,
)
from effspinenet_lib.data.folders import cache_lock
from effspinenet_lib.data.rendering import (
    ANGLES,
    SHAPES,
    SUBPIXELS,
    TEXTURES,
    Colour,
    Draws,
    Patch,
    draw,
    smooth_field,
)
from effspinenet_lib.files import atomic_write, cache_folder, ensure_folder, read_json

T = TypeVar("T")
# Raise it with every change to the drawing below: cached scenes of another version are not used.
VERSION = 2

CLASSES: tuple[tuple[str, str], ...] = (
    ("plain", "disc"),
    ("striped", "disc"),
    ("striped", "triangle"),
    ("dotted", "triangle"),
    ("dotted", "cross"),
    ("plain", "cross"),
)

# Larger canvases overflow the int32 products of the rasteriser.
MAX_IMAGE_SIZE = 512


@dataclass(frozen=True)
class SceneSettings:
    """How hard the scenes are. All our choice, tuned on small models.

    Pairs are ranges with both ends included. Lengths in permille are of the image's side; the
    side of an object is the square root of its area.
    """

    objects: tuple[int, int] = (1, 5)
    small_side: tuple[int, int] = (125, 230)
    medium_side: tuple[int, int] = (235, 550)
    large_side: tuple[int, int] = (680, 800)
    size_weights: tuple[int, int, int] = (46, 33, 21)
    most_large: int = 1
    distractors: tuple[int, int] = (0, 1)
    distractor_near_class_permille: int = 300
    clutter: tuple[int, int] = (2, 7)
    clutter_side: tuple[int, int] = (20, 120)
    crowd_permille: int = 40
    crowd_members: tuple[int, int] = (6, 12)
    crowd_member_side: tuple[int, int] = (45, 65)
    crowd_spread: int = 140
    out_of_order_permille: int = 250
    placement_tries: int = 4
    covered_percent: int = 12
    texture_cycles_tenths: tuple[int, int] = (15, 28)
    texture_shortest_period: int = 8
    texture_contrast: tuple[int, int] = (100, 180)
    object_contrast: tuple[int, int] = (60, 130)
    background_cells: int = 5
    background_range: tuple[int, int] = (50, 205)
    lighting_percent: tuple[int, int] = (60, 115)
    contrast_percent: tuple[int, int] = (80, 110)
    noise: tuple[int, int] = (3, 12)
    visible_percent: int = 25
    visible_pixels: int = 20


@dataclass(frozen=True)
class SceneObject:
    """One annotated object.

    Attributes:
        label: index into `CATEGORIES`.
        box: x, y, width, height in pixels, tight around the visible mask.
        iscrowd: a group of tiny objects of one class.
        counts: the visible mask as COCO's compressed run-length counts.
    """

    label: int
    box: tuple[int, int, int, int]
    iscrowd: bool
    counts: str

    @property
    def area(self) -> int:
        """The box's area in pixels.

        Not the mask's: in a 128-pixel image a mask larger than 96 x 96 would have to fill most of
        the image, so that COCO's large objects would hardly occur.
        """
        return self.box[2] * self.box[3]


@dataclass(frozen=True)
class Scene:
    """An image uint8 [S, S, 3], its objects, and semantic labels uint8 [S, S].

    Semantic labels are 0 for the background, else category ids; 255 marks objects that are too
    hidden to be annotated.
    """

    image: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    semantic: NDArray[np.uint8]

    def masks(self) -> NDArray[np.bool_]:
        """The visible masks of the objects, [M, S, S]."""
        size = list(self.semantic.shape)
        masks = [coco_mask.decode({"size": size, "counts": o.counts}) for o in self.objects]
        return np.asarray(masks, np.bool_).reshape(-1, *size)


@dataclass
class _Item:
    """Something to draw: one patch, or many for a crowd. `label` is None where unlabelled."""

    label: int | None
    texture: str
    shape: str
    side: int
    iscrowd: bool = False


@dataclass(frozen=True)
class SceneKind:
    """Scenes of one set of classes.

    Attributes:
        name: for people.
        classes: the texture and shape of each.
        settings: how hard they are.
    """

    name: str
    classes: tuple[tuple[str, str], ...]
    settings: SceneSettings

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes with ids from 1."""
        names = (f"{texture} {shape}" for texture, shape in self.classes)
        return tuple(Category(number, name) for number, name in enumerate(names, start=1))

    @property
    def near_classes(self) -> tuple[tuple[str, str], ...]:
        """Textures and shapes of which each occurs in a class, but not both in one."""
        looks = ((texture, shape) for texture in TEXTURES for shape in self.class_shapes)
        return tuple(look for look in looks if look not in self.classes)

    @property
    def class_shapes(self) -> tuple[str, ...]:
        """The shapes of the classes."""
        return tuple(dict.fromkeys(shape for _, shape in self.classes))

    @property
    def other_shapes(self) -> tuple[str, ...]:
        """Shapes that no class has."""
        return tuple(shape for shape in SHAPES if shape not in self.class_shapes)

    def key(self) -> str:
        """What besides seed, split and size decides the bytes: the version and the settings."""
        return f"v{VERSION}-{_digest(asdict(self.settings))}"


SHAPESCENES, SHAPEGRID = "shapescenes", "shapegrid"
KINDS: dict[str, SceneKind] = {
    SHAPESCENES: SceneKind("ShapeScenes", CLASSES, SceneSettings()),
    # Every look is a class, so nothing can be drawn that is none.
    SHAPEGRID: SceneKind(
        "ShapeGrid",
        tuple((texture, shape) for shape in SHAPES for texture in TEXTURES),
        SceneSettings(distractors=(0, 0), clutter=(0, 0), crowd_permille=0),
    ),
}
CATEGORIES = KINDS[SHAPESCENES].categories


def render_scene(kind: SceneKind, seed: int, split: str, index: int, size: int) -> Scene:
    """Draw scene `index` of a split; a pure function of its arguments, in bytes too."""
    return _Painter(kind, Draws(seed, crc32(split.encode()), index), size).paint()


class _Painter:
    """Draws one scene. The order of the random draws is part of the bytes of a version.

    Attributes:
        canvas: the image so far, int16 [S, S, 3].
        owner: the number of the item that each pixel shows, uint8 [S, S]; 0 for the background.
    """

    def __init__(self, kind: SceneKind, draws: Draws, size: int) -> None:
        self.kind, self.settings, self.draws, self.size = kind, kind.settings, draws, size
        settings = self.settings
        low, high = settings.background_range
        cells = settings.background_cells
        grid = draws.octets(cells * cells * 3).reshape(cells, cells, 3).astype(np.int32)
        self.canvas = smooth_field((low + grid * (high - low) // 255).astype(np.uint8), size)
        self.owner = np.zeros((size, size), np.uint8)

    def paint(self) -> Scene:
        for _ in range(self.draws.integer(*self.settings.clutter)):
            texture, shape = self._one_of(tuple(TEXTURES)), self._one_of(self.kind.other_shapes)
            self._place(_Item(None, texture, shape, self._length(self.settings.clutter_side)), 0)
        items = self._items()
        wholes = [
            self._draw_crowd(item, number) if item.iscrowd else self._place(item, number)
            for number, item in enumerate(items, start=1)
        ]
        objects, semantic = self._annotate(items, wholes)
        return Scene(self._expose(), objects, semantic)

    def _one_of(self, options: Sequence[T]) -> T:
        return options[self.draws.integer(0, len(options) - 1)]

    def _subpixels(self, permille: int) -> int:
        """A length in permille of the side, in subpixels."""
        return permille * self.size * SUBPIXELS // 1000

    def _length(self, permille: tuple[int, int]) -> int:
        return self._subpixels(self.draws.integer(*permille))

    def _items(self) -> list[_Item]:
        draws, settings, classes = self.draws, self.settings, self.kind.classes
        ranges = (settings.small_side, settings.medium_side, settings.large_side)
        labels = range(len(classes))
        items, large = [], 0
        for _ in range(draws.integer(*settings.objects)):
            label = self._one_of(labels)
            size = draws.choice(3 if large < settings.most_large else 2, settings.size_weights)
            large += size == 2
            items.append(_Item(label, *classes[label], self._length(ranges[size])))
        for _ in range(draws.integer(*settings.distractors)):
            if draws.chance(settings.distractor_near_class_permille):
                look = self._one_of(self.kind.near_classes)
            else:
                look = self._one_of(tuple(TEXTURES)), self._one_of(self.kind.other_shapes)
            size = draws.choice(2, settings.size_weights)
            items.append(_Item(None, *look, self._length(ranges[size])))
        if draws.chance(settings.crowd_permille):
            label = self._one_of(labels)
            items.append(_Item(label, *classes[label], 0, iscrowd=True))
        # Large ones behind, with exceptions, so that occlusion happens and small ones survive it.
        order = []
        for item in items:
            later = self._length((0, settings.large_side[1]))
            order.append(later if draws.chance(settings.out_of_order_permille) else item.side)
        return [items[i] for i in sorted(range(len(items)), key=lambda i: (-order[i], i))]

    def _contrasting(self, reference: Colour, contrast: tuple[int, int]) -> Colour:
        """A colour that differs from `reference` by an amount of `contrast` in every channel.

        All channels move the same way where they can, so that the luminance differs too.
        """
        brighter = sum(reference) < 3 * 128
        if 3 * 96 < sum(reference) < 3 * 160:
            brighter = self.draws.chance(500)
        sign = 1 if brighter else -1
        values = []
        for value in reference:
            step = sign * self.draws.integer(*contrast)
            values.append(value + step if 0 <= value + step <= 255 else value - step)
        red, green, blue = (min(255, max(0, value)) for value in values)
        return red, green, blue

    def _draw(self, item: _Item, number: int, side: int, x: int, y: int) -> int:
        """Draw one patch of an item around a point; how many pixels it covers."""
        draws, settings = self.draws, self.settings
        row, column = (min(self.size - 1, max(0, place // SUBPIXELS)) for place in (y, x))
        red, green, blue = self.canvas[row, column].tolist()
        main = self._contrasting((red, green, blue), settings.object_contrast)
        cycles = draws.integer(*settings.texture_cycles_tenths)
        patch = Patch(
            shape=item.shape,
            texture=item.texture,
            side=side,
            x=x,
            y=y,
            angle=draws.integer(0, ANGLES - 1),
            texture_angle=draws.integer(0, ANGLES - 1),
            period=max(settings.texture_shortest_period * SUBPIXELS, 10 * side // cycles),
            colours=(main, self._contrasting(main, settings.texture_contrast)),
        )
        drawn = draw(self.canvas, patch)
        if number:
            self.owner[drawn.rows, drawn.columns][drawn.mask] = number
        return int(np.count_nonzero(drawn.mask))

    def _place(self, item: _Item, number: int) -> int:
        """Draw a single item, labelled ones where few others lie if a few tries find a place."""
        # At most about a third of the radius sticks out of the image.
        middle = self.size * SUBPIXELS // 2
        margin = min(item.side * 2 // 5, middle - middle // 8)
        half = item.side // 2 // SUBPIXELS
        for _ in range(self.settings.placement_tries):
            x = self.draws.integer(margin, 2 * middle - margin)
            y = self.draws.integer(margin, 2 * middle - margin)
            row, column = y // SUBPIXELS, x // SUBPIXELS
            rows = slice(max(0, row - half), row + half + 1)
            near = self.owner[rows, max(0, column - half) : column + half + 1]
            if np.count_nonzero(near) * 100 <= self.settings.covered_percent * near.size:
                break
        return self._draw(item, number, item.side, x, y)

    def _draw_crowd(self, item: _Item, number: int) -> int:
        """Draw the members of a crowd; 0, since they overlap and their share does not count."""
        spread = self._subpixels(self.settings.crowd_spread)
        x, y = (self.draws.integer(spread, self.size * SUBPIXELS - spread) for _ in range(2))
        for _ in range(self.draws.integer(*self.settings.crowd_members)):
            left, top = (place + self.draws.integer(-spread, spread) for place in (x, y))
            self._draw(item, number, self._length(self.settings.crowd_member_side), left, top)
        return 0

    def _annotate(
        self, items: list[_Item], wholes: list[int]
    ) -> tuple[tuple[SceneObject, ...], NDArray[np.uint8]]:
        """The objects that are visible enough, and the semantic labels."""
        objects: list[SceneObject] = []
        semantic_of = np.zeros(len(items) + 1, np.uint8)
        for number, (item, whole) in enumerate(zip(items, wholes, strict=True), start=1):
            if item.label is None:
                continue
            visible = self.owner == number
            pixels = int(np.count_nonzero(visible))
            hidden = pixels * 100 < whole * self.settings.visible_percent
            if hidden or pixels < self.settings.visible_pixels:
                semantic_of[number] = SEMANTIC_IGNORE
                continue
            semantic_of[number] = item.label + 1
            rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
            left, top = int(columns[0]), int(rows[0])
            box = (left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top)
            objects.append(SceneObject(item.label, box, item.iscrowd, encode_mask(visible)))
        return tuple(objects), semantic_of[self.owner]

    def _expose(self) -> NDArray[np.uint8]:
        """Light the scene unevenly, change its contrast, add sensor noise."""
        draws, settings, canvas = self.draws, self.settings, self.canvas
        corners = [draws.integer(*settings.lighting_percent) for _ in range(4)]
        light = smooth_field(np.asarray(corners, np.uint8).reshape(2, 2, 1), self.size)
        contrast = draws.integer(*settings.contrast_percent)
        lit = (canvas * light.astype(np.int32) // 100 - 128) * contrast // 100 + 128
        amplitude = draws.integer(*settings.noise)
        grain = draws.octets(2 * canvas.size).reshape(2, *canvas.shape).astype(np.int32)
        # The sum of two uniform bytes is close enough to a bell curve.
        lit += (grain[0] + grain[1] - 255) * amplitude // 256
        return np.clip(lit, 0, 255).astype(np.uint8)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _file_name(index: int) -> str:
    return f"{index:06d}.png"


class ShapeScenes(Dataset):
    """A split of a kind of scenes in the cache.

    Image i has the id i + 1. A longer split of the same seed starts with the same images.
    """

    def __init__(
        self, split: str, images: int, image_size: int, seed: int = 0, kind: str = SHAPESCENES
    ) -> None:
        """Open the split; make it first if it is not in the cache.

        Raises:
            UserError: the cache folder cannot be written.
        """
        self.kind, self.split, self.image_size, self.seed = KINDS[kind], split, image_size, seed
        key = _digest([self.kind.key(), split, images, image_size, seed])
        name = f"{split}-{images}-{image_size}px-{key}"
        self.folder = cache_folder() / kind / name
        self._arrays: dict[str, NDArray[np.uint8]] = {}  # memory-mapped, opened on first use
        # The annotations are written last: where they exist, the images are complete.
        files = [self.folder / "images.npy", self.folder / "annotations.json"]
        if not all(path.exists() for path in files):
            with cache_lock(self.folder):
                if not all(path.exists() for path in files):
                    self._make(images)
        super().__init__(
            f"{self.kind.name} {split}",
            self.kind.categories,
            Annotations.from_coco(read_json(self.folder / "annotations.json")),
        )

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as a copy of all images; workers map the file again.
        return {**self.__dict__, "_arrays": {}}

    def _make(self, images: int) -> None:
        ensure_folder(self.folder)
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        scenes, objects = _progress(f"{self.kind.name} {self.split}", range(images)), []
        with _npy(self.folder / "images.npy", images, self.image_size, 3) as pixels:
            for index in scenes:
                scene = self.scene(index)
                pixels.write(scene.image.tobytes())
                objects.append(scene.objects)
        with atomic_write(self.folder / "annotations.json") as handle:
            handle.write(annotations_json(objects, self.image_size, self.kind))

    def _array(self, name: str) -> NDArray[np.uint8]:
        if name not in self._arrays:
            self._arrays[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._arrays[name]

    def load_image(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as uint8 [S, S, 3], RGB."""
        return np.array(self._array("images")[index])

    def prepare(self, task: str) -> None:
        """Make the semantic labels if the cache lacks them; masks are in the annotations."""
        path = self.folder / "semantic.npy"
        if task != "segmentation":
            super().prepare(task)
        elif not path.exists():
            with cache_lock(self.folder):
                if path.exists():
                    return
                with _npy(path, len(self), self.image_size) as labels:
                    for index in _progress(f"{self.name}, labels", range(len(self))):
                        labels.write(self.scene(index).semantic.tobytes())

    def semantic(self, index: int) -> NDArray[np.uint8]:
        """The semantic labels of image `index`, [S, S]; 255: objects too hidden to be annotated."""
        self.prepare("segmentation")
        return np.array(self._array("semantic")[index])

    def scene(self, index: int) -> Scene:
        """Scene `index` drawn again, with masks and semantic labels; objects as in `load`."""
        return render_scene(self.kind, self.seed, self.split, index, self.image_size)

    def _read_masks(self) -> RunLengths:
        return RunLengths.from_coco(read_json(self.folder / "annotations.json"))


def _progress(title: str, indices: Iterable[int]) -> Iterable[int]:
    return tqdm(indices, desc=title, unit="image", disable=None)


@contextmanager
def _npy(path: Path, images: int, side: int, *channels: int) -> Iterator[IO[bytes]]:
    """A .npy file of uint8 [images, side, side, *channels], to write the images to in order."""
    shape = (images, side, side, *channels)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with atomic_write(path, "wb") as handle:
        np.lib.format.write_array_header_1_0(handle, header)
        yield handle


def annotations_json(
    scenes: Sequence[Sequence[SceneObject]], image_size: int, kind: SceneKind
) -> str:
    """The COCO annotation file of scenes, given their objects; part of the bytes of a version."""
    objects = [(image, one) for image, found in enumerate(scenes, start=1) for one in found]
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": one.label + 1,
            "bbox": list(one.box),
            "area": one.area,
            "iscrowd": int(one.iscrowd),
            "segmentation": {"size": [image_size, image_size], "counts": one.counts},
        }
        for number, (image, one) in enumerate(objects, start=1)
    ]
    images = [
        {"id": index + 1, "file_name": _file_name(index), "width": image_size, "height": image_size}
        for index in range(len(scenes))
    ]
    categories = [
        {"id": c.id, "name": c.name, "supercategory": c.name.split()[1]} for c in kind.categories
    ]
    records = ",\n".join(map(json.dumps, annotations))
    return (
        '{"annotations": [' + (f"\n{records}" if records else "") + "\n],\n"
        f'"categories": {json.dumps(categories)},\n'
        '"images": [\n' + ",\n".join(map(json.dumps, images)) + "\n],\n"
        f'"info": {{"description": "{kind.name}"}},\n"licenses": []}}\n'
    )


def export_split(
    folder: str | os.PathLike[str],
    split: str,
    images: int,
    image_size: int,
    seed: int = 0,
    kind: str = SHAPESCENES,
) -> Path:
    """Write a split as a COCO folder: `<split>/*.png`, `annotations/instances_<split>.json`.

    Returns:
        The annotation file, which is written last.

    Raises:
        UserError: the folder cannot be written.
    """
    pictures = ensure_folder(Path(folder) / split)
    path = ensure_folder(Path(folder) / "annotations") / f"instances_{split}.json"
    objects = []
    for index in _progress(f"{KINDS[kind].name} {split}", range(images)):
        scene = render_scene(KINDS[kind], seed, split, index, image_size)
        with atomic_write(pictures / _file_name(index), "wb") as handle:
            Image.fromarray(scene.image).save(handle, format="PNG")
        objects.append(scene.objects)
    with atomic_write(path) as records:
        records.write(annotations_json(objects, image_size, KINDS[kind]))
    return path
