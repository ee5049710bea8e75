"""Runs that are killed, told to stop, starved or poisoned end as those that were left alone."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from effspinenet_lib import experiments
from effspinenet_lib.data import DataConfig
from effspinenet_lib.errors import (
    PREEMPTED_EXIT,
    DataError,
    Preempted,
    TrainingError,
    UserError,
)
from effspinenet_lib.experiments import reproduction
from effspinenet_lib.files import write_json
from effspinenet_lib.training import checkpoint, device, loop, preemption
from effspinenet_lib.training import log as log_module
from effspinenet_lib.training import run as run_module
from effspinenet_lib.training.checkpoint import list_checkpoints, load_checkpoint
from effspinenet_lib.training.log import (
    DIVERGED_FACTOR,
    DIVERGED_ROWS,
    TrainingLog,
    refuse_divergence,
)
from effspinenet_lib.training.preemption import Preemption, handle_preemption
from effspinenet_lib.training.recipes import get_recipe
from effspinenet_lib.training.run import RunConfig, RunResult, train_run

STEPS, STRUCK = 5, 3  # the fourth step is the one in which something happens
SCENES = DataConfig("shapescenes", train_images=6, eval_images=2, image_size=64)
# float32: at 64 pixels the coarsest level is one value, on which torch's bfloat16 layers on CPUs
# do not give the same numbers every time.
RECIPE = (
    get_recipe("smoke_detection")
    .scale_to_steps(STEPS)
    .replace(precision="float32", learning_rate=0.001, batch_size=2)
)
CONFIGS = {
    task: RunConfig(
        "eff_spinenet_m0",
        task,
        64,
        SCENES,
        # one object an image leaves the classes' coarsest norm one value an image
        RECIPE.replace(
            batch_size=4 if task == "classification" else 2,
            ema_decay=0.9 if task == "segmentation" else None,
        ),
    )
    for task in ("detection", "instances", "classification", "segmentation")
}
DETECTION = CONFIGS["detection"]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def curve_of(folder: Path) -> list[list[str]]:
    """The curve without its last column, the speed."""
    with open(folder / "curve.csv", newline="") as handle:
        return [row[:-1] for row in csv.reader(handle)]


def steps_of(folder: Path) -> list[int]:
    return [load_checkpoint(path).step for path in list_checkpoints(folder)]


def assert_same_end(result: RunResult, expected: RunResult) -> None:
    """The same weights, predictions, metrics and curve, to the last bit."""
    first, second = weights_of(result.folder), weights_of(expected.folder)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("metrics.json", "predictions.json"):
        assert (result.folder / name).read_bytes() == (expected.folder / name).read_bytes(), name
    assert curve_of(result.folder) == curve_of(expected.folder)


# --- what happens to the runs, each in a process of its own ---------------------------------


def strike(action: Callable[[], object]) -> None:
    """Do something in the middle of a step."""
    rate_at = loop.learning_rate_at

    def struck(recipe: Any, step: int) -> float:
        if step == STRUCK:
            action()
        return rate_at(recipe, step)

    loop.learning_rate_at = struck


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_loader() -> None:
    (loader,) = multiprocessing.active_children()
    os.kill(loader.pid, signal.SIGKILL)
    time.sleep(60)  # torch tells of the death wherever the process is


def stop_all() -> None:
    """As schedulers and terminals do, which tell every process of a job."""
    (loader,) = multiprocessing.active_children()
    signals = (
        "import os, sys; loader, run = map(int, sys.argv[1:]);"
        "[os.kill(pid, number) for pid, number in ((loader, 2), (loader, 15), (run, 15))]"
    )
    subprocess.run([sys.executable, "-c", signals, str(loader.pid), str(os.getpid())])
    time.sleep(0.5)  # a worker that ends is noticed in that time
    assert loader.is_alive()


def poison() -> None:
    backward = loop._backward

    def spoilt(model: Any, batch: Any, *arguments: Any) -> Any:
        batch.images.fill_(math.inf)
        return backward(model, batch, *arguments)

    loop._backward = spoilt


def ruin_weights() -> None:
    """A loss that is finite with a gradient that is not."""
    backward = loop._backward

    def spoilt(model: Any, *arguments: Any) -> Any:
        losses = backward(model, *arguments)
        next(model.parameters()).grad.fill_(math.inf)
        return losses

    loop._backward = spoilt


def train(config: RunConfig, runs: Path, **options: Any) -> int:
    """The exit code; what an error said goes to error.txt."""
    try:
        train_run(config, runs, progress=False, **{"checkpoint_seconds": 0, **options})
    except (UserError, Preempted) as error:
        (runs / "error.txt").write_text(str(error))
        return error.exit_code
    return 0


CASES: dict[str, tuple[Callable[[], None], RunConfig, dict[str, Any]]] = {
    **{task: (kill_self, config, {}) for task, config in CONFIGS.items()},
    # no checkpoint before it is told to stop
    "told to stop": (
        lambda: os.kill(os.getpid(), signal.SIGTERM),
        DETECTION,
        {"checkpoint_seconds": 1000},
    ),
    "interrupted": (lambda: os.kill(os.getpid(), signal.SIGINT), DETECTION, {}),
    "loader killed": (kill_loader, DETECTION, {"workers": 1}),
    "all told to stop": (stop_all, DETECTION, {"workers": 1}),
    "poisoned": (poison, DETECTION, {}),
    "weights ruined": (ruin_weights, DETECTION, {}),
}


def in_forks(root: Path) -> None:
    """Every case in a copy of this process, which has loaded the library once; writes the ends."""
    ends = {}
    for name, (action, config, options) in CASES.items():
        runs = root / name
        runs.mkdir()
        child = os.fork()
        if not child:
            code = 1
            try:
                strike(action)
                code = train(config, runs, **options)
            finally:
                os._exit(code)
        ends[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    write_json(root / "ends.json", ends)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunResult]:
    """The runs that were left alone."""
    runs = tmp_path_factory.mktemp("alone")
    return {task: train_run(c, runs, progress=False) for task, c in CONFIGS.items()}


@pytest.fixture(scope="module")
def struck(alone: dict[str, RunResult], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the struck runs, a folder each, and `ends.json`, their exit codes."""
    root = tmp_path_factory.mktemp("struck")
    subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys; from test_interruptions import *; in_forks(Path(sys.argv[1]))",
            str(root),
        ],
        env=environment(),
        check=True,
    )
    return root


def environment() -> dict[str, str]:
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}


def end_of(struck: Path, name: str) -> int:
    ends: dict[str, int] = json.loads((struck / "ends.json").read_text())
    return ends[name]


# --- the tests ------------------------------------------------------------------------------


@pytest.mark.parametrize("task", CONFIGS)
def test_a_killed_run_of_any_task_resumes_to_the_bit(
    struck: Path, alone: dict[str, RunResult], task: str
) -> None:
    config, runs = CONFIGS[task], struck / task
    assert end_of(struck, task) == -signal.SIGKILL
    assert steps_of(runs / config.key) == [3, 2]
    if task == "detection":  # and the newest checkpoint is damaged
        newest = list_checkpoints(runs / config.key)[0]
        newest.write_bytes(newest.read_bytes()[:-1000])
    assert_same_end(train_run(config, runs, progress=False), alone[task])


def test_the_average_is_what_a_run_leaves(alone: dict[str, RunResult]) -> None:
    folder = alone["segmentation"].folder
    last, left = load_checkpoint(list_checkpoints(folder)[0]), weights_of(folder)
    assert last.ema_state is not None
    assert all(torch.equal(left[name], value) for name, value in last.ema_state.items())
    assert not all(torch.equal(left[name], v) for name, v in last.model_state.items())


@pytest.mark.parametrize(
    ("name", "code", "said", "done"),
    [
        ("told to stop", PREEMPTED_EXIT, "stopped after step 4 by SIGTERM", 4),
        ("interrupted", PREEMPTED_EXIT, "stopped after step 4 by SIGINT", 4),
        ("loader killed", DataError.exit_code, "a data loading worker died", 3),
        (
            "all told to stop",
            PREEMPTED_EXIT,
            "stopped after step 4 by SIGTERM",
            4,
        ),
        ("weights ruined", TrainingError.exit_code, "weights are not finite after step 4", 3),
        ("poisoned", TrainingError.exit_code, "the loss of step 4 is not finite", 3),
    ],
)
def test_a_run_that_ends_early_says_why_and_resumes_to_the_bit(
    struck: Path, alone: dict[str, RunResult], name: str, code: int, said: str, done: int
) -> None:
    runs = struck / name
    assert end_of(struck, name) == code
    message = (runs / "error.txt").read_text()
    assert said in message
    assert "\n" not in message
    assert steps_of(runs / DETECTION.key)[0] == done
    assert_same_end(train_run(DETECTION, runs, progress=False), alone["detection"])


@pytest.mark.parametrize("asked", [False, True], ids=["not asked", "asked to stop"])
def test_an_accelerator_checks_losses_once_in_some_steps(
    alone: dict[str, RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """Only checked states are saved, and a resumed run is still the same to the bit."""
    monkeypatch.setattr(loop, "loss_check_steps", lambda device: 2)
    saved: list[int] = []
    save = checkpoint.save_checkpoint

    def watch(folder: Path, state: Any, kept: int) -> Path:
        saved.append(state.step)
        return save(folder, state, kept)

    monkeypatch.setattr(checkpoint, "save_checkpoint", watch)
    if asked:
        strike_once = iter([True])
        rate_at = loop.learning_rate_at

        def struck(recipe: Any, step: int) -> float:
            if step == 2 and next(strike_once, False):
                os.kill(os.getpid(), signal.SIGTERM)
            return rate_at(recipe, step)

        monkeypatch.setattr(loop, "learning_rate_at", struck)
        with pytest.raises(Preempted, match="stopped after step 3"):
            train_run(DETECTION, tmp_path, progress=False, checkpoint_seconds=0)
        assert saved == [2, 3]
    result = train_run(DETECTION, tmp_path, progress=False, checkpoint_seconds=0)
    assert saved == ([2, 3, 4, 5] if asked else [2, 4, 5])
    assert_same_end(result, alone["detection"])


def test_a_bad_loss_found_late_names_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "loss_check_steps", lambda device: 4)
    backward, steps = loop._backward, itertools.count(1)

    def spoilt(model: Any, batch: Any, *arguments: Any) -> Any:
        if next(steps) == 2:
            batch.images.fill_(math.inf)
        return backward(model, batch, *arguments)

    monkeypatch.setattr(loop, "_backward", spoilt)
    with pytest.raises(TrainingError, match=r"loss of step 2 is not finite .*; images \d+, \d+;"):
        train_run(DETECTION, tmp_path, progress=False, checkpoint_seconds=0)
    assert steps_of(tmp_path / DETECTION.key) == []


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of its own on `folder`, or a skip where none can be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no small file system can be mounted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_the_checkpoints_before(
    alone: dict[str, RunResult], tmp_path: Path
) -> None:
    size = list_checkpoints(alone["detection"].folder)[0].stat().st_size
    with small_disk(tmp_path, int(2.8 * size)):  # two are kept while the third is written
        with pytest.raises(UserError, match="No space left on device") as caught:
            train_run(DETECTION, tmp_path, progress=False, checkpoint_seconds=0)
        assert "\n" not in str(caught.value)
        folder = tmp_path / DETECTION.key
        assert steps_of(folder) == [2, 1]
        assert not list(folder.glob(".*.tmp"))
        remount = ["mount", "-o", f"remount,size={10 * size}", str(tmp_path)]
        subprocess.run(remount, check=True)
        assert_same_end(train_run(DETECTION, tmp_path, progress=False), alone["detection"])


def test_a_diverging_run_keeps_the_checkpoints_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, steps = loop._backward, itertools.count(1)

    def rising(*arguments: Any) -> dict[str, Tensor]:
        factor = 1000.0 if next(steps) > 5 else 1.0
        return {name: factor * loss for name, loss in backward(*arguments).items()}

    monkeypatch.setattr(loop, "_backward", rising)
    monkeypatch.setattr(log_module, "ROW_STEPS", 1)
    monkeypatch.setattr(log_module, "DIVERGED_ROWS", 2)
    config = replace(DETECTION, recipe=RECIPE.scale_to_steps(12))
    with pytest.raises(TrainingError, match=r"up to step 7 .* checkpoints are of before"):
        train_run(config, tmp_path, progress=False, checkpoint_seconds=0, checkpoints=3)
    assert steps_of(tmp_path / config.key) == [5, 4, 3]


@pytest.mark.parametrize(
    ("profile", "asked", "given"), [("paper", None, 2), ("paper", 7, 7), ("smoke", None, None)]
)
def test_the_papers_batches_are_computed_in_parts_on_a_processor(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    profile: str,
    asked: int | None,
    given: int | None,
) -> None:
    seen: list[tuple[int, int | None]] = []

    def take(configs: list[RunConfig], *given: Any) -> list[Any]:
        seen.extend((config.recipe.batch_size, given[-1]) for config in configs)
        return []

    annotations = tmp_path / "annotations"
    annotations.mkdir()
    for split in ("train2017", "val2017"):
        (annotations / f"instances_{split}.json").write_text("{}")
    parameters = experiments.resolve_parameters(
        profile, tmp_path, tmp_path / "results", accelerator="cpu", seeds=0
    )
    monkeypatch.setattr(reproduction, "run_many", take)
    monkeypatch.setattr(reproduction, "cost_rows", lambda rows: [])
    experiments.reproduce("table-08", parameters, progress=False, micro_batch=asked)
    assert seen == [(256 if profile == "paper" else 4, given)] * 2


def test_a_launcher_that_is_told_to_stop_lets_its_runs_save(tmp_path: Path) -> None:
    endless = replace(DETECTION, recipe=RECIPE.scale_to_steps(10_000))
    write_json(tmp_path / "request.json", endless.to_dict())
    script = (
        "from effspinenet_lib.experiments import launcher\n"
        "from test_interruptions import *\n"
        "launcher.usable_cores = lambda: 1\n"
        "config = RunConfig.from_dict(json.load(open(sys.argv[1])))\n"
        "try:\n"
        "    with launcher.open_pool('local', 1, 'cpu') as pool:\n"
        "        runs = launcher.run_many([config], sys.argv[2], pool, False, False, 2)\n"
        "        list(runs)\n"
        "except (UserError, Preempted) as error: sys.exit(error.exit_code)"
    )
    runs = tmp_path / "runs"
    command = [sys.executable, "-c", script, str(tmp_path / "request.json"), str(runs)]
    parent = subprocess.Popen(command, env=environment())
    curve, deadline = runs / endless.key / "curve.csv", time.monotonic() + 300
    while not curve.exists():
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=300) == PREEMPTED_EXIT
    (newest, *_) = steps_of(runs / endless.key)
    assert newest >= 10
    asked = json.loads((runs / endless.key / "request.json").read_text())
    assert asked["options"]["micro_batch"] == 2
    said = (runs / endless.key / "worker.log").read_text().splitlines()[-1]
    assert said == f"error: stopped after step {newest} by SIGTERM; the same command resumes there"


def test_the_second_signal_acts_at_once_but_not_a_launchers_echo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now)
    asked = Preemption()
    with asked.in_steps():
        asked.take(signal.SIGTERM, None)
        asked.take(signal.SIGINT, None)
        assert asked.signal == "SIGTERM"
        now += preemption.SAME_SIGNAL_SECONDS
        for again in (signal.SIGINT, signal.SIGTERM):
            with pytest.raises(KeyboardInterrupt):
                asked.take(again, None)


def test_a_signal_between_steps_and_handlers_as_they_were() -> None:
    before = [signal.getsignal(number) for number in preemption.STOP_SIGNALS]
    with handle_preemption() as asked, pytest.raises(Preempted, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert asked.signal == ""
    assert [signal.getsignal(number) for number in preemption.STOP_SIGNALS] == before


def test_a_signal_does_not_hide_the_error_that_ended_the_steps() -> None:
    with handle_preemption() as asked:
        with pytest.raises(TrainingError), asked.in_steps():
            raise TrainingError("of the steps")
        os.kill(os.getpid(), signal.SIGTERM)  # waits, for the run is ending
    assert asked.signal == "SIGTERM"


@pytest.mark.parametrize(
    ("late", "diverged"),
    [
        ([DIVERGED_FACTOR + 0.1] * DIVERGED_ROWS, True),
        ([DIVERGED_FACTOR + 0.1] * (DIVERGED_ROWS - 1), False),
        ([DIVERGED_FACTOR - 0.1] * DIVERGED_ROWS, False),
        ([100.0] * (DIVERGED_ROWS - 1) + [1.0], False),
    ],
)
def test_a_run_has_diverged_when_its_loss_stays_far_above_the_usual(
    late: list[float], diverged: bool
) -> None:
    losses = [1.0] * DIVERGED_ROWS + [9.0, 1.0, 1.0] + late
    if not diverged:
        refuse_divergence(losses, 100)
        return
    with pytest.raises(TrainingError, match=r"diverged.* step 100 .*lower the learning rate"):
        refuse_divergence(losses, 100)


def test_divergence_is_seen_over_an_interruption(tmp_path: Path) -> None:
    recipe = RECIPE.scale_to_steps(10_000)

    def add(start: int, rows: int, loss: float) -> None:
        losses = {step: {"box": loss} for step in range(start + 1, start + 10 * rows + 1)}
        with contextlib.closing(TrainingLog(tmp_path, recipe, start, {}, progress=False)) as log:
            log.add(losses)

    add(0, DIVERGED_ROWS, 1.0)
    add(10 * DIVERGED_ROWS, DIVERGED_ROWS - 1, 1000.0)
    with pytest.raises(TrainingError, match="diverged"):
        add(10 * (2 * DIVERGED_ROWS - 1), 1, 1000.0)


def test_too_little_memory_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(loop, "autocast", exhausted)
    with pytest.raises(TrainingError, match=r"too little memory for 2 images.*micro_batch"):
        train_run(DETECTION, tmp_path, progress=False)


def test_weights_of_another_task_give_the_backbone(
    alone: dict[str, RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = alone["detection"].folder / "model.safetensors"
    started: list[dict[str, Tensor]] = []
    prepare = device.prepare_model

    def take(model: Any, *arguments: Any) -> Any:
        started.append({name: value.clone() for name, value in model.state_dict().items()})
        return prepare(model, *arguments)

    monkeypatch.setattr(device, "prepare_model", take)
    config = replace(CONFIGS["segmentation"], initial_weights=str(path))
    train_run(config, tmp_path, max_steps=1, progress=False)
    given = weights_of(alone["detection"].folder)
    backbone = [name for name in started[0] if name.startswith("backbone.")]
    assert backbone
    assert all(torch.equal(started[0][name], given[name]) for name in backbone)
    with pytest.raises(UserError, match="backbone"):
        train_run(replace(config, model="eff_spinenet_m1"), tmp_path, max_steps=1, progress=False)


def test_a_signal_during_the_last_checkpoint_ends_the_run_before_its_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = run_module._save

    def save(*args: Any) -> None:
        saved(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_module, "_save", save)
    with pytest.raises(Preempted, match=f"stopped after step {RECIPE.steps} by SIGTERM"):
        train_run(DETECTION, tmp_path, progress=False, checkpoint_seconds=1e9)
    monkeypatch.undo()
    monkeypatch.setattr(run_module, "train_steps", lambda *args, **options: iter(()))
    assert train_run(DETECTION, tmp_path, progress=False).steps == RECIPE.steps
