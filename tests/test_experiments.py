"""Items, parameters, planning, and runs in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from effspinenet_lib import experiments
from effspinenet_lib.data import DataConfig
from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.experiments import ITEMS, check_parameters, planned_runs
from effspinenet_lib.experiments.fanout import run_all
from effspinenet_lib.results.paper import paper_values
from effspinenet_lib.training.recipes import get_recipe
from effspinenet_lib.training.run import RunConfig


@pytest.fixture
def smoke(tmp_path):
    return check_parameters("smoke", results_dir=tmp_path)


def test_the_suite_knows_every_table_and_figure_of_the_paper():
    assert [name for name in ITEMS if name.startswith("table")] == [
        f"table-{number:02}" for number in range(1, 12)
    ]
    assert [name for name in ITEMS if name.startswith("figure")] == [
        f"figure-{number:02}" for number in range(1, 6)
    ]


def test_every_named_notebook_exists(repository):
    for item in ITEMS.values():
        if item.notebook:
            assert (repository / "notebooks" / f"{item.notebook}.ipynb").exists()


def test_rows_carry_the_labels_of_the_papers_tables():
    for item in ITEMS.values():
        if item.rows:
            printed = set(paper_values(item.id)["row"])
            assert {row.label for row in item.rows} <= printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": "smok"}, "unknown profile 'smok'; did you mean smoke"),
        ({"accelerator": "cuda"}, "unknown accelerator 'cuda'"),
        ({"engine": "rays"}, "unknown engine"),
        ({"seeds": "0,one"}, "seeds is '0,one'"),
        ({"seeds": "-1"}, "seeds is '-1'"),
        ({"devices": "0"}, "devices is '0'"),
        ({"devices": "many"}, "devices is 'many'"),
        ({"force": "yes"}, "force is 'yes'"),
        ({"profile": "paper"}, "set data_root"),
        ({"profile": "paper", "data_root": "/nowhere"}, "/nowhere is none"),
        ({"results_dir": "/proc/results"}, "cannot write in /proc/results"),
        ({"accelerator": "tpu"}, "'tpu' is not on this machine; it has cpu"),
    ],
)
def test_bad_parameters_stop_before_any_work(tmp_path, changes, message):
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        check_parameters(**{"results_dir": tmp_path, **changes})
    assert message in str(caught.value)
    assert not list(tmp_path.rglob("*.csv"))


@pytest.mark.parametrize(
    ("seeds", "resolved"),
    [("", (0,)), (None, (0,)), (0, (0,)), (1, (1,)), ("0,1, 2", (0, 1, 2)), ([3, 3], (3,))],
)
def test_seeds_come_as_papermill_gives_them(tmp_path, seeds, resolved):
    assert check_parameters("smoke", results_dir=tmp_path, seeds=seeds).seeds == resolved


def test_unknown_item_lists_the_near_ones(smoke):
    with pytest.raises(UnknownName, match="table-08"):
        experiments.reproduce("table-8", smoke)


def test_rows_of_two_tables_share_a_run(smoke):
    keys = {
        name: {run.row.label: run.config.key for run in planned_runs(ITEMS[name], smoke)}
        for name in ("table-08", "table-09")
    }
    assert keys["table-08"]["Eff-SpineNet-D0"] == keys["table-09"]["Eff-SpineNet-D0"]
    assert len(set(keys["table-09"].values())) == 3


def test_a_run_key_depends_on_what_changes_the_result(smoke):
    (run, *_) = planned_runs(ITEMS["table-08"], smoke)
    config = run.config
    changed = [
        RunConfig.from_dict({**config.to_dict(), **change})
        for change in (
            {"seed": 1},
            {"image_size": 128},
            {"model_options": {"weighted_fusion": False}},
            {"recipe": {**config.recipe.to_dict(), "learning_rate": 0.5}},
            {"data": {**config.data.to_dict(), "seed": 5}},
        )
    ]
    assert len({config.key, *(other.key for other in changed)}) == 6
    again = RunConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.key == config.key


def test_moved_data_is_the_same_data():
    first, second = (
        RunConfig("eff_spinenet_m0", "detection", 128, data, get_recipe("smoke_detection"))
        for data in (DataConfig("coco", root="/here"), DataConfig("coco", root="/there"))
    )
    assert first.key == second.key


def test_the_paper_profile_plans_the_papers_models(tmp_path):
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (tmp_path / "coco" / "annotations" / f"instances_{split}.json").write_text("{}")
    parameters = check_parameters("paper", data_root=tmp_path / "coco", results_dir=tmp_path)
    configs = [run.config for run in planned_runs(ITEMS["table-08"], parameters)]
    assert [c.model for c in configs] == ["sp_efficientnet_b0", "eff_spinenet_d0"]
    assert {c.image_size for c in configs} == {512}
    assert {c.data.train_split for c in configs} == {"train2017"}


def test_a_smoke_table_is_measured_reused_and_labelled(smoke):
    store = experiments.reproduce("table-08", smoke, progress=False)
    frame = store.measurements("table-08")
    costs = frame[frame["source"] == "cost"].set_index(["row", "metric"])["value"]
    assert costs["Eff-SpineNet-D0", "multi_adds"] == pytest.approx(2.51, abs=0.005)
    assert costs["SP-EfficientNet-B0", "parameters"] == pytest.approx(4.44, abs=0.005)
    assert set(frame["source"]) == {"cost", "smoke"}
    runs = store.runs()
    assert set(runs["state"]) == {"finished"}
    assert set(runs["profile"]) == {"smoke"}
    assert len(runs) == 2

    stamps = {path: path.stat().st_mtime_ns for path in store.folder.glob("runs/*/run.json")}
    again = experiments.reproduce("table-08", smoke, progress=False)
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert again.measurements("table-08").equals(frame)

    # Table 9 shares one of the runs: two more are run, not three.
    experiments.reproduce("table-09", smoke, progress=False)
    assert len(store.runs()) == 4
    assert len(store.measurements("table-09").query("metric == 'AP'")) == 3


def test_seeds_of_other_settings_are_dropped(smoke):
    store = experiments.reproduce("table-08", smoke, progress=False)
    (run, *_) = planned_runs(ITEMS["table-08"], smoke)
    config = run.config.to_dict()
    record = {**store.run(run.config.key), "seed": 7}
    row = {"row": run.row.label, "model": run.config.model, "task": "detection", "data": "-"}
    row = {**row, "metric": "AP", "value": 1.0, "unit": "%"}
    kept = {**config, "seed": 7}
    dropped = {**config, "seed": 8, "image_size": 128}
    for key, other in (("0" * 12, kept), ("1" * 12, dropped)):
        store.add_run({**record, "run": key, "config": other, "seed": other["seed"]})
        store.add_measurements("table-08", [{**row, "run": key, "seed": other["seed"]}])
    experiments.reproduce("table-08", smoke, progress=False)
    assert set(store.measurements("table-08")["seed"].dropna().astype(int)) == {0, 7}


@pytest.mark.parametrize("force", [False, True])
def test_a_failed_run_names_its_log_and_the_others_are_kept(tmp_path, smoke, force):
    good, bad = (run.config for run in planned_runs(ITEMS["table-08"], smoke))
    bad = RunConfig.from_dict(
        {**bad.to_dict(), "data": DataConfig("coco", root=str(tmp_path / "none")).to_dict()}
    )
    results = []

    def collect():
        for result in run_all(
            [good, bad], tmp_path / "runs", processes=2, force=force, progress=False
        ):
            results.append(result.key)

    with pytest.raises(UserError, match=r"1 of 2 runs failed.*worker\.log") as caught:
        collect()
    assert results == [good.key]
    assert "Traceback" not in str(caught.value)


def test_workers_end_with_the_process_that_started_them(tmp_path, smoke):
    config = planned_runs(ITEMS["table-08"], smoke)[0].config
    endless = RunConfig.from_dict(
        {**config.to_dict(), "recipe": get_recipe("proxy_detection").to_dict()}
    )
    request = tmp_path / "request.json"
    request.write_text(json.dumps(endless.to_dict()))
    script = (
        "import json, sys; from effspinenet_lib.experiments.fanout import run_all; "
        "from effspinenet_lib.training.run import RunConfig; "
        "config = RunConfig.from_dict(json.load(open(sys.argv[1]))); "
        "list(run_all([config], sys.argv[2], processes=1, progress=False))"
    )
    runs = tmp_path / "runs"
    parent = subprocess.Popen([sys.executable, "-c", script, str(request), str(runs)])
    try:
        _wait((runs / endless.key / "curve.csv").exists)
        (worker,) = _children(parent.pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _wait(lambda: not os.path.exists(f"/proc/{worker}"))


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as handle:
        return [int(child) for child in handle.read().split()]


def _wait(condition, seconds=300):
    """Wait for a condition; the limit is generous, as machines that test are often busy."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
