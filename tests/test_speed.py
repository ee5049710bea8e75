"""What the library does for speed changes no result, and what the benchmarks record of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from effspinenet_lib.kernels import DepthwiseConv2d
from effspinenet_lib.native import norm_activation
from effspinenet_lib.native.library import load_library

from benchmarks.pairs import compare, fastest, time_in_turn
from benchmarks.plain import make_plain
from benchmarks.record import Figure, ratio_figure, to_rows, write
from benchmarks.traffic import Traffic
from effspinenet_lib import create_model
from effspinenet_lib.errors import DataError
from effspinenet_lib.report.speed import (
    format_sentence,
    goal_sentence,
    machine_table,
    measured_on,
    memory_table,
    missed_goals,
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


def test_the_page_names_every_commit_that_was_measured(results: Path):
    speed = read_speed(results)
    speed["commit"] = ["0123456789", *["abcdef0123"] * (len(speed) - 1)]
    assert ", commit 0123456789 and abcdef0123, on one thread" in measured_on(speed)


def test_a_figure_with_an_unknown_unit_is_refused():
    with pytest.raises(DataError, match="unit"):
        to_rows([Figure("machine", "copying", "", 1.0, "furlongs")])


def test_the_page_names_the_goals_that_were_missed_and_by_how_much(results: Path):
    speed = read_speed(results)
    assert goal_sentence(speed) == "1 of the 2 goals were reached. These were not:"
    missed = missed_goals(speed)
    assert missed.startswith("- training against B (float32): **0.75 of 1.0**.")
    assert "asks for 25 % less time" in missed
    assert "against A" not in missed
    assert "against C" not in missed


PARTS = {
    "convolutions, forward": 20.0,
    "convolutions, backward": 30.0,
    "norms": 20.0,
    "activations": 10.0,
    "sums and products": 10.0,
    "the rest": 10.0,
}
SHARE = "share of the"


def recorded(folder: Path, *figures: Figure, half: float = 40.0) -> str:
    """What the page says of the missed goals among figures, beside the machine's and a step's."""
    times = {"float32": PARTS, "bfloat16": {**PARTS, "convolutions, forward": 70.0}}
    # of the step before, norms are a larger share
    around = [
        Figure("profile", part, f"{name}, 512x512, batch 2, {state}", time * scale, "ms")
        for name, parts in times.items()
        for state, scale in (("before", 3.0), ("after", 1.0))
        for part, time in {**parts, "norms": 20 * scale, "of it the system's": 50.0}.items()
    ]
    around += [
        Figure("machine", "matrix product", f"{name}, 2048x2048", rate, "GMAC/s")
        for name, rate in (("float32", 80.0), ("bfloat16", half))
    ]
    around += [
        Figure(
            "machine",
            f"{SHARE} copying rate that training Eff-SpineNet-D0 reaches",
            "float32, 512x512, batch 2",
            74.6,
            "percent",
        ),
        Figure(
            "machine",
            f"{SHARE} time of Eff-SpineNet-D0's inference that convolutions take",
            "float32, 512x512, batch 1",
            78.9,
            "percent",
        ),
    ]
    write(to_rows([*figures, *around]), folder / "speed" / "speed.csv")
    return missed_goals(read_speed(folder))


def missed_ratio(benchmark: str, settings: str, goal: float | None = 1.5) -> Figure:
    return ratio_figure(benchmark, "ours against B", settings, compare([1.0], [1.2]), goal)


def test_a_missed_goal_has_the_reasons_that_the_record_holds(tmp_path: Path):
    settings = "float32 against float32, the faster of each, 512x512, batch 2"
    said = recorded(tmp_path, missed_ratio("training", settings))
    assert "**1.20 of 1.5**. The goal asks for 20 % less time." in said
    assert "Float32 is the faster format for both: this machine multiplies 0.5 times" in said
    assert "40 % of a step of Eff-SpineNet-D0 is norms, activations, sums and products" in said
    assert "read and write is 75 % of what copying" in said
    said = recorded(tmp_path, missed_ratio("inference", settings))
    assert "Convolutions take 79 % of this library's time" in said
    assert "step" not in said


def test_what_the_record_does_not_show_is_no_reason(tmp_path: Path):
    single = "float32 against float32, the faster of each, 512x512, batch 2"
    mixed = "bfloat16 against float32, the faster of each, 512x512, batch 2"
    assert "faster format for both" not in recorded(
        tmp_path, missed_ratio("training", single), half=160.0
    )
    said = recorded(tmp_path, missed_ratio("training", mixed))
    assert "faster format for both" not in said
    assert "27 % of a step of Eff-SpineNet-D0" in said  # 40 of 150
    assert "copying" not in said
    assert recorded(tmp_path, missed_ratio("inference", mixed)).endswith("less time.")
    assert recorded(tmp_path, missed_ratio("loading", "JPEG")).endswith("less time.")
    reached = ratio_figure("training", "ours against B", single, compare([1.0], [1.6]), 1.5)
    assert recorded(tmp_path, reached) == ""
    assert goal_sentence(read_speed(tmp_path)) == "1 of the 1 goals were reached."


def test_a_goal_missed_in_a_slow_format_names_what_the_other_reaches(tmp_path: Path):
    half = missed_ratio("proxy", "bfloat16 against bfloat16, batch 8", goal=1.3)
    single = ratio_figure(
        "proxy",
        "ours against B",
        "float32 against bfloat16, batch 8",
        compare([0.9], [1.2]),
    )
    said = recorded(tmp_path, half, single)
    assert "67 % of a step of Eff-SpineNet-D0 in bfloat16 and 50 % in float32" in said
    assert "a step takes 900.0 ms, not 1,000, and the ratio to the same peer is 1.33." in said
    rest = (
        "less time. 27 % of a step of Eff-SpineNet-D0 is norms, activations, sums and products: "
        "passes over memory, which no faster convolution shortens."
    )
    assert recorded(tmp_path, half).endswith(rest)
    assert recorded(tmp_path, half, single, half=160.0).endswith(rest)


def test_every_missed_goal_of_the_record_has_a_reason():
    """The record that comes with the suite."""
    for line in missed_goals(read_speed(Path(__file__).parents[1] / "results")).splitlines():
        assert not line.endswith("less time."), line


def test_the_page_knows_parts_of_a_step_by_the_names_that_the_benchmarks_give():
    pytest.importorskip("effdet")  # the benchmarks' own extra
    from benchmarks import profile
    from effspinenet_lib.report import speed as report

    assert {*report.CONVOLUTIONS, *report.PASSES} <= set(profile.PARTS)
    assert f", {profile.AFTER}" == report.AFTER
    assert profile.SYSTEM.startswith(report.OF_IT)


def moved(work: Callable[[], object]) -> int:
    """The bytes that some work reads and writes."""
    with Traffic() as traffic:
        work()
    return traffic.bytes


@pytest.mark.parametrize(
    ("work", "elements"),
    [
        (lambda a, b: a @ b.t(), 15 + 15 + 25),  # [5, 3] by [3, 5]
        (lambda a, b: a + b, 3 * 15),
        (lambda a, b: a.add_(b), 3 * 15),
        (lambda a, b: torch.add(a, 1, out=b), 2 * 15),  # b is not read
        (lambda a, b: a.copy_(b), 2 * 15),
        (lambda a, b: a.zero_(), 15),
        (lambda a, b: a.sum(), 15 + 1),
        (lambda a, b: a + b[:1].expand(5, 3), 15 + 3 + 15),  # rows of b repeat
        (lambda a, b: (a.view(15), a.t(), a[1:], a.unsqueeze(0), a.detach(), a.shape), 0),
        (lambda a, b: a.unsqueeze_(0), 0),
        (lambda a, b: (torch.empty_like(a), a.contiguous()), 0),
        (lambda a, b: torch.zeros_like(a), 15),
        (lambda a, b: a.t().contiguous(), 2 * 15),
        (lambda a, b: torch.cat([a, b]), 2 * 30),
        (lambda a, b: torch._foreach_add_([a, b], 1.0), 2 * 30),
        (lambda a, b: a[0, 0].item(), 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_traffic_of_an_operation_is_what_it_reads_and_writes(
    work: Callable[..., object], elements: int, dtype: torch.dtype
):
    left, right = torch.ones(5, 3, dtype=dtype), torch.ones(5, 3, dtype=dtype)
    assert moved(lambda: work(left, right)) == elements * dtype.itemsize


def test_the_traffic_of_a_training_step_is_that_of_its_three_parts():
    features, gradient = torch.ones(5, 3), torch.ones(5, 2)
    layer = torch.nn.Linear(3, 2)
    weight, bias = 6, 2
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, fused=True)
    for _ in range(2):  # the first step makes the momentum
        optimizer.zero_grad()
        outputs: list[torch.Tensor] = []
        forward = moved(lambda found=outputs: found.append(layer(features)))
        backward = moved(lambda found=outputs: found[0].backward(gradient))
        update = moved(optimizer.step)
    assert forward == 4 * (bias + 15 + weight + 10)
    # one matrix product and one sum over the batch
    assert backward == 4 * ((10 + 15 + weight) + (10 + bias))
    # weights and momenta read and written, gradients read
    assert update == 4 * 5 * (weight + bias)


def test_the_traffic_of_a_compiled_norm_is_that_of_one_operation_each_way():
    if load_library() is None:
        pytest.skip("the C++ of the library cannot be compiled here")
    shape = (2, 4, 6, 6)
    features = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.ones(shape).contiguous(memory_format=torch.channels_last)
    norm, outputs = torch.nn.BatchNorm2d(4), list[torch.Tensor]()
    outputs.append(norm_activation(norm, torch.nn.SiLU(), features))
    backward = moved(lambda: outputs[0].backward(gradient))
    # features and gradient read, the features' gradient written; four numbers a channel kept
    assert backward == 4 * (3 * 288 + 4 * 4 + 2 * 4)


def test_a_convolutions_gradient_by_one_argument_does_not_read_that_argument():
    features, gradient = torch.ones(1, 4, 6, 6), torch.ones(1, 4, 6, 6)
    weight = torch.ones(4, 1, 3, 3)

    def by(*wanted: bool) -> int:
        return moved(
            lambda: torch.ops.aten.convolution_backward(
                gradient, features, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 4, wanted
            )
        )

    assert by(True, False, False) == 4 * (144 + 36 + 144)
    assert by(False, True, False) == 4 * (144 + 144 + 36)
    assert by(True, True, False) == 4 * (144 + 144 + 36 + 144 + 36)


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
