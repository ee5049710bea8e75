"""What the library does for speed changes no result, and what the benchmarks record of it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from benchmarks import instrument
from benchmarks.pairs import compare, fastest, time_in_turn
from benchmarks.plain import make_plain
from benchmarks.record import Figure, ratio_figure, to_rows
from effspinenet_lib import create_model
from effspinenet_lib.errors import DataError
from effspinenet_lib.results.tables import read_rows, upsert, write_table

SIDE, CLASSES = 128, 3
# Allocates, fills and frees 40 MiB three times, then says how many pages the system had to clear.
FAULTS = """
import resource, sys
from effspinenet_lib.training.device import disable_malloc_trim
if sys.argv[1] == "keep":
    assert disable_malloc_trim()
b"x" * (40 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    b"x" * (40 << 20)
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
    assert plain.losses.__func__ is not model.losses.__func__
    images = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)
    images = images.contiguous(memory_format=torch.channels_last)
    found = []
    for network in (model, plain):
        network.train().to(memory_format=torch.channels_last)
        losses = network(images, targets())
        torch.stack(list(losses.values())).sum().backward()
        trained = ((n, p) for n, p in network.named_parameters() if p.requires_grad)
        found.append((losses, {name: p.grad for name, p in trained}))
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
    write_table(tmp_path / "speed" / "speed.csv", "speed", to_rows(figures))
    return tmp_path


def test_the_record_follows_its_schema_and_says_on_what_it_was_measured(results: Path):
    rows = read_rows(results / "speed" / "speed.csv", "speed")
    values = ["2", "0.75", "0.75", "11.9", "312.1", "341.2", "400", "200"]
    assert [row["value"] for row in rows] == values
    assert (rows[0]["ours"], rows[0]["peer"]) == ("1000", "2000")
    assert all(row["hardware"] and row["torch"] and row["date"] for row in rows)


def test_a_figure_with_an_unknown_unit_is_refused():
    with pytest.raises(DataError, match="unit"):
        to_rows([Figure("machine", "copying", "", 1.0, "furlongs")])


# The proxy as an instrument


def test_the_data_sheet_sums_up_the_runs(tmp_path, monkeypatch):
    draws = np.random.default_rng(1)
    shared = draws.normal(0, 2, 13)  # what a seed does to every model
    models = {
        "the reference": (55.0, range(5)),
        instrument.HALF: (40.0, range(5)),
        instrument.VARIANT: (50.0, range(5)),
        instrument.AGAIN: (55.0, range(5, 10)),
    }
    common = {"model": "m", "task": "detection", "steps": 100, "commit": "c", "date": "2026-01-01"}
    rows = [
        {**common, "study": "precision", "setting": name, "seed": seed, "metric": metric}
        | {"value": value, "run": "0123456789ab"}
        for name, (mean, seeds) in models.items()
        for seed in seeds
        for metric, value in (
            ("AP", mean + shared[seed] + draws.normal(0, 0.5)),
            ("cpu_minutes", 5.0),
        )
    ]
    effects = draws.normal(0, 1, instrument.SEARCH_SAMPLES)
    rows += [
        {**common, "study": "distributions, 100 steps", "setting": f"d{number}", "seed": seed}
        | {"metric": "AP", "value": effect + draws.normal(0, 0.1)}
        for number, effect in enumerate(effects)
        for seed in instrument.SEARCH_SEEDS
    ]
    monkeypatch.setattr(instrument, "INSTRUMENT", tmp_path / "instrument.csv")
    upsert(instrument.INSTRUMENT, "instrument", rows, "made")
    sheet = {row["setting"]: row for row in instrument.sheet(tmp_path)}
    upsert(instrument.INSTRUMENT, "instrument", sheet.values(), "the sheet")
    for name, gap in ((instrument.HALF, 15), (instrument.VARIANT, 5)):
        worse = sheet[f"AP of the reference less: {name}"]
        assert 0 < worse["low"] < gap < worse["high"]
    again = sheet[f"AP of the reference less: {instrument.AGAIN}"]
    assert again["low"] < 0 < again["high"]
    paired = sheet["AP, sd of a difference in pairs of a seed"]
    assert paired["low"] < math.hypot(0.5, 0.5) < paired["high"]
    apart = sheet["AP, sd of the same difference without pairs"]["value"]
    assert apart > 2 * paired["value"]
    pooled = sheet["AP, sd over seeds of the reference and the variant"]
    assert pooled["low"] < math.hypot(2, 0.5) < pooled["high"]
    assert sheet["8 seeds"]["value"] < sheet["5 seeds"]["value"] < sheet["3 seeds"]["value"]
    assert sheet["images trained a second of CPU"]["value"] == pytest.approx(
        16 * 100 / 300, rel=0.01
    )
    share = sheet["share of variance between distributions: 100 steps, AP"]
    assert share["low"] > 0.9


def test_the_smallest_difference_is_seen_in_four_of_five_repetitions() -> None:
    seeds, sd, repetitions = 5, 1.3, 4_000
    size = instrument.smallest_difference(sd, seeds)
    first, second = np.random.default_rng(7).normal(0, sd, (2, repetitions, seeds))
    seen = stats.ttest_ind(first + size, second, axis=1, equal_var=False).pvalue < 0.05
    assert seen.mean() == pytest.approx(0.8, abs=0.02)
    assert math.isnan(instrument.smallest_difference(sd, 1))


def test_intervals_cover_what_they_estimate() -> None:
    """Of 95 % intervals about 95 % hold the number that the samples were drawn with."""
    draws, repetitions = np.random.default_rng(1), 600
    covered = np.zeros((repetitions, 3))
    for one in covered:
        sd = instrument.sd_interval(*map(pd.Series, draws.normal(0, 2.0, (2, 4))))
        effects = draws.normal(0, 3.0, 12)
        noise = draws.normal(0, 3.0, (3, 12))
        share = instrument.variance_share(pd.DataFrame(effects + noise))
        x, y = draws.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 40).T
        ranks = instrument.rank_correlation(pd.Series(x), pd.Series(y))
        true_ranks = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's of a normal correlation of 0.6
        expected = ((sd, 2.0), (share, 0.5), (ranks, true_ranks))
        one[:] = [found.low <= true <= found.high for found, true in expected]
    assert covered.mean(axis=0) == pytest.approx([0.95] * 3, abs=0.03)
