"""The pages of the search: what they say is what a record holds, and nothing without one."""

from __future__ import annotations

import ast
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from IPython.display import Markdown
from myst_nb.core.read import read_myst_markdown_notebook
from test_report import COLOUR_BLINDNESS, lab, linear

from effspinenet_lib import create_model, experiments, measure_cost
from effspinenet_lib.errors import DataError
from effspinenet_lib.models.specs import (
    LEARNED_BETAS,
    MODELS,
    SEARCH_SPACE,
    betas_text,
    parse_betas,
)
from effspinenet_lib.models.zoo import (
    Distribution,
    read_distribution,
    write_distribution,
)
from effspinenet_lib.report import (
    claims,
    plots,
    search,
    search_costs,
    search_levels,
    search_plots,
    search_space,
    search_words,
    style,
)
from effspinenet_lib.results import ResultsStore, paper
from effspinenet_lib.search.record import equal_betas, plan_betas
from effspinenet_lib.search.settings import get_search
from effspinenet_lib.search.statements import space_statements, write_statements

REPOSITORY = Path(__file__).resolve().parents[1]
LEVELS = np.array([block.level for block in MODELS["sp_efficientnet_b0"].backbone.blocks])
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
    planned = plan_betas(get_search(profile), betas, method, seed, 0, first)
    common = {"state": "finished", "attempts": 1, "seconds": 36.0}
    entropy = {"entropy": 1.5} if method in search.POLICIES else {}
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
    *again(equal_betas(), {0: 20.0, 1: 21.0, 2: 22.0}, 0),
    *again(LEARNED_BETAS, {0: 20.0, 1: 22.0, 2: 24.0}, 1),
    # the seed that the search chose it by, then others
    *again(FOUND, {0: max(row["AP"] for row in SAMPLED), 1: 24.0, 2: 25.0, 3: 26.0}, 2),
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


# Everything that the pages say of a record.
SENTENCES = (
    search.shown_sentence,
    search.trial_sentence,
    search_words.conclusions,
    search_words.comparison_sentences,
    search_words.progress_sentences,
    search_words.entropy_sentence,
    search_words.noise_sentence,
    search_words.limits_sentence,
    lambda trials: search_words.scale_sentence(trials, 240),
    search_levels.level_sentences,
    search_costs.correlation_sentence,
)


# The record


def test_a_smoke_search_is_never_read(tmp_path: Path) -> None:
    ResultsStore(tmp_path, "smoke").add_trials(SAMPLED)
    trials = search.read_trials(tmp_path)
    assert trials.empty
    assert search.record_files(trials).files == ()


def test_the_first_folder_with_a_record_is_read(tmp_path: Path) -> None:
    ResultsStore(tmp_path / "b", "proxy").add_trials(SAMPLED[:3])
    ResultsStore(tmp_path / "c", "proxy").add_trials(SAMPLED[:5])
    trials = search.read_trials(*(tmp_path / name for name in "abc"))
    assert len(trials) == 3
    assert search.record_files(trials).files == ("proxy/search_trials.csv",)


def test_a_record_at_the_papers_settings_comes_first_and_alone(tmp_path: Path) -> None:
    ResultsStore(tmp_path / "b", "proxy").add_trials(SAMPLED[:3])
    ResultsStore(tmp_path / "c", "paper").add_trials(PAPER_SAMPLES[:2])
    for order in ("bc", "cb"):
        trials = search.read_trials(*(tmp_path / name for name in order))
        assert set(trials["run"]) == {row["run"] for row in PAPER_SAMPLES[:2]}
        assert search.profile_of(trials) == "paper"
        assert search.record_files(trials).files == ("paper_scale/search_trials.csv",)


def test_what_a_record_says_names_its_source() -> None:
    for source, name in (("proxy", "proxy"), ("paper_scale", "paper's settings")):
        trials = TRIALS.assign(source=source)
        assert f"({name}, seed 0), with an AP of" in search.shown_sentence(trials)
        for picture in search_plots.samples(trials).pictures:
            assert f"AP (%), {name}" in picture.svg
            assert f"samples ({name})" in picture.alt
        assert set(search.reference_measurements(trials)["source"]) == {source}
        dots = search_plots.reference_dots(trials)
        assert f"AP (%), {name}, one dot a seed" in dots.svg
        assert f"({name})" in dots.alt
        assert "search's best: 24.00, 25.00, 26.00, mean 25.00" in dots.alt


def test_a_paper_scale_record_is_never_called_the_proxy() -> None:
    trials = frame(PAPER_SAMPLES, source="paper_scale")
    texts = [said(trials) for said in SENTENCES]
    texts += [picture.alt + picture.svg for picture in search_plots.samples(trials).pictures]
    assert not [text for text in texts if "proxy" in text or "smaller" in text]
    assert "the profile `paper`" in search.trial_sentence(trials)
    assert "after a full training" in search_words.limits_sentence(trials)
    assert "own search is **not run**" in search_words.scale_sentence(TRIALS, 240)


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


def test_a_failed_trial_is_no_sample() -> None:
    failed = {**SAMPLED[0], "state": "failed", "AP": math.nan, "reward": math.nan}
    trials = frame([failed, *SAMPLED[1:]])
    assert len(search.searched(trials)) == len(SAMPLED) - 1
    table = search.summary_table(trials).frame
    assert table.loc["PPO", ["samples", "failed", "trained"]].tolist() == [20, 1, 19]
    assert table.loc["PPO", "hours of trials"] == f"{20 * 36 / 3600:.1f}"
    assert search_plots.progress(trials).pictures
    assert "2 methods chose 40 of them; 1 failed" in search_words.conclusions(trials)


def test_a_record_whose_trials_all_failed_says_so_and_not_that_nothing_was_run() -> None:
    trials = TRIALS[TRIALS["method"] == "random"].assign(
        state="failed", AP=math.nan, reward=math.nan
    )
    assert search.nothing(trials).startswith("The search has no result: every trial failed (20 of")
    table = search.summary_table(trials).frame
    row = ["samples", "failed", "best AP", "sd of AP"]
    assert table.loc["random search", row].tolist() == [20, 20, "–", "–"]
    texts = [said(trials) for said in (*SENTENCES, search_words.chosen_sentence)]
    pictures = [
        *search_plots.progress(trials).pictures,
        search_plots.block_preference(trials),
        *search_plots.samples(trials).pictures,
    ]
    levels = search_levels.level_table(trials)
    texts += [picture.alt for picture in pictures] + [repr(levels)]
    allowed = search_words.comparison_sentences(trials)  # that was not run
    assert not [
        text for text in texts if "not run" in text and text != allowed and "policy" not in text
    ]
    assert all("every trial failed" in picture.alt for picture in pictures)
    assert "β" in repr(levels)
    assert "every trial failed" in search_plots.entropy(trials.assign(method="ppo")).alt
    assert "not run" in search_plots.entropy(trials).alt
    assert search_costs.correlation_table(trials).frame.iloc[:, 0].eq("–").all()


def test_a_record_of_chosen_distributions_alone_has_no_sample() -> None:
    trials = frame(REFERENCES[:3])
    assert search.nothing(trials) == search.NOTHING
    assert search.reference_table(trials).frame.loc[search.SP].iloc[0] == "21.00 ± 1.00 (3)"
    assert "search's best not run" in search_words.comparison_sentences(trials)


@pytest.mark.parametrize("method", search.METHOD_NAMES)
@pytest.mark.parametrize("count", [1, 3, SAMPLES])
def test_what_is_said_of_a_record_of_one_method_names_no_other(method: str, count: int) -> None:
    betas = [parse_betas(row["betas"]) for row in SAMPLED[:count]]
    trials = frame(rows(method, 0, betas, [row["AP"] for row in SAMPLED[:count]]))
    said = "\n".join(sentence(trials) for sentence in SENTENCES)
    lines = [line for line in said.splitlines() if "not both" not in line and "too few" not in line]
    others = {name for key, name in search.METHOD_NAMES.items() if key != method}
    assert not {name for name in others for line in lines if name in line}
    assert f"1 method chose {count} of them; 0 failed" in said
    assert search.METHOD_NAMES[method] in said
    assert ("nats" in said) == (method in search.POLICIES)
    assert "not both are on record" in search_words.noise_sentence(trials)
    table = search.summary_table(trials).frame
    assert table.index.tolist() == [search.METHOD_NAMES[method]]
    pictures = (search_plots.block_preference(trials), search_plots.entropy(trials))
    shown = [said, repr(table), repr(search_levels.level_table(trials))]
    shown += [repr(search_costs.correlation_table(trials)), *(one.alt for one in pictures)]
    assert not [text for text in shown if re.search(r"\bnan\b", text)]


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


def test_costs_of_chosen_distributions_are_those_of_the_record() -> None:
    table = search.reference_table(TRIALS).frame
    for name, own in search.references(TRIALS).groupby("row"):
        costs = own[["multi_adds_d0", "parameters_d0"]].iloc[0] / [1e9, 1e6]
        assert table.loc[name].tolist()[2:] == [f"{value:.2f}" for value in costs]
    empty = search.reference_table(NOTHING).frame
    assert empty.loc[search.SP].tolist()[2:] == table.loc[search.SP].tolist()[2:]
    assert set(empty.loc[search.FOUND]) == {"not run", "–"}


def test_a_given_distribution_has_a_row_with_its_cost_and_what_the_record_knows_of_it() -> None:
    betas = tuple(reversed(LEARNED_BETAS))
    given = Distribution("mine", "eff_spinenet_m0", betas)
    with torch.device("meta"):
        cost = measure_cost(create_model("eff_spinenet_d0", betas=betas_text(betas)), 512)
    costs = [f"{cost.multi_adds / 1e9:.2f}", f"{cost.parameters / 1e6:.2f}"]
    for trials in (TRIALS, NOTHING):
        table = search.reference_table(trials, given).frame
        assert table.index.tolist() == [*search.reference_names(trials), search.GIVEN]
        assert table.loc[search.GIVEN].tolist() == ["not run", "–", *costs]
    again_found = Distribution("found", "eff_spinenet_m0", FOUND)
    table = search.reference_table(TRIALS, again_found).frame
    assert table.loc[search.GIVEN].tolist() == table.loc[search.FOUND].tolist()
    assert search.shown_sentence(TRIALS, given).startswith("The given distribution is mine: β 1, ")
    shown = search.shown_distribution(TRIALS, given)
    dims = [block.feature_dim for block in shown[search.GIVEN].blocks]
    assert (list(shown), dims) == ([search.GIVEN], given.feature_dims)


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
    assert search_costs.cost_sentence("Samples", [], []) == "Samples: there are none."
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
    assert "too few samples" in search_costs.correlation_sentence(NOTHING)


def test_noise_is_pooled_over_seeds_and_set_beside_random_search() -> None:
    seeds, samples = search_words.noise(TRIALS)
    # variances 1, 4 and 1 of 3 seeds each
    assert seeds == pytest.approx(math.sqrt(2))
    blind = [row["AP"] for row in SAMPLED if row["method"] == "random"]
    assert samples == pytest.approx(np.std(blind, ddof=1))
    same = TRIALS.assign(AP=np.where(TRIALS["method"] == "random", 20.0, TRIALS["AP"]))
    assert "one trial cannot tell two distributions apart" in search_words.noise_sentence(same)
    assert "not both are on record" in search_words.noise_sentence(frame(SAMPLED))


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


# The statements on the whole space


def test_the_statements_on_the_space_are_shown_under_both_equations(tmp_path: Path) -> None:
    counted = {(row["claim"], row["equation"]): row for row in space_statements(500, seed=1)}
    write_statements(tmp_path / "b", counted.values())
    statements = search_space.read_statements(tmp_path / "a", tmp_path / "b")
    assert search_space.statement_files(statements).files == ("search/space.csv",)
    table = search_space.statement_table(statements).frame
    expected = [
        [equation, stated, f"{row['computed']:.1f} %", row["verdict"], "500"]
        for claim, stated in (
            ("multi-adds-within-10-percent", "all"),
            ("parameters-reduced", "most"),
        )
        for equation in ("exact", "approximate")
        for row in (counted[claim, equation],)
    ]
    assert table.to_numpy().tolist() == expected
    said = search_space.equations_sentence(statements)
    near = counted["multi-adds-within-10-percent", "approximate"]["computed"]
    exact = counted["multi-adds-within-10-percent", "exact"]["computed"]
    assert f"{exact:.1f} against {near:.1f} %" in said
    assert f"{counted['same-as-exact', 'approximate']['computed']:.1f} % of the samples get" in said
    assert "The verdicts are the same." in said
    turned = statements.copy()
    turned.loc[turned["equation"] == "approximate", "verdict"] = "holds"
    assert "verdicts differ in multi-adds-within-10-percent" in (
        search_space.equations_sentence(turned)
    )


def test_the_statements_on_the_space_are_rows_of_the_claims(tmp_path: Path) -> None:
    counted = {(row["claim"], row["equation"]): row for row in space_statements(500, seed=1)}
    write_statements(tmp_path, counted.values())
    rows = search_space.space_claims(search_space.read_statements(tmp_path))
    known = paper.claims()
    assert set(rows.columns) <= set(known.columns)
    assert not set(rows["claim"]) & set(known["claim"])
    exact = [counted[claim, "exact"] for claim in rows["claim"]]
    assert rows["computed"].tolist() == [row["computed"] for row in exact]
    assert rows["verdict"].tolist() == [row["verdict"] for row in exact] == ["mismatch", "holds"]
    both = pd.concat([known, rows], ignore_index=True)
    assert claims.claims_sentence(both).startswith(f"{len(known) + 2} claims recomputed")
    table = claims.claims_table(both, "all").frame.tail(2)
    assert table["stated"].tolist() == ["100 %", "more than 50 %"]
    near = counted["multi-adds-within-10-percent", "approximate"]["computed"]
    assert f"approximates it {near:.4g} %, mismatch" in table["note"].iloc[0]


def test_statements_that_nobody_counted_are_not_run(tmp_path: Path) -> None:
    statements = search_space.read_statements(tmp_path)
    assert "not run" in search_space.equations_sentence(statements)
    assert "not run" in search_space.statement_table(statements).caption
    assert search_space.space_claims(statements).empty
    assert search_space.statement_files(statements).files == ()
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "space.csv").write_text("claim\n", encoding="utf-8")
    with pytest.raises(DataError, match="columns missing"):
        search_space.read_statements(tmp_path)


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
    betas = generator.choice(SEARCH_SPACE, (40, len(LEARNED_BETAS)))
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
        search_plots.reference_dots(NOTHING),
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
        "given": None,
    }
    values = dict.fromkeys(("data_root", "seeds", "distribution"), "")
    names |= {**values, "accelerator": "auto", "devices": "auto", "engine": "local"}
    names |= {"profile": "smoke", "force": False}
    found = {
        "figure 3": ("notebooks/figure_03_distribution.ipynb", ""),
        "figure 5": ("notebooks/figure_05_search_samples.ipynb", ""),
        "table 8": ("notebooks/table_08_learned_distribution.ipynb", "search-"),
        "search": ("book/search.md", ""),
    }

    def show(page: str, chosen: str | None = None, **given: Any) -> str:
        path, own = found[page]
        return shown(REPOSITORY / path, {**names, **given}, own if chosen is None else chosen)

    return SimpleNamespace(folder=tmp_path, store=ResultsStore(tmp_path, "proxy"), show=show)


PAGES = ("figure 3", "figure 5", "table 8", "search")
# Of a search that is small: what the paper's would take.
PAPERS_OWN = "The paper's own search is **not run**"


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
    write_statements(pages.folder, space_statements(500, seed=1))
    text = pages.show(page)
    assert (PAPERS_OWN in text) == (page == "search")
    assert "not run" not in text.replace(PAPERS_OWN, "")
    assert "98.7" not in text
    expected = {
        "figure 3": "and search's best: "
        + ", ".join(str(block.feature_dim) for block in search.found_spec(TRIALS).blocks),
        "figure 5": "Samples of all methods: ",
        "table 8": "25.00 and 21.00 AP (3 and 3 seeds)",
        "search": search.setting(TRIALS),
    }
    assert expected[page] in text
    if page in ("figure 5", "search"):
        assert "on 500 uniform samples" in text


@pytest.mark.parametrize("page", PAGES)
def test_a_paper_scale_record_takes_the_place_of_the_proxys(pages: Any, page: str) -> None:
    pages.store.add_trials([*SAMPLED, *REFERENCES])
    before = pages.show(page)
    ResultsStore(pages.folder, "paper").add_trials(PAPER_SAMPLES)
    text = pages.show(page)
    own = search.setting(frame(PAPER_SAMPLES))
    assert own in text
    assert own not in before
    assert search.setting(TRIALS) not in text
    assert search.setting(TRIALS) in before
    assert "random search's trial" not in text
    if page != "table 8":  # its cells that are run here show no files
        assert "paper_scale/search_trials.csv" in text
        assert "proxy/search_trials.csv" not in text


@pytest.mark.parametrize("page", ["figure 3", "table 8"])
def test_a_page_takes_a_distribution_from_a_file(pages: Any, page: str) -> None:
    path = pages.folder / "mine.json"
    write_distribution(path, Distribution("my own", "eff_spinenet_m0", (1,) * 17 + (20,)))
    pages.store.add_trials(SAMPLED)
    given = read_distribution(path)
    if page == "figure 3":
        text = pages.show(page, distribution=str(path))
        assert "The given distribution is my own" in text
        assert "given distribution: " + ", ".join(map(str, given.feature_dims)) in text
        assert search.FOUND not in text
    else:
        text = pages.show(page, given=given)
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


def test_a_change_of_the_record_changes_what_the_page_says(pages: Any) -> None:
    pages.store.add_trials([*SAMPLED, *REFERENCES])
    before = pages.show("search")
    worse = [{**row, "AP": row["AP"] - 9} for row in again(FOUND, {1: 24.0, 2: 25.0, 3: 26.0}, 2)]
    pages.store.add_trials(worse)
    after = pages.show("search")
    assert "larger than the spread over seeds, and the search's best is ahead" in before
    assert "larger than the spread over seeds, and SP-EfficientNet-B0 is ahead" in after
    assert betas_text(FOUND) == search.best_sample(TRIALS)["betas"]
