"""The released detectors here against the TensorFlow Model Garden's, number for number.

    make parity                                     # all of them, at their published sizes
    python -m benchmarks.parity mobile_spinenet_49  # in an environment with tf-models-official

For each detector: seeded weights go into the Model Garden's model, which is saved as its trainer
saves it and converted as a user converts it; then both run on the same images. Exits with 1 if a
difference is over its limit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.model_garden import GardenModel, preprocess
from benchmarks.seeded import (
    detection_differences,
    outputs_by_level,
    relative_difference,
    seeded_images,
    seeded_objects,
    seeded_places,
    training_losses,
)
from effspinenet_lib.data.augment import fit_released
from effspinenet_lib.models.released import convert, create_released
from effspinenet_lib.models.released_specs import RELEASED, ReleasedSpec
from effspinenet_lib.models.retinanet import RetinaNet
from effspinenet_lib.results import write_table

SEED, IMAGES = 2010, 2
TENSOR_LIMIT, PIXEL_LIMIT = 1e-5, 1e-3
PICTURE = (427, 640, 3)  # a size that many of COCO's pictures have
# Four images: batch norms over two values, as P7 of two images has, magnify rounding a hundredfold.
GOLDEN_SIZE, GOLDEN_IMAGES, GOLDEN_VALUES = 128, 4, 1024
OUTPUT = Path("results/parity/parity.csv")


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


def compare(spec: ReleasedSpec) -> Iterator[Row]:
    """Compare one detector at its published size."""
    size = spec.image_size
    garden = GardenModel(spec, size, SEED)
    model = create_released(spec.name, stochastic_depth=0.0).eval()
    with tempfile.TemporaryDirectory() as folder:
        state, _ = convert(garden.save(Path(folder)), spec.name)
    model.load_state_dict(state)
    for quantity, measure, value, limit in measure_differences(model, garden):
        yield Row(spec.name, size, quantity, measure, value, limit)


def measure_differences(
    model: RetinaNet, garden: GardenModel
) -> Iterator[tuple[str, str, float, float]]:
    """Quantity, measure, difference and its limit."""
    size = garden.image_size
    images = seeded_images(IMAGES, size, SEED)
    expected = garden.outputs(images)
    for name, values in outputs_by_level(model, images).items():
        yield name, "relative_l2", relative_difference(values, expected[name]), TENSOR_LIMIT
    found = detection_differences(model, images, expected)
    yield "detections_class", "mismatches", found["class"], 0
    yield "detections_box", "maximum_pixels", found["box"], PIXEL_LIMIT
    yield "detections_score", "maximum_absolute", found["score"], TENSOR_LIMIT
    objects = seeded_objects(IMAGES, size, SEED)
    # In float64 here, so that what is left is TensorFlow's rounding: over a training step of
    # SpineNet-49 that of either framework is half of the limit.
    losses = training_losses(model.double(), images.astype(np.float64), objects)
    for name, loss in garden.losses(images, objects).items():
        yield f"loss_{name}", "relative", abs(losses[name] - loss) / loss, TENSOR_LIMIT
    picture = np.random.default_rng(SEED).integers(0, 256, PICTURE, dtype=np.uint8)
    fitted = fit_released(picture, size)[0].numpy()
    difference = relative_difference(fitted, preprocess(picture, size))
    yield "input", "relative_l2", difference, TENSOR_LIMIT


def write_golden(spec: ReleasedSpec, folder: Path) -> Path:
    """Write what the Model Garden gives for the seeded weights at a small size.

    The weights, images and objects are drawn by the tests again; of each tensor the values at
    seeded places are kept, and of every variable path, name and shape.
    """
    garden = GardenModel(spec, GOLDEN_SIZE, SEED)
    images = seeded_images(GOLDEN_IMAGES, GOLDEN_SIZE, SEED)
    kept = {}
    for name, values in garden.outputs(images).items():
        kept[name] = values
        if name.startswith(("level_", "class_", "box_")):
            places = seeded_places(name, values.size, GOLDEN_VALUES, SEED)
            kept[name] = values.ravel()[places]
    objects = seeded_objects(GOLDEN_IMAGES, GOLDEN_SIZE, SEED)
    for name, value in garden.losses(images, objects).items():
        kept[f"loss_{name}"] = np.float32(value)
    variables = garden.variables
    kept["variables"] = np.array(
        [
            f"{path} {variable.name.split(':')[0]} {'x'.join(map(str, variable.shape))}"
            for path, variable in sorted(variables.items())
        ]
    )
    path = folder / f"{spec.name}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **kept)
    return path


def print_rows(rows: list[Row]) -> None:
    print(f"{'model':22}{'size':>5}  {'quantity':20}{'measure':18}{'value':>10}{'limit':>9}")
    for row in rows:
        print(
            f"{row.model:22}{row.image_size:5}  {row.quantity:20}{row.measure:18}"
            f"{row.value:10.1e}{row.limit:9.0e}  {'ok' if row.passed else 'FAILED'}"
        )


def record(row: Row) -> dict[str, str]:
    """The row as the schema `parity` has it."""
    cells = {"value": f"{row.value:.3g}", "limit": f"{row.limit:g}"}
    return {**row._asdict(), **cells, "passed": str(row.passed).lower()}


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
    write_table(arguments.output, "parity", map(record, rows))
    print(f"Wrote {arguments.output}")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
