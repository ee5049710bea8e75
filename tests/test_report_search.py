"""The pages of the search: what they say is what a record holds, and nothing without one."""

from __future__ import annotations

import ast
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from IPython.display import Markdown
from myst_nb.core.read import read_myst_markdown_notebook
from test_report import COLOUR_BLINDNESS, lab, linear

from effspinenet_lib import create_model, experiments, measure_cost
from effspinenet_lib.choices.learned import BETAS, SEARCH_SPACE, betas_text, parse_betas
from effspinenet_lib.report import (
    plots,
    search,
    search_costs,
    search_levels,
    search_plots,
    search_words,
    style,
)
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.search.record import equal_betas, plan_betas
from effspinenet_lib.search.settings import get_search
from effspinenet_lib.specs import BASES

REPOSITORY = Path(__file__).resolve().parents[1]
LEVELS = np.array([block.level for block in BASES["sp_efficientnet"].blocks])
SAMPLES = 20  # of each method
METHODS = ("ppo", "random")


def rows(
    method: str, seed: int, betas: list[tuple[int, ...]], aps: list[float], first: int = 0
) -> list[dict[str, Any]]:
    """Trials of the proxy as a search records them, four a batch."""
    planned = plan_betas(get_search("proxy"), betas, method, seed, 0, first)
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
        betas = generator.choice(SEARCH_SPACE, (SAMPLES, len(BETAS)))
        middle = betas[:, np.isin(LEVELS, (3, 4, 5))].mean(axis=1) / betas.mean(axis=1)
        aps = 20 + slope * (middle - 1) + noise * generator.standard_normal(SAMPLES)
        found += rows(method, 0, [tuple(map(int, b)) for b in betas], aps.round(2).tolist())
    return found


def again(betas: tuple[int, ...], aps: dict[int, float], first: int) -> list[dict[str, Any]]:
    """Trainings of one distribution by seed."""
    return [rows("reference", seed, [betas], [ap], first)[0] for seed, ap in aps.items()]


def frame(*parts: list[dict[str, Any]]) -> pd.DataFrame:
    """Trials as a store gives them back."""
    made = pd.DataFrame([row for part in parts for row in part])
    return made if "entropy" in made else made.assign(entropy=math.nan)


SAMPLED = sampled(np.random.default_rng(0), slope=20, noise=0.1)
FOUND = parse_betas(max(SAMPLED, key=lambda row: row["AP"])["betas"])
REFERENCES = [
    *again(equal_betas(), {0: 20.0, 1: 21.0, 2: 22.0}, 0),
    *again(BETAS, {0: 20.0, 1: 22.0, 2: 24.0}, 1),
    # the seed that the search chose it by, then others
    *again(FOUND, {0: max(row["AP"] for row in SAMPLED), 1: 24.0, 2: 25.0, 3: 26.0}, 2),
]
TRIALS = frame(SAMPLED, REFERENCES)
NOTHING = TRIALS.iloc[:0]


# The record


def test_a_smoke_search_is_never_read(tmp_path: Path) -> None:
    ResultsStore(tmp_path, "smoke").add_trials(SAMPLED)
    assert search.read_trials(tmp_path).empty
    assert search.record_files(tmp_path).files == ()


def test_the_first_folder_with_a_record_is_read(tmp_path: Path) -> None:
    ResultsStore(tmp_path / "b", "proxy").add_trials(SAMPLED[:3])
    ResultsStore(tmp_path / "c", "proxy").add_trials(SAMPLED[:5])
    assert len(search.read_trials(*(tmp_path / name for name in "abc"))) == 3
    assert search.record_files(tmp_path / "c").files == ("proxy/search_trials.csv",)


def test_the_best_sample_has_the_highest_reward_and_then_the_fewest_parameters() -> None:
    ties = TRIALS.assign(reward=TRIALS["reward"].round(-1), AP=TRIALS["AP"].round(-1))
    for trials in (TRIALS, ties):
        best = search.best_sample(trials)
        chosen = trials[trials["method"] != "reference"]
        rank = list(zip(chosen["reward"], -chosen["parameters"], -chosen["trial"], strict=True))
        expected = chosen.iloc[rank.index(max(rank))]
        assert (best["method"], best["trial"]) == (expected["method"], expected["trial"])
    higher = frame(SAMPLED, again(BETAS, {0: 99.0}, 0))
    assert search.best_sample(higher)["method"] != "reference"
    assert search.best_sample(NOTHING) is None


def test_a_failed_trial_is_no_sample() -> None:
    failed = {**SAMPLED[0], "state": "failed", "AP": math.nan, "reward": math.nan}
    trials = frame([failed, *SAMPLED[1:]])
    assert len(search.searched(trials)) == len(SAMPLED) - 1
    table = search.summary_table(trials).frame
    assert table.loc["PPO", ["samples", "failed", "trained"]].tolist() == [20, 1, 19]
    assert table.loc["PPO", "core hours"] == f"{20 * 36 / 3600:.1f}"
    assert search_plots.progress(trials).pictures


def test_the_found_distribution_is_built_from_the_best_betas() -> None:
    spec = search.found_spec(TRIALS)
    dims = "-".join(str(block.feature_dim) for block in spec.blocks)
    assert dims == search.best_sample(TRIALS)["feature_dims"]


# Table 8's proxy


def test_the_run_that_a_distribution_was_chosen_by_is_left_out() -> None:
    spreads = search.reference_spreads(TRIALS)
    assert spreads[search.FOUND].mean == 25.0  # 24, 25, 26
    assert spreads[search.FOUND].seeds == 3
    assert spreads[search.SP].seeds == 3


def test_other_methods_bests_have_their_names() -> None:
    other = next(m for m in METHODS if m != search.best_sample(TRIALS)["method"])
    best = max((r for r in SAMPLED if r["method"] == other), key=lambda r: r["AP"])
    trials = frame(SAMPLED, again(parse_betas(best["betas"]), {1: 22.0, 2: 23.0}, 5))
    name = f"best of {search.METHOD_NAMES[other]}"
    assert search.reference_names(trials) == [search.SP, search.D0, search.FOUND, name]
    table = search.reference_table(trials).frame
    assert table.loc[name, "AP (%) it was chosen for"] == f"{best['AP']:.2f}"
    assert table.loc[name].iloc[0] == "22.50 ± 0.71 (2)"
    assert table.loc[search.SP].iloc[0] == "not run"


def test_a_comparison_says_whether_it_is_larger_than_the_spread() -> None:
    # By hand: 25 and 21, both of variance 1 over 3 seeds: t(4) = 2.776 times sqrt(2/3) = 2.27.
    said = search_words.comparison_sentences(TRIALS).splitlines()
    assert "25.00 and 21.00 AP (3 and 3 seeds), a difference of +4.00 ± 2.27" in said[0]
    assert "larger than the spread over seeds, and the search's best is ahead" in said[0]
    # 22 and 21: variances 4 and 1 over 3 seeds: t(2) = 4.303 times sqrt(5/3) = 5.56.
    assert "a difference of +1.00 ± 5.56 (95 % interval): inconclusive" in said[1]


def test_a_comparison_without_runs_or_with_one_seed_is_none() -> None:
    assert "not run" in search_words.comparison_sentences(frame(SAMPLED))
    one = frame(SAMPLED, again(FOUND, {1: 24.0}, 0), again(equal_betas(), {1: 20.0}, 1))
    said = search_words.comparison_sentences(one).splitlines()
    assert "single seed has no spread" in said[0]
    assert "Eff-SpineNet-D0 not run, so nothing can be said" in said[1]


def test_luck_of_the_choice_is_said() -> None:
    chosen = search.best_sample(TRIALS)["AP"]
    said = search_words.chosen_sentence(TRIALS)
    assert f"with an AP of {chosen:.2f} out of {len(SAMPLED)} samples" in said
    assert f"with 3 other seeds it has 25.00 ({25 - chosen:+.2f})" in said
    assert "not run with other seeds" in search_words.chosen_sentence(frame(SAMPLED))


# Progress


def test_progress_names_the_first_and_last_batch_and_the_best() -> None:
    aps = [10.0, 12, 14, 16, 20, 18, 17, 21]
    betas = [parse_betas(row["betas"]) for row in SAMPLED[:8]]
    blind = [15.0, 16, 14, 15, 15, 16, 14, 15]
    trials = frame(rows("ppo", 0, betas, aps), rows("random", 0, betas[::-1], blind))
    said = search_words.progress_sentences(trials)
    assert (
        "PPO: mean reward 13.00 in the first batch, 19.00 in the last (2 batches); best 21.00"
        in said
    )
    # second half of PPO: mean 19, of random search all: 15
    assert "The second half of PPO's samples is on average +4.00" in said
    assert "it learned to choose better ones" in said
    best, means = search_plots.progress(trials).pictures
    assert "PPO from 10.00 to 21.00" in best.alt
    assert "PPO from 13.00 to 19.00" in means.alt


def test_entropy_is_told_as_a_number_of_values() -> None:
    entropy = [math.log(5)] * 4 + [math.log(2)] * 4
    trials = frame(SAMPLED[:8]).assign(entropy=entropy)
    assert "from 1.61 to 0.69 nats, as if choosing among 2.0 values where it began with 5.0" in (
        search_words.entropy_sentence(trials)
    )
    assert "not run" in search_words.entropy_sentence(TRIALS[TRIALS["method"] == "random"])


# Levels


def test_the_best_tenth_shows_the_levels_that_make_the_ap() -> None:
    said = search_levels.level_sentences(TRIALS)
    assert "L3 to L5 +" in said
    assert "the paper's way" in said
    assert "against the paper's way" not in said
    turned = search_levels.level_sentences(TRIALS.assign(AP=-TRIALS["AP"]))
    assert "against the paper's way" in turned


def test_the_level_table_is_the_mean_of_the_betas() -> None:
    betas = np.array([parse_betas(row["betas"]) for row in SAMPLED])
    aps = np.array([row["AP"] for row in SAMPLED])
    best = betas[np.argsort(-aps)[: len(SAMPLED) // 10]]
    table = search_levels.level_table(TRIALS).frame
    middle = np.isin(LEVELS, (3, 4, 5))
    cells = table.loc["L3 to L5", "mean β"]
    assert cells["all samples"] == f"{betas[:, middle].mean():.1f}"
    assert cells["best tenth"] == f"{best[:, middle].mean():.1f}"


def test_too_few_samples_have_no_best_tenth() -> None:
    few = frame(SAMPLED[:5])
    assert search_levels.level_sentences(few) == "Too few samples for a best tenth."
    assert search_levels.level_sentences(NOTHING) == search.NOTHING


def test_levels_without_anchors_inside_the_image_are_named() -> None:
    anchors = {5: 96.0, 6: 192.0, 7: 384.0}
    assert "anchors of L6 and L7 (192 and 384" in search_levels.silent_levels_sentence(128, anchors)
    assert "every output level" in search_levels.silent_levels_sentence(512, anchors)


# Cost and noise


def test_the_target_is_what_the_built_detector_costs() -> None:
    cost = measure_cost(create_model("sp_efficientnet_b0", num_classes=90), 512)
    assert search_costs.target() == (cost.multi_adds, cost.parameters)


def test_the_statements_of_section_5_1_5_are_checked() -> None:
    known = search_costs.target()
    flops = known.multi_adds * np.array([0.91, 1.0, 1.09])
    weights = known.parameters * np.array([0.8, 0.9, 1.3])
    said = search_costs.cost_sentence("Samples", flops, weights)
    assert "100 % have #FLOPs within ±10 %" in said
    assert "that all have holds. 67 % have fewer parameters; that most have holds" in said
    said = search_costs.cost_sentence("Samples", flops * 1.1, weights * 1.2)
    assert (
        "that all have does not hold. 33 % have fewer parameters; that most have does not" in said
    )
    assert search_costs.cost_sentence("Samples", [], []) == "Samples: not run."
    table = search_costs.cost_table({"three": (flops, weights)}).frame
    assert table.loc["three"].tolist() == [
        "3", "100 %", "-9 to +9 %", "67 %", "67 %", "-20 to +30 %",
    ]  # fmt: skip


def test_rank_correlation_is_spearmans() -> None:
    generator = np.random.default_rng(1)
    pair = pd.DataFrame(generator.integers(0, 6, (30, 2)))  # with ties
    expected = pair.corr(method="spearman").iloc[0, 1]
    assert search_costs.rank_correlation(pair[0], pair[1]) == pytest.approx(expected)
    blind = [
        search_costs.rank_correlation(*map(pd.Series, generator.standard_normal((2, 40))))
        for _ in range(1000)
    ]
    within = np.mean(np.abs(blind) <= search_costs.chance_correlation(40))
    assert within == pytest.approx(0.95, abs=0.03)


def test_a_correlation_larger_than_chance_is_named() -> None:
    alike = TRIALS.assign(AP=TRIALS["parameters_d0"] / 1e6)
    assert "#Params at D0 (+1.00)" in search_costs.correlation_sentence(alike)
    assert "not run" in search_costs.correlation_sentence(NOTHING)


def test_noise_is_pooled_over_seeds_and_set_beside_random_search() -> None:
    seeds, samples = search_words.noise(TRIALS)
    # variances 1, 4 and 1 of 3 seeds each
    assert seeds == pytest.approx(math.sqrt(2))
    blind = [row["AP"] for row in SAMPLED if row["method"] == "random"]
    assert samples == pytest.approx(np.std(blind, ddof=1))
    same = TRIALS.assign(AP=np.where(TRIALS["method"] == "random", 20.0, TRIALS["AP"]))
    assert "one trial cannot tell two distributions apart" in search_words.noise_sentence(same)
    assert "not run" in search_words.noise_sentence(frame(SAMPLED))


def test_the_share_of_right_orders_is_what_a_simulation_gives() -> None:
    seeds, samples = 1.0, 2.0
    trials = TRIALS.assign(
        AP=np.where(
            TRIALS["method"] == "reference",
            20 + (TRIALS["seed"] - TRIALS.groupby("betas")["seed"].transform("mean")) * seeds,
            TRIALS["AP"],
        )
    )
    chosen = trials["method"] == "random"
    values = trials.loc[chosen, "AP"]
    trials.loc[chosen, "AP"] = 20 + samples * (values - values.mean()) / values.std()
    assert search_words.noise(trials) == pytest.approx((seeds, samples), rel=0.2)
    seeds, samples = search_words.noise(trials)
    generator = np.random.default_rng(2)
    true = generator.standard_normal((2, 200_000)) * math.sqrt(samples**2 - seeds**2)
    seen = true + seeds * generator.standard_normal(true.shape)
    right = np.mean((true[0] > true[1]) == (seen[0] > seen[1]))
    said = search_words.noise_sentence(trials)
    stated = int(said.split("right order in ")[1].split(" %")[0])
    assert stated == pytest.approx(100 * right, abs=1)


def test_the_scale_of_the_search_is_that_of_its_record() -> None:
    said = search_words.scale_sentence(TRIALS, get_search("proxy").steps)
    assert f"{SAMPLES} samples of PPO and {SAMPLES} samples of random search" in said
    assert "240 steps a trial" in said
    assert "eff_spinenet_m0" in said
    assert "not run" in search_words.scale_sentence(NOTHING, 1)


# Pictures


def test_figure_5_draws_every_sample_and_marks_what_was_chosen() -> None:
    flops, weights = search_plots.samples(TRIALS).pictures
    assert "±10 %" in flops.svg
    assert "±20 %" in flops.svg
    assert "±10 %" not in weights.svg
    for picture in (flops, weights):
        assert f"AP of {len(SAMPLED)} samples" in picture.alt
        assert "search's best at" in picture.alt
        assert "with AP 25.00 (3 runs)" in picture.alt
        for name in ("PPO", "random search", search.SP, search.D0):
            assert name in picture.svg
    middle = search_costs.target().multi_adds / 1e9
    assert f"{search.SP} at {middle:.2f}" in flops.alt


def test_blocks_outside_the_interval_are_named() -> None:
    generator = np.random.default_rng(3)
    betas = generator.choice(SEARCH_SPACE, (40, len(BETAS)))
    betas[:4, 4], betas[4:, 4] = 20, 1  # block 5 makes the best tenth
    aps = np.r_[np.full(4, 30.0), generator.uniform(10, 20, 36)].round(2)
    trials = frame(rows("random", 0, [tuple(map(int, b)) for b in betas], aps.tolist()))
    assert "block 5 (L4) by +19.0" in search_plots.block_preference(trials).alt


def test_pictures_without_a_record_say_so() -> None:
    pictures = [
        *search_plots.progress(NOTHING).pictures,
        search_plots.entropy(NOTHING),
        search_plots.block_preference(NOTHING),
        *search_plots.samples(NOTHING).pictures,
        plots.seed_dots(
            search.REFERENCE,
            search.reference_measurements(NOTHING),
            search.reference_names(NOTHING),
        ),
    ]
    assert all("not run" in picture.alt and "not run" in picture.svg for picture in pictures)


@pytest.mark.parametrize("kind", COLOUR_BLINDNESS)
def test_methods_stay_apart_from_each_other_and_from_the_models(kind: str) -> None:
    models = {name: style.family_colour(name) for name in (search.SP, search.D0)}
    palette = {**search_plots.METHOD_COLOURS, **models}
    seen = {name: lab(COLOUR_BLINDNESS[kind] @ linear(c)) for name, c in palette.items()}
    for (one, first), (other, second) in itertools.combinations(seen.items(), 2):
        assert np.linalg.norm(first - second) > 3 * 2.3, (one, other)
    for marks in (search_plots.METHOD_MARKERS, search_plots.METHOD_LINES):
        assert list(marks) == list(search.METHOD_NAMES)
        assert len(set(marks.values())) == len(marks)


# The pages


def cells(path: Path) -> list[Any]:
    if path.suffix == ".md":
        notebook = read_myst_markdown_notebook(path.read_text(encoding="utf-8"), path=path)
    else:
        notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(path: Path, names: dict[str, Any], chosen: str = "") -> str:
    """Run a page's cells, or those whose id starts with `chosen`; what they show, as text."""
    texts = []
    for cell in cells(path):
        given = "parameters" in cell.metadata.get("tags", [])
        if given or not cell.get("id", "").startswith(chosen):
            continue
        tree = ast.parse(cell.source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.name, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), path.name, "eval"), names)
            texts.append(value.data if isinstance(value, Markdown) else repr(value))
    return "\n".join(texts)


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Shows a page on the record of a results folder that stands for the checkout's too."""
    monkeypatch.setattr(experiments, "default_results_dir", lambda: tmp_path)
    ResultsStore(tmp_path, "smoke").add_trials([{**row, "AP": 98.7} for row in SAMPLED])
    names = {
        "results_dir": str(tmp_path),
        "experiments": experiments,
        "parameters": SimpleNamespace(results_dir=tmp_path),
        "plots": plots,
        "Markdown": Markdown,
    }
    values = dict.fromkeys(("data_root", "seeds"), "")
    names |= {**values, "accelerator": "auto", "devices": "auto", "engine": "local"}
    names |= {"profile": "smoke", "force": False}
    found = {
        "figure 3": ("notebooks/figure_03_distribution.ipynb", ""),
        "figure 5": ("notebooks/figure_05_search_samples.ipynb", ""),
        "table 8": ("notebooks/table_08_learned_distribution.ipynb", "search-"),
        "search": ("book/search.md", ""),
    }
    return SimpleNamespace(
        store=ResultsStore(tmp_path, "proxy"),
        show=lambda page: shown(REPOSITORY / found[page][0], dict(names), found[page][1]),
    )


PAGES = ("figure 3", "figure 5", "table 8", "search")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_without_a_record_says_not_run_and_shows_no_smoke_number(
    pages: Any, page: str
) -> None:
    text = pages.show(page)
    assert "not run" in text
    assert "98.7" not in text


@pytest.mark.parametrize("page", PAGES)
def test_a_page_with_a_record_shows_it(pages: Any, page: str) -> None:
    pages.store.add_trials([*SAMPLED, *REFERENCES])
    text = pages.show(page)
    assert "not run" not in text
    assert "98.7" not in text
    expected = {
        "figure 3": "and search's best: "
        + ", ".join(str(block.feature_dim) for block in search.found_spec(TRIALS).blocks),
        "figure 5": "Samples of all methods: ",
        "table 8": "25.00 and 21.00 AP (3 and 3 seeds)",
        "search": search.setting(TRIALS),
    }
    assert expected[page] in text


def test_a_change_of_the_record_changes_what_the_page_says(pages: Any) -> None:
    pages.store.add_trials([*SAMPLED, *REFERENCES])
    before = pages.show("search")
    worse = [{**row, "AP": row["AP"] - 9} for row in again(FOUND, {1: 24.0, 2: 25.0, 3: 26.0}, 2)]
    pages.store.add_trials(worse)
    after = pages.show("search")
    assert "larger than the spread over seeds, and the search's best is ahead" in before
    assert "larger than the spread over seeds, and SP-EfficientNet-B0 is ahead" in after
    assert betas_text(FOUND) == search.best_sample(TRIALS)["betas"]
