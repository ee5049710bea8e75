"""Engines: what a trial can do to its process, and what to a search."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import pytest
import search_fakes
import torch
from search_fakes import Here, import_path, record

from effspinenet_lib.errors import CheckpointError, DataError, Preempted, UserError
from effspinenet_lib.experiments.parameters import usable_cores
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.search.engines import LocalEngine, RayEngine, ray_resources
from effspinenet_lib.search.record import plan_trials
from effspinenet_lib.search.run import METHODS, Search, _stream, run_search
from effspinenet_lib.search.settings import get_search
from effspinenet_lib.search.trials import Device, Trial, TrialFailed, run_trial
from effspinenet_lib.training.loop import resolve_precision

SETTINGS = get_search("smoke")

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"
)


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path, "smoke")


def test_a_trial_whose_process_dies_is_tried_once_more(store: ResultsStore):
    search = Search(SETTINGS, store, "random", seed=0, trials=2)
    with LocalEngine(search_fakes.dies_once, workers=1, timeout=60) as engine:
        rows = run_search(search, engine, progress=False)
    assert rows["state"].tolist() == ["finished"] * 2
    assert rows["attempts"].tolist() == [2, 2]


class Counting(LocalEngine):
    """Knows how often it was asked: a trial that is cut off may have had no time to say so."""

    asked = 0

    def attempt(self, request):
        self.asked += 1
        return super().attempt(request)


@pytest.mark.parametrize(
    ("trial", "timeout", "reason"),
    [(search_fakes.dies, 60, "process died"), (search_fakes.hangs, 0.5, "no answer within")],
)
def test_a_trial_that_dies_or_hangs_twice_is_recorded_as_failed(
    store: ResultsStore, trial: Trial, timeout: float, reason: str
):
    search = Search(SETTINGS, store, "evolution", seed=0, trials=1)
    with Counting(trial, workers=1, timeout=timeout) as engine:
        (row,) = run_search(search, engine, progress=False).to_dict("records")
    assert (row["state"], row["attempts"]) == ("failed", 2)
    assert reason in row["note"]
    assert engine.asked == 2


@pytest.mark.parametrize(
    ("trouble", "error", "said"),
    [
        ("disk", UserError, "cannot write run.json: No space left on device"),
        ("data", DataError, "instances.json: no such file"),
        ("images", DataError, r"a\.jpg: not found in images"),
        ("checkpoint", CheckpointError, "is of another run"),
        ("name", UserError, "unknown model 'eff'"),
        ("stopped", Preempted, "stopped by SIGTERM"),
        ("system", UserError, "a trial cannot go on: .*No space left on device"),
    ],
)
def test_what_is_no_fault_of_a_trial_ends_the_search_which_goes_on_later(
    store: ResultsStore, trouble: str, error: type[UserError], said: str
):
    search = Search(SETTINGS, store, "ppo", seed=0, trials=4)
    store.runs_folder.mkdir(parents=True)
    (store.runs_folder / search_fakes.TROUBLE).write_text(trouble)
    with (
        LocalEngine(search_fakes.in_trouble, timeout=60) as engine,
        pytest.raises(error, match=said) as ended,
    ):
        run_search(search, engine, progress=False)
    assert ended.value.exit_code == error.exit_code
    assert record(store) == []
    (store.runs_folder / search_fakes.TROUBLE).unlink()
    rows = run_search(search, Here(search_fakes.in_trouble), progress=False)
    assert rows["state"].tolist() == ["finished"] * 4


def test_a_trial_that_diverges_is_recorded_and_the_search_goes_on(store: ResultsStore):
    store.runs_folder.mkdir(parents=True)
    (store.runs_folder / search_fakes.TROUBLE).write_text("diverged")
    with LocalEngine(search_fakes.in_trouble, timeout=60) as engine:
        search = Search(SETTINGS, store, "random", seed=0, trials=1)
        (row,) = run_search(search, engine, progress=False).to_dict("records")
    assert row["state"] == "failed"
    assert row["note"] == "TrainingError: the loss of step 3 is not finite"


def test_a_true_trial_whose_folder_cannot_be_written_is_not_recorded(store: ResultsStore):
    search = Search(SETTINGS, store, "random", seed=0, trials=2)
    (sample,) = METHODS["random"](18, 5, _stream(search), search.trials).ask(1)
    run = plan_trials(SETTINGS, [sample], "random", 0, 0, 0)[0]["run"]
    store.runs_folder.mkdir(parents=True)
    (store.runs_folder / run).write_text("where the run's folder belongs")
    with pytest.raises(UserError, match=f"cannot write in .*{run}"):
        run_search(search, Here(run_trial), progress=False)
    assert record(store) == []


def test_a_process_that_ends_as_it_starts_ends_the_search(
    store: ResultsStore, monkeypatch: pytest.MonkeyPatch
):
    """As in a script without a guard, which every process for trials would run anew."""
    monkeypatch.setattr(search_fakes.works, "__module__", "no_such_module")
    monkeypatch.setitem(sys.modules, "no_such_module", search_fakes)
    search = Search(SETTINGS, store, "random", seed=0, trials=2)
    with (
        LocalEngine(search_fakes.works, timeout=60) as engine,
        pytest.raises(UserError, match=r"ended as it started \(exit code 1\)"),
    ):
        run_search(search, engine, progress=False)
    assert record(store) == []


def test_a_process_that_saw_an_error_is_not_asked_again():
    with LocalEngine(search_fakes.fails_with_its_process, timeout=60) as engine:
        said = []
        for _ in range(2):
            with pytest.raises(TrialFailed) as failure:
                engine.attempt({})
            said.append(str(failure.value))
    assert said[0] != said[1]


@pytest.mark.parametrize(("device", "said"), [(Device(), (1, 0)), (Device("gpu", 2), (0, 1))])
def test_trials_leave_the_processor_only_where_an_accelerator_is_asked_for(
    device: Device, said: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with LocalEngine(search_fakes.tells_of_its_process, device=device, timeout=60) as engine:
        answer = engine.attempt({})
    assert (answer["AP"], answer["seconds"]) == said


def test_a_true_trial_trains_and_leaves_nothing_but_its_row(store: ResultsStore):
    search = Search(SETTINGS, store, "random", seed=0, trials=1)
    with LocalEngine(run_trial, workers=1, timeout=120) as engine:
        (row,) = run_search(search, engine, progress=False).to_dict("records")
    assert row["state"] == "finished"
    assert 0 <= row["AP"] <= 100
    assert row["seconds"] > 0
    assert row["precision"] == resolve_precision(SETTINGS.recipe, torch.device("cpu"))
    assert not (store.runs_folder / row["run"]).exists()


def test_ray_is_asked_for_what_a_trial_needs():
    assert ray_resources(Device()) == {"CPU": 1}
    assert ray_resources(Device("gpu", 3)) == {"CPU": 4, "GPU": 1}
    assert ray_resources(Device("tpu")) == {"CPU": 1, "TPU": 1}


@needs_ray
def test_a_ray_cluster_says_how_many_trials_it_has_room_for():
    with RayEngine(search_fakes.works, workers=0, device=Device("auto")) as engine:
        assert engine.device.kind == "cpu"
        assert engine.workers == usable_cores()
    with pytest.raises(UserError, match=r"a trial needs .*'GPU': 1.* of the Ray cluster"):
        RayEngine(search_fakes.works, device=Device("gpu"))


@needs_ray
def test_a_ray_cluster_that_runs_is_joined_where_it_is_named_and_shared(
    store: ResultsStore, monkeypatch: pytest.MonkeyPatch
):
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", import_path())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        with RayEngine(search_fakes.works, workers=2) as engine:
            assert engine.workers == 2, "one of its own, as none is named"
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with RayEngine(search_fakes.works, workers=2, timeout=4) as engine:
            assert engine.workers == 1, "its room"
            someone = ray.remote(lambda: time.sleep(6)).remote()
            time.sleep(1)  # so that it has the place
            search = Search(SETTINGS, store, "random", seed=0, trials=1)
            (row,) = run_search(search, engine, progress=False).to_dict("records")
            ray.get(someone)
    finally:
        cluster.shutdown()
    assert (row["state"], row["attempts"]) == ("finished", 1), "to wait for a place is not to hang"


@needs_ray
def test_ray_gives_the_same_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", import_path())
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
    [(search_fakes.dies, 60, "process died"), (search_fakes.hangs, 3, "no answer within 3 sec")],
)
def test_a_trial_that_dies_or_hangs_on_ray_is_recorded_as_failed(
    store: ResultsStore,
    trial: Trial,
    timeout: float,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("PYTHONPATH", import_path())
    with RayEngine(trial, workers=1, timeout=timeout) as engine:
        search = Search(SETTINGS, store, "random", seed=0, trials=1)
        (row,) = run_search(search, engine, progress=False).to_dict("records")
    assert (row["state"], row["attempts"]) == ("failed", 2)
    assert reason in row["note"]


@needs_ray
def test_what_is_no_fault_of_a_trial_ends_a_search_on_ray(
    store: ResultsStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", import_path())
    store.runs_folder.mkdir(parents=True)
    (store.runs_folder / search_fakes.TROUBLE).write_text("images")
    search = Search(SETTINGS, store, "random", seed=0, trials=2)
    with (
        RayEngine(search_fakes.in_trouble, timeout=60) as engine,
        pytest.raises(DataError, match=r"a\.jpg: not found in images"),
    ):
        run_search(search, engine, progress=False)
    assert record(store) == []


@pytest.mark.skipif(bool(importlib.util.find_spec("ray")), reason="the extra ray is here")
def test_without_ray_its_engine_says_what_to_install():
    with pytest.raises(UserError, match=r"pip install 'effspinenet\[ray\]'"):
        RayEngine()
