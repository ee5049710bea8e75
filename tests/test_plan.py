"""The plan: the arithmetic of one row by hand, and what is left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.experiments import ITEMS, planned_runs, resolve_parameters
from effspinenet_lib.experiments.cost_table import model_cost
from effspinenet_lib.experiments.plan import (
    Throughput,
    activation_bytes,
    fixed_bytes,
    plan,
    totals,
)
from effspinenet_lib.models.zoo import create_model
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.training.recipes import get_recipe

D0 = model_cost("eff_spinenet_d0", "detection", 512)
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
    parameters = resolve_parameters("paper", data_root=_coco(tmp_path), results_dir=tmp_path)
    return next(
        run.config
        for run in planned_runs(ITEMS["table-08"], parameters)
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
    planned = plan(["table-08"], results_dir=tmp_path, throughput=Throughput(400), progress=False)
    row = _row(planned, "Eff-SpineNet-D0")
    assert (row["state"], row["steps"], row["batch"]) == ("missing", 300_300, 256)
    assert row["images"] == IMAGES == 76_876_800
    assert row["multi_adds"] == 3 * D0.multi_adds * IMAGES
    assert row["hours"] == pytest.approx(IMAGES / 400 / 3600)
    assert row["throughput"] == "stated"
    # weights, gradients and momenta of 4 bytes each
    fixed = row["memory"] - 256 * row["memory_image"]
    assert fixed == 12 * D0.parameters
    assert not list(tmp_path.iterdir())


def test_an_assumed_speed_is_a_share_of_the_device(tmp_path):
    rate, origin = Throughput(device="a100", devices=8).of(D0.multi_adds)
    # 312e12 operations a second each; 6 for a Multi-Add of a training image
    assert rate == pytest.approx(0.02 * 8 * 312e12 / (6 * D0.multi_adds))
    assert origin == "assumed"


def test_what_is_finished_is_left_out_and_what_is_partial_counts_the_rest(tmp_path, d0):
    store = ResultsStore(tmp_path, "paper")
    store.add_run(_record(d0, 300_000))
    row = _row(plan(["table-08"], "paper", tmp_path, progress=False), "Eff-SpineNet-D0")
    assert (row["state"], row["steps"], row["images"]) == ("partial", 300, 300 * 256)
    # recorded runs of the same model say how fast it trains
    assert (row["throughput"], row["images_per_second"]) == ("measured", 100)
    assert row["hours"] == pytest.approx(300 * 256 / 100 / 3600)
    store.add_run(_record(d0, 300_300))
    rest = plan(["table-08"], "paper", tmp_path, progress=False)
    assert "Eff-SpineNet-D0" not in set(rest["row"])


def test_a_stated_speed_wins_and_a_short_run_measures_none(tmp_path, d0):
    store = ResultsStore(tmp_path, "paper")
    store.add_run(_record(d0, 200))
    stated = plan(["table-08"], "paper", tmp_path, throughput=Throughput(7), progress=False)
    assert _row(stated, "Eff-SpineNet-D0")["images_per_second"] == 7
    store.add_run(_record(d0, 3, images_per_second=0.1))
    short = plan(["table-08"], "paper", tmp_path, progress=False)
    assert _row(short, "Eff-SpineNet-D0")["throughput"] == "assumed"


def test_runs_that_tables_share_count_once(tmp_path):
    planned = plan(["table-08", "table-09"], "paper", tmp_path, progress=False)
    assert len(planned) == 2 + 3 - 1, "Eff-SpineNet-D0 is in both"
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


def test_rows_that_the_profile_does_not_train_are_left_out(tmp_path):
    table_4 = plan(["table-04"], "proxy", tmp_path, progress=False)
    assert not table_4["row"].str.contains("ResNet").any()
    proxy = plan(["table-08"], "proxy", tmp_path, progress=False)
    assert len(proxy) == 2 * 5  # rows, seeds
    long = plan(["table-06"], "proxy", tmp_path, progress=False)
    assert len(long) == 2 * 3  # a run of them takes over a quarter of an hour


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


def test_the_meta_device_counts_what_a_cpu_keeps():
    with torch.device("meta"):
        absent = create_model("eff_spinenet_m0")
    present = create_model("eff_spinenet_m0")
    assert activation_bytes(absent, 128) == pytest.approx(activation_bytes(present, 128), rel=1e-3)


def test_rmsprop_and_an_average_keep_more_numbers_a_weight():
    # weights, gradients, mean of squares, momentum, average
    assert fixed_bytes(10, get_recipe("paper_classification")) == 10 * 4 * 5
