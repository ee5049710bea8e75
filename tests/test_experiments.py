"""Items, their rows and parameters, and the runs that an item needs."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from effspinenet_lib import experiments
from effspinenet_lib.data import DataConfig, export_coco
from effspinenet_lib.data.shapescenes import CATEGORIES
from effspinenet_lib.errors import (
    CheckpointError,
    DataError,
    TrainingError,
    UnknownName,
    UserError,
)
from effspinenet_lib.experiments import (
    ITEMS,
    PROFILES,
    RunParameters,
    find_row,
    planned_runs,
    resolve_parameters,
    train_row,
)
from effspinenet_lib.experiments.cost_table import model_cost
from effspinenet_lib.experiments.items import Item, Profile, Row
from effspinenet_lib.experiments.launcher import Outcome
from effspinenet_lib.models.zoo import model_entry
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.results.paper import paper_values
from effspinenet_lib.training.recipes import get_recipe
from effspinenet_lib.training.run import RunConfig, RunResult, train_run

TABLES = ("table-03", "table-04", "table-05", "table-06", "table-07", "table-10", "table-11")
# Rows that the paper prints and that nothing here trains.
UNTRAINED = {
    "ResNet-50-FPN +SE",  # printed N/A
    "MobileNetv2 + DeepLabv3",
    "ResNet-101 + DeepLabv3",
}


def parameters_of(folder: Path, profile: str = "paper", **changes) -> RunParameters:
    chosen = PROFILES[profile]
    return replace(RunParameters(chosen, None, folder, chosen.seeds), **changes)


@pytest.fixture
def smoke(tmp_path):
    return resolve_parameters("smoke", results_dir=tmp_path)


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """A folder with COCO's layout and names of splits."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    config = DataConfig(
        "shapescenes", None, "train2017", "val2017", train_images=6, eval_images=4, image_size=64
    )
    export_coco(config, folder)
    return folder


def split_lists(folder: Path, lists: str, names: tuple[str, ...]) -> Path:
    for name in names:
        path = folder / lists.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return folder


COCO_LISTS = "annotations/instances_{}.json"


# Items and rows


def test_the_suite_knows_every_table_and_figure_of_the_paper(repository):
    assert list(ITEMS) == [
        *(f"table-{number:02}" for number in range(1, 12)),
        *(f"figure-{number:02}" for number in range(1, 6)),
    ]
    for item in ITEMS.values():
        assert (repository / "notebooks" / f"{item.notebook}.ipynb").exists()
        if item.rows:
            own = {row.label for row in item.rows if row.trains_in("paper")}
            assert own <= set(paper_values(item.id)["row"])


@pytest.mark.parametrize("table", TABLES)
def test_every_printed_row_can_be_trained_as_the_paper_has_it(table):
    printed = paper_values(table).drop_duplicates("row").set_index("row")
    rows = [row for row in ITEMS[table].rows if row.trains_in("paper")]
    assert set(printed.index) - UNTRAINED == {row.label for row in rows}
    for row in rows:
        assert (row.model, row.task) == tuple(printed.loc[row.label, ["model", "task"]])
        assert row.task in model_entry(row.proxy_model or row.model).image_sizes


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("table", TABLES)
def test_every_recipe_and_option_exists(tmp_path, table, profile):
    recipes = set(PROFILES[profile].recipes.values())
    for run in planned_runs(ITEMS[table], parameters_of(tmp_path, profile)):
        assert run.config.options is not None
        assert run.config.recipe.name in {*run.row.recipes.values(), *recipes}


def test_the_proxy_trains_what_has_a_counterpart_of_equal_cost(tmp_path):
    planned = {
        table: Counter(run.row.group for run in planned_runs(ITEMS[table], parameters))
        for parameters in [parameters_of(tmp_path, "proxy", seeds=(0,))]
        for table in (*TABLES, "table-08", "table-09")
    }
    for table in ("table-03", "table-07", "table-08", "table-09", "table-10"):
        assert "" not in planned[table]
        assert min(planned[table].values()) >= 2, table
    names = {run.config.model for run in planned_runs(ITEMS["table-07"], parameters_of(tmp_path))}
    assert "mobilenetv2_nas_fpn" in names
    proxy = planned_runs(ITEMS["table-07"], parameters_of(tmp_path, "proxy"))
    assert "mobilenetv2_nas_fpn" not in {run.config.model for run in proxy}


@pytest.mark.parametrize("table", ["table-03", "table-07", "table-08", "table-09", "table-10"])
def test_rows_that_the_proxy_compares_cost_the_same(tmp_path, table):
    costs: dict[str, list[int]] = {}
    for run in planned_runs(ITEMS[table], parameters_of(tmp_path, "proxy", seeds=(0,))):
        config, options = run.config, tuple(run.row.options.items())
        classes = len(CATEGORIES) if config.task == "detection" else None
        cost = model_cost(config.model, config.task, config.image_size, options, classes)
        costs.setdefault(run.row.group, []).append(cost.multi_adds)
    assert costs
    for group, counts in costs.items():
        assert max(counts) <= 1.15 * min(counts), group


def test_seeds_that_are_given_are_all_trained(tmp_path):
    for seeds, long, short in (((), 3, 5), (tuple(range(10)), 10, 10)):
        given = {"seeds": seeds} if seeds else {}
        runs = planned_runs(ITEMS["table-07"], parameters_of(tmp_path, "proxy", **given))
        count = Counter(run.row.label for run in runs)
        assert (count["Eff-SpineNet-M1"], count["Eff-SpineNet-M0"]) == (long, short)


def test_rows_of_table_4_add_one_strategy_each(tmp_path):
    runs = planned_runs(ITEMS["table-04"], parameters_of(tmp_path))
    settings = {
        run.row.label.removeprefix("Eff-SpineNet-D2 "): (
            run.config.options.get("squeeze_excitation", True),
            run.config.options.get("activation", "swish"),
            run.config.recipe.steps // 462,
            run.config.recipe.scale_jitter,
            run.config.options["stochastic_depth"],
        )
        for run in runs
        if run.config.model == "eff_spinenet_d2"
    }
    assert settings == {
        "baseline": (False, "relu", 72, (0.8, 1.2), 0.0),
        "+SE": (True, "relu", 72, (0.8, 1.2), 0.0),
        "+ms train": (True, "relu", 650, (0.1, 2.0), 0.0),
        "+Swish": (True, "swish", 650, (0.1, 2.0), 0.0),
        "+SD": (True, "swish", 650, (0.1, 2.0), 0.2),
    }


def test_the_proxy_of_table_4_parts_schedule_and_jitter(tmp_path):
    runs = planned_runs(ITEMS["table-04"], parameters_of(tmp_path, "proxy", seeds=(0,)))
    assert {run.config.model for run in runs} == {"eff_spinenet_m0"}
    recipes = [run.config.recipe for run in runs]
    changed = [
        {name for name in ("steps", "scale_jitter") if getattr(a, name) != getattr(b, name)}
        for a, b in itertools.pairwise(recipes)
    ]
    assert changed == [set(), {"steps"}, {"scale_jitter"}, set(), set()]
    assert recipes[-1].stochastic_depth > recipes[0].stochastic_depth == 0


def test_the_proxy_of_table_5_has_the_papers_shares_of_the_schedule(tmp_path):
    runs = planned_runs(ITEMS["table-05"], parameters_of(tmp_path, "proxy", seeds=(0,)))
    epochs = [int(run.row.label.split()[1]) for run in runs]
    for run, length in zip(runs, epochs, strict=True):
        steps, drops = run.config.recipe.steps, run.config.recipe.lr_drops
        shares = [last / steps for last, _ in drops]
        assert shares == pytest.approx([30 / length, 10 / length], abs=0.6 / steps)
        assert [factor for _, factor in drops] == [0.1, 0.01]
        assert steps / runs[-1].config.recipe.steps == pytest.approx(length / 650, rel=0.01)


def test_tables_share_runs(tmp_path, smoke):
    keys = {
        table: {run.row.label: run.config.key for run in planned_runs(ITEMS[table], parameters)}
        for parameters, tables in (
            (parameters_of(tmp_path), ("table-03", "table-04", "table-05")),
            (smoke, ("table-08", "table-09")),
        )
        for table in tables
    }
    d2 = keys["table-03"]["Eff-SpineNet-D2"]
    assert d2 == keys["table-04"]["Eff-SpineNet-D2 +SD"]
    assert d2 == keys["table-05"]["Eff-SpineNet-D2 650 epochs"]
    assert keys["table-03"]["ResNet-50-FPN"] == keys["table-04"]["ResNet-50-FPN +SD"]
    assert keys["table-08"]["Eff-SpineNet-D0"] == keys["table-09"]["Eff-SpineNet-D0"]
    assert len(set(keys["table-09"].values())) == 3


def test_the_paper_profile_plans_the_papers_models(tmp_path):
    data = split_lists(tmp_path / "coco", COCO_LISTS, ("train2017", "val2017"))
    parameters = resolve_parameters("paper", data_root=data, results_dir=tmp_path)
    configs = [run.config for run in planned_runs(ITEMS["table-08"], parameters)]
    assert [c.model for c in configs] == ["sp_efficientnet_b0", "eff_spinenet_d0"]
    assert {c.data.train_split for c in configs} == {"train2017"}
    sizes = {
        (table, run.config.model): run.config.image_size
        for table in ("table-06", "table-07", "table-08", "table-10", "table-11")
        for run in planned_runs(ITEMS[table], parameters_of(tmp_path))
    }
    assert sizes["table-06", "eff_spinenet_d1"] == 640
    assert sizes["table-07", "eff_spinenet_m0"] == 256
    assert sizes["table-08", "sp_efficientnet_b0"] == 512
    assert sizes["table-10", "eff_spinenet_d1"] == 240
    assert sizes["table-11", "eff_spinenet_d2"] == 512


def test_a_row_is_found_by_label_or_model():
    for name in ("Eff-SpineNet-D2", "eff-spinenet-d2", "eff_spinenet_d2"):
        assert find_row(ITEMS["table-03"], name).label == "Eff-SpineNet-D2"
    with pytest.raises(UnknownName, match="eff_spinenet_d2"):
        find_row(ITEMS["table-03"], "eff_spinenet_d3")
    with pytest.raises(UserError, match=r"5 rows of eff_spinenet_d2.*72 epochs"):
        find_row(ITEMS["table-05"], "eff_spinenet_d2")


# Parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": "smok"}, "unknown profile 'smok'; did you mean smoke"),
        ({"accelerator": "cuda"}, "unknown accelerator 'cuda'"),
        ({"engine": "rays"}, "unknown engine 'rays'; did you mean ray?"),
        ({"seeds": "0,one"}, "seeds is '0,one'"),
        ({"seeds": "-1"}, "seeds is '-1'"),
        ({"devices": "0"}, "devices is '0'"),
        ({"devices": "many"}, "devices is 'many'"),
        ({"force": "yes"}, "force is 'yes'"),
        ({"profile": "paper"}, "set data_root"),
        ({"profile": "paper", "data_root": "/nowhere"}, "/nowhere does not exist"),
        ({"results_dir": "/proc/results"}, "cannot write in /proc/results"),
        ({"accelerator": "tpu"}, "'tpu' is not on this machine; it has cpu"),
    ],
)
def test_bad_parameters_stop_before_any_work(tmp_path, changes, message):
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        experiments.reproduce("table-08", **{"results_dir": tmp_path, **changes})
    assert message in str(caught.value)
    assert not list(tmp_path.rglob("*.csv"))


@pytest.mark.parametrize(
    ("seeds", "resolved"),
    [("", (0,)), (None, (0,)), (0, (0,)), (1, (1,)), ("0,1, 2", (0, 1, 2)), ([3, 3], (3,))],
)
def test_seeds_come_as_papermill_gives_them(tmp_path, seeds, resolved):
    assert resolve_parameters("smoke", results_dir=tmp_path, seeds=seeds).seeds == resolved


def test_a_clusters_devices_are_not_this_machines(tmp_path):
    on_ray = resolve_parameters("smoke", results_dir=tmp_path, engine="ray", accelerator="tpu")
    assert (on_ray.device, on_ray.devices) == ("tpu", 0)
    assert resolve_parameters("smoke", results_dir=tmp_path, devices="3").devices == 3


def test_unknown_item_lists_the_near_ones(tmp_path):
    with pytest.raises(UnknownName, match="table-08"):
        experiments.reproduce("table-8", results_dir=tmp_path)


def test_moved_data_is_the_same_data():
    first, second = (
        RunConfig("eff_spinenet_m0", "detection", 128, data, get_recipe("smoke_detection"))
        for data in (DataConfig("coco", root="/here"), DataConfig("coco", root="/there"))
    )
    assert first.key == second.key


# Data


@pytest.mark.parametrize("names", [("train2017", "val2017"), ("train", "val")])
def test_splits_of_a_coco_folder_are_found_by_name(tmp_path, names):
    folder = split_lists(tmp_path / "own", COCO_LISTS, names)
    config = planned_runs(ITEMS["table-03"], parameters_of(tmp_path, data_root=folder))[0].config
    assert (config.data.train_split, config.data.eval_split) == names
    assert config.data.root == str(folder)


def test_segmentation_takes_the_augmented_list_where_there_is_one(tmp_path):
    lists = "ImageSets/Segmentation/{}.txt"
    folder = split_lists(tmp_path / "voc", lists, ("train", "val"))
    (tmp_path / "weights").write_bytes(b"")
    parameters = parameters_of(tmp_path, data_root=folder, initial_weights=tmp_path / "weights")
    assert planned_runs(ITEMS["table-11"], parameters)[0].config.data.train_split == "train"
    split_lists(folder, lists, ("train_aug",))
    data = planned_runs(ITEMS["table-11"], parameters)[0].config.data
    assert (data.format, data.train_split) == ("voc_segmentation", "train_aug")


def test_a_folder_without_the_splits_is_one_clear_line(tmp_path):
    folder = split_lists(tmp_path / "own", COCO_LISTS, ("training",))
    with pytest.raises(DataError, match=r"no splits train2017/val2017 nor train/val"):
        planned_runs(ITEMS["table-03"], parameters_of(tmp_path, data_root=folder))


def test_a_row_that_starts_from_another_says_which_weights_are_missing(tmp_path):
    run = planned_runs(ITEMS["table-11"], parameters_of(tmp_path))[0]
    d0 = planned_runs(ITEMS["table-03"], parameters_of(tmp_path))[0].config
    assert run.config.initial_weights is not None
    assert Path(run.config.initial_weights).parent.name == d0.key
    smoke = PROFILES["smoke"].data["segmentation"]
    config = replace(run.config, data=smoke, recipe=get_recipe("smoke_detection"), image_size=64)
    with pytest.raises(CheckpointError, match=rf"{d0.key}.*no such weights file"):
        train_run(config, tmp_path, progress=False)


def test_the_proxys_segmentation_starts_from_the_detector_of_its_seed(tmp_path):
    parameters = parameters_of(tmp_path, "proxy", seeds=(2,))
    detectors = {
        run.config.model: run.config.key for run in planned_runs(ITEMS["table-07"], parameters)
    }
    starts = {run.row.label: run.config for run in planned_runs(ITEMS["table-11"], parameters)}
    d0, scratch = starts["Eff-SpineNet-D0"], starts["Eff-SpineNet-D0, from scratch"]
    assert Path(d0.initial_weights).parent.name == detectors["eff_spinenet_m0"]
    assert (
        Path(starts["Eff-SpineNet-D2"].initial_weights).parent.name == detectors["eff_spinenet_m2"]
    )
    assert scratch.initial_weights is None
    assert d0.key != scratch.key
    # The key rests on the detector's run, wherever the results lie.
    elsewhere = parameters_of(tmp_path / "moved", "proxy", seeds=(2,))
    again = {run.row.label: run.config for run in planned_runs(ITEMS["table-11"], elsewhere)}
    assert again["Eff-SpineNet-D0"].key == d0.key


# Reproducing an item


def test_a_smoke_table_is_measured_reused_and_labelled(tmp_path, monkeypatch):
    results = experiments.reproduce("table-08", results_dir=tmp_path, progress=False)
    store = ResultsStore(tmp_path, "smoke")
    frame = store.measurements("table-08")
    assert set(frame["source"]) == {"cost", "smoke"}
    runs = store.runs()
    assert runs[["state", "profile"]].to_numpy().tolist() == [["finished", "smoke"]] * 2

    assert results.paper.equals(paper_values("table-08"))
    costs = frame[frame["source"] == "cost"].set_index(["row", "metric"])["value"]
    shown = results.measured[results.measured["source"] == "cost"]
    assert shown.set_index(["row", "metric"])["value"].equals(costs)
    assert "smoke" not in set(results.measured["source"]), "says nothing about accuracy"
    assert set(results.runs["label"]) == set(results.curves)
    assert results.runs["label"].tolist()[0].endswith(", seed 0")
    assert {"step", "loss"} <= set(results.curves["Eff-SpineNet-D0, seed 0"])

    stamps = {path: path.stat().st_mtime_ns for path in store.folder.glob("runs/*/run.json")}
    again = experiments.reproduce("table-08", results_dir=tmp_path, progress=False)
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert store.measurements("table-08").equals(frame)
    assert again.paper.equals(results.paper)

    # Table 9 shares one of the runs: two more are run, not three.
    trained = pretend(monkeypatch)
    experiments.reproduce("table-09", results_dir=tmp_path, progress=False)
    assert len(trained) == 2
    assert len(store.measurements("table-09").query("metric == 'AP'")) == 3


def pretend(monkeypatch, failing: str = "") -> list[str]:
    """Put runs that take no training in place of the launcher's; the keys of those that ran."""
    trained: list[str] = []

    def run(configs, *_):
        for config in configs:
            trained.append(config.key)
            key, images = config.key, 12 * config.recipe.batch_size
            record = {
                **{"run": key, "state": "finished", "model": config.model, "task": config.task},
                **{"seed": config.seed, "steps": config.recipe.steps, "images": images},
                **{"config": config.to_dict(), "commit": "0123456789", "date": "2026-01-31"},
            }
            result = RunResult(Path(key), {"AP": float(len(trained))}, record)
            if config.model == failing:
                error = TrainingError("the loss of step 3 is not finite")
                yield Outcome(config, 1, Path(key) / "worker.log", error=error)
            else:
                yield Outcome(config, 1, Path(key) / "worker.log", result)

    monkeypatch.setattr("effspinenet_lib.experiments.reproduction.run_many", run)
    return trained


def test_items_share_what_force_has_trained(smoke, monkeypatch):
    """`reproduce table-08 table-09 --force` trains what both need once."""
    trained = pretend(monkeypatch)
    experiments.reproduce("table-08", smoke, progress=False)
    assert len(trained) == 2
    forced = replace(smoke, force=True, started=set())
    for name in ("table-08", "table-09", "table-08"):
        experiments.reproduce(name, forced, progress=False)
    assert len(trained) == 2 + 2 + 2


def test_finished_runs_are_looked_up_together(smoke, monkeypatch):
    pretend(monkeypatch)
    opened: list[str] = []
    read = ResultsStore.runs
    monkeypatch.setattr(ResultsStore, "runs", lambda self: opened.append("") or read(self))
    counts = []
    for seeds in ((0,), (0, 1, 2, 3)):
        parameters = replace(smoke, seeds=seeds)
        experiments.reproduce("table-08", parameters, progress=False)
        opened.clear()
        experiments.reproduce("table-08", parameters, progress=False)
        counts.append(len(opened))
    assert counts[0] == counts[1], "not for every run"


def test_an_item_without_rows_is_only_read(tmp_path):
    assert experiments.reproduce("figure-02", results_dir=tmp_path).measured.empty


def test_seeds_of_other_settings_are_dropped(smoke, monkeypatch):
    pretend(monkeypatch)
    for changes in (
        {"seeds": (0, 7)},
        {"seeds": (8,), "profile": replace(smoke.profile, image_size=128)},
    ):
        experiments.reproduce("table-08", replace(smoke, **changes), progress=False)
    store = smoke.store
    assert set(store.measurements("table-08")["seed"].dropna()) == {8}
    experiments.reproduce("table-08", replace(smoke, seeds=(0, 7)), progress=False)
    experiments.reproduce("table-08", smoke, progress=False)
    assert set(store.measurements("table-08")["seed"].dropna()) == {0, 7}, "7 is of these settings"


def test_a_failed_run_names_its_log_and_the_others_are_recorded(smoke, monkeypatch):
    pretend(monkeypatch, failing="eff_spinenet_m0")
    said = (
        r"^1 of 2 runs failed; .* the loss of step 3 is not finite \(log: .*worker\.log\).*resume"
    )
    with pytest.raises(TrainingError, match=said):
        experiments.reproduce("table-08", smoke, progress=False)
    assert smoke.store.runs()["model"].tolist() == ["sp_efficientnet_m0"]


def test_the_status_counts_what_the_files_hold(tmp_path):
    store = ResultsStore(tmp_path, "proxy")
    row = {"row": "Eff-SpineNet-D0", "model": "eff_spinenet_m0", "task": "detection"}
    row = {**row, "data": "-", "metric": "AP", "unit": "%"}
    store.add_measurements("table-08", [{**row, "value": 1.0, "seed": seed} for seed in (0, 1)])
    status = experiments.item_status(tmp_path, tmp_path).set_index("item")
    assert list(status.index) == list(ITEMS)
    assert status.loc["table-08", ["cost_rows", "proxy_rows", "paper_scale_rows"]].tolist() == [
        *(0, 2, 0)
    ]
    assert status.loc["table-08", "paper_values"] == len(paper_values("table-08"))
    assert isinstance(status, pd.DataFrame)


# One row, trained in this process. The paper's profile at a size that a test can train.

TINY = Profile("paper", {"detection": "paper_detection"}, (0,), 64, {})
ITEM = Item(
    "table-07", "Mobile", "table_07_mobile_detection", (Row("Eff-SpineNet-M0", "eff_spinenet_m0"),)
)


def tiny(folder: Path, coco: Path, **changes) -> RunParameters:
    return replace(RunParameters(TINY, coco, folder, (0,)), **changes)


def test_a_row_of_a_few_steps_is_recorded_and_says_so(tmp_path, coco):
    parameters = tiny(tmp_path, coco)
    result = train_row(ITEM, ITEM.rows[0], parameters, max_steps=2, progress=False)
    store = ResultsStore(tmp_path, "paper")
    frame = store.measurements("table-07")
    measured = frame[frame["source"] == "paper_scale"]
    assert set(measured["row"]) == {"Eff-SpineNet-M0"}
    assert set(measured["note"]) == {"2 of 38,438,400 steps, recipe scaled from batch 256 to 2"}
    assert set(measured["data"]) == {"coco (pictures), train2017/val2017, 64x64"}
    assert dict(zip(measured["metric"], measured["value"], strict=True)) == pytest.approx(
        result.metrics, nan_ok=True
    )
    assert {"multi_adds", "parameters"} <= set(frame[frame["source"] == "cost"]["metric"])
    record = store.runs().set_index("run").loc[result.key]
    assert (record["state"], record["steps"]) == ("partial", 2)
    shown = experiments.read_results(ITEM, parameters).measured
    assert set(shown["source"]) == {"cost"}, "a partial run is never shown"

    more = train_row(ITEM, ITEM.rows[0], parameters, max_steps=3, progress=False)
    assert more.key == result.key
    notes = set(store.measurements("table-07").query("source != 'cost'")["note"])
    assert notes == {"3 of 38,438,400 steps, recipe scaled from batch 256 to 2"}


def test_a_batch_in_parts_is_not_scaled(tmp_path, coco):
    profile = replace(TINY, recipes={"detection": "smoke_detection"})
    parameters = tiny(tmp_path, coco, profile=profile)
    result = train_row(ITEM, ITEM.rows[0], parameters, micro_batch=2, max_steps=1, progress=False)
    assert result.record["images"] == get_recipe("smoke_detection").batch_size == 4
    notes = set(ResultsStore(tmp_path, "paper").measurements("table-07")["note"].fillna(""))
    assert notes == {"", "1 of 12 steps"}


def test_a_few_steps_do_not_replace_what_a_longer_run_measured(tmp_path, coco):
    parameters = tiny(tmp_path, coco)
    first = train_row(ITEM, ITEM.rows[0], parameters, max_steps=2, progress=False)
    store = ResultsStore(tmp_path, "paper")
    before = store.measurements("table-07")
    with pytest.raises(UserError, match=rf"run {first.key}, of 4 images.*another results folder"):
        train_row(ITEM, ITEM.rows[0], parameters, batch_size=3, max_steps=1, progress=False)
    assert store.measurements("table-07").equals(before)
