"""Loaders: every batch is decided by data set, seed and step alone."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from effspinenet_lib.data import DataConfig, Dataset, ShapeScenes, open_dataset
from effspinenet_lib.data.augment import Augmentation
from effspinenet_lib.data.loader import Batch, TrainingOrder, evaluation_loader, training_loader
from effspinenet_lib.errors import UserError

JITTER = Augmentation((0.5, 2.0), 0.5)


@pytest.fixture(scope="module")
def scenes() -> ShapeScenes:
    return ShapeScenes("train", 23, 64)


def batches(dataset: Dataset, start: int = 0, total: int = 9, **options: Any) -> list[Batch]:
    settings = {"image_size": 64, "batch_size": 5, "augmentation": JITTER, "seed": 7, **options}
    return list(training_loader(dataset, start_step=start, total_steps=total, **settings))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.scales, two.scales)
        assert one.image_ids == two.image_ids
        assert one.sizes == two.sizes
        for left, right in zip(one.targets, two.targets, strict=True):
            assert left.keys() == right.keys() == {"boxes", "labels", "iscrowd"}
            assert all(torch.equal(left[name], right[name]) for name in left)


# Of step 2 of each task: a digest of the batch but for pixels and masks, whose last bit depends
# on the CPU, and the means of pixels and masks. Recorded with the scenes' second version:
# resumed runs and committed results rest on the same images and random numbers.
BATCHES = {
    "detection": ("8b7710011ccb0f9f", 0.12155, 0.00000),
    "instances": ("8b7710011ccb0f9f", 0.12155, 0.19701),
    "classification": ("ee96acb630d98318", -0.24798, 0.00000),
    "segmentation": ("0b10137282a3b8e3", 0.12155, 0.00000),
}


@pytest.mark.parametrize("task", BATCHES)
def test_the_batch_of_a_seed_and_a_step_does_not_change(task: str) -> None:
    dataset = open_dataset(DataConfig("shapescenes", train_images=23, image_size=64), "train", task)
    (batch,) = training_loader(dataset, 96, 5, JITTER, 7, 2, 3, task=task)
    covered = [t.pop("masks", torch.zeros(1)).double().mean().item() for t in batch.targets]

    def thousandths(values: torch.Tensor) -> list[float]:
        return values.double().mul(1e3).round().flatten().tolist()

    targets = {name: [thousandths(t[name]) for t in batch.targets] for name in batch.targets[0]}
    scales = batch.scales.double().mul(1e3).round().tolist()
    seen = json.dumps([batch.image_ids, batch.sizes, scales, targets], sort_keys=True)
    digest, pixels, masks = BATCHES[task]
    assert hashlib.sha256(seen.encode()).hexdigest()[:16] == digest
    assert batch.images.double().mean().item() == pytest.approx(pixels, abs=1e-4)
    assert np.mean(covered) == pytest.approx(masks, abs=1e-4)


@pytest.mark.parametrize(("start", "workers"), [(0, 2), (1, 0), (3, 1), (4, 0), (8, 0)])
def test_neither_where_a_loader_starts_nor_its_workers_change_a_batch(
    scenes: ShapeScenes, start: int, workers: int
) -> None:
    assert_same(batches(scenes)[start:], batches(scenes, start, workers=workers))


def test_a_spawned_worker_makes_the_same_batch(scenes: ShapeScenes) -> None:
    """Such a worker gets the loader's parts pickled."""
    loader = training_loader(scenes, 64, 5, JITTER, 7, 0, 2)
    items, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    batches_again = [collate([items[key] for key in keys]) for keys in loader.batch_sampler]
    assert_same(list(loader), batches_again)


def test_the_seed_changes_order_and_augmentation(scenes: ShapeScenes) -> None:
    first, second = batches(scenes), batches(scenes, seed=8)
    assert [b.image_ids for b in first] != [b.image_ids for b in second]
    scales = [{i: s for b in run for i, s in zip(b.image_ids, b.scales.tolist(), strict=True)}
              for run in (first, second)]  # fmt: skip
    assert all(scales[0][i] != scales[1][i] for i in scales[0].keys() & scales[1].keys())


def test_an_epoch_shows_no_image_twice_and_epochs_differ(scenes: ShapeScenes) -> None:
    run = batches(scenes)
    epochs = [[i for b in run[k : k + 4] for i in b.image_ids] for k in (0, 4)]
    for epoch in epochs:
        assert len(set(epoch)) == 20
    assert epochs[0] != epochs[1]
    # What the shortened epoch leaves out changes from epoch to epoch.
    assert set(epochs[0]) != set(epochs[1])
    assert {image for b in batches(scenes, total=40) for image in b.image_ids} == set(range(1, 24))


@pytest.mark.parametrize("images", [1, 3, 8])
def test_a_set_smaller_than_a_batch_is_run_through_again(images: int) -> None:
    run = list(TrainingOrder(images, 8, 0, 0, 6))
    shown = [key for batch in run for key in batch]
    assert all(len(batch) == 8 for batch in run)
    # One permutation after the other: counts never differ by more than one.
    for end in range(1, len(shown) + 1):
        counts = Counter(index for _, index in shown[:end])
        assert max(counts.values()) - min(counts[i] for i in range(images)) <= 1
    # An image shown twice in a batch has another epoch, and so another augmentation.
    assert len(set(shown)) == len(shown)
    assert list(TrainingOrder(images, 8, 0, 4, 6)) == run[4:]


def test_processes_share_a_batch(scenes: ShapeScenes) -> None:
    whole = batches(scenes, batch_size=6)
    shares = [batches(scenes, batch_size=6, rank=rank, world_size=3) for rank in range(3)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert [len(part.image_ids) for part in parts] == [2, 2, 2]
        assert sorted(i for part in parts for i in part.image_ids) == sorted(batch.image_ids)
        by_id = dict(zip(batch.image_ids, batch.images, strict=True))
        for part in parts:
            for image_id, image in zip(part.image_ids, part.images, strict=True):
                assert torch.equal(by_id[image_id], image)
    with pytest.raises(UserError, match="cannot be shared equally by 4"):
        batches(scenes, batch_size=6, world_size=4)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_random_states_alone(scenes: ShapeScenes, workers: int) -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.random.get_rng_state()
    words = np.random.get_state()[1].copy()  # noqa: NPY002
    batches(scenes, total=2, workers=workers)
    list(evaluation_loader(scenes, 64, 8, workers))
    assert torch.equal(before, torch.random.get_rng_state())
    assert (words == np.random.get_state()[1]).all()  # noqa: NPY002


def test_a_finished_run_has_no_batches_left(scenes: ShapeScenes) -> None:
    assert batches(scenes, 9, 9) == []
    assert batches(scenes, 12, 9) == []
    assert len(training_loader(scenes, 64, 5, JITTER, 0, 2, 9)) == 7
    with pytest.raises(UserError, match="cannot be shared"):
        batches(scenes, batch_size=0)


def test_evaluation_shows_every_image_once_in_order(scenes: ShapeScenes) -> None:
    run = list(evaluation_loader(scenes, 128, 8))
    assert [len(batch.images) for batch in run] == [8, 8, 7]
    assert not any(batch.targets for batch in run)
    assert [i for batch in run for i in batch.image_ids] == list(range(1, 24))
    assert run[0].images.shape == (8, 3, 128, 128)
    assert run[0].images.dtype == torch.float32
    assert run[0].scales.tolist() == [[2.0, 2.0]] * 8
    assert run[0].sizes == [(64, 64)] * 8
    assert_same(run, list(evaluation_loader(scenes, 128, 8, workers=2)))


def test_targets_scaled_back_are_perfect_detections(tiny_coco: Path) -> None:
    """pycocotools gives the training targets themselves, unaugmented, full marks."""
    dataset = open_dataset(DataConfig("coco", str(tiny_coco)), "eval")
    detections = []
    for batch in training_loader(dataset, 384, len(dataset), Augmentation(), 0, 0, 1):
        for image_id, scale, target in zip(
            batch.image_ids, batch.scales[:, 0].tolist(), batch.targets, strict=True
        ):
            boxes = target["boxes"][~target["iscrowd"]].double() / scale
            labels = target["labels"][~target["iscrowd"]]
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
                category, box = dataset.categories[label].id, [x1, y1, x2 - x1, y2 - y1]
                detections.append(
                    {"image_id": image_id, "category_id": category, "bbox": box, "score": 0.9}
                )
    truth = COCO()
    truth.dataset = dataset.ground_truth()
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[[0, 1, 2]] == pytest.approx(1.0)
    assert evaluation.stats[8] == pytest.approx(1.0)


def test_training_on_real_images_keeps_their_crowds(tiny_coco: Path) -> None:
    dataset = open_dataset(DataConfig("coco", str(tiny_coco)), "train")
    plain = Augmentation()
    (batch,) = training_loader(dataset, 256, 50, plain, 0, 0, 1)
    crowds = sum(int(target["iscrowd"].sum()) for target in batch.targets)
    assert crowds == dataset.describe()["crowds"] > 0
    for image, target, (height, width), scale in zip(
        batch.images, batch.targets, batch.sizes, batch.scales[:, 0].tolist(), strict=True
    ):
        assert scale == pytest.approx(256 / max(height, width))
        rows, columns = int(height * scale + 1e-4), int(width * scale + 1e-4)
        assert not image[:, rows:].any()
        assert not image[:, :, columns:].any()
        assert image[:, :rows, :columns].any()
        limits = torch.tensor([columns, rows, columns, rows])
        assert (target["boxes"] <= limits).all()


def test_a_batch_moves_with_its_targets(scenes: ShapeScenes) -> None:
    (batch,) = batches(scenes, total=1)
    moved = batch.to("meta")
    assert moved.images.device.type == "meta"
    assert all(value.device.type == "meta" for target in moved.targets for value in target.values())
    assert moved.image_ids == batch.image_ids
