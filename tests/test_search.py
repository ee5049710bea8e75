"""The search: its space and controllers, a record that loses no trial, and what is exported."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import launcher_fakes
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import effspinenet_lib as esn
from effspinenet_lib.cli import app
from effspinenet_lib.data import DataConfig
from effspinenet_lib.errors import (
    CheckpointError,
    DataError,
    TrainingError,
    UnknownName,
    UserError,
)
from effspinenet_lib.experiments.launcher import Outcome
from effspinenet_lib.models.cost import measure_cost
from effspinenet_lib.models.specs import (
    EQUAL_BETAS,
    LARGEST_BETA,
    LEARNED_BETAS,
    MODELS,
    SCALES,
    SP_DIMS,
    TOPOLOGY,
    betas_text,
    parse_betas,
)
from effspinenet_lib.models.specs import feature_dims as dims_of_one
from effspinenet_lib.results import ResultsStore, read_table, validate, write_table
from effspinenet_lib.search.controllers import (
    CONTROLLERS,
    Choices,
    Controller,
    Evolution,
    PolicySearch,
    RandomSearch,
    population_size,
)
from effspinenet_lib.search.export import export_distribution
from effspinenet_lib.search.search import (
    Search,
    get_search,
    plan_trials,
    run_references,
    run_search,
)
from effspinenet_lib.search.space import (
    detector_costs,
    feature_dims,
    sample_betas,
    space_claims,
)
from effspinenet_lib.training.config import RunConfig
from effspinenet_lib.training.recipes import get_recipe
from effspinenet_lib.training.run import RunResult

SMOKE, PROXY = get_search("smoke"), get_search("proxy")
BLOCKS, CHOICES = 18, 5
TRIALS = 50  # of the proxy


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path, "smoke")


# Trials that take no training


def ap_of(config: RunConfig) -> float:
    return sum(parse_betas(config.model_options["betas"])) / 10


def diverges_at_20(config: RunConfig) -> float:
    """Fail wherever block 1 has the largest beta."""
    if config.model_options["betas"].startswith("20-"):
        raise TrainingError("the loss of step 3 is not finite")
    return 1.0


class Here:
    """Runs trials in this process; knows the betas of those that ran."""

    def __init__(self, trial: Callable[[RunConfig], float] = ap_of, precision: str = "float32"):
        self.trial, self.precision = trial, precision
        self.started: list[str] = []

    def __call__(self, configs: Sequence[RunConfig]) -> Iterator[Outcome]:
        for config in configs:
            self.started.append(config.model_options["betas"])
            log = Path("worker.log")
            try:
                metrics = {"AP": self.trial(config)}
            except UserError as error:
                yield Outcome(config, 1, log, error=error)
                continue
            record = {"run": config.key, "wall_seconds": 0.5, "precision": self.precision}
            result = RunResult(Path(config.key), metrics, record)
            yield Outcome(config, 1, log, result)


def record(store: ResultsStore) -> list[tuple[object, ...]]:
    columns = ["method", "trial", "step", "betas", "AP", "reward", "entropy", "run", "parameters"]
    return [tuple(row) for row in store.trials()[columns].fillna(-1).to_numpy().tolist()]


def searched(search: Search, runner: Here | None = None, **options: Any) -> Any:
    return run_search(search, runner or Here(), progress=False, **options)


def referenced(settings: Any, store: ResultsStore, named: Any, seeds: Any, runner: Here) -> Any:
    return run_references(settings, store, named, seeds, runner, progress=False)


# The record


@pytest.mark.parametrize("method", sorted(CONTROLLERS))
def test_a_search_in_two_parts_is_the_search_in_one(tmp_path: Path, method: str) -> None:
    whole, parts = (ResultsStore(tmp_path / name, "smoke") for name in ("whole", "parts"))
    search = Search(SMOKE, whole, method, seed=3, trials=8)
    searched(search)
    for trials in (4, 8):
        searched(replace(search, store=parts, trials=trials))
    assert record(parts) == record(whole)
    assert len(record(whole)) == 8


@pytest.mark.parametrize("method", ["ppo", "evolution"])
def test_a_search_continues_past_trials_that_diverge(store: ResultsStore, method: str) -> None:
    rows = searched(Search(SMOKE, store, method, seed=1, trials=24), Here(diverges_at_20))
    diverged = rows["betas"].str.startswith("20-")
    assert 0 < diverged.sum() < 24
    assert set(rows.loc[diverged, "state"]) == {"failed"}
    assert rows.loc[diverged, "reward"].isna().all()
    assert rows.loc[diverged, "note"].str.contains("not finite|as trial").all()
    assert "failed" not in set(rows.loc[~diverged, "state"])


def test_a_trial_without_an_ap_has_failed(store: ResultsStore) -> None:
    (row,) = searched(Search(SMOKE, store, "random", 0, 1), Here(lambda _: math.nan)).itertuples()
    assert (row.state, row.note) == (
        "failed",
        "no AP: there is nothing to find in the held-out images",
    )


@pytest.mark.parametrize("error", [DataError("a.jpg: not found"), UserError("no space left")])
def test_what_is_no_fault_of_a_trial_ends_the_search_which_resumes(
    store: ResultsStore, error: UserError
) -> None:
    ended = []

    def breaks(config: RunConfig) -> float:
        if len(ended) == 1:
            raise error
        ended.append(config)
        return 1.0

    search = Search(SMOKE, store, "ppo", seed=0, trials=4)
    with pytest.raises(type(error), match=str(error)):
        searched(search, Here(breaks))
    assert len(record(store)) == 1
    runner = Here()
    assert searched(search, runner)["state"].tolist() == ["finished"] * 4
    assert len(runner.started) == 3


def test_a_sample_that_was_trained_before_takes_its_result(store: ResultsStore) -> None:
    """State lost, record kept: drawn again from the same seed, every sample is known."""
    search = Search(SMOKE, store, "random", seed=0, trials=4)
    searched(search)
    known = store.trials()
    other = ResultsStore(store.results_dir / "other", "smoke")
    other.add_trials(known.assign(method="reference").to_dict("records"))
    runner = Here()
    rows = searched(replace(search, store=other), runner)
    assert set(rows["state"]) == {"duplicate"}
    assert rows["AP"].tolist() == known["AP"].tolist()
    assert runner.started == []


def test_equal_samples_of_one_batch_are_trained_once(
    store: ResultsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RandomSearch, "ask", lambda self, count: [(1,) * 18] * count)
    runner = Here(precision="bfloat16")
    rows = searched(Search(SMOKE, store, "random", 0, 4), runner)
    assert rows["state"].tolist() == ["finished", *["duplicate"] * 3]
    assert rows["precision"].tolist() == ["bfloat16"] * 4
    assert len(runner.started) == 1


def test_a_record_holds_trials_of_one_kind_whoever_chose_them(store: ResultsStore) -> None:
    search = Search(SMOKE, store, "random", seed=0, trials=2)
    searched(search)
    before = record(store)
    another = replace(search, method="ppo")
    # norms that see other images give other results, and the runs have the same keys
    in_parts = replace(another, settings=SMOKE.on(None, micro_batch=2))
    changed = replace(search, settings=replace(SMOKE, image_size=128), trials=4)
    for force in (False, True):
        for other, said in (
            (in_parts, "trial 0 of random with seed 0 was made with other settings"),
            (replace(another, penalty=-0.07), "trial 0 of random .* another penalty"),
            (replace(in_parts, method="random", seed=1), "other settings"),
        ):
            with pytest.raises(UserError, match=said):
                searched(other, force=force)
    with pytest.raises(UserError, match=r"other settings.*--force"):
        searched(changed)
    with pytest.raises(UserError, match="other settings"):
        referenced(in_parts.settings, store, {"x": (1,) * 18}, [0], Here())
    assert record(store) == before
    assert len(searched(changed, force=True)) == 4
    assert SMOKE.on(None, batch_size=2).description.endswith("smoke_search scaled to batch 2")


def test_references_and_failed_trials_have_no_penalty(store: ResultsStore) -> None:
    referenced(SMOKE, store, {"x": (1,) * 17 + (20,)}, [0], Here())
    search = Search(SMOKE, store, "random", seed=0, trials=8, penalty=-0.07)
    searched(search, Here(diverges_at_20))
    rows = searched(replace(search, trials=10))
    assert len(rows) == 10
    assert "failed" in set(rows["state"])
    (equal,) = plan_trials(SMOKE, [EQUAL_BETAS], "reference", 0, 0, 0)
    worked = rows[rows["state"] != "failed"]
    ratio = worked["multi_adds"].astype(float) / equal["multi_adds"]
    np.testing.assert_allclose(worked["reward"], worked["AP"] * ratio**-0.07)


@pytest.mark.parametrize("exponent", [float("-inf"), float("nan"), 0.07])
def test_an_invalid_penalty_is_refused(tmp_path: Path, exponent: float) -> None:
    given = ["search", f"--penalty={exponent}", "--results-dir", str(tmp_path)]
    error = CliRunner().invoke(app, given).exception
    assert isinstance(error, UserError)
    assert str(error).startswith(
        f"the penalty is {exponent}; it must be 0 or a finite number below"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lost", ["all", "a learned one"])
def test_a_record_that_lost_trials_is_refused(store: ResultsStore, lost: str) -> None:
    search = Search(SMOKE, store, "ppo", seed=0, trials=6)
    searched(search)
    path = store.folder / "search_trials.csv"
    lines = path.read_text().splitlines(keepends=True)
    if lost == "all":
        path.unlink()
    else:
        path.write_text("".join(lines[:2] + lines[3:]))
    said = "lacks 4 .* first of them 0;" if lost == "all" else "lacks 1 .* first of them 1;"
    with pytest.raises(CheckpointError, match=f"{said}.*--force"):
        searched(search)
    assert len(searched(search, force=True)) == 6


def test_trials_of_the_last_batch_that_the_record_lost_run_again(store: ResultsStore) -> None:
    search = Search(SMOKE, store, "ppo", seed=0, trials=6)
    searched(search)
    path, before = store.folder / "search_trials.csv", record(store)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    searched(search)
    assert record(store) == before


def test_a_lost_or_broken_state_is_refused_and_the_record_kept(store: ResultsStore) -> None:
    search = Search(SMOKE, store, "ppo", seed=0, trials=2)
    searched(search)
    before = record(store)
    search.state_file.write_bytes(search.state_file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is no state of ppo"):
        searched(replace(search, trials=4))
    search.state_file.unlink()
    with pytest.raises(CheckpointError, match="state of the controller is missing"):
        searched(replace(search, trials=4))
    assert record(store) == before
    assert len(searched(search)) == 2, "a finished search needs no state"


def test_two_processes_do_not_run_one_search(store: ResultsStore) -> None:
    from filelock import FileLock

    search = Search(SMOKE, store, "random", seed=0, trials=2)
    search.state_file.parent.mkdir(parents=True)
    with (
        FileLock(f"{search.state_file}.lock"),
        pytest.raises(UserError, match="another process"),
    ):
        searched(search)


def test_references_are_run_once_for_each_seed(store: ResultsStore) -> None:
    named = {"equal": (1,) * 18, "rising": (1,) * 9 + (20,) * 9, "also equal": (1,) * 18}
    runner = Here()
    for seeds in ([0], [0, 1]):
        rows = referenced(SMOKE, store, named, seeds, runner)
    keys = rows[["seed", "trial", "note", "state"]].to_numpy().tolist()
    assert keys == [
        [seed, trial, name, "finished"]
        for seed in (0, 1)
        for trial, name in enumerate(("equal", "rising"))
    ]
    assert len(set(rows["run"])) == len(runner.started) == 4


def test_references_that_failed_are_run_again_under_their_numbers(store: ResultsStore) -> None:
    named = {"equal": (1,) * 18, "falling": (20,) * 9 + (1,) * 9, "rising": (1,) * 9 + (20,) * 9}
    states = [
        referenced(SMOKE, store, named, [0], Here(trial))["state"].tolist()
        for trial in (diverges_at_20, ap_of)
    ]
    assert states == [["finished", "failed", "finished"], ["finished"] * 3]
    rows = store.trials()
    assert rows["trial"].tolist() == [0, 1, 2]
    assert rows["note"].tolist() == list(named)


def test_killed_at_three_moments_it_ends_with_every_trial_once(tmp_path: Path) -> None:
    """Processes of the launcher, killed with the search in the middle of a batch and between."""
    whole, killed = (ResultsStore(tmp_path / name, "smoke") for name in ("whole", "killed"))
    runs = killed.runs_folder
    runs.mkdir(parents=True)
    command = [sys.executable, launcher_fakes.__file__, str(killed.results_dir), "6"]
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    environment = {**os.environ, "PYTHONPATH": path}

    def started() -> int:
        log = runs / "started.log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def start(ended: int) -> subprocess.Popen[bytes]:
        (runs / launcher_fakes.LET_GO).write_text(str(ended))
        return subprocess.Popen([*command, "is_held", "local"], env=environment)

    for ended in (0, 2, 3):  # in the first batch, between two batches, in the middle of a batch
        before, done = started(), len(record(killed))
        process = start(ended)
        limit = time.monotonic() + 300
        while len(record(killed)) < ended or started() < before + ended - done + 1:
            assert time.monotonic() < limit
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(record(killed)) == ended
        # its runs notice that it is gone
        processes = (runs / "processes.log").read_text().split()
        while any(map(launcher_fakes.is_running, processes)):
            assert time.monotonic() < limit
            time.sleep(0.02)
    assert start(6).wait(timeout=300) == 0
    searched(Search(SMOKE, whole, "ppo", seed=0, trials=6))
    assert record(killed) == record(whole)
    # at most the two that each kill cut off ran again
    assert started() <= 6 + 3 * 2


# On the command line


def on_the_command_line(monkeypatch: pytest.MonkeyPatch, runner: Here) -> None:
    def run_many(configs: Sequence[RunConfig], **_: Any) -> Iterator[Outcome]:
        return runner(configs)

    monkeypatch.setattr("effspinenet_lib.experiments.launcher.run_many", run_many)


def test_the_command_line_says_why_a_trial_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_command_line(monkeypatch, Here(diverges_at_20))
    monkeypatch.chdir(tmp_path)
    for command in (["search", "--method", "random", "--trials", "12"], ["search", "compare"]):
        result = CliRunner().invoke(app, [*command, "--profile", "smoke", "--results-dir", "found"])
        assert result.exit_code == 0, result.output
        failed = "random with seed 0 failed: the loss of step 3 is not finite"
        assert (failed in result.output) == ("random" in command)


def test_compare_shows_chosen_distributions_without_the_runs_that_chose_them(
    store: ResultsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched(Search(SMOKE, store, "random", 0, 4))
    on_the_command_line(monkeypatch, Here())
    command = ["search", "compare", "--profile", "smoke", "--seeds", "3"]
    result = CliRunner().invoke(app, [*command, "--results-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("│")]
    seeds = {cells[1].strip(): int(cells[2]) for cells in (line.split("│") for line in lines)}
    assert seeds == {"SP-EfficientNet-B0": 3, "Eff-SpineNet-D0": 3, "search's best": 2}


def test_the_papers_search_on_a_cpu_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folders = ["--data", str(tmp_path), "--results-dir", str(tmp_path)]
    result = CliRunner().invoke(
        app, ["search", "--profile", "paper", "--accelerator", "cpu", *folders]
    )
    assert isinstance(result.exception, UserError)
    assert "--micro-batch or --batch-size" in str(result.exception)


# Settings


def test_held_out_images_are_in_no_split_that_a_table_uses() -> None:
    assert PROXY.data.eval_split not in (PROXY.data.train_split, "train", "val")
    assert PROXY.config(LEARNED_BETAS, 0).to_dict()["data"]["eval_split"] == "search"


def test_the_papers_search_is_section_5_1_1s_on_the_users_folder(tmp_path: Path) -> None:
    found = get_search("paper").on(tmp_path)
    config = found.config(LEARNED_BETAS, seed=0)
    assert (found.trials, found.model, found.image_size) == (5_000, "eff_spinenet_d0", 512)
    assert (config.data.train_split, config.data.eval_split) == (
        "train2017-rest-7392",
        "train2017-held-7392",
    )
    assert (config.recipe.batch_size, config.recipe.steps) == (256, 4_500)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert get_search("paper").on(elsewhere).config(LEARNED_BETAS, 0).key == config.key
    scaled = get_search("paper").on(tmp_path, batch_size=64).config(LEARNED_BETAS, 0).recipe
    assert (scaled.batch_size, scaled.steps) == (64, 4 * 4_500)
    assert scaled.learning_rate == pytest.approx(0.28 / 4)


def test_a_search_is_refused_on_data_that_it_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name its folder with --data"):
        get_search("paper").on(None)
    with pytest.raises(UserError, match="does not exist"):
        get_search("paper").on(tmp_path / "missing")
    with pytest.raises(UserError, match="data of its own"):
        get_search("smoke").on(tmp_path)


# Controllers, on rewards whose optimum is known


def target(positions: int, seed: int) -> Callable[[Choices], float]:
    """A reward of 0 at one sample and below it elsewhere; positions differ in weight."""
    generator = np.random.default_rng(seed)
    best = generator.integers(CHOICES, size=positions)
    weight = generator.uniform(0.5, 1.5, size=positions)
    weight /= weight.sum() * (CHOICES - 1)
    return lambda sample: -float(weight @ np.abs(np.array(sample) - best))


def play(
    controller: Controller, reward: Callable[[Choices], float], budget: int, batch: int
) -> list[float]:
    gained: list[float] = []
    while len(gained) < budget:
        samples = controller.ask(batch)
        rewards = [reward(sample) for sample in samples]
        controller.tell(samples, rewards)
        gained += rewards
    return gained


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
def test_each_controller_finds_the_optimum_of_a_small_space(name: str) -> None:
    """Of the 125 samples of three blocks; random search draws 1,000 and misses it in e^-8."""
    controller = CONTROLLERS[name](3, CHOICES, 0, TRIALS)
    gained = play(controller, target(3, 0), budget=1000, batch=10)
    assert max(gained) == pytest.approx(0, abs=1e-12)


def test_ppo_beats_random_search_by_a_margin() -> None:
    """18 blocks, 300 samples, three seeds. Measured: 0.13 from the optimum at random, under 0.06
    by PPO; its last samples, 0.43 on average at random, are within 0.1."""
    found: dict[str, tuple[list[float], list[float]]] = {"ppo": ([], []), "random": ([], [])}
    for seed in range(3):
        for name, (best, last) in found.items():
            controller = CONTROLLERS[name](BLOCKS, CHOICES, seed, TRIALS)
            gained = play(controller, target(BLOCKS, seed), 300, 10)
            best.append(max(gained))
            last.append(float(np.mean(gained[-40:])))
    assert np.mean(found["ppo"][0]) - np.mean(found["random"][0]) > 0.05
    assert np.mean(found["ppo"][1]) - np.mean(found["random"][1]) > 0.25


def test_a_policy_starts_uniform_and_loses_entropy_as_it_learns() -> None:
    controller = CONTROLLERS["ppo"](BLOCKS, CHOICES, 0, TRIALS)
    assert controller.entropy() == pytest.approx(math.log(CHOICES), abs=1e-6)
    play(controller, target(BLOCKS, 0), 150, 10)
    assert controller.entropy() < 0.9 * math.log(CHOICES)


def test_one_step_of_ppo_is_reinforce() -> None:
    """The first step's gradient, with the entropy left out, is that of log-probability times
    advantage, computed here from the policy's own probabilities."""
    controller = PolicySearch(4, CHOICES, 0, epochs=1)
    controller.entropy_weight, controller.clip_gradient_norm = 0.0, math.inf
    for parameter in controller.policy.parameters():  # away from the uniform start
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=controller.generator))
    samples, rewards = controller.ask(6), [1.0, 0.0, 2.0, 0.5, -1.0, 3.0]
    chosen, reward = torch.tensor(samples), torch.tensor(rewards)
    advantage = (reward - reward.mean()) / reward.std(correction=0)
    logits = controller.policy.distribution(chosen).logits
    picked = logits.log_softmax(-1).gather(2, chosen[..., None])[..., 0]
    expected = torch.autograd.grad(
        -(picked * advantage[:, None]).mean(), list(controller.policy.parameters())
    )
    seen: list[torch.Tensor] = []
    controller.optimizer.step = lambda: seen.extend(  # type: ignore[method-assign]
        p.grad.clone() for p in controller.policy.parameters()
    )
    controller.tell(samples, rewards)
    for given, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-7)


def taught(batches: Sequence[Sequence[float]]) -> list[torch.Tensor]:
    """The weights of a policy that learned from rewards alone, not from its entropy."""
    controller = PolicySearch(4, CHOICES, 0, epochs=3)
    controller.entropy_weight = 0.0
    for rewards in batches:
        controller.tell(controller.ask(len(rewards)), rewards)
    return list(controller.policy.parameters())


@pytest.mark.parametrize("reward", [0.1, 1.7, 1e-7, 0.0, -0.3, 1e6])
def test_equal_rewards_teach_a_policy_nothing(reward: float) -> None:
    for count in (3, 7, 10):
        for given, before in zip(taught([[reward] * count] * 3), taught([]), strict=True):
            assert torch.equal(given, before)


def test_rewards_that_differ_little_teach_what_they_do_without_what_they_share() -> None:
    """Float32 rounds those about 30 to a tenth of their differences here."""
    shared = taught([[30.00001, 30.00002, 30.00004], [30.00003, 30.00002, 30.00004]])
    alone = taught([[0.00001, 0.00002, 0.00004], [0.00003, 0.00002, 0.00004]])
    for one, other in zip(shared, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def differences(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("trials", "size"), [(1, 2), (4, 2), (20, 10), (50, 16), (5000, 16)])
def test_evolution_has_children_within_half_of_its_trials(trials: int, size: int) -> None:
    assert population_size(trials) == size
    controller = CONTROLLERS["evolution"](BLOCKS, CHOICES, 0, trials)
    parents = controller.ask(size)
    controller.tell(parents, [1.0] * size)
    (child,) = controller.ask(1)
    assert min(differences(child, parent) for parent in parents) == 1


def test_evolution_keeps_the_youngest_and_changes_one_choice() -> None:
    controller = Evolution(BLOCKS, CHOICES, 0)
    parents = controller.ask(40)
    controller.tell(parents, [float(index) for index in range(40)])
    assert [sample for sample, _ in controller.population] == parents[-16:]
    for child in controller.ask(50):
        assert min(differences(child, parent) for parent in parents[-16:]) == 1


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
def test_a_controller_continues_from_its_state(name: str) -> None:
    reward = target(BLOCKS, 0)
    first = CONTROLLERS[name](BLOCKS, CHOICES, 0, TRIALS)
    play(first, reward, 40, 10)
    saved = io.BytesIO()
    torch.save(first.state(), saved)
    saved.seek(0)
    second = CONTROLLERS[name](BLOCKS, CHOICES, 99, TRIALS)
    second.load(torch.load(saved, weights_only=True))
    assert play(second, reward, 40, 10) == play(first, reward, 40, 10)


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
def test_samples_cover_the_space_and_a_batch_of_failures_teaches_nothing(name: str) -> None:
    controller = CONTROLLERS[name](BLOCKS, CHOICES, 0, TRIALS)
    samples = controller.ask(60)
    assert {choice for sample in samples for choice in sample} == set(range(CHOICES))
    assert all(len(sample) == BLOCKS for sample in samples)
    controller.tell([], [])
    assert len(controller.ask(5)) == 5


# The space


def test_dimensions_are_those_of_the_models() -> None:
    betas = [*sample_betas(200, seed=1).tolist(), list(LEARNED_BETAS), list(EQUAL_BETAS)]
    for multiplier in (0.4, 1.0, 1.1):
        wanted = [list(dims_of_one(row, multiplier)) for row in betas]
        assert feature_dims(np.array(betas), multiplier).tolist() == wanted
    printed = [block.feature_dim for block in MODELS["eff_spinenet_d0"].backbone.blocks]
    assert feature_dims(np.array([LEARNED_BETAS])).tolist() == [printed]


def test_equation_4_keeps_the_computation_of_the_blocks_but_for_rounding() -> None:
    """Equation 2 as the paper approximates it, written out here: N^2 C^2 over the blocks."""
    sides = np.array([math.ceil(512 / 2**level) for level, _, _ in TOPOLOGY])
    dims = feature_dims(sample_betas(2000, seed=2))
    kept = (sides**2 * dims**2).sum(axis=1) / (sides**2 * np.array(SP_DIMS) ** 2).sum()
    assert abs(kept.mean() - 1) < 0.02
    assert kept.std() < 0.06


@pytest.mark.parametrize(
    ("scale", "size", "classes", "count"),
    [("D0", 512, 90, 2), ("M0", 96, 12, 2), ("D2", 768, 90, 1)],
)
def test_costs_are_those_of_the_built_model(
    scale: str, size: int, classes: int, count: int
) -> None:
    betas = np.concatenate([sample_betas(count, seed=2), [LEARNED_BETAS], [EQUAL_BETAS]])
    costs = detector_costs(betas, SCALES[scale], classes, size)
    for number, row in enumerate(betas.tolist()):
        with torch.device("meta"):
            name = f"eff_spinenet_{scale.lower()}"
            model = esn.create_model(name, num_classes=classes, betas=betas_text(row))
        cost = measure_cost(model, size)
        assert cost.multi_adds == costs.multi_adds[number]
        assert cost.authors_count == costs.authors_count[number]
        assert cost.parameters == costs.parameters[number]


def test_claims_on_the_space_are_counted_and_valid(tmp_path: Path) -> None:
    rows = space_claims(2000, seed=0)
    path = tmp_path / "search" / "space.csv"
    write_table(path, "space", rows)
    frame = read_table(path, "space").set_index("claim")
    costs = detector_costs(sample_betas(2000, seed=0), SCALES["D0"], 90, 512)
    with torch.device("meta"):
        target = measure_cost(esn.create_model("sp_efficientnet_b0"), 512)
    for claim, given, wanted in (
        ("multi-adds", costs.multi_adds, target.multi_adds),
        ("authors-count", costs.authors_count, target.authors_count),
    ):
        within = np.abs(given - wanted) <= 0.1 * wanted
        computed = frame.loc[f"{claim}-within-10-percent", "computed"]
        assert computed == pytest.approx(100 * within.mean(), abs=1e-3)
    fewer = 100 * (costs.parameters < target.parameters).mean()
    assert frame.loc["parameters-reduced", "computed"] == pytest.approx(fewer, abs=1e-3)
    assert not [problem for problem in validate(tmp_path) if "space.csv" in problem]


# Distributions as files


@pytest.fixture
def found(tmp_path: Path) -> Path:
    """The file of a distribution."""
    store = ResultsStore(tmp_path / "results", "smoke")
    store.add_trials(trials([5.0]))
    path = tmp_path / "found.json"
    export_distribution(store, path)
    return path


def trials(rewards: list[float], method: str = "ppo") -> list[dict[str, Any]]:
    drawn = [tuple(row) for row in sample_betas(len(rewards), seed=5).tolist()]
    planned = plan_trials(SMOKE, drawn, method, 0, 0, 0)
    return [
        {**row, "state": "finished", "attempts": 1, "AP": reward, "reward": reward}
        for row, reward in zip(planned, rewards, strict=True)
    ]


def test_a_distribution_stands_for_its_model_wherever_it_lies(found: Path, tmp_path: Path):
    betas = json.loads(found.read_text())["betas"]
    by_file = esn.create_model(str(found), num_classes=3)
    by_name = esn.create_model("eff_spinenet_m0", num_classes=3, betas=betas_text(betas))
    shapes = [
        {name: tuple(value.shape) for name, value in model.state_dict().items()}
        for model in (by_file, by_name)
    ]
    assert shapes[0] == shapes[1]
    moved = found.rename(tmp_path / "moved.json")
    recipe, data = get_recipe("smoke_detection"), DataConfig("shapescenes")
    keys = {
        RunConfig(str(moved), "detection", 64, data, recipe).key,
        RunConfig(
            "eff_spinenet_m0",
            "detection",
            64,
            data,
            recipe,
            model_options={"betas": betas_text(betas)},
        ).key,
    }
    assert len(keys) == 1
    config = RunConfig(str(moved), "detection", 64, data, recipe)
    assert RunConfig.from_dict(config.to_dict()).key == config.key


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"betas": [1, 2]}, DataError, "invalid distribution: betas are"),
        ({"feature_dims": [8] * 18}, DataError, "its betas give"),
        ({"format": "other"}, DataError, "not a resource distribution"),
        ({"model": "resnet50_fpn"}, UnknownName, "scale-permuted model"),
        ({"betas": [10**400] * 18}, DataError, f"whole numbers from 1 to {LARGEST_BETA}"),
        ({"origin": [1]}, DataError, "its origin is no object"),
        ({"origin": [["a", 1]]}, DataError, "its origin is no object"),
    ],
)
def test_a_file_that_is_no_distribution_is_refused(
    found: Path, change: dict[str, Any], error: type[Exception], message: str
):
    found.write_text(json.dumps({**json.loads(found.read_text()), **change}))
    with pytest.raises(error, match=message):
        esn.create_model(str(found))


def test_a_distribution_that_is_missing_or_has_betas_beside_it(found: Path, tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        esn.create_model(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="betas of its own"):
        esn.create_model(str(found), betas=betas_text(LEARNED_BETAS))


def test_the_best_trial_is_exported_and_no_reference(tmp_path: Path):
    store = ResultsStore(tmp_path, "smoke")
    store.add_trials(trials([1.0, 7.0, 3.0]))
    store.add_trials(trials([2.0, 9.0], "random"))
    store.add_trials(trials([99.0], "reference"))
    for method, reward in ((None, 9.0), ("ppo", 7.0)):
        found = export_distribution(store, tmp_path / "best.json", method)
        assert found.origin["reward"] == reward
    with pytest.raises(UserError, match="no finished trial of evolution"):
        export_distribution(store, tmp_path / "best.json", "evolution")


def test_the_papers_distribution_is_exported_with_what_remains(tmp_path: Path):
    path = tmp_path / "paper.json"
    result = CliRunner().invoke(
        app, ["search", "export", str(path), "--method", "paper", "--results-dir", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert written["betas"] == list(LEARNED_BETAS)
    assert written["feature_dims"] == list(dims_of_one(LEARNED_BETAS))
    assert written["origin"]["in_search_space"] is True
    with torch.device("meta"):
        given = esn.measure_cost(esn.create_model(str(path)), 256)
        own = esn.measure_cost(esn.create_model("eff_spinenet_m0"), 256)
    assert given == own
