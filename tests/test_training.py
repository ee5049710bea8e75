"""Training: the optimizer's arithmetic, the schedule, and runs that survive being killed."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import signal
import subprocess
import sys
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

from effspinenet_lib.data import Batch, DataConfig
from effspinenet_lib.errors import CheckpointError, DataError, TrainingError, UserError
from effspinenet_lib.models.zoo import create_model
from effspinenet_lib.results.tables import schema
from effspinenet_lib.training import loop
from effspinenet_lib.training.checkpoint import (
    create_from_weights,
    list_checkpoints,
    load_latest,
    load_weights,
    save_checkpoint,
)
from effspinenet_lib.training.loop import Step, prepare_model, seed_everything, train_steps
from effspinenet_lib.training.optim import build_optimizer, decayed_parameters, learning_rate_at
from effspinenet_lib.training.recipes import RECIPES, Recipe, get_recipe
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
    recipe = get_recipe("smoke_detection").with_(
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
    recipe = get_recipe("proxy_detection").with_(schedule=schedule, warmup_start=0.001)
    rates = [learning_rate_at(recipe, step) for step in range(recipe.warmup_steps + 1)]
    assert rates[0] == pytest.approx(0.001)
    np.testing.assert_allclose(np.diff(rates, n=2), 0, atol=1e-12)
    after = learning_rate_at(recipe, recipe.warmup_steps + 1)
    assert after == pytest.approx(rates[-1], rel=1e-3)


# --- the optimizer --------------------------------------------------------------------------


def test_norms_biases_and_fusion_weights_are_not_decayed() -> None:
    model = create_model("eff_spinenet_m0", num_classes=3)
    decayed, kept = decayed_parameters(model, get_recipe("paper_detection"))
    kernels = {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    }
    assert set(decayed) == kernels
    assert set(decayed) | set(kept) == {name for name, _ in model.named_parameters()}
    assert any("fusion" in name for name in kept)
    everything, nothing = decayed_parameters(
        model, get_recipe("paper_detection").with_(decay_norms_and_biases=True)
    )
    assert len(everything) == len(decayed) + len(kept)
    assert nothing == []


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

    def run(self, start: int, stop: int, poisoned: int | None = None) -> list[Step]:
        batches = make_batches(start, stop, poisoned)
        return list(
            train_steps(
                self.model, self.optimizer, batches, self.recipe, self.accelerator, 7, start
            )
        )

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


FLOAT32 = get_recipe("smoke_detection").with_(
    precision="float32", learning_rate=0.5, weight_decay=0.01
)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_step_is_sgd_written_out(clip: float | None) -> None:
    """Coupled decay of the kernel only, momentum, then the rate; clipped before all that."""
    recipe = FLOAT32.with_(clip_gradient_norm=clip)
    trainer = Trainer(recipe)
    expected = TinyDetector()
    expected.norm.momentum = 1 - recipe.norm_momentum
    expected.load_state_dict(trainer.state())
    velocity = {name: torch.zeros_like(p) for name, p in expected.named_parameters()}
    for step, batch in enumerate(make_batches(0, 6)):
        losses = expected(batch.images, batch.targets)
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
    steps = trainer.run(0, 6)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(trainer.state()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.images for step in steps] == [2] * 6
    assert [step.learning_rate for step in steps] == [learning_rate_at(recipe, s) for s in range(6)]


def test_frozen_norms_keep_their_statistics_and_use_them() -> None:
    recipe = FLOAT32.with_(norm_freeze_steps=4)  # of 12
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
    (step,) = again.run(8, 9)
    assert step.losses == pytest.approx({n: float(loss.detach()) for n, loss in losses.items()})


def test_losses_are_the_models_own() -> None:
    trainer = Trainer(FLOAT32)
    expected = TinyDetector()
    expected.load_state_dict(trainer.state())
    (batch,) = make_batches(0, 1)
    losses = expected(batch.images, batch.targets)
    (step,) = trainer.run(0, 1)
    assert step.losses == pytest.approx(
        {name: float(loss.detach()) for name, loss in losses.items()}
    )


def test_a_run_in_two_parts_draws_the_same_random_numbers() -> None:
    whole, parts = Trainer(FLOAT32, dropout=0.5), Trainer(FLOAT32, dropout=0.5)
    losses = [step.losses for step in whole.run(0, 8)]
    first = parts.run(0, 3)
    torch.randn(5)  # whatever else draws between the parts must not matter
    second = parts.run(3, 8)
    assert [step.losses for step in first + second] == losses
    assert same(whole.state(), parts.state())


def test_another_seed_gives_other_random_numbers() -> None:
    def drawn(*entropy: int) -> float:
        seed_everything(*entropy)
        return float(torch.rand(()))

    draws = [drawn(seed, step, rank) for seed in range(3) for step in range(3) for rank in (0, 1)]
    assert len(set(draws)) == len(draws)
    assert drawn(1, 2, 0) == drawn(1, 2, 0)


def test_a_loss_that_is_not_finite_names_step_and_images() -> None:
    trainer = Trainer(FLOAT32)
    trainer.run(0, 2)
    before = trainer.state()
    with pytest.raises(TrainingError) as caught:
        trainer.run(2, 5, poisoned=2)
    message = str(caught.value)
    assert "step 3" in message
    assert "104, 105" in message
    assert "classification nan" in message
    assert "\n" not in message
    weights = {name: value for name, value in trainer.state().items() if "running" not in name}
    assert same(
        {n: v for n, v in weights.items() if "num_batches" not in n},
        {n: v for n, v in before.items() if n in weights and "num_batches" not in n},
    )


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_precision_is_the_recipes(precision: str, dtype: torch.dtype) -> None:
    trainer = Trainer(FLOAT32.with_(precision=precision))
    trainer.run(0, 2)
    assert trainer.model.seen == [dtype, dtype]
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": True}, "bfloat16"),
        ({"avx512_bf16": True, "amx_bf16": False}, "float32"),
        ({"avx2": True}, "float32"),
    ],
)
def test_auto_is_bfloat16_where_matrix_units_multiply_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    recipe = FLOAT32.with_(precision="auto")
    assert loop.resolve_precision(recipe, torch.device("cpu")) == expected


def test_an_old_torch_falls_back_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    recipe = FLOAT32.with_(precision="auto")
    assert loop.resolve_precision(recipe, torch.device("cpu")) == "float32"


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_memory_layout_is_the_recipes(channels_last: bool) -> None:
    trainer = Trainer(FLOAT32.with_(channels_last=channels_last))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert trainer.model.conv.weight.is_contiguous(memory_format=layout)


# --- whole runs -----------------------------------------------------------------------------

SCENES = DataConfig("shapescenes", train_images=24, eval_images=4, image_size=64)
SMOKE = RunConfig("eff_spinenet_m0", "detection", 64, SCENES, get_recipe("smoke_detection"))
FILES = {
    "config.json",
    "curve.csv",
    "data.json",
    "predictions.json",
    "metrics.json",
    "model.safetensors",
    "run.json",
}


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
    assert {path.name for path in folder.iterdir()} >= FILES
    assert any((folder / "tb").iterdir())
    assert json.loads((folder / "config.json").read_text()) == SMOKE.to_dict()
    assert curve_of(folder)[0] == ["step", "learning_rate", "loss", "classification", "box"]
    assert [row[0] for row in curve_of(folder)[1:]] == ["10", "12"]
    _, metadata = load_weights(folder / "model.safetensors")
    assert metadata["run"] == SMOKE.key
    assert metadata["steps"] == 12
    assert metadata["image_size"] == 64
    assert len(metadata["categories"]) == metadata["num_classes"]


def test_a_run_counts_what_it_did(uninterrupted: RunResult) -> None:
    record = uninterrupted.record
    assert set(record) == set(schema("run").columns)
    assert (record["state"], record["steps"], record["images"]) == ("finished", 12, 48)
    assert json.loads(record["config"]) == SMOKE.to_dict()
    assert uninterrupted.images_per_second == pytest.approx(
        48 / uninterrupted.wall_seconds, rel=0.9
    )
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


def test_nothing_is_printed_where_there_is_no_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_run(SMOKE, tmp_path, max_steps=1)
    assert capfd.readouterr() == ("", "")


def test_stochastic_depth_is_on_unless_an_option_says_otherwise(uninterrupted: RunResult) -> None:
    rates = {
        config.options["stochastic_depth"]
        for config in (SMOKE, replace(SMOKE, model_options={"stochastic_depth": 0.0}))
    }
    assert rates == {0.2, 0.0}
    assert json.loads(uninterrupted.record["config"])["model_options"] == {"stochastic_depth": 0.2}


def test_a_finished_run_is_not_run_again(
    uninterrupted: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effspinenet_lib.training.run._train_and_evaluate", None)
    again = train_run(SMOKE, uninterrupted.folder.parent, progress=False)
    assert again.record == uninterrupted.record
    np.testing.assert_equal(again.metrics, uninterrupted.metrics)


def test_the_weights_detect_as_the_run_did(uninterrupted: RunResult) -> None:
    from effspinenet_lib.data import open_dataset
    from effspinenet_lib.training.evaluate import evaluate

    model, _ = create_from_weights(uninterrupted.folder / "model.safetensors")
    evaluation = evaluate(model, open_dataset(SCENES, "eval"), "detection", 64, 16, 0, False)
    np.testing.assert_equal(evaluation.metrics, uninterrupted.metrics)


def test_a_run_in_three_parts_ends_as_one(tmp_path: Path, uninterrupted: RunResult) -> None:
    for steps, state in ((3, "partial"), (11, "partial"), (None, "finished")):
        part = train_run(SMOKE, tmp_path, max_steps=steps, progress=False)
        assert part.record["state"] == state
        assert part.steps == (steps or 12)
    assert same(weights_of(part.folder), weights_of(uninterrupted.folder))
    assert curve_of(part.folder) == curve_of(uninterrupted.folder)


def test_force_runs_anew(tmp_path: Path) -> None:
    first = train_run(SMOKE, tmp_path, max_steps=2, progress=False)
    (first.folder / "left over").mkdir()
    (first.folder / "checkpoint-2.pt").write_bytes(b"not a checkpoint")
    again = train_run(SMOKE, tmp_path, max_steps=1, force=True, progress=False)
    assert again.steps == 1
    assert not (first.folder / "left over").exists()
    assert [path.name for path in list_checkpoints(again.folder)] == ["checkpoint-1.pt"]


def test_a_cut_checkpoint_costs_steps_but_not_the_result(
    tmp_path: Path, uninterrupted: RunResult, caplog: pytest.LogCaptureFixture
) -> None:
    part = train_run(SMOKE, tmp_path, max_steps=6, checkpoint_seconds=0, progress=False)
    newest, before = list_checkpoints(part.folder)
    assert (newest.name, before.name) == ("checkpoint-6.pt", "checkpoint-5.pt")
    newest.write_bytes(newest.read_bytes()[:10_000])
    with caplog.at_level(logging.WARNING):
        whole = train_run(SMOKE, tmp_path, progress=False)
    assert "checkpoint-6.pt cannot be read" in caplog.text
    assert same(weights_of(whole.folder), weights_of(uninterrupted.folder))
    assert curve_of(whole.folder) == curve_of(uninterrupted.folder)


def test_wall_time_adds_up_over_interruptions(tmp_path: Path) -> None:
    part = train_run(SMOKE, tmp_path, max_steps=2, progress=False)
    checkpoint = load_latest(part.folder, SMOKE.key, SMOKE.model)
    assert checkpoint is not None
    save_checkpoint(part.folder, replace(checkpoint, wall_seconds=1000.0))
    whole = train_run(SMOKE, tmp_path, max_steps=3, progress=False)
    assert 1000 < whole.wall_seconds < 1100
    assert whole.images_per_second == pytest.approx(3 * 4 / 1000, rel=0.2)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    part = train_run(SMOKE, tmp_path, max_steps=1, progress=False)
    other = replace(SMOKE, model="sp_efficientnet_m0")
    (tmp_path / other.key).mkdir()
    (part.folder / "checkpoint-1.pt").rename(tmp_path / other.key / "checkpoint-1.pt")
    with pytest.raises(CheckpointError, match="is of model eff_spinenet_m0"):
        train_run(other, tmp_path, progress=False)


def test_a_second_process_is_told(tmp_path: Path) -> None:
    folder = tmp_path / SMOKE.key
    folder.mkdir()
    with FileLock(folder / LOCK), pytest.raises(UserError, match="another process"):
        train_run(SMOKE, tmp_path, progress=False)


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"):
        train_run(SMOKE, tmp_path / "file", progress=False)


def test_no_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_steps is 0"):
        train_run(SMOKE, tmp_path, max_steps=0, progress=False)


def test_a_diverged_run_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    recipe = get_recipe("smoke_detection").with_(
        learning_rate=1e6, warmup_start=1e6, weight_decay=1.0
    )
    config = replace(SMOKE, recipe=recipe.scaled_to(200).with_(warmup_steps=0))
    with pytest.raises(TrainingError, match="is not finite"):
        train_run(config, tmp_path, checkpoint_seconds=0, progress=False)
    checkpoint = load_latest(tmp_path / config.key, config.key, config.model)
    assert checkpoint is not None
    assert checkpoint.step >= 1
    assert not (tmp_path / config.key / "run.json").exists()


def test_configurations_that_differ_have_different_keys() -> None:
    others = [
        replace(SMOKE, seed=1),
        replace(SMOKE, image_size=128),
        replace(SMOKE, model="eff_spinenet_m1"),
        replace(SMOKE, data=replace(SCENES, seed=1)),
        replace(SMOKE, model_options={"space_to_depth": False}),
        *(replace(SMOKE, recipe=recipe) for recipe in RECIPES.values()),
    ]
    assert len({config.key for config in others}) == len(others)
    assert SMOKE.key in {config.key for config in others}  # smoke_detection is its recipe
    assert replace(SMOKE, model_options={"stochastic_depth": 0.2}).key == SMOKE.key


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
    for steps in (1, 2):  # to be reused, and to be gone on with
        with pytest.raises(DataError, match="holds a run on other data"):
            train_run(config(other), runs, max_steps=steps, progress=False)
    anew = train_run(config(other), runs, max_steps=1, force=True, progress=False)
    assert anew.key == first.key


def test_a_configuration_comes_back_from_json() -> None:
    again = RunConfig.from_dict(json.loads(json.dumps(SMOKE.to_dict())))
    assert again.key == SMOKE.key
    assert again.recipe == SMOKE.recipe


def run_script(*command: str, **variables: str) -> int:
    """Run Python with this folder's modules; the exit code."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        **variables,
    }
    return subprocess.run([sys.executable, *command], env=environment, check=False).returncode


KILLED = """
import os, signal, sys
from effspinenet_lib.training import loop, run, trainer
from test_training import SMOKE

rate_at, save = loop.learning_rate_at, trainer.save_checkpoint

def rate_or_death(recipe, step):
    if step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return rate_at(recipe, step)

loop.learning_rate_at = rate_or_death
trainer.save_checkpoint = lambda folder, state, kept: state.step in (2, 5) and save(folder, state)
run.train_run(SMOKE, sys.argv[1], checkpoint_seconds=0, progress=False)
"""


def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(
    tmp_path: Path, uninterrupted: RunResult
) -> None:
    """SIGKILL in the eleventh step, in mid-epoch, a row of the curve after the checkpoint."""
    assert run_script("-c", KILLED, str(tmp_path)) == -signal.SIGKILL
    folder = tmp_path / SMOKE.key
    assert [path.name for path in list_checkpoints(folder)] == [
        "checkpoint-5.pt",
        "checkpoint-2.pt",
    ]
    assert not (folder / "run.json").exists()
    again = train_run(SMOKE, tmp_path, progress=False)
    assert again.steps == 12
    assert same(weights_of(folder), weights_of(uninterrupted.folder))
    assert curve_of(folder) == curve_of(uninterrupted.folder)
