"""The launcher: what a run can do to its process, and what can happen to the launcher."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import launcher_fakes
import pytest
from filelock import FileLock

from effspinenet_lib.data import DataConfig
from effspinenet_lib.errors import CheckpointError, DataError, Preempted, TrainingError, UserError
from effspinenet_lib.experiments import launcher
from effspinenet_lib.experiments.launcher import (
    Outcome,
    Pool,
    open_pool,
    ray_resources,
    run_many,
    thread_environment,
    usable_cores,
)
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.search.search import get_search

SEARCH = get_search("smoke")
CONFIG = SEARCH.config((1,) * 18, 0)
TESTS = str(Path(__file__).parent)

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"
)
engines = pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=needs_ray)])


@pytest.fixture(autouse=True)
def fakes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.pathsep.join([TESTS, str(Path(TESTS).parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)


def run(
    folder: Path,
    fake: str,
    pool: Pool | None = None,
    engine: str = "local",
    timeout: float = 60,
    force: bool = False,
) -> Outcome:
    """How one run of a fake ends."""
    folder.mkdir(exist_ok=True)
    options = {"progress": False, "function": f"launcher_fakes:{fake}", "force": force}
    if pool is not None:
        (outcome,) = run_many([CONFIG], folder, pool, **options)
        return outcome
    with open_pool(engine, 1, "cpu", timeout=timeout) as opened:
        return run(folder, fake, opened, force=force)


def starts(folder: Path) -> int:
    log = folder / "started.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_until(happened: Callable[[], bool], seconds: float = 300) -> None:
    """The limit is generous, as machines that test are often busy."""
    limit = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.02)


@engines
@pytest.mark.parametrize("force", [False, True])
def test_a_run_whose_process_dies_is_resumed(tmp_path: Path, engine: str, force: bool) -> None:
    outcome = run(tmp_path, "dies_once", engine=engine, force=force)
    assert outcome.result is not None
    assert (outcome.result.metrics, outcome.attempts, outcome.error) == ({"AP": 1.0}, 2, None)


@engines
@pytest.mark.parametrize(
    ("fake", "timeout", "reason"),
    [("dies", 60, r"died \(exit code 9\)"), ("hangs", 5, "no answer within 5 seconds")],
)
def test_a_run_that_dies_or_hangs_twice_has_failed(
    tmp_path: Path, fake: str, timeout: float, reason: str, engine: str
) -> None:
    outcome = run(tmp_path, fake, engine=engine, timeout=timeout)
    assert (outcome.result, outcome.attempts) == (None, 2)
    with pytest.raises(TrainingError, match=reason):
        raise outcome.error or AssertionError
    assert starts(tmp_path) == 2


@pytest.mark.parametrize(
    ("trouble", "error", "said", "attempts"),
    [
        ("disk", UserError, "cannot write run.json: No space left on device", 1),
        ("data", DataError, "a.jpg: not found in images", 1),
        ("checkpoint", CheckpointError, "checkpoint-3.pt: is of another run", 1),
        ("name", UserError, "unknown model 'eff'; known: eff_spinenet_m0", 1),
        ("stopped", Preempted, "stopped by SIGTERM", 1),
        ("diverged", TrainingError, "the loss of step 3 is not finite", 1),
        (
            "bug",
            TrainingError,
            "process died (exit code 1); its last line: ArithmeticError: div",
            2,
        ),
    ],
)
def test_a_failed_process_reports_its_own_error(
    tmp_path: Path, trouble: str, error: type[UserError], said: str, attempts: int
) -> None:
    (tmp_path / launcher_fakes.TROUBLE).write_text(trouble)
    outcome = run(tmp_path, "in_trouble")
    assert type(outcome.error) is error
    assert said in str(outcome.error)
    assert "\n" not in str(outcome.error)
    assert outcome.attempts == attempts


@pytest.mark.parametrize(("device", "cpu"), [("cpu", True), ("gpu", False)])
def test_runs_leave_the_cpu_only_for_an_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, cpu: bool
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    outcome = run(tmp_path, "works", Pool(1, device, 0, 60))
    assert outcome.result is not None
    assert ("ACCELERATE_USE_CPU" in outcome.result.record["environment"]) is cpu
    assert "OMP_NUM_THREADS" in outcome.result.record["environment"]


def test_runs_at_once_are_spread_over_the_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    seen: list[str] = []
    start = launcher._start

    def note(request: str, log: str, environment: dict[str, str]) -> Any:
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
        return start(request, log, environment)

    monkeypatch.setattr(launcher, "_start", note)
    configs = [replace(CONFIG, seed=seed) for seed in range(4)]
    function = "launcher_fakes:works"
    pool = Pool(4, "gpu", 0, 60)
    outcomes = list(run_many(configs, tmp_path, pool, progress=False, function=function))
    assert all(outcome.result for outcome in outcomes)
    assert sorted(seen) == ["5", "5", "7", "7"]


def test_free_cores_are_shared_out_over_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "usable_cores", lambda: 8)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.2, 9.0, 9.0))
    assert [Pool(n, "cpu", 0, None).threads(runs) for n, runs in ((1, 5), (8, 1), (3, 9))] == [
        *(8, 8, 2)
    ]
    assert Pool(16, "cpu", 0, None).threads(16) == 1
    for load, free in ((2.7, 5), (30.0, 1)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert Pool(1, "cpu", 0, None).threads(1) == free


def test_the_users_own_number_of_threads_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert thread_environment(3) == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert thread_environment(3)["OMP_NUM_THREADS"] == "5"


def test_real_runs_end_each_for_itself_and_are_not_run_twice(tmp_path: Path) -> None:
    bad = replace(CONFIG, data=DataConfig("coco", root=str(tmp_path / "none")))
    held = replace(CONFIG, seed=1)
    (tmp_path / held.key).mkdir()
    with open_pool("local", 2, "cpu", timeout=600) as pool:
        with FileLock(tmp_path / held.key / "run.lock"):
            outcomes = list(run_many([held, bad, CONFIG], tmp_path, pool, progress=False))
        first, failed, locked = (
            next(one for one in outcomes if one.config.key == config.key)
            for config in (CONFIG, bad, held)
        )
        stamp = (tmp_path / CONFIG.key / "run.json").stat().st_mtime_ns
        (again,) = run_many([CONFIG], tmp_path, pool, progress=False)
    assert first.result is not None
    assert 0 <= first.result.metrics["AP"] <= 100
    assert again.result == first.result
    assert stamp == (tmp_path / CONFIG.key / "run.json").stat().st_mtime_ns, "not trained again"
    assert isinstance(failed.error, DataError)
    assert failed.log.name == "worker.log"
    assert "another process is running this configuration" in str(locked.error)


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    (tmp_path / "smoke" / "runs").mkdir(parents=True)
    (tmp_path / "smoke" / "runs" / launcher_fakes.LET_GO).write_text("0")
    parent = subprocess.Popen([sys.executable, *search_program(tmp_path, "is_held", "local")])
    runs = tmp_path / "smoke" / "runs"
    try:
        wait_until(lambda: starts(runs) == 2)
        with open(f"/proc/{parent.pid}/task/{parent.pid}/children") as handle:
            children = handle.read().split()
    finally:
        parent.kill()
        parent.wait()
    assert len(children) >= 2
    wait_until(lambda: not any(map(launcher_fakes.is_running, children)))


def search_program(results: Path, fake: str, engine: str, trials: int = 12) -> list[str]:
    return [launcher_fakes.__file__, str(results), str(trials), fake, engine]


@engines
def test_ctrl_c_ends_a_search_and_records_nothing_that_it_cut_off(
    tmp_path: Path, engine: str
) -> None:
    store = ResultsStore(tmp_path, "smoke")
    store.runs_folder.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, *search_program(tmp_path, "hangs", engine)],
        stderr=subprocess.PIPE,
        start_new_session=True,
        # a process that was started in the background ignores the keyboard
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_until(lambda: starts(store.runs_folder) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the runs too
    _, said = process.communicate(timeout=100)
    assert said.decode().strip().endswith("KeyboardInterrupt")
    assert starts(store.runs_folder) == 2, "nothing was tried again"
    assert store.trials().empty


def test_ray_is_asked_for_what_a_run_needs() -> None:
    assert ray_resources("cpu", 0) == {"CPU": 1}
    assert ray_resources("gpu", 3) == {"CPU": 4, "GPU": 1}
    assert ray_resources("tpu", 0) == {"CPU": 1, "TPU": 1}


@needs_ray
def test_a_ray_cluster_says_how_many_runs_it_has_room_for() -> None:
    with open_pool("ray", 0, "auto") as pool:
        assert (pool.device, pool.processes) == ("cpu", usable_cores())
    with (
        pytest.raises(UserError, match=r"a run needs .*'GPU': 1.* of the Ray cluster"),
        open_pool("ray", 0, "gpu"),
    ):
        pass


@needs_ray
def test_a_ray_cluster_is_joined_where_it_is_named_and_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        with open_pool("ray", 2, "cpu") as pool:
            assert pool.processes == 2, "one of its own, as none is named"
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with open_pool("ray", 2, "cpu", timeout=10) as pool:
            assert pool.processes == 1, "its room"
            someone = ray.remote(lambda: time.sleep(12)).remote()
            time.sleep(1)  # so that it has the place
            outcome = run(tmp_path, "works", pool)
            ray.get(someone)
    finally:
        cluster.shutdown()
    assert outcome.result is not None
    assert outcome.attempts == 1, "to wait for a place is not to hang"


@needs_ray
def test_runs_of_a_cluster_node_that_dies_resume_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    (tmp_path / launcher_fakes.LET_GO).write_text("0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    configs = [replace(CONFIG, seed=seed) for seed in range(4)]
    function = "launcher_fakes:is_held"
    outcomes: list[Outcome] = []
    try:
        node = cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with open_pool("ray", 0, "cpu", timeout=300) as pool:
            assert pool.processes == 2
            ended = threading.Thread(
                target=lambda: outcomes.extend(
                    run_many(configs, tmp_path, pool, progress=False, function=function)
                )
            )
            ended.start()
            wait_until(lambda: starts(tmp_path) == 2)
            cluster.remove_node(node, allow_graceful=False)
            # one more than there are, as the process that was cut off may take one
            (tmp_path / launcher_fakes.LET_GO).write_text("5")
            ended.join()
    finally:
        cluster.shutdown()
    assert [outcome.error for outcome in outcomes] == [None] * 4
    assert sorted(outcome.attempts for outcome in outcomes) == [1, 1, 1, 2]
    assert starts(tmp_path) == 5, "the run of the node that died was started once more"


@pytest.mark.skipif(bool(importlib.util.find_spec("ray")), reason="the extra ray is here")
def test_without_ray_its_engine_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"pip install -e '\.\[ray\]'"), open_pool("ray"):
        pass
