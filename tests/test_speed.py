"""What the library does for speed changes no result, and what the benchmarks record of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.pairs import compare, fastest, time_in_turn
from benchmarks.plain import make_plain
from benchmarks.record import Figure, ratio_figure, to_rows, write
from effspinenet_lib import create_model
from effspinenet_lib.errors import DataError
from effspinenet_lib.kernels import DepthwiseConv2d
from effspinenet_lib.report.speed import (
    format_sentence,
    goal_sentence,
    machine_table,
    memory_table,
    profile_table,
    ratio_table,
    read_speed,
)
from effspinenet_lib.results.csvfile import read_rows
from effspinenet_lib.results.speed import SPEED

SIDE, CLASSES = 128, 3
# Allocates, fills and frees 64 MiB ten times, then says how many pages the system had to clear.
FAULTS = """
import resource, sys
from effspinenet_lib.training.allocation import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    b"x" * (64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    b"x" * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def targets() -> list[dict[str, torch.Tensor]]:
    boxes = [[[10.0, 10.0, 60.0, 70.0], [50.0, 30.0, 110.0, 120.0]], [[5.0, 40.0, 30.0, 60.0]]]
    return [{"boxes": torch.tensor(found), "labels": torch.arange(len(found))} for found in boxes]


def test_a_step_has_the_losses_and_gradients_of_the_same_network_from_torchs_own_parts():
    torch.manual_seed(0)
    options = {"num_classes": CLASSES, "stochastic_depth": 0.0}
    model = create_model("eff_spinenet_m0", **options).double()
    plain = create_model("eff_spinenet_m0", **options).double()
    plain.load_state_dict(model.state_dict())
    make_plain(plain)
    assert not any(isinstance(layer, DepthwiseConv2d) for layer in plain.modules())
    images = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)
    images = images.contiguous(memory_format=torch.channels_last)
    found = []
    for network in (model, plain):
        network.train().to(memory_format=torch.channels_last)
        losses = network(images, targets())
        torch.stack(list(losses.values())).sum().backward()
        found.append((losses, {n: p.grad for n, p in network.named_parameters()}))
    (losses, gradients), (expected, expected_gradients) = found
    for name, loss in expected.items():
        # losses are computed in float32 on either side
        torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=0, check_dtype=False)
    # biases before a norm have no gradient but rounding's
    largest = max(gradient.abs().max() for gradient in expected_gradients.values()).item()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-9 * largest)


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_freed_memory_stays_with_the_process():
    def faults(word: str) -> int:
        command = [sys.executable, "-c", FAULTS, word]
        return int(subprocess.run(command, check=True, capture_output=True).stdout)

    assert faults("keep") * 100 < faults("give back")


def test_things_are_timed_in_turn_after_a_round_that_does_not_count():
    now, order = [0.0], []

    def work(name: str, seconds: list[float]):
        def run() -> None:
            order.append(name)
            now[0] += seconds.pop(0)

        return run

    times = time_in_turn(
        {"a": work("a", [9, 1, 2]), "b": work("b", [9, 4, 2])}, rounds=2, clock=lambda: now[0]
    )
    assert order == ["a", "b"] * 3
    assert times == {"a": [1, 2], "b": [4, 2]}
    assert fastest(times) == "a"


def test_a_ratio_is_the_median_of_the_paired_ones_and_above_1_where_ours_is_faster():
    ratio = compare(ours=[1.0, 2.0, 4.0], peer=[3.0, 2.0, 8.0])
    assert (ratio.ratio, ratio.lowest, ratio.highest) == (2.0, 1.0, 3.0)
    assert (ratio.ours, ratio.peer, ratio.pairs) == (2.0, 3.0, 3)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    fast = compare([1.0], [2.0])
    slow = compare([2.0], [1.5])
    figures = [
        ratio_figure("training", "training against A", "float32", fast, 1.5),
        ratio_figure("training", "training against B", "float32", slow, 1.0),
        ratio_figure("training", "training against C", "float32", slow),
        Figure("machine", "copying", "", 11.9, "GB/s"),
        Figure("memory", "resident", "1,000 images", 312.1, "MiB"),
        Figure("memory", "resident", "120,000 images", 341.2, "MiB"),
        Figure("profile", "norms", "float32, 512x512, batch 2, before", 400.0, "ms"),
        Figure("profile", "norms", "float32, 512x512, batch 2, after", 200.0, "ms"),
    ]
    write(to_rows(figures), tmp_path / "speed" / "speed.csv")
    return tmp_path


def test_the_record_follows_its_schema_and_says_on_what_it_was_measured(results: Path):
    rows = read_rows(results / "speed" / "speed.csv", SPEED)
    values = ["2", "0.75", "0.75", "11.9", "312.1", "341.2", "400", "200"]
    assert [row["value"] for row in rows] == values
    assert (rows[0]["ours"], rows[0]["peer"]) == ("1000", "2000")
    assert all(row["hardware"] and row["torch"] and row["date"] for row in rows)


def test_a_figure_with_an_unknown_unit_is_refused():
    with pytest.raises(DataError, match="unit"):
        to_rows([Figure("machine", "copying", "", 1.0, "furlongs")])


def test_the_page_names_the_goals_that_were_missed_and_by_how_much(results: Path):
    sentence = goal_sentence(read_speed(results))
    assert sentence.startswith("1 of the 2 goals were reached.")
    assert "training against B (float32): 0.75 of 1.0" in sentence
    assert "against A" not in sentence
    assert "against C" not in sentence


def test_the_tables_of_the_page_hold_the_record(results: Path):
    speed = read_speed(results)
    ratios = ratio_table(speed, "training").frame
    assert list(ratios["ratio"]) == ["2.00", "0.75", "0.75"]
    assert list(ratios["goal"]) == ["1.5", "1.0", ""]
    assert "not run" in ratio_table(speed, "inference").caption
    profile = profile_table(speed).frame
    assert profile.loc["norms"].to_dict() == {"float32, before": "400", "float32, after": "200"}
    assert list(machine_table(speed).frame["figure"]) == ["11.9 GB/s"]
    memory = memory_table(speed).frame
    assert memory.loc["resident"].to_dict() == {"1,000 images": "312", "120,000 images": "341"}


def test_the_page_says_which_number_format_the_machine_multiplies_faster(tmp_path: Path):
    def said(single: float, half: float) -> str:
        rates = {"float32": single, "bfloat16": half}
        figures = [
            Figure("machine", "matrix product", f"{name}, 2048x2048", rate, "GMAC/s")
            for name, rate in rates.items()
        ]
        write(to_rows(figures), tmp_path / "speed" / "speed.csv")
        return format_sentence(read_speed(tmp_path))

    assert "0.5 times as fast in bfloat16 as in float32, so bfloat16 saves memory" in said(80, 40)
    assert said(80, 160).endswith("2.0 times as fast in bfloat16 as in float32.")


def test_without_the_machines_rates_nothing_is_said_of_formats(results: Path):
    assert "not run" in format_sentence(read_speed(results))
