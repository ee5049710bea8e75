"""The pages of the search show what a record holds, and "not run" without one."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pages import shown
from test_report import COLOUR_BLINDNESS, assert_apart

from effspinenet_lib import create_model, experiments, measure_cost
from effspinenet_lib.errors import DataError
from effspinenet_lib.models.specs import EQUAL_BETAS, LEARNED_BETAS, SEARCH_SPACE, parse_betas
from effspinenet_lib.models.zoo import Distribution, write_distribution
from effspinenet_lib.report import search, style
from effspinenet_lib.results import ResultsStore, write_table
from effspinenet_lib.search.search import get_search, plan_trials
from effspinenet_lib.search.space import space_claims

LEVELS = np.array([block.level for block in search.BEFORE.blocks])
SAMPLES = 20  # of each method
METHODS = ("ppo", "random")


def rows(
    method: str,
    seed: int,
    betas: list[tuple[int, ...]],
    aps: list[float],
    first: int = 0,
    profile: str = "proxy",
) -> list[dict[str, Any]]:
    """Trials as a search records them, four a batch."""
    planned = plan_trials(get_search(profile), betas, method, seed, 0, first)
    common = {"state": "finished", "attempts": 1, "seconds": 36.0}
    entropy = {"entropy": 1.5} if method == "ppo" else {}
    return [
        {**row, **common, **entropy, "AP": ap, "reward": ap, "step": row["trial"] // 4}
        for row, ap in zip(planned, aps, strict=True)
    ]


def sampled(generator: np.random.Generator, slope: float, noise: float) -> list[dict[str, Any]]:
    """Random betas of two methods; the AP grows with the share of the betas at L3 to L5."""
    found = []
    for method in METHODS:
        betas = generator.choice(SEARCH_SPACE, (SAMPLES, len(LEARNED_BETAS)))
        middle = betas[:, np.isin(LEVELS, (3, 4, 5))].mean(axis=1) / betas.mean(axis=1)
        aps = 20 + slope * (middle - 1) + noise * generator.standard_normal(SAMPLES)
        found += rows(method, 0, [tuple(map(int, b)) for b in betas], aps.round(2).tolist())
    return found


def again(betas: tuple[int, ...], aps: dict[int, float], first: int) -> list[dict[str, Any]]:
    """Trainings of one distribution by seed."""
    return [rows("reference", seed, [betas], [ap], first)[0] for seed, ap in aps.items()]


def frame(*parts: list[dict[str, Any]], source: str = "proxy") -> pd.DataFrame:
    """Trials as `read_trials` gives them."""
    made = pd.DataFrame([row for part in parts for row in part]).assign(source=source)
    return made if "entropy" in made else made.assign(entropy=math.nan)


SAMPLED = sampled(np.random.default_rng(0), slope=20, noise=0.1)
FOUND = parse_betas(max(SAMPLED, key=lambda row: row["AP"])["betas"])
REFERENCES = [
    *again(EQUAL_BETAS, {1: 20.0, 2: 21.0, 3: 22.0}, 0),
    *again(LEARNED_BETAS, {0: 20.0, 1: 22.0, 2: 24.0}, 1),
    # the seed that the search chose it by, then others
    *again(FOUND, {0: max(row["AP"] for row in SAMPLED), 1: 24.0, 2: 26.0, 3: 25.0}, 2),
]
PAPER_SAMPLES = rows(
    "ppo",
    0,
    [parse_betas(row["betas"]) for row in SAMPLED[:SAMPLES]],
    [row["AP"] for row in SAMPLED[:SAMPLES]],
    profile="paper",
)
TRIALS = frame(SAMPLED, REFERENCES)
NOTHING = TRIALS.iloc[:0]


# The record


def test_a_smoke_search_is_never_read(tmp_path: Path) -> None:
    ResultsStore(tmp_path, "smoke").add_trials(SAMPLED)
    trials = search.read_trials(tmp_path)
    assert trials.empty
    assert search.record_file(trials) == ""


def test_a_record_at_the_papers_settings_comes_first_and_alone(tmp_path: Path) -> None:
    ResultsStore(tmp_path / "b", "proxy").add_trials(SAMPLED[:3])
    ResultsStore(tmp_path / "d", "proxy").add_trials(SAMPLED[:5])
    trials = search.read_trials(tmp_path / "a", tmp_path / "b", tmp_path / "d")
    assert len(trials) == 3
    assert search.record_file(trials) == "proxy/search_trials.csv"
    ResultsStore(tmp_path / "c", "paper").add_trials(PAPER_SAMPLES[:2])
    for order in ("bc", "cb"):
        trials = search.read_trials(*(tmp_path / name for name in order))
        assert set(trials["run"]) == {row["run"] for row in PAPER_SAMPLES[:2]}
        assert search.record_file(trials) == "paper_scale/search_trials.csv"


def test_what_is_shown_names_its_source() -> None:
    for source, name in (("proxy", "proxy"), ("paper_scale", "paper's settings")):
        trials = TRIALS.assign(source=source)
        assert f"({name}; " in search.summary(trials).caption
        assert f"({name}; " in search.reference_table(trials).caption
        for picture in (*search.samples(trials).pictures, search.reference_dots(trials)):
            assert f"AP (%), {name}" in picture.svg


def test_the_best_sample_has_the_highest_reward_and_then_the_fewest_parameters() -> None:
    ties = TRIALS.assign(reward=TRIALS["reward"].round(-1), AP=TRIALS["AP"].round(-1))
    for trials in (TRIALS, ties):
        best = search.best_sample(trials)
        chosen = trials[trials["method"] != "reference"]
        rank = list(zip(chosen["reward"], -chosen["parameters"], -chosen["trial"], strict=True))
        expected = chosen.iloc[rank.index(max(rank))]
        assert (best["method"], best["trial"]) == (expected["method"], expected["trial"])
    higher = frame(SAMPLED, again(LEARNED_BETAS, {0: 99.0}, 0))
    assert search.best_sample(higher)["method"] != "reference"
    assert search.best_sample(NOTHING) is None


# Tables


def test_the_summary_has_first_and_last_batch_and_the_way_from_random_search() -> None:
    aps = [10.0, 12, 14, 16, 20, 18, 17, 21]
    betas = [parse_betas(row["betas"]) for row in SAMPLED[:8]]
    blind = [15.0, 16, 14, 15, 15, 16, 14, 15]
    trials = frame(rows("ppo", 0, betas, aps), rows("random", 0, betas[::-1], blind))
    table = search.summary(trials).frame
    found = table.loc["PPO"]
    assert found[["reward, first batch", "last batch", "best AP"]].tolist() == [
        *("13.00", "19.00", "21.00")
    ]
    assert found["second half – random"].startswith("+4.00 ± ")  # 19 less 15
    assert table.loc["random search", "second half – random"] == "–"
    best, means = search.progress(trials).pictures
    assert "PPO from 10.00 to 21.00" in best.alt
    assert "PPO from 13.00 to 19.00" in means.alt


def test_a_failed_trial_is_no_sample() -> None:
    failed = {**SAMPLED[0], "state": "failed", "AP": math.nan, "reward": math.nan}
    trials = frame([failed, *SAMPLED[1:]])
    assert len(search.searched(trials)) == len(SAMPLED) - 1
    table = search.summary(trials).frame
    assert table.loc["PPO", ["samples", "failed", "trained"]].tolist() == [20, 1, 19]
    assert table.loc["PPO", "hours"] == f"{20 * 36 / 3600:.1f}"
    every = frame(SAMPLED).assign(state="failed", AP=math.nan, reward=math.nan)
    assert search.summary(every).frame["best AP"].tolist() == ["–", "–"]


def test_the_run_that_a_distribution_was_chosen_by_is_left_out() -> None:
    table = search.reference_table(TRIALS).frame
    assert table.index.tolist() == [search.SP, search.D0, search.FOUND]
    aps = table["AP (%), mean ± sd (seeds)"]
    assert aps.tolist() == ["21.00 ± 1.00 (3)", "22.00 ± 2.00 (3)", "25.00 ± 1.00 (3)"]
    chosen = table["AP (%) it was chosen for"]
    assert chosen.tolist() == ["–", "–", f"{max(row['AP'] for row in SAMPLED):.2f}"]


def test_costs_of_chosen_distributions_are_those_of_the_record() -> None:
    table = search.reference_table(TRIALS).frame
    for name, own in search.references(TRIALS).groupby("row"):
        costs = own[["multi_adds_d0", "parameters_d0"]].iloc[0] / [1e9, 1e6]
        assert table.loc[name].tolist()[2:] == [f"{value:.2f}" for value in costs]
    given = tuple(reversed(LEARNED_BETAS))
    for trials in (TRIALS, NOTHING):
        own = search.reference_table(trials, (given, (2.5e9, 3.6e6))).frame.loc[search.GIVEN]
        assert own.tolist() == ["not run", "–", "2.50", "3.60"]
    empty = search.reference_table(NOTHING).frame
    assert empty.loc[search.D0].tolist()[2:] == table.loc[search.D0].tolist()[2:]
    known = search.reference_table(TRIALS, (FOUND, (2.5e9, 3.6e6))).frame
    assert known.loc[search.GIVEN].tolist()[:2] == known.loc[search.FOUND].tolist()[:2]


def test_other_methods_bests_have_their_names() -> None:
    other = next(m for m in METHODS if m != search.best_sample(TRIALS)["method"])
    best = max((r for r in SAMPLED if r["method"] == other), key=lambda r: r["AP"])
    trials = frame(SAMPLED, again(parse_betas(best["betas"]), {1: 22.0, 2: 23.0}, 5))
    name = f"best of {search.METHODS[other].name}"
    table = search.reference_table(trials).frame
    assert table.loc[name, "AP (%) it was chosen for"] == f"{best['AP']:.2f}"
    assert table.loc[name].iloc[0] == "22.50 ± 0.71 (2)"
    assert table.loc[search.SP].iloc[0] == "not run"


def test_chosen_distributions_are_compared_over_seeds() -> None:
    table = search.reference_differences(TRIALS).frame
    # By hand: sd 1 over 3 seeds in both: t(4) = 2.776 times sqrt(2 / 3) = 2.27.
    found = table.loc[f"{search.FOUND} – {search.SP}"]
    assert found.tolist() == ["+4.00", "+1.73 to +6.27", "3", "higher"]
    assert table.loc[f"{search.D0} – {search.SP}", "verdict"] == "inconclusive"
    one = frame(SAMPLED, again(FOUND, {1: 24.0}, 0), again(EQUAL_BETAS, {1: 20.0}, 1))
    table = search.reference_differences(one).frame
    assert table.loc[f"{search.FOUND} – {search.SP}"].tolist() == [
        *("+4.00", "–", "1", "inconclusive")
    ]
    assert table.loc[f"{search.D0} – {search.SP}", "measured"] == "not run"


def test_the_level_table_is_the_mean_of_the_betas() -> None:
    betas = np.array([parse_betas(row["betas"]) for row in SAMPLED])
    aps = np.array([row["AP"] for row in SAMPLED])
    best = betas[np.argsort(-aps)[: len(SAMPLED) // 10]]
    middle = np.isin(LEVELS, (3, 4, 5))
    cells = search.level_table(TRIALS).frame.loc["L3 to L5", "mean β"]
    assert cells["all samples"] == f"{betas[:, middle].mean():.1f}"
    assert cells["best tenth"] == f"{best[:, middle].mean():.1f}"
    assert cells["difference"].startswith("+")  # the AP was made of these levels
    worst = TRIALS.assign(AP=-TRIALS["AP"])
    cells = search.level_table(worst).frame.loc["L3 to L5", "mean β"]
    assert cells["difference"].startswith("-")


def test_a_correlation_with_cost_is_shown_with_its_chance() -> None:
    alike = TRIALS.assign(AP=TRIALS["parameters_d0"] / 1e6)
    table = search.correlation_table(alike).frame
    blind = f"random search ({SAMPLES} samples)"
    assert table.loc["#Params at D0", (blind, "ρ")] == "+1.00"
    assert float(table.loc["#Params at D0", (blind, "p")]) < 1e-6
    assert search.correlation_table(NOTHING).frame.empty


def test_the_statements_of_section_5_1_5_are_checked() -> None:
    cost = measure_cost(create_model("sp_efficientnet_b0", num_classes=90), 512)
    known = search.paper_cost("sp_efficientnet_b0")
    assert known == pytest.approx((cost.multi_adds, cost.parameters), abs=1e3)
    flops = cost.multi_adds * np.array([0.91, 1.0, 1.09])
    weights = cost.parameters * np.array([0.8, 0.9, 1.3])
    table = search.cost_table({"three": (flops, weights), "none": ([], [])}).frame
    assert table.loc["three"].tolist() == ["3", "100.0 %", "-9 to +9 %", "66.7 %", "-20 to +30 %"]
    assert table.index.tolist() == ["three"]


def test_the_noise_of_one_trial_is_what_a_simulation_gives() -> None:
    # variances 1, 4 and 1 of 3 seeds each; random search's made twice as wide as their mean
    wide = TRIALS["AP"].where(TRIALS["method"] != "random")
    blind = TRIALS.loc[TRIALS["method"] == "random", "AP"]
    blind = 20 + 2 * math.sqrt(2) * (blind - blind.mean()) / blind.std()
    cells = search.noise(TRIALS.assign(AP=wide.fillna(blind))).frame.iloc[:, 0].tolist()
    assert cells[:3] == ["1.41 AP", "2.83 AP", "25 %"]
    generator = np.random.default_rng(2)
    true = generator.standard_normal((2, 200_000)) * math.sqrt(6)
    seen = true + math.sqrt(2) * generator.standard_normal(true.shape)
    right = 100 * np.mean((true[0] > true[1]) == (seen[0] > seen[1]))
    assert float(cells[3].removesuffix(" %")) == pytest.approx(right, abs=1)
    assert search.noise(NOTHING).frame.empty


def test_the_statements_on_the_space_are_shown(tmp_path: Path) -> None:
    counted = space_claims(500, seed=1)
    write_table(tmp_path / "b" / search.SPACE_FILE, "space", counted)
    table = search.space_table(tmp_path / "a", tmp_path / "b").frame
    stated = sorted((row for row in counted if row["stated"]), key=lambda row: row["claim"])
    assert table.index.tolist() == [row["statement"] for row in stated]
    assert table.to_numpy().tolist() == [
        [row["stated"], f"{row['computed']:.1f} %", row["verdict"], "500"] for row in stated
    ]
    assert "not run" in search.space_table(tmp_path / "a").caption


# Pictures


def test_figure_5_draws_every_sample_and_marks_what_was_chosen() -> None:
    flops, weights = search.samples(TRIALS).pictures
    assert "±10 %" in flops.svg
    assert "±20 %" in flops.svg
    assert "±10 %" not in weights.svg
    for picture in (flops, weights):
        assert f"AP of {len(SAMPLED)} samples" in picture.alt
        assert "with AP 25.00 (3 runs)" in picture.alt
        for name in ("PPO", "random search", search.SP, search.D0, search.FOUND):
            assert name in picture.svg


@pytest.mark.parametrize("kind", COLOUR_BLINDNESS)
def test_methods_stay_apart_from_each_other_and_from_the_models(kind: str) -> None:
    models = {name: style.family_colour(name) for name in (search.SP, search.D0)}
    assert_apart({**{m.name: m.colour for m in search.METHODS.values()}, **models}, kind)
    for marks in zip(*search.METHODS.values(), strict=True):
        assert len(set(marks)) == len(search.METHODS)


# The pages

PAGES = {
    "figure 3": ("notebooks/figure_03_distribution.ipynb", ""),
    "figure 5": ("notebooks/figure_05_search_samples.ipynb", ""),
    "table 8": ("notebooks/table_08_learned_distribution.ipynb", "search-"),
    "search": ("book/search.md", ""),
}


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Shows a page on the record of a results folder that stands for the checkout's too."""
    monkeypatch.setattr(experiments, "default_results_dir", lambda: tmp_path)
    ResultsStore(tmp_path, "smoke").add_trials([{**row, "AP": 98.7} for row in SAMPLED])
    names = {
        **dict.fromkeys(("data_root", "seeds", "distribution"), ""),
        **{"accelerator": "auto", "devices": "auto", "engine": "local"},
        **{"profile": "smoke", "force": False, "results_dir": str(tmp_path)},
        **{"search": search, "folders": (tmp_path,), "given": None},
    }

    def show(page: str, chosen: str | None = None, **given: Any) -> str:
        name, own = PAGES[page]
        return shown(name, {**names, **given}, own if chosen is None else chosen)

    return SimpleNamespace(folder=tmp_path, store=ResultsStore(tmp_path, "proxy"), show=show)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_without_a_record_says_not_run_and_shows_no_smoke_number(
    pages: Any, page: str
) -> None:
    text = pages.show(page)
    assert "not run" in text
    assert "98.7" not in text


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_the_record_and_the_papers_in_the_place_of_the_proxys(
    pages: Any, page: str
) -> None:
    pages.store.add_trials([*SAMPLED, *REFERENCES])
    write_table(pages.folder / search.SPACE_FILE, "space", space_claims(500, seed=1))
    text = pages.show(page)
    assert "not run" not in text
    assert "98.7" not in text
    found = search.best_sample(TRIALS)["feature_dims"].replace("-", ", ")
    expected = {
        "figure 3": f"search's best: {found}",
        "figure 5": "random search",
        "table 8": "25.00 ± 1.00 (3)",
        "search": "25.00 ± 1.00 (3)",
    }
    assert expected[page] in text
    ResultsStore(pages.folder, "paper").add_trials(PAPER_SAMPLES)
    text = pages.show(page)
    assert "AP (%), proxy" not in text
    assert "(proxy; " not in text
    if page != "table 8":  # its cells that are run here show no files
        assert "paper_scale/search_trials.csv" in text
        assert "proxy/search_trials.csv" not in text


def test_a_page_takes_a_distribution_from_a_file(pages: Any) -> None:
    given = Distribution("my own", "eff_spinenet_m0", (1,) * 17 + (20,))
    write_distribution(pages.folder / "mine.json", given)
    pages.store.add_trials(SAMPLED)
    text = pages.show("figure 3", distribution=str(pages.folder / "mine.json"))
    assert f"{search.GIVEN}: " + ", ".join(map(str, given.feature_dims)) in text
    assert search.FOUND not in text
    text = pages.show("table 8", given=(given.betas, (2.5e9, 3.6e6)))
    assert search.GIVEN in text
    assert search.FOUND in text


@pytest.mark.parametrize("page", ["figure 3", "table 8"])
@pytest.mark.parametrize("content", [None, "{", '{"format": "another"}'])
def test_a_wrong_distribution_stops_a_page_before_any_work(
    pages: Any, page: str, content: str | None
) -> None:
    path = pages.folder / "wrong.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        pages.show(page, "check-parameters", distribution=str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
