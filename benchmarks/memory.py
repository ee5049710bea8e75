"""Memory of a loading process against the number of images: `python -m benchmarks.memory`.

Annotations of as many images as COCO has and of fewer are generated; all share one small picture,
so that what is measured is the annotations' share. Each row comes from two programs of their own:
the first opens the annotation file for the first time, the second opens it again and lets one
worker load images. The table is CSV. Linux only: it reads what the kernel says of a process.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGE_COUNTS = (100, 1_000, 10_000, 120_000)
BOXES = 7  # an image: COCO train2017 has 7.3
SIDE = 16  # of the picture
# Images that the worker loads: of 120,000 at random so many lie on nearly every page of the arrays.
LOADED, BATCH = 20_000, 50
NAME = f"{0:012d}.png"  # as long as COCO's names
MIB = 2**20

_OPEN = """
import json, resource, sys, time
from effspinenet_lib.data import Augmentation, DataConfig, open_dataset, training_loader

def opened():
    began = time.perf_counter()
    dataset = open_dataset(DataConfig("coco", sys.argv[1], "train2017"), "train")
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dataset, {"seconds": seconds, "peak": peak}
"""
_FIRST = _OPEN + "print(json.dumps(opened()[1]))\n"
_AGAIN = (
    _OPEN
    + """
import psutil

dataset, facts = opened()
steps, batch = int(sys.argv[2]), int(sys.argv[3])
plan = training_loader(dataset, 16, batch, Augmentation((0.5, 2.0), 0.5), 0, 0, steps, 1)
for step, _ in enumerate(plan, start=1):
    if step in (steps // 10, steps - 2):  # at the very end the worker is gone
        (worker,) = psutil.Process().children()
        memory = worker.memory_full_info()
        facts["early" if step < steps - 2 else "late"] = [memory.rss, memory.pss, memory.uss]
print(json.dumps(facts))
"""
)


def measure(images: int) -> dict[str, Any]:
    """One row: sizes in MiB, times in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        annotations = _write(root, images)
        steps = LOADED // BATCH
        environment = {
            **os.environ,
            "EFFSPINENET_CACHE": str(Path(folder) / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        runs = [
            subprocess.run(
                [sys.executable, "-c", program, str(root), str(steps), str(BATCH)],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            for program in (_FIRST, _AGAIN)
        ]
    first, again = (json.loads(run.stdout) for run in runs)
    row = {
        "images": images,
        "annotations": images * BOXES,
        "file_mib": annotations / MIB,
        "first_open_seconds": first["seconds"],
        "first_open_peak_mib": first["peak"] / MIB,
        "next_open_seconds": again["seconds"],
        "next_open_peak_mib": again["peak"] / MIB,
    }
    for kind, index in (("rss", 0), ("pss", 1), ("uss", 2)):
        row[f"worker_{kind}_mib"] = again["late"][index] / MIB
        row[f"worker_{kind}_growth_mib"] = (again["late"][index] - again["early"][index]) / MIB
    return row


def _write(root: Path, images: int) -> int:
    """Write a data folder; the bytes of its annotation file."""
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(picture).save(root / "train2017" / NAME)
    outline = generator.uniform(0, SIDE, 60).round(2).tolist()
    path = root / "annotations" / "instances_train2017.json"
    with open(path, "w") as handle:
        handle.write('{"categories": [{"id": 1, "name": "thing"}], "images": [')
        entries = (
            {"id": n, "file_name": NAME, "width": SIDE, "height": SIDE} for n in range(images)
        )
        handle.write(",".join(map(json.dumps, entries)) + '], "annotations": [')
        for number in range(images * BOXES):
            x, y, width, height = generator.uniform(1, SIDE / 2, 4).round(2).tolist()
            record = {
                "id": number + 1,
                "image_id": number // BOXES,
                "category_id": 1,
                "bbox": [x, y, width, height],
                "area": round(width * height, 2),
                "segmentation": [outline],
            }
            handle.write(("," if number else "") + json.dumps(record))
        handle.write("]}")
    return path.stat().st_size


def main() -> None:
    """Print the table, a row as soon as it is measured; about five minutes on a free core."""
    writer = None
    for images in IMAGE_COUNTS:
        row = measure(images)
        if writer is None:
            writer = csv.DictWriter(sys.stdout, list(row))
            writer.writeheader()
        writer.writerow(
            {name: f"{v:.1f}" if isinstance(v, float) else v for name, v in row.items()}
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
