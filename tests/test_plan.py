"""The plan: the arithmetic of one row by hand, and what is left out."""

from __future__ import annotations

import pytest
import torch
from effspinenet_lib.native import functions
from torch import Tensor, nn

from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.experiments import ITEMS, check_parameters, planned_runs
from effspinenet_lib.experiments.memory import activation_bytes, training_memory
from effspinenet_lib.experiments.plan import (
    DEVICES,
    Throughput,
    _entries,
    plan,
    totals,
)
from effspinenet_lib.models.zoo import create_model
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.training.recipes import get_recipe

# Counted by `results costs`, in results/cost/costs.csv.
D0_MULTI_ADDS, D0_PARAMETERS = 2_512_678_400, 3_678_399
IMAGES = 650 * 462 * 256  # epochs, steps of an epoch, batch


def _record(config, steps, **changes):
    return {
        "run": config.key,
        "state": "finished" if steps == config.recipe.steps else "partial",
        "model": config.model,
        "task": config.task,
        "seed": config.seed,
        "steps": steps,
        "images": steps * config.recipe.batch_size,
        "images_per_second": 100.0,
        "config": config.to_dict(),
        **changes,
    }


@pytest.fixture
def d0(tmp_path):
    parameters = check_parameters("paper", data_root=_coco(tmp_path), results_dir=tmp_path)
    return next(
        run.config
        for run in planned_runs(ITEMS["table-03"], parameters)
        if run.config.model == "eff_spinenet_d0"
    )


def _coco(folder):
    (folder / "coco" / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / "coco" / "annotations" / f"instances_{split}.json").write_text("{}")
    return folder / "coco"


def _row(planned, label):
    (row,) = planned[planned["row"] == label].to_dict("records")
    return row


def test_a_row_is_the_arithmetic_of_its_recipe(tmp_path):
    planned = plan(["table-03"], results_dir=tmp_path, throughput=Throughput(400), progress=False)
    row = _row(planned, "Eff-SpineNet-D0")
    assert (row["state"], row["steps"], row["batch"]) == ("missing", 300_300, 256)
    assert row["images"] == IMAGES == 76_876_800
    assert row["multi_adds"] == 3 * D0_MULTI_ADDS * IMAGES
    assert row["hours"] == pytest.approx(IMAGES / 400 / 3600)
    assert row["throughput"] == "stated"
    # weights, gradients and momenta of 4 bytes each
    fixed = row["memory"] - 256 * row["memory_image"]
    assert fixed == 12 * D0_PARAMETERS
    assert not list(tmp_path.iterdir())


def test_an_assumed_speed_is_a_share_of_the_device(tmp_path):
    rate, origin = Throughput(device="a100", devices=8).of(D0_MULTI_ADDS)
    # 312e12 operations a second each; 6 for a Multi-Add of a training image
    assert rate == pytest.approx(0.02 * 8 * 312e12 / (6 * D0_MULTI_ADDS))
    assert origin == "assumed"
    assert all(device.source for device in DEVICES.values())


def test_what_is_finished_is_left_out_and_what_is_partial_counts_the_rest(tmp_path, d0):
    store = ResultsStore(tmp_path, "paper")
    store.add_run(_record(d0, 300_000))
    row = _row(plan(["table-03"], "paper", tmp_path, progress=False), "Eff-SpineNet-D0")
    assert (row["state"], row["steps"], row["images"]) == ("partial", 300, 300 * 256)
    # recorded runs of the same model say how fast it trains
    assert (row["throughput"], row["images_per_second"]) == ("measured", 100)
    assert row["hours"] == pytest.approx(300 * 256 / 100 / 3600)
    store.add_run(_record(d0, 300_300))
    rest = plan(["table-03"], "paper", tmp_path, progress=False)
    assert "Eff-SpineNet-D0" not in set(rest["row"])


def test_a_stated_speed_wins_and_a_short_run_measures_none(tmp_path, d0):
    store = ResultsStore(tmp_path, "paper")
    store.add_run(_record(d0, 200))
    stated = plan(["table-03"], "paper", tmp_path, throughput=Throughput(7), progress=False)
    assert _row(stated, "Eff-SpineNet-D0")["images_per_second"] == 7
    store.add_run(_record(d0, 3, images_per_second=0.1))
    short = plan(["table-03"], "paper", tmp_path, progress=False)
    assert _row(short, "Eff-SpineNet-D0")["throughput"] == "assumed"


def test_runs_that_tables_share_count_once(tmp_path):
    planned = plan(["table-04", "table-05"], "paper", tmp_path, progress=False)
    # +SD of Table 4 is the 650 epochs of Table 5
    assert len(planned) == 9 + 5 - 1
    assert len(planned) == len(planned.drop_duplicates(["row", "seed"]))
    sums = totals(planned)
    assert sums.loc["all", "images"] == sums.loc["own", "images"] == planned["images"].sum()


def test_the_search_is_part_of_the_papers_total(tmp_path):
    planned = plan(["figure-05"], "paper", tmp_path, progress=False)
    (row,) = planned.to_dict("records")
    assert (row["kind"], row["runs"], row["steps"]) == ("search", 5_000, 4_500)
    assert row["images"] == 5_000 * 4_500 * 256
    assert "7,392" in row["row"]
    assert totals(planned).loc["search", "images"] == row["images"]


def test_the_searchs_runs_hold_out_what_they_are_rewarded_for(tmp_path):
    parameters = check_parameters("paper", data_root=_coco(tmp_path), results_dir=tmp_path)
    (entry,) = _entries("figure-05", parameters)
    assert entry.config.recipe.name == "paper_search_trial"
    data = entry.config.data
    assert (data.train_split, data.eval_split) == ("train2017-rest-7392", "train2017-held-7392")


def test_rows_without_a_recipe_in_the_profile_are_left_out(tmp_path):
    assert plan(["table-05"], "proxy", tmp_path, progress=False).empty
    proxy = plan(["table-08"], "proxy", tmp_path, progress=False)
    assert len(proxy) == 2 * 3  # rows, seeds


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Throughput(device="a10"), "did you mean a100"),
        (lambda: Throughput(-1), "must be positive"),
        (lambda: plan(["table-33"]), "unknown item"),
        (lambda: plan([], "papr"), "unknown profile"),
    ],
)
def test_wrong_names_and_numbers_are_one_line(make, message):
    with pytest.raises((UnknownName, UserError), match=message):
        make()


class _Layers(nn.Module):
    """Two layers whose kept tensors can be counted: a 1x1 convolution and a ReLU."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 1, bias=False)

    def network(self, images: Tensor) -> Tensor:
        return torch.relu(self.convolution(images))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_activations_are_what_autograd_keeps(device):
    model = _Layers().to(device).eval()
    # the images for the weights' gradient, and what the ReLU gives for its own
    assert activation_bytes(model, 16) == (3 + 5) * 16 * 16 * 4
    assert not model.training


def test_the_meta_device_counts_what_a_processor_keeps(monkeypatch):
    monkeypatch.setattr(functions, "load_library", lambda: None)  # compiled norms keep less
    with torch.device("meta"):
        absent = create_model("eff_spinenet_m0")
    assert activation_bytes(absent, 128) == activation_bytes(create_model("eff_spinenet_m0"), 128)


def test_rmsprop_and_an_average_keep_more_numbers_a_weight():
    memory = training_memory(10, 100, get_recipe("paper_classification"))
    # weights, gradients, mean of squares, momentum, average
    assert memory.fixed == 10 * 4 * 5
    assert memory.of(3) == 200 + 300
