"""A search loses no trial and repeats none, whatever happens to it or to its trials."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import search_fakes
from search_fakes import Here, record, started
from typer.testing import CliRunner

from effspinenet_lib.cli import app
from effspinenet_lib.errors import CheckpointError, UserError
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.search.methods import RandomSearch
from effspinenet_lib.search.references import run_references
from effspinenet_lib.search.run import METHODS, Search, run_search
from effspinenet_lib.search.running import Penalty
from effspinenet_lib.search.settings import get_search

SETTINGS = get_search("smoke")


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path, "smoke")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_search_in_two_parts_is_the_search_in_one(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(search_fakes, "SECONDS", 0)
    whole, parts = (ResultsStore(tmp_path / name, "smoke") for name in ("whole", "parts"))
    search = Search(SETTINGS, whole, method, seed=3, trials=8)
    run_search(search, Here(), progress=False)
    for trials in (4, 8):
        run_search(replace(search, store=parts, trials=trials), Here(), progress=False)
    assert record(parts) == record(whole)
    assert len(record(whole)) == 8


def test_the_smoke_search_has_children(store: ResultsStore):
    """Its last two of four trials differ from one of the first two in one block."""
    search = Search(SETTINGS, store, "evolution", seed=0, trials=SETTINGS.trials)
    betas = [text.split("-") for text in run_search(search, Here(), progress=False)["betas"]]
    for child in betas[2:]:
        changes = [sum(a != b for a, b in zip(child, one, strict=True)) for one in betas[:2]]
        assert min(changes) == 1


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_search_goes_on_past_trials_that_diverge(store: ResultsStore, method: str):
    search = Search(SETTINGS, store, method, seed=1, trials=24)
    rows = run_search(search, Here(search_fakes.diverges_at_20), progress=False)
    diverged = rows["betas"].str.startswith("20-")
    assert 0 < diverged.sum() < 24
    assert set(rows.loc[diverged, "state"]) == {"failed"}
    assert rows.loc[diverged, "reward"].isna().all()
    assert "failed" not in set(rows.loc[~diverged, "state"])


def test_a_sample_that_was_trained_before_takes_its_result(store: ResultsStore):
    """Method state lost, record kept: drawn again from the same seed, every sample is known."""
    search = Search(SETTINGS, store, "random", seed=0, trials=4)
    run_search(search, Here(), progress=False)
    known = store.trials()
    other = ResultsStore(store.results_dir / "other", "smoke")
    other.add_trials(known.assign(method="reference").to_dict("records"))
    rows = run_search(replace(search, store=other), Here(), progress=False)
    assert set(rows["state"]) == {"duplicate"}
    assert rows["AP"].tolist() == known["AP"].tolist()
    assert started(other) == []


def test_equal_samples_of_one_batch_are_trained_once(
    store: ResultsStore, monkeypatch: pytest.MonkeyPatch
):
    sample = (1,) * 18
    monkeypatch.setattr(RandomSearch, "ask", lambda self, count: [sample] * count)
    rows = run_search(Search(SETTINGS, store, "random", 0, 4), Here(), progress=False)
    assert rows["state"].tolist() == ["finished", *["duplicate"] * 3]
    assert len(started(store)) == 1


def test_a_record_of_other_settings_is_not_mixed(store: ResultsStore):
    search = Search(SETTINGS, store, "random", seed=0, trials=2)
    run_search(search, Here(), progress=False)
    changed = replace(search, settings=replace(SETTINGS, image_size=128), trials=4)
    in_parts = replace(search, settings=SETTINGS.on(None, micro_batch=2), trials=4)
    for other in (changed, in_parts):
        with pytest.raises(UserError, match="other settings"):
            run_search(other, Here(), progress=False)
    assert len(run_search(changed, Here(), progress=False, force=True)) == 4
    with pytest.raises(UserError, match="another penalty"):
        run_search(replace(changed, penalty=Penalty(-0.07)), Here(), progress=False)


@pytest.mark.parametrize("force", [False, True])
def test_a_record_holds_trials_of_one_kind_whoever_chose_them(store: ResultsStore, force: bool):
    search = Search(SETTINGS, store, "random", seed=0, trials=2)
    run_search(search, Here(), progress=False)
    before = record(store)
    another = replace(search, method="ppo")
    # norms that see other images give other results, and the runs have the same names
    in_parts = replace(another, settings=SETTINGS.on(None, micro_batch=2))
    for other, said in (
        (in_parts, "trial 0 of random with seed 0 was made with other settings"),
        (replace(another, penalty=Penalty(-0.07)), "trial 0 of random .* another penalty"),
        (replace(in_parts, method="random", seed=1), "other settings"),
    ):
        with pytest.raises(UserError, match=said):
            run_search(other, Here(), progress=False, force=force)
    assert record(store) == before
    with pytest.raises(UserError, match="other settings"):
        run_references(in_parts.settings, store, {"x": (1,) * 18}, [0], Here(), progress=False)
    assert len(run_search(another, Here(), progress=False, force=force)) == 2


def test_references_and_failed_trials_have_no_penalty(store: ResultsStore):
    run_references(SETTINGS, store, {"x": (1,) * 17 + (20,)}, [0], Here(), progress=False)
    search = Search(SETTINGS, store, "random", seed=0, trials=8, penalty=Penalty(-0.07))
    run_search(search, Here(search_fakes.diverges_at_20), progress=False)
    rows = run_search(replace(search, trials=10), Here(), progress=False)
    assert len(rows) == 10
    assert "failed" in set(rows["state"])


@pytest.mark.parametrize("exponent", [float("-inf"), float("nan"), 0.07])
def test_a_penalty_that_is_no_number_is_refused(tmp_path: Path, exponent: float):
    given = ["search", f"--penalty={exponent}", "--results-dir", str(tmp_path)]
    error = CliRunner().invoke(app, given).exception
    assert isinstance(error, UserError)
    assert str(error).startswith(
        f"the penalty is {exponent}; it must be 0 or a finite number below"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lost", ["all", "a learned one"])
def test_a_record_that_lost_trials_is_said(store: ResultsStore, lost: str):
    search = Search(SETTINGS, store, "ppo", seed=0, trials=6)
    run_search(search, Here(), progress=False)
    path = store.folder / "search_trials.csv"
    lines = path.read_text().splitlines(keepends=True)
    if lost == "all":
        path.unlink()
    else:
        path.write_text("".join(lines[:2] + lines[3:]))
    said = "lacks 4 .* first of them 0;" if lost == "all" else "lacks 1 .* first of them 1;"
    with pytest.raises(CheckpointError, match=f"{said}.*--force"):
        run_search(search, Here(), progress=False)
    assert len(run_search(search, Here(), progress=False, force=True)) == 6


def test_trials_of_the_last_batch_that_the_record_lost_run_again(store: ResultsStore):
    search = Search(SETTINGS, store, "ppo", seed=0, trials=6)
    run_search(search, Here(), progress=False)
    path, before = store.folder / "search_trials.csv", record(store)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    run_search(search, Here(), progress=False)
    assert record(store) == before


def test_a_lost_or_broken_state_is_said_and_the_record_kept(store: ResultsStore):
    search = Search(SETTINGS, store, "ppo", seed=0, trials=2)
    run_search(search, Here(), progress=False)
    before = record(store)
    search.state_file.write_bytes(search.state_file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is no state of ppo"):
        run_search(replace(search, trials=4), Here(), progress=False)
    search.state_file.unlink()
    with pytest.raises(CheckpointError, match="state of the method is gone"):
        run_search(replace(search, trials=4), Here(), progress=False)
    assert record(store) == before
    assert len(run_search(search, Here(), progress=False)) == 2, "a finished search needs no state"


def test_two_processes_do_not_run_one_search(store: ResultsStore):
    from filelock import FileLock

    search = Search(SETTINGS, store, "random", seed=0, trials=2)
    search.state_file.parent.mkdir(parents=True)
    with (
        FileLock(f"{search.state_file}.lock"),
        pytest.raises(UserError, match="another process"),
    ):
        run_search(search, Here(), progress=False)


def test_the_precision_is_recorded_and_a_duplicate_has_its_sources(
    store: ResultsStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(RandomSearch, "ask", lambda self, count: [(1,) * 18] * count)
    search = Search(SETTINGS, store, "random", seed=0, trials=4)
    rows = run_search(search, Here(search_fakes.computes_in_bfloat16), progress=False)
    assert rows["state"].tolist() == ["finished", *["duplicate"] * 3]
    assert rows["precision"].tolist() == ["bfloat16"] * 4
    rows = run_search(replace(search, seed=1, trials=1), Here(), progress=False)
    assert rows["precision"].tolist() == [""]


def test_references_are_run_once_for_each_seed(store: ResultsStore):
    named = {"equal": (1,) * 18, "rising": (1,) * 9 + (20,) * 9, "also equal": (1,) * 18}
    for seeds in ([0], [0, 1]):
        rows = run_references(SETTINGS, store, named, seeds, Here(), progress=False)
    keys = rows[["seed", "trial", "note", "state"]].to_numpy().tolist()
    assert keys == [
        [seed, trial, name, "finished"]
        for seed in (0, 1)
        for trial, name in enumerate(("equal", "rising"))
    ]
    assert len(set(rows["run"])) == 4
    assert len(started(store)) == 4
    scaled = SETTINGS.on(None, batch_size=2)
    assert scaled.description.endswith("smoke_search scaled to batch 2")
    in_parts = SETTINGS.on(None, micro_batch=2)
    assert in_parts.description.endswith("smoke_search, 2 images at once")
    for other in (scaled, in_parts):
        with pytest.raises(UserError, match=r"trial 0 of reference .* other settings"):
            run_references(other, store, named, [0], Here(), progress=False)


def test_references_that_failed_are_run_again_under_their_numbers(store: ResultsStore):
    named = {"equal": (1,) * 18, "falling": (20,) * 9 + (1,) * 9, "rising": (1,) * 9 + (20,) * 9}
    trials = (search_fakes.diverges_at_20, search_fakes.works)
    states = [
        run_references(SETTINGS, store, named, [0], Here(trial), progress=False)["state"].tolist()
        for trial in trials
    ]
    assert states == [["finished", "failed", "finished"], ["finished"] * 3]
    rows = store.trials()
    assert rows["trial"].tolist() == [0, 1, 2]
    assert rows["note"].tolist() == list(named)
    assert len(started(store)) == 3 + 1 + 1  # the one that failed was tried twice before


def test_the_command_line_says_why_a_trial_failed_and_names_folders_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    engine = Here(search_fakes.diverges_at_20)
    folders: list[str] = []
    attempt = engine.attempt
    monkeypatch.setattr(
        engine, "attempt", lambda given: (folders.append(given["runs_dir"]), attempt(given))[1]
    )
    monkeypatch.setattr("effspinenet_lib.cli.search._engine", lambda *_: engine)
    monkeypatch.chdir(tmp_path)
    for command in (["search", "--method", "random", "--trials", "12"], ["search", "compare"]):
        result = CliRunner().invoke(app, [*command, "--profile", "smoke", "--results-dir", "found"])
        assert result.exit_code == 0, result.output
        failed = "random with seed 0 failed: the loss of step 3 is not finite"
        assert (failed in result.output) == ("random" in command)
    assert set(folders) == {str(tmp_path / "found" / "smoke" / "runs")}


def test_compare_shows_chosen_distributions_without_the_runs_that_chose_them(
    store: ResultsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    engine = Here()
    run_search(Search(SETTINGS, store, "random", 0, 4), engine, progress=False)
    monkeypatch.setattr("effspinenet_lib.cli.search._engine", lambda *_: engine)
    command = ["search", "compare", "--profile", "smoke", "--seeds", "3"]
    result = CliRunner().invoke(app, [*command, "--results-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("│")]
    seeds = {cells[1].strip(): int(cells[2]) for cells in (line.split("│") for line in lines)}
    assert seeds == {"SP-EfficientNet-B0": 3, "Eff-SpineNet-D0": 3, "search's best": 2}
