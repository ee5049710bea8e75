"""Batches in parts and over processes give the losses, weights and metrics of one process."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from effspinenet_lib import cli
from effspinenet_lib.data import DataConfig, open_dataset
from effspinenet_lib.data.augment import Augmentation
from effspinenet_lib.data.dataset import SEMANTIC_IGNORE
from effspinenet_lib.data.loader import Batch, training_loader
from effspinenet_lib.errors import Preempted, UserError
from effspinenet_lib.models.zoo import create_model, known_options
from effspinenet_lib.training import loop
from effspinenet_lib.training.checkpoint import create_from_weights, list_checkpoints
from effspinenet_lib.training.device import prepare_model, synchronise_norms
from effspinenet_lib.training.evaluate import coco_metrics, evaluate
from effspinenet_lib.training.loop import train_steps
from effspinenet_lib.training.optim import build_optimizer
from effspinenet_lib.training.recipes import get_recipe
from effspinenet_lib.training.run import RunConfig, read_result, train_run

STEPS = 4
MOST_SECONDS = 300.0  # what a launcher and its processes may take, far more than they do
TASKS = ("detection", "instances", "classification", "segmentation")
SCENES = DataConfig("shapescenes", train_images=8, eval_images=5, image_size=64)
# Statistics frozen and nothing random but the weights and the data: then there is no difference.
EXACT = (
    get_recipe("smoke_detection")
    .scale_to_steps(STEPS)
    .replace(
        precision="float32",
        learning_rate=0.001,
        warmup_steps=0,
        stochastic_depth=0.0,
        norm_freeze_steps=STEPS,
    )
)
LOOSE = EXACT.replace(norm_freeze_steps=0)
# Half of its norms' statistics are those of its one batch: good ones to freeze, for no variance is
# below a half, as some of one batch's at 64 pixels are.
FIRST = RunConfig(
    "eff_spinenet_m0", "detection", 64, SCENES, LOOSE.scale_to_steps(1).replace(norm_momentum=0.5)
)


def config_of(task: str, first: Path) -> RunConfig:
    """Exact from the weights of `FIRST`; the tasks with samples or dropout as they are."""
    exact = task in ("detection", "segmentation")
    weights = str(first / FIRST.key / "model.safetensors")
    recipe = EXACT if exact else LOOSE
    start = weights if exact else None
    return RunConfig("eff_spinenet_m0", task, 64, SCENES, recipe, initial_weights=start)


def synchronised(first: Path) -> RunConfig:
    """A step of norms that learn their statistics; those of few values magnify rounding."""
    exact, side = config_of("detection", first), 256
    data = replace(SCENES, image_size=side)
    return replace(exact, recipe=LOOSE.scale_to_steps(1), image_size=side, data=data)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return record


def curve_of(folder: Path) -> list[list[float]]:
    with open(folder / "curve.csv", newline="") as handle:
        return [[float(value) for value in row[:-1]] for row in list(csv.reader(handle))[1:]]


def assert_close(first: Path, second: Path, limit: float = 1e-5) -> None:
    """Curves, weights and statistics agree to `limit`."""
    for row, other in zip(curve_of(first), curve_of(second), strict=True):
        assert row == pytest.approx(other, rel=limit)
    weights, others = weights_of(first), weights_of(second)
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=limit, atol=limit / 10, msg=name)


# --- parts of a batch -----------------------------------------------------------------------


def batch_of(task: str, size: int = 64) -> Batch:
    """Seven images with different numbers of objects, or of pixels that count."""
    dataset = open_dataset(SCENES, "train", task)
    loader = training_loader(dataset, size, 7, Augmentation((0.8, 1.25), 0.5), 0, 0, 1, task=task)
    (batch,) = loader
    if task == "segmentation":
        batch.targets[0]["semantic"][: size // 2] = SEMANTIC_IGNORE
    return batch


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("eff_spinenet_m0", "detection"),
        ("eff_spinenet_m0", "classification"),
        ("eff_spinenet_m0", "segmentation"),
        ("mobilenetv3_small_ssdlite", "detection"),
    ],
)
def test_parts_of_a_batch_add_up_to_the_batch(name: str, task: str) -> None:
    recipe = EXACT.replace(steps=2, norm_freeze_steps=2, batch_size=7)
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    still = {"stochastic_depth": 0.0} if "stochastic_depth" in known_options(name) else {}
    given = create_model(name, task=task, num_classes=7, **still)
    batch = batch_of(task)
    for layer in given.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.5
    given.train()(batch.images, batch.targets)  # as `FIRST` does
    ends = []
    for size in (None, 3, 4):  # of 7: at once, in three parts and in two
        model = prepare_model(copy.deepcopy(given), recipe, accelerator)
        steps = train_steps(
            model, build_optimizer(model, recipe), [batch, batch], recipe, accelerator, 0, 0, size
        )
        losses = [one for checked in steps for one in checked.values()]
        ends.append((losses, model.state_dict()))
    (losses, weights), *in_parts = ends
    assert losses[0] != losses[1]
    for part_losses, part_weights in in_parts:
        for whole, parts in zip(losses, part_losses, strict=True):
            assert parts == pytest.approx(whole, rel=1e-5)
        for key, value in weights.items():
            torch.testing.assert_close(part_weights[key], value, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("name", "size"),
    [("eff_spinenet_m0", 64), ("eff_spinenet_m0", 96), ("mobilenetv2_mnasfpn", 96)]
    + [("mobilenetv3_small_ssdlite", size) for size in (64, 96)],
)
def test_what_losses_are_means_over_is_counted_as_the_losses_do(name: str, size: int) -> None:
    """The count alone, without the network, divides the losses' sums as the model does."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=7).train()
    batch = batch_of("detection", size)
    counts = [model.loss_count(batch.images[i : i + 1], batch.targets[i : i + 1]) for i in range(7)]
    count = model.loss_count(batch.images, batch.targets)
    assert sum(counts) == count > 0
    with torch.no_grad():
        logits, codes, anchors = model.eval().network(batch.images)
    losses = model.losses(logits, codes, anchors, batch.targets)
    alone = [
        model.losses(logits[i : i + 1], codes[i : i + 1], anchors, batch.targets[i : i + 1])
        for i in range(7)
    ]
    for key, value in losses.items():
        summed = sum(
            losses_[key] * model.loss_divisor(one)
            for losses_, one in zip(alone, counts, strict=True)
        )
        torch.testing.assert_close(summed / model.loss_divisor(count), value)


def test_parts_move_the_norms_statistics_as_far_as_the_batch() -> None:
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    norm = nn.BatchNorm2d(1)
    recipe = EXACT.replace(norm_momentum=0.9)
    prepared = prepare_model(norm, recipe, accelerator, parts=3).train()
    for _ in range(3):  # what is seen has mean 1: what is left of the old mean, 0, is the momentum
        prepared(torch.ones(2, 1, 4, 4))
    assert float(norm.running_mean) == pytest.approx(1 - 0.9)


def test_a_run_in_parts_says_so(one: Path, tmp_path: Path) -> None:
    config = config_of("detection", one)
    parts = train_run(config, tmp_path, progress=False, micro_batch=2)
    assert_close(parts.folder, one / config.key)
    assert record_of(parts.folder)["hardware"].endswith("; processes: 1, parts a step: 2")
    assert "parts" not in record_of(one / config.key)["hardware"]
    with pytest.raises(UserError, match="micro_batch is 0"):
        train_run(config, tmp_path, progress=False, micro_batch=0)


# --- two processes under torchrun -------------------------------------------------------------


def _strike_losses(rank: int, what: Any) -> None:
    """Let `what` happen in one process when it is to compute the losses of the third step."""
    backward, steps = loop._backward, itertools.count()

    def struck(*arguments: Any) -> dict[str, Tensor]:
        if next(steps) == 2 and int(os.environ["RANK"]) == rank:
            what()
        return backward(*arguments)

    loop._backward = struck  # type: ignore[assignment]


def _break() -> None:
    raise RuntimeError("a mistake in the losses")


NORMS = [
    (kind, dtype, share)
    for kind in (nn.BatchNorm2d, BatchNormAct2d)
    for dtype in (torch.float32, torch.bfloat16)
    for share in (0, 2)  # of five images, for the first process
]


def _norm_differences(rank: int) -> list[list[float]]:
    """How far a process's part of a synchronised norm is from torch's norm over all images."""
    found = []
    for kind, dtype, share in NORMS:
        torch.manual_seed(0)
        whole = kind(6, eps=1e-3)
        nn.init.uniform_(whole.weight, 0.5, 1.5)
        nn.init.normal_(whole.bias)
        own = synchronise_norms(nn.Sequential(copy.deepcopy(whole)), torch.device("cpu"))
        images = (3 * torch.randn(5, 6, 7, 9) + 10).to(dtype).requires_grad_()
        gradient = torch.randn(5, 6, 7, 9).to(dtype)
        part = slice(share) if rank == 0 else slice(share, None)
        expected = whole(images)
        expected.backward(gradient)
        given = images.detach()[part].requires_grad_()
        result = own(given)
        result.backward(gradient[part])
        by_weights = torch.stack([own[0].weight.grad, own[0].bias.grad])
        torch.distributed.all_reduce(by_weights)
        own(given[:0]).sum().backward()  # no process has any: nothing is learnt
        pairs = [
            (result, expected[part]),
            (given.grad, images.grad[part]),
            (by_weights, torch.stack([whole.weight.grad, whole.bias.grad])),
            (own[0].running_mean, whole.running_mean),
            (own[0].running_var, whole.running_var),
        ]
        found.append(
            [float((a - b).detach().float().norm() / max(1.0, b.float().norm())) for a, b in pairs]
        )
    return found


STRUCK = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "told to stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "breaks": _break,
}


def _in_pairs(root: Path, one: Path) -> None:
    """The cases in which something happens to one of two copies of this process."""
    for name, what in STRUCK.items():
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        pids = []
        for rank in (0, 1):
            pids.append(os.fork())
            if pids[-1] == 0:
                os.environ.update(
                    {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
                try:
                    _strike_losses(1, what)
                    config = config_of("detection", one)
                    train_run(config, root / name, progress=False, checkpoint_seconds=0)
                except (Exception, Preempted) as error:
                    (root / f"{name} {rank}").write_text(f"{type(error).__name__}: {error}")
                finally:
                    os._exit(0)
        for pid in pids:
            os.waitpid(pid, 0)


def _under_torchrun(root: Path, one: Path) -> None:
    """What each of two processes does."""
    for each in (*(config_of(task, one) for task in TASKS), synchronised(one)):
        train_run(each, root / "whole", progress=False)
    (root / f"norms {os.environ['RANK']}").write_text(
        json.dumps(_norm_differences(int(os.environ["RANK"])))
    )
    # resumes what another pair began
    train_run(config_of("detection", one), root / "killed", progress=False)
    _run_commands(root, one)


def _run_commands(folder: Path, one: Path) -> None:
    weights = one / FIRST.key / "model.safetensors"
    scenes = "--data shapescenes --image-size 64"
    for command in (
        f"train {scenes} --images 4 --batch-size 4 --steps 1 --output {folder}/trained",
        f"evaluate {scenes} --images 5 --weights {weights} --output {folder}/evaluated "
        f"--record {folder}/evaluated/record.csv",
    ):
        sys.argv = ["effspinenet", *command.split()]
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process left of `FIRST` and of the exact runs."""
    runs = tmp_path_factory.mktemp("one")
    train_run(FIRST, runs, progress=False)
    for config in (*(config_of(task, runs) for task in TASKS[::3]), synchronised(runs)):
        train_run(config, runs, progress=False)
    return runs


@pytest.fixture(scope="module")
def two(one: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two processes left; stdout of the commands."""
    root = tmp_path_factory.mktemp("two")
    pairs = "import sys, test_several_processes as t; t._in_pairs(*map(t.Path, sys.argv[1:]))"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    for start in (("-c", pairs), (*torchrun, Path(__file__).stem)):
        done = run_python(*start, str(root), str(one))
        assert done.returncode == 0, done.stderr
    return root, done.stdout


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_two_processes_train_as_one(two: tuple[Path, str], one: Path, task: str) -> None:
    key = config_of(task, one).key
    folder = two[0] / "whole" / key
    assert_close(folder, one / key)
    record = record_of(folder)
    assert (record["steps"], record["images"]) == (STEPS, STEPS * EXACT.batch_size)
    assert record["hardware"].endswith("; processes: 2, parts a step: 1")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_synchronised_norm_is_that_of_all_images(two: tuple[Path, str], rank: int) -> None:
    """Its outputs, gradients and statistics, of unequal parts and of none."""
    for norm, found in zip(NORMS, json.loads((two[0] / f"norms {rank}").read_text()), strict=True):
        limit = 1e-5 if norm[1] == torch.float32 else 5e-3  # half of bfloat16's last digit
        assert len(found) == 5
        assert all(difference < limit for difference in found), norm  # no NaN either


def test_two_processes_share_the_statistics_of_norms(two: tuple[Path, str], one: Path) -> None:
    key = synchronised(one).key
    assert_close(two[0] / "whole" / key, one / key, 1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_evaluate_as_one(two: tuple[Path, str], one: Path, task: str) -> None:
    """Five images, two for one process and three for the other, each counted once."""
    folder = two[0] / "whole" / config_of(task, one).key
    model, _ = create_from_weights(folder / "model.safetensors")
    dataset = open_dataset(SCENES, "eval", task)
    alone = evaluate(model, dataset, task, 64, 8, progress=False)
    result = read_result(folder)
    assert result is not None
    found = json.loads((folder / "predictions.json").read_text())
    assert [f["image_id"] for f in found] == [p["image_id"] for p in alone.predictions]
    scores = [prediction["score"] for prediction in alone.predictions]
    assert [f["score"] for f in found] == pytest.approx(scores, rel=1e-3)  # batches of other sizes
    expected = alone.metrics
    if "AP" in expected:  # which of nearly equal scores is first may differ
        truth = dataset.ground_truth(masks=task == "instances")
        expected = coco_metrics(truth, found)
        if task == "instances":
            masks = coco_metrics(truth, found, "segm")
            expected |= {f"{name}_mask": value for name, value in masks.items()}
    assert result.metrics == pytest.approx(expected, rel=1e-3, nan_ok=True)


def test_processes_told_to_stop_stop_together_and_one_alone_resumes(
    two: tuple[Path, str], one: Path
) -> None:
    root, _ = two
    said = [(root / f"told to stop {rank}").read_text() for rank in (0, 1)]
    assert said == [
        "Preempted: stopped after step 3 by a signal to another process; the same command resumes "
        "there",
        "Preempted: stopped after step 3 by SIGTERM; the same command resumes there",
    ]
    config = config_of("detection", one)
    newest = list_checkpoints(root / "told to stop" / config.key)[0]
    assert newest.name == "checkpoint-3.pt"
    train_run(config, root / "told to stop", progress=False)
    assert_close(root / "told to stop" / config.key, one / config.key)


@pytest.mark.parametrize("name", ["killed", "breaks"])
def test_a_lost_process_ends_the_run_with_its_last_checkpoint(
    two: tuple[Path, str], one: Path, name: str
) -> None:
    root, _ = two
    assert (
        (root / f"{name} 0")
        .read_text()
        .startswith(
            "Preempted: another process of this run died; the same command resumes from the last "
            "checkpoint"
        )
    )
    if name == "breaks":
        assert (root / "breaks 1").read_text() == "RuntimeError: a mistake in the losses"
        return
    key = config_of("detection", one).key  # two processes have resumed it
    names = [path.name for path in list_checkpoints(root / "killed" / key)]
    assert names == [f"checkpoint-{STEPS}.pt", "checkpoint-2.pt"]
    assert_close(root / "killed" / key, one / key)


def test_the_commands_run_under_torchrun_and_speak_once(two: tuple[Path, str], one: Path) -> None:
    root, said = two
    (folder,) = [path for path in (root / "trained").iterdir() if path.is_dir()]
    assert record_of(folder)["steps"] == 1
    assert "processes: 2" in record_of(folder)["hardware"]
    lines = ("Run: ", "Weights: ", "Predictions: ", "Record: ", "AP50 ")
    assert [said.count(text) for text in lines] == [1, 1, 1, 1, 2]  # both print the metrics
    metrics = json.loads((root / "evaluated" / "metrics.json").read_text())
    assert len((root / "evaluated" / "record.csv").read_text().splitlines()) == 1 + len(metrics)


if __name__ == "__main__":
    _under_torchrun(*map(Path, sys.argv[1:]))
