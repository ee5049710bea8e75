"""The input pipeline against what a model consumes, and against torchvision's transforms."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from benchmarks.models import PROXY_BATCH, PROXY_SIZE, Setting, our_step, proxy_step
from benchmarks.pairs import compare, time_in_turn
from benchmarks.record import Figure, ratio_figure
from effspinenet_lib.data import DataConfig, open_dataset
from effspinenet_lib.data.augment import MEAN, STD, Augmentation
from effspinenet_lib.data.loader import training_loader

# Pictures of COCO's usual size, and about as large as its files (160 kB).
PICTURES, HEIGHT, WIDTH, OBJECTS, QUALITY = 32, 480, 640, 7, 90
GRAIN = 12  # of the noise that stands for a photograph's detail, grey levels
JITTER = (0.1, 2.0)  # paper 5.1.1
BATCH, SIZE = 4, 512
SPLIT = "train2017"
CATEGORIES = 80


def loading(rounds: int, quick: bool) -> Iterator[Figure]:
    """One loader worker: its time an image beside that of a training step, on one thread."""
    del quick
    with tempfile.TemporaryDirectory() as folder:
        _write_pictures(Path(folder))
        steps = {
            "Eff-SpineNet-D0": (our_step(Setting(SIZE, BATCH), "bfloat16"), SIZE, BATCH),
            "Eff-SpineNet-M0": (
                proxy_step(Setting(PROXY_SIZE, PROXY_BATCH)),
                PROXY_SIZE,
                PROXY_BATCH,
            ),
        }
        for name, (step, size, batch) in steps.items():
            times = time_in_turn({"loader": _loader(folder, size, batch), "model": step}, rounds)
            yield ratio_figure(
                "loading",
                f"one loading process against the training of {name}",
                f"JPEG {HEIGHT}x{WIDTH} to {size}x{size}, bfloat16, batch {batch}",
                compare(times["loader"], times["model"]),
                1.0,
            )
        times = time_in_turn(
            {"ours": _loader(folder, SIZE, BATCH), "torchvision": _torchvision(folder)}, rounds
        )
        yield ratio_figure(
            "loading",
            "loading against torchvision's reference transforms with large scale jitter",
            f"JPEG {HEIGHT}x{WIDTH} to {SIZE}x{SIZE}, batch {BATCH}",
            compare(times["ours"], times["torchvision"]),
        )
        yield Figure(
            "loading",
            "images a loading process gives",
            f"JPEG {HEIGHT}x{WIDTH} to {SIZE}x{SIZE}",
            BATCH / statistics.median(times["ours"]),
            "images/s",
        )


def _loader(folder: str, size: int, batch: int) -> Callable[[], object]:
    """Batch after batch as a run gets them, made in this process."""
    dataset = open_dataset(DataConfig("coco", folder, SPLIT), "train")
    batches = iter(
        training_loader(dataset, size, batch, Augmentation(JITTER, 0.5), 0, 0, 10**6, workers=0)
    )
    return lambda: next(batches)


def _torchvision(folder: str) -> Callable[[], object]:
    """The same pictures by the transforms of torchvision's detection reference, preset `lsj`."""
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ScaleJitter((SIZE, SIZE), JITTER, antialias=True),
            v2.RandomCrop((SIZE, SIZE), pad_if_needed=True),
            v2.RandomHorizontalFlip(0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.SanitizeBoundingBoxes(),
        ]
    )
    truth = json.loads((Path(folder) / "annotations" / f"instances_{SPLIT}.json").read_text())
    pictures = sorted((Path(folder) / SPLIT).iterdir())
    order = iter(np.random.default_rng(0).integers(PICTURES, size=10**6).tolist())

    def image() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        index = next(order)
        found = [a for a in truth["annotations"] if a["image_id"] == index]
        boxes = torch.tensor([a["bbox"] for a in found])
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=(HEIGHT, WIDTH)),
            "labels": torch.tensor([a["category_id"] for a in found]),
        }
        with Image.open(pictures[index]) as picture:
            result: tuple[torch.Tensor, dict[str, torch.Tensor]] = transform(
                picture.convert("RGB"), target
            )
        return result

    return lambda: torch.stack([image()[0] for _ in range(BATCH)])


def _write_pictures(folder: Path) -> None:
    """A data set in COCO's layout, from a seed."""
    generator = np.random.default_rng(0)
    (folder / SPLIT).mkdir()
    (folder / "annotations").mkdir()
    annotations = []
    for index in range(PICTURES):
        coarse = generator.integers(0, 256, (HEIGHT // 40, WIDTH // 40, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth) + generator.normal(0, GRAIN, (HEIGHT, WIDTH, 1))
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        picture.save(folder / SPLIT / f"{index:012d}.jpg", quality=QUALITY)
        for _ in range(OBJECTS):
            left, top = generator.uniform(0, WIDTH / 2), generator.uniform(0, HEIGHT / 2)
            width, height = generator.uniform(16, WIDTH / 2), generator.uniform(16, HEIGHT / 2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": int(generator.integers(1, CATEGORIES + 1)),
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    truth = {
        "images": [
            {"id": index, "file_name": f"{index:012d}.jpg", "height": HEIGHT, "width": WIDTH}
            for index in range(PICTURES)
        ],
        "annotations": annotations,
        "categories": [{"id": c, "name": str(c)} for c in range(1, CATEGORIES + 1)],
    }
    (folder / "annotations" / f"instances_{SPLIT}.json").write_text(json.dumps(truth))
