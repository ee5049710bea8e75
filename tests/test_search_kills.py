"""Searches that are killed, and that the keyboard ends."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import search_fakes
from search_fakes import Here, import_path, record, started

from effspinenet_lib.results import ResultsStore
from effspinenet_lib.search.run import Search, run_search
from effspinenet_lib.search.settings import get_search

SETTINGS = get_search("smoke")
PROGRAM = Path(search_fakes.__file__).with_name("search_program.py")

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"
)


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path, "smoke")


def start(store: ResultsStore, fake: str, engine: str = "local") -> subprocess.Popen[bytes]:
    """A search of 12 trials in a process, and a process group, of its own."""
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(store.results_dir), "ppo", "12", fake, engine],
        env=dict(os.environ, PYTHONPATH=import_path()),
        stderr=subprocess.PIPE,
        start_new_session=True,
        # a process that was started in the background ignores the keyboard
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_until(happened: Callable[[], bool]) -> None:
    limit = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.02)


def let_go(store: ResultsStore, trials: int) -> None:
    """Let so many trials in all end; the others wait."""
    store.runs_folder.mkdir(parents=True, exist_ok=True)
    (store.runs_folder / search_fakes.LET_GO).write_text(str(trials))


def test_killed_at_three_moments_it_ends_with_every_trial_once(tmp_path: Path):
    whole, killed = (ResultsStore(tmp_path / name, "smoke") for name in ("whole", "killed"))
    for ended in (0, 2, 5):  # in the first batch, between two batches, in the middle of a batch
        let_go(killed, ended)
        cut_off = len(started(killed)) - len(record(killed))
        process = start(killed, "is_held")
        wait_until(
            lambda ended=ended, before=cut_off: (
                len(record(killed)) == ended and len(started(killed)) > before + ended
            )
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(record(killed)) == ended
    let_go(killed, 12)
    process = start(killed, "is_held")
    assert process.wait(timeout=120) == 0, process.stderr.read() if process.stderr else ""
    run_search(Search(SETTINGS, whole, "ppo", seed=0, trials=12), Here(), progress=False)
    assert [row[:4] for row in record(killed)] == [row[:4] for row in record(whole)]
    assert record(killed) == record(whole)
    # what was recorded before a kill did not run again: at most the two that each kill cut off did
    assert len(started(killed)) <= len(started(whole)) + 3 * 2


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=needs_ray)])
def test_ctrl_c_ends_a_search_at_once_and_records_nothing_that_it_cut_off(
    store: ResultsStore, engine: str
):
    process = start(store, "hangs", engine)
    wait_until(lambda: len(started(store)) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, said = process.communicate(timeout=60)
    assert said.decode().strip().endswith("KeyboardInterrupt")
    assert said.decode().count("Traceback") == 1  # not the workers'
    assert len(started(store)) == 2  # nothing was tried again
    assert record(store) == []
