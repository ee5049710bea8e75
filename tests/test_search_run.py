"""A search loses no trial and repeats none, whatever happens to it or to its trials."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import search_fakes
from typer.testing import CliRunner

from effspinenet_lib.cli import app
from effspinenet_lib.errors import CheckpointError, UserError
from effspinenet_lib.experiments.parameters import usable_cores
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.search.engines import Engine, LocalEngine, RayEngine, ray_resources
from effspinenet_lib.search.run import METHODS, Penalty, Search, run_references, run_search
from effspinenet_lib.search.settings import get_search
from effspinenet_lib.search.trials import Device, Trial, TrialFailed, run_trial

SETTINGS = get_search("smoke")
PROGRAM = Path(search_fakes.__file__).with_name("search_program.py")


needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"
)


class Here(Engine):
    """An engine without processes, where a test needs none."""

    def __init__(self, trial: Trial = search_fakes.works) -> None:
        super().__init__(trial, workers=1, timeout=0)

    def attempt(self, request):
        try:
            return self.trial(request)
        except ArithmeticError as error:
            raise TrialFailed(str(error)) from error


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path, "smoke")


def started(store: ResultsStore) -> list[str]:
    log = store.runs_folder / "started.log"
    return log.read_text().splitlines() if log.exists() else []


def record(store: ResultsStore) -> list[tuple[object, ...]]:
    columns = ["method", "trial", "step", "betas", "AP", "reward", "entropy", "run", "parameters"]
    return [tuple(row) for row in store.trials()[columns].fillna(-1).to_numpy().tolist()]


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


def start(store: ResultsStore, fake: str = "works") -> subprocess.Popen[bytes]:
    """A search of 12 trials in a process, and a process group, of its own."""
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(store.results_dir), "ppo", "12", fake],
        env=dict(os.environ, PYTHONPATH=str(PROGRAM.parent)),
        stderr=subprocess.PIPE,
        start_new_session=True,
        # a process that was started in the background ignores the keyboard
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(store: ResultsStore, starts: int) -> None:
    limit = time.monotonic() + 120
    while len(started(store)) < starts and time.monotonic() < limit:
        time.sleep(0.02)


def test_killed_at_three_moments_it_ends_with_every_trial_once(tmp_path: Path):
    whole, killed = (ResultsStore(tmp_path / name, "smoke") for name in ("whole", "killed"))
    for starts in (1, 4, 9):  # in the first batch, between two batches, in the middle of a batch
        process = start(killed)
        wait_for(killed, starts)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(started(killed)) >= starts
        assert len(record(killed)) < 12, "the kill came after the end"
    for store in (killed, whole):
        process = start(store)
        assert process.wait(timeout=120) == 0, process.stderr.read() if process.stderr else ""
    assert [row[:4] for row in record(killed)] == [row[:4] for row in record(whole)]
    assert record(killed) == record(whole)
    # what was recorded before a kill did not run again: at most the two that each kill cut off did
    assert len(started(killed)) <= len(started(whole)) + 3 * 2


def test_ctrl_c_ends_a_search_at_once_and_records_nothing_that_it_cut_off(store: ResultsStore):
    process = start(store, "hangs")
    wait_for(store, 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, said = process.communicate(timeout=60)
    assert said.decode().strip().endswith("KeyboardInterrupt")
    assert said.decode().count("Traceback") == 1  # not the workers'
    assert len(started(store)) == 2  # nothing was tried again
    assert record(store) == []


def test_a_trial_whose_process_dies_is_tried_once_more(store: ResultsStore):
    search = Search(SETTINGS, store, "random", seed=0, trials=2)
    with LocalEngine(search_fakes.dies_once, workers=1, timeout=60) as engine:
        rows = run_search(search, engine, progress=False)
    assert rows["state"].tolist() == ["finished"] * 2
    assert rows["attempts"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("trial", "timeout", "reason"),
    [(search_fakes.dies, 60, "process died"), (search_fakes.hangs, 0.5, "no answer within")],
)
def test_a_trial_that_dies_or_hangs_twice_is_recorded_as_failed(
    store: ResultsStore, trial: Trial, timeout: float, reason: str
):
    search = Search(SETTINGS, store, "evolution", seed=0, trials=1)
    with LocalEngine(trial, workers=1, timeout=timeout) as engine:
        (row,) = run_search(search, engine, progress=False).to_dict("records")
    assert (row["state"], row["attempts"]) == ("failed", 2)
    assert reason in row["note"]
    assert len(started(store)) == 2


@pytest.mark.parametrize(("device", "said"), [(Device(), (1, 0)), (Device("cuda", 2), (0, 1))])
def test_trials_leave_the_processor_only_where_an_accelerator_is_asked_for(
    device: Device, said: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with LocalEngine(search_fakes.tells_of_its_process, device=device, timeout=60) as engine:
        answer = engine.attempt({})
    assert (answer["AP"], answer["seconds"]) == said


def test_ray_is_asked_for_what_a_trial_needs():
    assert ray_resources(Device()) == {"CPU": 1}
    assert ray_resources(Device("cuda", 3)) == {"CPU": 4, "GPU": 1}
    assert ray_resources(Device("tpu")) == {"CPU": 1, "TPU": 1}


@needs_ray
def test_a_ray_cluster_says_how_many_trials_it_has_room_for():
    with RayEngine(search_fakes.works, workers=0, device=Device("auto")) as engine:
        assert engine.device.kind == "cpu"
        assert engine.workers == usable_cores()
    with pytest.raises(UserError, match=r"a trial needs .*'GPU': 1.* of the Ray cluster"):
        RayEngine(search_fakes.works, device=Device("cuda"))


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
    # norms that see other images give other results, and the runs have the same names
    in_parts = replace(search, store=other, settings=SETTINGS.on(None, micro_batch=2))
    rows = run_search(in_parts, Here(), progress=False, force=True)
    assert set(rows["state"]) == {"finished"}
    assert len(started(other)) == 4


def test_equal_samples_of_one_batch_are_trained_once(
    store: ResultsStore, monkeypatch: pytest.MonkeyPatch
):
    sample = (1,) * 18
    monkeypatch.setattr(METHODS["random"], "ask", lambda self, count: [sample] * count)
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


def test_a_true_trial_trains_and_leaves_nothing_but_its_row(store: ResultsStore):
    search = Search(SETTINGS, store, "random", seed=0, trials=1)
    with LocalEngine(run_trial, workers=1, timeout=120) as engine:
        (row,) = run_search(search, engine, progress=False).to_dict("records")
    assert row["state"] == "finished"
    assert 0 <= row["AP"] <= 100
    assert row["seconds"] > 0
    assert not (store.runs_folder / row["run"]).exists()


@needs_ray
def test_ray_gives_the_same_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(PROGRAM.parent))  # Ray's workers import the trial by name
    records = []
    for name, engine in (("local", LocalEngine), ("ray", RayEngine)):
        store = ResultsStore(tmp_path / name, "smoke")
        with engine(search_fakes.works, workers=2, timeout=120) as running:
            run_search(Search(SETTINGS, store, "ppo", 0, 6), running, progress=False)
        assert set(store.trials()["note"]) == {""}
        records.append(record(store))
    assert records[0] == records[1]


@needs_ray
@pytest.mark.parametrize(
    ("trial", "timeout", "reason"),
    [(search_fakes.dies, 60, "process died"), (search_fakes.hangs, 5, "no answer within")],
)
def test_a_trial_that_dies_or_hangs_on_ray_is_recorded_as_failed(
    store: ResultsStore,
    trial: Trial,
    timeout: float,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("PYTHONPATH", str(PROGRAM.parent))
    with RayEngine(trial, workers=1, timeout=timeout) as engine:
        search = Search(SETTINGS, store, "random", seed=0, trials=1)
        (row,) = run_search(search, engine, progress=False).to_dict("records")
    assert (row["state"], row["attempts"]) == ("failed", 2)
    assert reason in row["note"]


@pytest.mark.skipif(bool(importlib.util.find_spec("ray")), reason="the extra ray is here")
def test_without_ray_its_engine_says_what_to_install():
    with pytest.raises(UserError, match=r"pip install 'effspinenet\[ray\]'"):
        RayEngine()


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
        with pytest.raises(UserError, match="equal with seed 0 was trained with other settings"):
            run_references(other, store, named, [0], Here(), progress=False)


def test_a_process_that_saw_an_error_is_not_asked_again():
    with LocalEngine(search_fakes.fails_with_its_process, timeout=60) as engine:
        said = []
        for _ in range(2):
            with pytest.raises(TrialFailed) as failure:
                engine.attempt({})
            said.append(str(failure.value))
    assert said[0] != said[1]


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
