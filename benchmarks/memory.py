"""Memory of a loader worker against the number of images.

Annotations of as many images as COCO has and of fewer are generated; all share one small picture,
so that what is measured is the annotations' share. Each count of images takes two programs: the
first opens the annotation file for the first time, the second opens it again and lets one worker
load images for two epochs, or `LOADED` images where these are more. Linux only: it reads what the
kernel says of a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.record import Figure

IMAGE_COUNTS, QUICK_COUNTS = (1_000, 10_000, 120_000), (1_000,)
BOXES = 7  # an image: COCO train2017 has 7.3
SIDE = 16  # of the picture
# Images that the worker loads: of 120,000 at random so many lie on nearly every page of the arrays.
LOADED, BATCH = 20_000, 50
EPOCHS = 2
NAME = f"{0:012d}.png"  # as long as COCO's names
MIB = 2**20

# The peak is the kernel's "high water mark"; `ru_maxrss` would count the program that started this.
_OPEN = """
import json, sys
from pathlib import Path
from effspinenet_lib.data import DataConfig, open_dataset
from effspinenet_lib.data.augment import Augmentation
from effspinenet_lib.data.loader import training_loader

def opened():
    dataset = open_dataset(DataConfig("coco", sys.argv[1], "train2017"), "train")
    status = Path("/proc/self/status").read_text()
    return dataset, {"peak": int(status.split("VmHWM:")[1].split()[0]) * 1024}
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
    if step in (steps // 2, steps - 2):  # at the very end the worker is gone
        (worker,) = psutil.Process().children()
        memory = worker.memory_full_info()
        facts["early" if step < steps - 2 else "late"] = [memory.rss, memory.pss, memory.uss]
print(json.dumps(facts))
"""
)


def memory(rounds: int, quick: bool) -> Iterator[Figure]:
    """Resident memory of a loader worker, and of opening an annotation file; Linux only."""
    del rounds
    if sys.platform != "linux":
        return
    for images in QUICK_COUNTS if quick else IMAGE_COUNTS:
        steps = max(LOADED, EPOCHS * images) // BATCH
        settings = f"{images:,} images, {images * BOXES:,} annotations"
        first, again = _measure(images, steps)
        resident, shared, own = (value / MIB for value in again["late"])
        figures = {
            "memory of a loading worker, resident": resident,
            "memory of a loading worker, its share of what is shared": shared,
            "memory of a loading worker, its own alone": own,
            "growth of a worker's resident memory over the second half": (
                resident - again["early"][0] / MIB
            ),
            "peak of opening an annotation file for the first time": first["peak"] / MIB,
            "peak of opening it again": again["peak"] / MIB,
        }
        for what, value in figures.items():
            yield Figure("memory", what, f"{settings}, {steps * BATCH:,} loaded", value, "MiB")


def _measure(images: int, steps: int) -> list[dict[str, Any]]:
    """What the two programs say."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        _write(root, images)
        environment = {
            **os.environ,
            "EFFSPINENET_CACHE": str(Path(folder) / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        runs = [
            subprocess.run(
                [sys.executable, "-c", program, str(root), str(steps), str(BATCH)],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            for program in (_FIRST, _AGAIN)
        ]
    return [json.loads(run.stdout) for run in runs]


def _write(root: Path, images: int) -> None:
    """Write a data folder."""
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
