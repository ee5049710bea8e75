"""Training: the schedule, the loop's arithmetic, and whole runs."""

from __future__ import annotations

import copy
import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from filelock import FileLock
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from typer.testing import CliRunner

from effspinenet_lib import cli
from effspinenet_lib.data import DataConfig, open_dataset
from effspinenet_lib.data.loader import Batch
from effspinenet_lib.errors import CheckpointError, DataError, TrainingError, UserError
from effspinenet_lib.models.weights import load_weights
from effspinenet_lib.results import read_table
from effspinenet_lib.training import device, loop, run
from effspinenet_lib.training.checkpoint import (
    create_from_weights,
    list_checkpoints,
    load_latest,
    save_checkpoint,
)
from effspinenet_lib.training.device import (
    RENORM_FACTOR,
    RENORM_SHIFT,
    RenormalisedNorm,
    prepare_model,
)
from effspinenet_lib.training.evaluate import evaluate
from effspinenet_lib.training.loop import Losses, seed_everything, train_steps
from effspinenet_lib.training.optim import build_optimizer, learning_rate_at
from effspinenet_lib.training.recipe import Recipe
from effspinenet_lib.training.recipes import get_recipe
from effspinenet_lib.training.run import LOCK, RunConfig, RunResult, train_run

# --- the schedule ---------------------------------------------------------------------------


def test_the_paper_schedule_at_its_corners() -> None:
    recipe, epoch = get_recipe("paper_detection"), 462
    expected = {
        0: 0.0067,
        1_000: (0.0067 + 0.28) / 2,
        2_000: 0.28,
        620 * epoch - 1: 0.28,
        620 * epoch: 0.028,
        640 * epoch - 1: 0.028,
        640 * epoch: 0.0028,
        650 * epoch - 1: 0.0028,
    }
    for step, rate in expected.items():
        assert learning_rate_at(recipe, step) == pytest.approx(rate, rel=1e-12), step


def test_cosine_is_torchs_own() -> None:
    recipe = get_recipe("smoke_detection").replace(
        schedule="cosine", steps=40, warmup_steps=0, lr_drops=(), learning_rate=0.05
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for step in range(40):
        assert learning_rate_at(recipe, step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_the_warmup_is_linear_and_meets_the_schedule(schedule: str) -> None:
    recipe = get_recipe("small_data_detection").replace(schedule=schedule, warmup_start=0.001)
    rates = [learning_rate_at(recipe, step) for step in range(recipe.warmup_steps + 1)]
    assert rates[0] == pytest.approx(0.001)
    np.testing.assert_allclose(np.diff(rates, n=2), 0, atol=1e-12)
    after = learning_rate_at(recipe, recipe.warmup_steps + 1)
    assert after == pytest.approx(rates[-1], rel=1e-3)


# --- the loop -------------------------------------------------------------------------------


class TinyDetector(nn.Module):
    """Two losses of one convolution and one norm, with dropout as the random part."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(dropout)
        self.seen: list[torch.dtype] = []

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        features = self.conv(images)
        self.seen.append(features.dtype)
        features = self.dropout(self.norm(features.float()))
        widths = torch.cat([target["boxes"] for target in targets])[:, 2].mean()
        return {"classification": features.square().mean(), "box": (features * widths).tanh().var()}


def make_batches(start: int, stop: int, poisoned: int | None = None) -> Iterator[Batch]:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(2, 3, 8, 8, generator=generator)
        if step == poisoned:
            images[1, 0, 0, 0] = math.inf
        target = {
            "boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]),
            "labels": torch.tensor([0]),
            "iscrowd": torch.tensor([False]),
        }
        ids = (100 + 2 * step, 101 + 2 * step)
        yield Batch(images, [target, target], ids, torch.ones(2), [(8, 8)] * 2)


@dataclass
class Trainer:
    """A tiny model and its optimizer."""

    recipe: Recipe
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.accelerator = Accelerator(mixed_precision="no", cpu=True)
        seed_everything(0)
        self.model = prepare_model(TinyDetector(self.dropout), self.recipe, self.accelerator)
        self.optimizer = build_optimizer(self.model, self.recipe)

    def run(self, start: int, stop: int, poisoned: int | None = None) -> Losses:
        steps = train_steps(
            self.model,
            self.optimizer,
            make_batches(start, stop, poisoned),
            self.recipe,
            self.accelerator,
            7,
            start,
        )
        return {step: losses for checked in steps for step, losses in checked.items()}

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


FLOAT32 = get_recipe("smoke_detection").replace(
    precision="float32", learning_rate=0.5, weight_decay=0.01
)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_step_is_sgd_written_out(clip: float | None) -> None:
    """Coupled decay of the kernel only, momentum, then the rate; clipped before all that."""
    recipe = FLOAT32.replace(clip_gradient_norm=clip)
    trainer = Trainer(recipe)
    expected = TinyDetector()
    expected.norm.momentum = 1 - recipe.norm_momentum
    expected.load_state_dict(trainer.state())
    velocity = {name: torch.zeros_like(p) for name, p in expected.named_parameters()}
    summed = []
    for step, batch in enumerate(make_batches(0, 6)):
        losses = expected(batch.images, batch.targets)
        summed.append({name: float(loss.detach()) for name, loss in losses.items()})
        gradients = torch.autograd.grad(sum(losses.values()), list(expected.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        shrink = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        with torch.no_grad():
            for (name, parameter), gradient in zip(
                expected.named_parameters(), gradients, strict=True
            ):
                decay = 0.01 * parameter if name == "conv.weight" else 0.0
                velocity[name] = 0.9 * velocity[name] + gradient * shrink + decay
                parameter -= learning_rate_at(recipe, step) * velocity[name]
    found = trainer.run(0, 6)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(trainer.state()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    for losses, expected_losses in zip(found.values(), summed, strict=True):
        assert losses == pytest.approx(expected_losses, rel=1e-4)


def test_frozen_norms_keep_their_statistics_and_use_them() -> None:
    recipe = FLOAT32.replace(norm_freeze_steps=4)  # of 12
    trainer = Trainer(recipe)
    trainer.run(0, 8)
    before = trainer.state()
    trainer.run(8, 12)
    after = trainer.state()
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["norm.weight"], after["norm.weight"])
    assert not torch.equal(before["conv.weight"], after["conv.weight"])
    # A step with frozen norms is one of the model in evaluation mode.
    (batch,) = make_batches(8, 9)
    expected = TinyDetector()
    expected.load_state_dict(before)
    expected.norm.eval()
    losses = expected(batch.images, batch.targets)
    again = Trainer(recipe)
    again.model.load_state_dict(before)
    found = again.run(8, 9)[9]
    assert found == pytest.approx({n: float(loss.detach()) for n, loss in losses.items()})


def test_gradients_through_frozen_norms_are_clipped() -> None:
    """Statistics that are far too small: features, and gradients, thousands of times as large."""
    recipe = FLOAT32.replace(norm_freeze_steps=12, weight_decay=0.0)
    frozen = Trainer(recipe)
    frozen.model.norm.running_var.fill_(1e-6)
    frozen.model.norm.eps = 0.0
    before = frozen.state()
    frozen.run(4, 5)
    change = sum(
        float((after.detach() - before[name]).square().sum())
        for name, after in frozen.model.named_parameters()
    )
    rate = learning_rate_at(recipe, 4)
    assert math.sqrt(change) == pytest.approx(rate * loop.FROZEN_NORMS_CLIP, rel=1e-3)


def test_a_run_in_two_parts_draws_the_same_random_numbers() -> None:
    whole, parts = Trainer(FLOAT32, dropout=0.5), Trainer(FLOAT32, dropout=0.5)
    losses = whole.run(0, 8)
    first = parts.run(0, 3)
    torch.randn(5)  # whatever else draws between the parts must not matter
    second = parts.run(3, 8)
    assert first | second == losses
    assert same(whole.state(), parts.state())


def test_every_seed_step_and_process_draws_other_random_numbers() -> None:
    def drawn(*entropy: int) -> float:
        seed_everything(*entropy)
        return float(torch.rand(()))

    draws = [drawn(seed, step, rank) for seed in range(3) for step in range(3) for rank in (0, 1)]
    assert len(set(draws)) == len(draws)
    assert drawn(1, 2, 0) == drawn(1, 2, 0)


def test_a_loss_that_is_not_finite_names_step_and_images() -> None:
    trainer = Trainer(FLOAT32)
    trainer.run(0, 2)
    with pytest.raises(TrainingError) as caught:
        trainer.run(2, 5, poisoned=2)
    message = str(caught.value)
    for part in ("step 3", "104, 105", "classification nan"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_precision_is_the_recipes(precision: str, dtype: torch.dtype) -> None:
    trainer = Trainer(FLOAT32.replace(precision=precision))
    trainer.run(0, 2)
    assert trainer.model.seen == [dtype, dtype]
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": True}, "bfloat16"),
        ({"avx512_bf16": True, "amx_bf16": False}, "float32"),
        (None, "float32"),  # an older torch, which cannot tell
    ],
)
def test_auto_is_bfloat16_where_matrix_units_multiply_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool] | None, expected: str
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    if capabilities is not None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    recipe = FLOAT32.replace(precision="auto")
    assert device.resolve_precision(recipe, torch.device("cpu")) == expected


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_memory_layout_is_the_recipes(channels_last: bool) -> None:
    trainer = Trainer(FLOAT32.replace(channels_last=channels_last))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert trainer.model.conv.weight.is_contiguous(memory_format=layout)


# --- whole runs -----------------------------------------------------------------------------

SCENES = DataConfig("shapescenes", train_images=24, eval_images=4, image_size=64)
SMOKE = RunConfig("eff_spinenet_m0", "detection", 64, SCENES, get_recipe("smoke_detection"))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def curve_of(folder: Path) -> list[list[str]]:
    """The curve without its last column, the speed."""
    with open(folder / "curve.csv", newline="") as handle:
        return [row[:-1] for row in csv.reader(handle)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train_run(SMOKE, tmp_path_factory.mktemp("runs"), progress=False)


def test_a_run_leaves_its_files(uninterrupted: RunResult) -> None:
    folder = uninterrupted.folder
    assert folder.name == uninterrupted.key == SMOKE.key
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "curve.csv", "data.json", "predictions.json", "metrics.json"),
        *("model.safetensors", "run.json", "run.lock", "tb", "checkpoint-12.pt"),
    }
    assert json.loads((folder / "config.json").read_text()) == SMOKE.to_dict()
    assert curve_of(folder)[0] == ["step", "learning_rate", "loss", "classification", "box"]
    assert [row[0] for row in curve_of(folder)[1:]] == ["10", "12"]
    _, metadata = load_weights(folder / "model.safetensors")
    assert (metadata["run"], metadata["steps"], metadata["image_size"]) == (SMOKE.key, 12, 64)
    assert len(metadata["categories"]) == metadata["num_classes"]
    assert metadata["data"]["train"] == {"name": "ShapeScenes train", "images": 24}
    assert (metadata["licence"], len(metadata["normalisation"]["mean"])) == ("Apache-2.0", 3)
    card = CliRunner().invoke(
        cli.app, ["card", str(folder), "--output", str(folder / "tb" / "c.md")]
    )
    assert card.exit_code == 0
    assert f"| run | {SMOKE.key} |" in (folder / "tb" / "c.md").read_text()


def test_a_run_counts_what_it_did(uninterrupted: RunResult) -> None:
    record = uninterrupted.record
    assert (record["state"], record["steps"], record["images"]) == ("finished", 12, 48)
    assert json.loads(record["config"]) == SMOKE.to_dict()
    assert json.loads(record["config"])["model_options"] == {"stochastic_depth": 0.2}
    assert record["images_per_second"] == pytest.approx(48 / record["wall_seconds"], rel=0.9)
    assert {"AP", "AP50", "AR_100"} <= set(uninterrupted.metrics)


def test_tensorboard_reads_the_curve(uninterrupted: RunResult) -> None:
    events = EventAccumulator(str(uninterrupted.folder / "tb"))
    events.Reload()
    with open(uninterrupted.folder / "curve.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    for name in ("learning_rate", "loss", "classification", "box"):
        scalars = events.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == [int(row["step"]) for row in rows]
        assert [scalar.value for scalar in scalars] == pytest.approx(
            [float(row[name]) for row in rows], rel=1e-6
        )


def test_a_run_adds_its_row_to_a_file_and_is_quiet_in_logs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "runs.csv"
    first = train_run(SMOKE, tmp_path, max_steps=1, runs_csv=file)
    assert capfd.readouterr() == ("", "")
    (row,) = read_table(file, "run").to_dict("records")
    assert (row["run"], row["state"], row["steps"], row["profile"]) == (
        *(first.key, "partial", 1),
        "own",
    )
    train_run(SMOKE, tmp_path, max_steps=2, runs_csv=file)
    (row,) = read_table(file, "run").to_dict("records")
    assert row["steps"] == 2


def test_freed_memory_is_kept_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(device, "disable_malloc_trim", lambda: called.append(True))
    train_run(SMOKE, tmp_path, max_steps=1, progress=False)
    assert called == [True]


def test_a_finished_run_is_not_run_again(
    uninterrupted: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "build_or_resume", None)
    again = train_run(SMOKE, uninterrupted.folder.parent, progress=False)
    assert again.record == uninterrupted.record
    np.testing.assert_equal(again.metrics, uninterrupted.metrics)


def test_the_weights_detect_as_the_run_did(uninterrupted: RunResult) -> None:
    model, _ = create_from_weights(uninterrupted.folder / "model.safetensors")
    evaluation = evaluate(model, open_dataset(SCENES, "eval"), "detection", 64, 16, 0, False)
    np.testing.assert_equal(evaluation.metrics, uninterrupted.metrics)


def test_a_run_in_three_parts_ends_as_one(tmp_path: Path, uninterrupted: RunResult) -> None:
    for steps, state in ((3, "partial"), (11, "partial"), (None, "finished")):
        part = train_run(SMOKE, tmp_path, max_steps=steps, progress=False)
        assert part.record["state"] == state
        assert part.steps == (steps or 12)
        if steps == 3:  # the time of all parts adds up
            checkpoint = load_latest(part.folder, SMOKE.key, SMOKE.model)
            save_checkpoint(part.folder, replace(checkpoint, wall_seconds=1000.0))
    assert 1000 < part.record["wall_seconds"] < 1100
    assert part.record["images_per_second"] == pytest.approx(12 * 4 / 1000, rel=0.2)
    assert same(weights_of(part.folder), weights_of(uninterrupted.folder))
    assert curve_of(part.folder) == curve_of(uninterrupted.folder)


def test_force_starts_over(tmp_path: Path) -> None:
    first = train_run(SMOKE, tmp_path, max_steps=2, progress=False)
    (first.folder / "left over").mkdir()
    (first.folder / "checkpoint-2.pt").write_bytes(b"not a checkpoint")
    again = train_run(SMOKE, tmp_path, max_steps=1, force=True, progress=False)
    assert again.steps == 1
    assert not (first.folder / "left over").exists()
    assert [path.name for path in list_checkpoints(again.folder)] == ["checkpoint-1.pt"]


def test_what_cannot_be_run_is_one_clear_error(tmp_path: Path) -> None:
    folder = tmp_path / SMOKE.key
    folder.mkdir()
    with FileLock(folder / LOCK), pytest.raises(UserError, match="another process"):
        train_run(SMOKE, tmp_path, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"):
        train_run(SMOKE, tmp_path / "file", progress=False)
    with pytest.raises(UserError, match="max_steps is 0"):
        train_run(SMOKE, tmp_path, max_steps=0, progress=False)
    with pytest.raises(UserError, match="checkpoints is 0"):
        train_run(SMOKE, tmp_path, checkpoints=0, progress=False)
    part = train_run(SMOKE, tmp_path, max_steps=1, progress=False)
    other = replace(SMOKE, model="sp_efficientnet_m0")
    (tmp_path / other.key).mkdir()
    (part.folder / "checkpoint-1.pt").rename(tmp_path / other.key / "checkpoint-1.pt")
    with pytest.raises(CheckpointError, match="is of model eff_spinenet_m0"):
        train_run(other, tmp_path, progress=False)


def coco_folder(root: Path, shift: int = 0) -> Path:
    """Eight images with one box each, in COCO layout; `shift` moves the boxes."""
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(1, 5):
            name = f"{number}.png"
            Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(root / split / name)
            images.append({"id": number, "file_name": name, "height": 64, "width": 64})
            box = [8 + shift, 8, 32, 32]
            annotation = {"id": number, "image_id": number, "category_id": 5, "bbox": box}
            annotations.append({**annotation, "area": 1024, "iscrowd": 0})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 5, "name": "square"}],
        }
        (root / "annotations").mkdir(exist_ok=True)
        path = root / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return root


def test_moved_data_is_the_same_run_but_other_data_is_refused(tmp_path: Path) -> None:
    def config(root: Path) -> RunConfig:
        return replace(SMOKE, data=DataConfig("coco", root=str(root)))

    here, runs = coco_folder(tmp_path / "here"), tmp_path / "runs"
    first = train_run(config(here), runs, max_steps=1, progress=False)
    there = here.rename(tmp_path / "there")
    assert config(there).key == first.key
    moved = train_run(config(there), runs, max_steps=1, progress=False)
    assert moved.record == first.record
    other = coco_folder(tmp_path / "other", shift=4)
    for steps in (1, 2):  # to be reused, and to be resumed
        with pytest.raises(DataError, match="holds a run on other data"):
            train_run(config(other), runs, max_steps=steps, progress=False)
    again = train_run(config(other), runs, max_steps=1, force=True, progress=False)
    assert again.key == first.key


def test_renormalised_features_are_those_of_the_running_statistics() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5, eps=1e-3, momentum=0.03)
    for values in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        values.uniform_(0.5, 2.0)
    few, many = 2 * torch.randn(16, 5, 1, 1) + 1, torch.randn(200, 5, 1, 1)
    renormalised = RenormalisedNorm(copy.deepcopy(norm), 100)

    expected = norm.eval()(few)  # within the limits of batch renormalisation
    torch.testing.assert_close(renormalised(few), expected)
    norm.train()(few)
    torch.testing.assert_close(renormalised.running_var, norm.running_var)
    torch.testing.assert_close(renormalised(many), norm(many))

    # a value far from all others is within the limits where evaluation has none
    few[0] = 1e4
    assert renormalised.eval()(few).abs().max() > 1e3
    limit = 2 * (15**0.5 * RENORM_FACTOR + RENORM_SHIFT) + 2
    assert renormalised.train()(few).abs().max() < limit
    assert renormalised(few[:1].bfloat16()).dtype == torch.bfloat16  # of a single value, too
    assert renormalised.running_var.isfinite().all()
