"""The released detectors here against the TensorFlow Model Garden's, number for number.

    make parity                                     # all of them, at their published sizes
    python -m benchmarks.parity mobile_spinenet_49  # in an environment with tf-models-official

For each detector: seeded weights go into the Model Garden's model, which is saved as its trainer
saves it and converted as a user converts it; then both run on the same images. Exits with 1 if a
difference is over its limit.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.model_garden import LEVELS, GardenModel, preprocess
from effspinenet_lib.data.released import fit_released
from effspinenet_lib.files import atomic_write
from effspinenet_lib.released.convert import create_released, read_released
from effspinenet_lib.released.seeded import seeded_images
from effspinenet_lib.released_specs import RELEASED, ReleasedSpec
from effspinenet_lib.tasks.detection import RetinaNet

SEED = 2010
IMAGES = 2
OBJECTS = 7  # an image in the training step
RELATIVE_LIMIT, PIXEL_LIMIT = 1e-5, 1e-3
OUTPUT = Path("results/parity/parity.csv")
COLUMNS = ("model", "image_size", "quantity", "measure", "value", "limit", "passed")
GOLDEN_SIZE = 128
GOLDEN_VALUES = 1024  # of each tensor, drawn from the seed


class Row(NamedTuple):
    """One comparison; `value` must not exceed `limit`."""

    model: str
    image_size: int
    quantity: str
    measure: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return bool(self.value <= self.limit)


def relative(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """L2 norm of the difference over that of the expected values."""
    if ours.shape != theirs.shape:
        return float("inf")
    expected = theirs.astype(np.float64)
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def network_outputs(model: RetinaNet, images: torch.Tensor) -> dict[str, NDArray[Any]]:
    """Levels and head outputs by level, as `GardenModel.outputs` names them."""
    features = list(model.backbone(images).values())
    arrays = {}
    for number, (name, lateral) in enumerate(zip(LEVELS, model.lateral, strict=True)):
        level = lateral(features[number])
        arrays[f"level_{name}"] = level.numpy()
        for head, branch, width in (
            ("class", model.class_head, model.logits),
            ("box", model.box_head, 4),
        ):
            output = branch(level, number).permute(0, 2, 3, 1)
            arrays[f"{head}_{name}"] = output.reshape(len(images), -1, width).numpy()
    return arrays


def compare_outputs(
    model: RetinaNet, garden: GardenModel
) -> Iterator[tuple[str, str, float, float]]:
    pixels = seeded_images(IMAGES, garden.image_size, SEED)
    images = torch.from_numpy(pixels)
    expected = garden.outputs(pixels)
    with torch.inference_mode():
        for name, values in network_outputs(model, images).items():
            yield name, "relative_l2", relative(values, expected[name]), RELATIVE_LIMIT
        found = model(images)
    counts = [len(one["scores"]) for one in found]
    wrong = int(counts != expected["count"].tolist())
    boxes = scores = 0.0
    for one, count, box, score, label in zip(
        found, counts, *(expected[name] for name in ("boxes", "scores", "labels")), strict=True
    ):
        if not wrong:
            wrong += int((one["labels"].numpy() != label[:count]).sum())
            boxes = max(boxes, float(np.abs(one["boxes"].numpy() - box[:count]).max()))
            scores = max(scores, float(np.abs(one["scores"].numpy() - score[:count]).max()))
    yield "detections_class", "mismatches", wrong, 0
    yield "detections_box", "maximum_pixels", boxes, PIXEL_LIMIT
    yield "detections_score", "maximum_absolute", scores, RELATIVE_LIMIT


def training_step(image_size: int) -> tuple[list[NDArray[np.float32]], list[NDArray[np.int64]]]:
    """Seeded boxes x1 y1 x2 y2 of all sizes, and labels, of `IMAGES` images."""
    boxes, labels = [], []
    for image in range(IMAGES):
        generator = np.random.default_rng([SEED, image])
        sides = image_size * np.exp(generator.uniform(np.log(0.05), np.log(0.9), (OBJECTS, 2)))
        corners = generator.random((OBJECTS, 2)) * (image_size - sides)
        boxes.append(np.concatenate([corners, corners + sides], 1).astype(np.float32))
        labels.append(generator.integers(0, 90, OBJECTS))
    return boxes, labels


def model_losses(model: RetinaNet, pixels: NDArray[np.float32], objects: Any) -> dict[str, float]:
    """Losses of one training step without stochastic depth."""
    targets = [
        {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}
        for boxes, labels in zip(*objects, strict=True)
    ]
    model.train()
    with torch.no_grad():
        losses: Any = model(torch.from_numpy(pixels), targets)
    model.eval()
    return {name: float(loss) for name, loss in losses.items()}


def compare(spec: ReleasedSpec) -> Iterator[Row]:
    size = spec.image_size
    garden = GardenModel(spec, size, SEED)
    with tempfile.TemporaryDirectory() as folder:
        garden.save(Path(folder))
        state = read_released(Path(folder), spec.name)
    model = create_released(spec.name, stochastic_depth=0.0).eval()
    model.load_state_dict(state)
    for row in compare_outputs(model, garden):
        yield Row(spec.name, size, *row)
    objects = training_step(size)
    pixels = seeded_images(IMAGES, size, SEED)
    losses = model_losses(model, pixels, objects)
    for name, expected in garden.losses(pixels, *objects).items():
        difference = abs(losses[name] - expected) / expected
        yield Row(spec.name, size, f"loss_{name}", "relative", difference, RELATIVE_LIMIT)
    picture = np.random.default_rng(SEED).integers(0, 256, (427, 640, 3), dtype=np.uint8)
    fitted = fit_released(picture, size)[0].numpy()
    error = relative(fitted, preprocess(picture, size))
    yield Row(spec.name, size, "input", "relative_l2", error, RELATIVE_LIMIT)


def write_golden(spec: ReleasedSpec, folder: Path) -> Path:
    """Write what the Model Garden gives for the seeded weights at a small size.

    The weights, images and objects are drawn anew by the tests; of each tensor the values at
    seeded places are kept.
    """
    garden = GardenModel(spec, GOLDEN_SIZE, SEED)
    pixels = seeded_images(IMAGES, GOLDEN_SIZE, SEED)
    kept = {}
    for name, values in garden.outputs(pixels).items():
        kept[name] = values
        if name.startswith(("level", "class", "box_")):
            kept[name] = values.ravel()[golden_places(name, values.size)]
    losses = garden.losses(pixels, *training_step(GOLDEN_SIZE))
    kept.update({f"loss_{name}": np.float32(value) for name, value in losses.items()})
    path = folder / f"{spec.name}.npz"
    np.savez_compressed(path, **kept)
    return path


def golden_places(name: str, size: int) -> NDArray[np.int64]:
    """Places in a flat tensor whose values are kept; those of a large one are drawn."""
    if size <= GOLDEN_VALUES:
        return np.arange(size)
    generator = np.random.default_rng([SEED, *name.encode()])
    return np.sort((generator.random(GOLDEN_VALUES) * size).astype(np.int64))


def print_rows(rows: list[Row]) -> None:
    print(f"{'model':22}{'size':>5}  {'quantity':20}{'measure':18}{'value':>10}{'limit':>9}")
    for row in rows:
        print(
            f"{row.model:22}{row.image_size:5}  {row.quantity:20}{row.measure:18}"
            f"{row.value:10.1e}{row.limit:9.0e}  {'ok' if row.passed else 'FAILED'}"
        )


def write_rows(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            values = (f"{row.value:.3g}", f"{row.limit:g}", str(row.passed).lower())
            writer.writerow((*row[:4], *values))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[[], *RELEASED], help="default: all")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"CSV file ({OUTPUT})")
    parser.add_argument("--golden", type=Path, metavar="FOLDER", help="write golden outputs")
    arguments = parser.parse_args()
    specs = [RELEASED[name] for name in arguments.models or RELEASED]
    if arguments.golden:
        for spec in specs:
            print(write_golden(spec, arguments.golden))
        return 0
    rows: list[Row] = []
    for spec in specs:
        start = time.perf_counter()
        rows += compare(spec)
        print(f"{spec.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print_rows(rows)
    write_rows(rows, arguments.output)
    print(f"Wrote {arguments.output}")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
