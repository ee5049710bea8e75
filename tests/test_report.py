"""Reports: what may be shown as a result, and that drawings and tables say what is true."""

from __future__ import annotations

import itertools
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from effspinenet_lib.data import DataConfig, open_dataset
from effspinenet_lib.models.layers import MBConv, Resample
from effspinenet_lib.models.scale_permuted import EffSpineNet
from effspinenet_lib.models.specs import MODELS, block_multi_adds, level_side
from effspinenet_lib.report import (
    browser,
    checks,
    claims,
    diagrams,
    plots,
    provenance,
    runs,
    status,
    style,
    tables,
    verdict,
)
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.results.paper import paper_values

D0 = MODELS["eff_spinenet_d0"].backbone
SP = MODELS["sp_efficientnet_b0"].backbone


def row(name: str, metric: str, value: float, source: str, seed: int | None = None) -> dict:
    return {
        "item": "table-08",
        "row": name,
        "model": "m",
        "task": "detection",
        "metric": metric,
        "value": value,
        "unit": {"multi_adds": "B", "parameters": "M"}.get(metric, "%"),
        "source": source,
        "seed": seed,
    }


PROXY = pd.DataFrame(
    [row("SP-EfficientNet-B0", "AP", value, "proxy", s) for s, value in enumerate((41, 42, 43))]
    + [row("Eff-SpineNet-D0", "AP", value, "proxy", s) for s, value in enumerate((44, 45, 46))]
)
NOTHING = PROXY.iloc[:0]


class Cells(HTMLParser):
    """Text of the cells of a table, row by row, as a browser reads it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag in ("th", "td"):
            self.rows[-1][-1] += data


# Comparison tables


def test_paper_values_never_reach_a_measured_column() -> None:
    paper = paper_values("table-08")
    frame = tables.comparison("table-08", paper, NOTHING)
    for heading, origin in frame.columns:
        cells = set(frame[heading, origin])
        if origin == "paper":
            assert not cells & {"not run", ""}
        else:
            assert cells <= {"not run", "–"}
    assert frame["AP (%)", "paper"].tolist() == ["33.0", "33.8"]


def test_proxy_shows_mean_deviation_and_number_of_seeds() -> None:
    frame = tables.comparison("table-08", paper_values("table-08"), PROXY)
    values = np.array([44, 45, 46])
    expected = f"{values.mean():.1f} ± {values.std(ddof=1):.1f} (3)"
    assert frame.loc["Eff-SpineNet-D0", ("AP (%)", "proxy")] == expected
    one = tables.comparison("table-08", paper_values("table-08"), PROXY.iloc[:1])
    assert one.loc["SP-EfficientNet-B0", ("AP (%)", "proxy")] == "41.0 (1)"
    assert one.loc["Eff-SpineNet-D0", ("AP (%)", "proxy")] == "not run"


def test_cost_stands_beside_its_deviation_from_the_print() -> None:
    measured = pd.DataFrame([row("Eff-SpineNet-D0", "multi_adds", 2.512, "cost")])
    frame = tables.comparison("table-08", paper_values("table-08"), measured)
    cells = frame.loc["Eff-SpineNet-D0", "#FLOPs (B)"]
    assert cells.tolist() == ["2.5", "2.51", "+0.5 %"]  # 2.512 / 2.5 = 1.0048


def test_runs_at_the_papers_settings_get_a_column_of_their_own() -> None:
    measured = pd.DataFrame([row("Eff-SpineNet-D0", "AP", 33.1, "paper_scale", 0)])
    frame = tables.comparison("table-08", paper_values("table-08"), measured)
    columns = frame["AP (%)"]
    assert columns.loc["Eff-SpineNet-D0"].tolist() == ["33.8", "not run", "33.1 (1)"]
    assert columns.loc["SP-EfficientNet-B0"].tolist() == ["33.0", "not run", "not run"]


def test_smoke_accuracy_is_never_shown(tmp_path: Path) -> None:
    smoke = ResultsStore(tmp_path, "smoke")
    smoke.add_measurements(
        "table-08",
        [
            row("Eff-SpineNet-D0", "AP", 98.7, "smoke", 0),
            row("Eff-SpineNet-D0", "multi_adds", 2.5, "cost"),
        ],
    )
    found = tables.measured("table-08", "smoke", tmp_path)
    assert found["metric"].tolist() == ["multi_adds"]
    every = smoke.measurements("table-08")
    html = tables.to_html(tables.comparison("table-08", paper_values("table-08"), every), "t")
    assert "98.7" not in html
    assert "98.7" not in browser.measurements(tmp_path).to_string()


def test_measured_takes_the_first_folder_that_has_a_number(tmp_path: Path) -> None:
    for folder, value in (("first", 40.0), ("second", 50.0)):
        store = ResultsStore(tmp_path / folder, "proxy")
        store.add_measurements("table-08", [row("Eff-SpineNet-D0", "AP", value, "proxy", 0)])
    found = tables.measured("table-08", "smoke", tmp_path / "first", tmp_path / "second")
    assert found["value"].tolist() == [40.0]
    found = tables.measured("table-08", "smoke", tmp_path / "none", tmp_path / "second")
    assert found["value"].tolist() == [50.0]


# HTML


def test_html_escapes_names_and_keeps_every_cell() -> None:
    nasty = '<script>alert("x")</script> & co'
    frame = pd.DataFrame({nasty: [nasty, "1"], "b": [2.5, None]}, index=[nasty, "plain"])
    page = Cells(tables.to_html(frame, nasty))
    assert "script" not in page.tags
    assert page.rows == [["", nasty, "b"], [nasty, nasty, "2.5"], ["plain", "1", ""]]


def test_html_of_grouped_columns_has_both_header_rows_and_scrolls() -> None:
    frame = tables.comparison("table-08", paper_values("table-08"), PROXY, ("AP", "AP50"))
    html = tables.to_html(frame, "caption")
    page = Cells(html)
    assert page.rows[0] == ["model", "AP (%)", "AP₅₀ (%)"]
    assert page.rows[1] == ["paper", "proxy", "paper", "proxy"]
    assert [len(cells) for cells in page.rows[2:]] == [5, 5]
    assert "overflow-x:auto" in html


# Verdicts


def test_difference_is_welchs_interval() -> None:
    # By hand: se = sqrt(1/3 + 1/3), 4 degrees of freedom, t = 2.776.
    found = verdict.difference(pd.Series([44.0, 45, 46]), pd.Series([41.0, 42, 43]))
    assert found.mean == 3
    assert found.half_width == pytest.approx(2.776 * math.sqrt(2 / 3))
    assert found.conclusive


def test_difference_of_unequal_samples_has_fewer_degrees_of_freedom() -> None:
    # By hand: shares 4/2 = 2 and 0.5/2 = 0.25 (variances 4 and 0.5, n = 2);
    # (2.25)^2 / (4 + 0.0625) = 1.246 degrees of freedom, taken as 1: t = 12.706.
    first, second = pd.Series([0.0, math.sqrt(8)]), pd.Series([0.0, 1.0])
    found = verdict.difference(first, second)
    assert found.half_width == pytest.approx(12.706 * 1.5)
    assert not found.conclusive


@pytest.mark.parametrize(
    ("better", "worse", "word"),
    [
        ("Eff-SpineNet-D0", "SP-EfficientNet-B0", "agrees"),
        ("SP-EfficientNet-B0", "Eff-SpineNet-D0", "agrees"),
    ],
)
def test_verdict_agrees_where_the_order_is_the_papers(better: str, worse: str, word: str) -> None:
    assert word in verdict.verdict("table-08", paper_values("table-08"), PROXY, better, worse)


def test_verdict_disagrees_where_the_order_is_reversed() -> None:
    names = {"SP-EfficientNet-B0": "Eff-SpineNet-D0", "Eff-SpineNet-D0": "SP-EfficientNet-B0"}
    swapped = PROXY.assign(row=PROXY["row"].map(names))
    pair = ("Eff-SpineNet-D0", "SP-EfficientNet-B0")
    sentence = verdict.verdict("table-08", paper_values("table-08"), swapped, *pair)
    assert "disagrees" in sentence
    assert "-3.0" in sentence


def test_verdict_without_enough_seeds_is_no_verdict() -> None:
    paper, pair = paper_values("table-08"), ("Eff-SpineNet-D0", "SP-EfficientNet-B0")
    assert "nothing can be said" in verdict.verdict("table-08", paper, NOTHING, *pair)
    single = PROXY[PROXY["seed"] == 0]
    assert "single seed has no spread" in verdict.verdict("table-08", paper, single, *pair)
    scattered = PROXY.assign(value=PROXY["value"] * [0, 1, 2, 0, 1, 2])
    assert "holds zero" in verdict.verdict("table-08", paper, scattered, *pair)


# Checks of the paper's specification tables


def test_a_wrong_cell_is_found_and_named() -> None:
    cells = checks.table_01_cells()
    paper = paper_values("table-01")
    assert checks.compare_cells(paper, cells)["agrees"].all()
    cells["Eff-SpineNet-D0 block 5", "feature_dim"] += 8
    compared = checks.compare_cells(paper, cells)
    assert checks.agreement(compared).endswith("1 differ: Eff-SpineNet-D0 block 5 feature_dim.")
    assert checks.table_01_frame(compared).loc[5, ("Eff-SpineNet-D0", "feature dim")] == "104 ≠ 112"


def test_lost_repeats_of_table_2_are_shown_as_lost() -> None:
    compared = checks.compare_cells(paper_values("table-02"), checks.table_02_cells())
    repeats = checks.table_02_repeats(compared)
    assert repeats.loc["D1, paper"].tolist()[-3:] == ["1", "–", "–"]
    assert repeats.loc["D1, library"].tolist()[-3:] == ["1", "1", "1"]
    assert repeats.shape == (12, 18)


def test_the_rule_of_section_3_1_fails_at_level_5_alone() -> None:
    averages = checks.level_averages()
    assert averages["holds"].tolist() == ["yes"] * 4 + ["no"] + ["yes"] * 2
    assert averages.loc["L5", "stated rule gives"] == f"{(4 * 192 + 320) / 5:g}"


def test_block_parameters_are_those_of_the_module() -> None:
    counted = checks.block_parameters(D0)
    for block in (D0.blocks[2], D0.blocks[11]):
        module = MBConv(block.feature_dim, block.feature_dim, 3, 1, 6, None, "swish", 0.0)
        weights = sum(p.numel() for p in module.parameters() if p.ndim == 4)
        assert counted[block.index - 1] == weights


def test_level_shift_adds_up() -> None:
    shift = checks.level_shift({"SP-EfficientNet-B0": SP, "Eff-SpineNet-D0": D0}, 512)
    for column in shift.columns:
        values = shift[column].astype(float)
        assert values.iloc[:-1].sum() == pytest.approx(values["all"], abs=2)  # rounded cells
    assert checks.shift_verdict(SP, D0).endswith("holds.")
    assert checks.shift_verdict(D0, SP).endswith("does not hold.")


# Diagrams


def test_drawn_shapes_are_those_of_the_module() -> None:
    pairs = diagrams.connections(D0)
    traced = {pair: trace(*pair) for pair in pairs}
    frame, sentence = diagrams.compare_shapes(D0, 256, traced)
    assert sentence == f"Of {len(pairs)} connections, {len(pairs)} agree."
    traced[3, 5] = [*traced[3, 5][:-1], (16, 8)]
    frame, _ = diagrams.compare_shapes(D0, 256, traced)
    assert frame.loc["3 → 5", "agree"] == "no"


def trace(source: int, target: int) -> list[tuple[int, int]]:
    start, end = D0.blocks[source - 1], D0.blocks[target - 1]
    module = Resample(start.feature_dim, start.level, end.feature_dim, end.level, True).eval()
    side, goal = level_side(256, start.level), level_side(256, end.level)
    seen = [(side, start.feature_dim)]
    for layer in module.layers:
        layer.register_forward_hook(
            lambda _, inputs, output: seen.extend(
                (t.shape[2], t.shape[1]) for t in (*inputs, output)
            )
        )
    with torch.inference_mode():
        module(torch.zeros(1, start.feature_dim, side, side), (goal, goal))
    return seen


def test_drawn_connections_are_those_of_the_backbone() -> None:
    backbone = EffSpineNet(MODELS["eff_spinenet_m0"].backbone)
    built = {
        (int(source), int(target))
        for target, fusion in backbone.fusions.items()
        for source in fusion.resample
    }
    assert set(diagrams.connections(D0)) == built


def test_wiring_describes_every_block_in_words() -> None:
    picture = diagrams.wiring(MODELS["eff_spinenet_d0"].backbone)
    assert "Block 1 at level 1 takes the stem." in picture.alt
    assert "Block 16 at level 5 takes 9, 14 and 13, output P5." in picture.alt
    assert picture.alt.count("output P") == 5


# Pictures


def test_a_picture_carries_its_text_and_takes_the_pages_ink() -> None:
    figure = style.new_figure(2, 1)
    figure.add_subplot().set_title("title")
    with style.drawing():
        picture = style.to_picture(figure, 'bars "<1>" & more')
    assert 'aria-label="bars &quot;&lt;1&gt;&quot; &amp; more"' in picture.svg
    assert 'role="img"' in picture.svg
    assert "\n\n" not in picture.svg  # an empty line would end the HTML block in Markdown


def test_a_picture_is_the_same_bytes_each_time_and_has_no_colour_for_ink() -> None:
    first, second = diagrams.wiring(D0).svg, diagrams.wiring(D0).svg
    assert first == second
    assert style.INK not in first
    assert "currentColor" in first


def test_a_picture_without_text_is_refused() -> None:
    with pytest.raises(ValueError, match="alternative text"):
        style.to_picture(style.new_figure(1, 1), " ")


# Machado, Oliveira and Fernandes (2009), severity 1: linear RGB as the colour-blind see it.
COLOUR_BLINDNESS = {
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(matrix) @ rgb.clip(0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", COLOUR_BLINDNESS)
@pytest.mark.parametrize("palette", [style.FAMILY_COLOURS, style.LEVEL_COLOURS])
def test_colours_stay_apart_for_the_colour_blind(kind: str, palette: dict) -> None:
    seen = {name: lab(COLOUR_BLINDNESS[kind] @ linear(colour)) for name, colour in palette.items()}
    for (one, first), (other, second) in itertools.combinations(seen.items(), 2):
        # 2.3 is the least difference that can be noticed (CIE 1976).
        assert np.linalg.norm(first - second) > 3 * 2.3, (one, other)


def test_text_on_a_level_colour_can_be_read() -> None:
    weights = np.array([0.2126, 0.7152, 0.0722])
    for level, colour in style.LEVEL_COLOURS.items():
        light = sorted(float(weights @ linear(c)) for c in (colour, style.LEVEL_TEXT[level]))
        assert (light[1] + 0.05) / (light[0] + 0.05) >= 3  # WCAG 2, large or bold text


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Eff-SpineNet-D0", "Eff-SpineNet"),
        ("eff_spinenet_m0", "Eff-SpineNet"),
        ("model 1, seed 0", "Eff-SpineNet"),
        ("SP-EfficientNet-B0", "SP-EfficientNet"),
        ("EfficientNet-B0-FPN", "EfficientNet"),
        ("EfficientDet-D0", "EfficientDet"),
        ("SpineNet-49", "SpineNet"),
        ("L5", ""),
    ],
)
def test_a_family_is_known_by_printed_and_library_names(name: str, family: str) -> None:
    assert style.family_of(name) == family


# Plots


def test_shares_are_equation_2() -> None:
    shares = plots.resource_shares(D0, 512)
    assert sum(shares) == pytest.approx(100)
    block = D0.blocks[4]  # level 4, 104 channels: 32 x 32 positions
    by_hand = 32**2 * (2 * 104**2 * 6 + 9 * 104 * 6)
    assert block.level == 4
    assert shares[4] == pytest.approx(100 * by_hand / sum(block_multi_adds(D0, 512)))


def test_figure_3_says_its_values_in_words() -> None:
    gallery = plots.distribution({"SP-EfficientNet-B0": SP, "Eff-SpineNet-D0": D0}, 512)
    dims, shares = gallery.pictures
    assert "16, 24, 16, 16, 104, 48, 120, 40" in dims.alt
    assert f"{plots.resource_shares(SP, 512)[0]:.1f}, " in shares.alt
    assert "flex-wrap" in gallery._repr_html_()


def test_seed_dots_keep_the_place_of_what_was_not_run() -> None:
    picture = plots.seed_dots("table-08", PROXY, ["SP-EfficientNet-B0", "model 1"])
    assert "SP-EfficientNet-B0: 41.0, 42.0, 43.0, mean 42.0." in picture.alt
    assert "model 1: not run." in picture.alt
    assert "not run" in plots.seed_dots("table-08", NOTHING, ["Eff-SpineNet-D0"]).svg


def test_training_curves_name_their_ends() -> None:
    curve = pd.DataFrame({"step": [10, 20], "loss": [2.0, 1.5]})
    assert "Eff-SpineNet-D0, seed 0 from 2.00 to 1.50" in (
        plots.training_curves({"Eff-SpineNet-D0, seed 0": curve}).alt
    )


def test_the_contact_sheet_counts_the_boxes_that_it_shows() -> None:
    scenes = open_dataset(DataConfig("shapescenes", eval_images=4, image_size=64), "eval")
    counts = scenes.describe()["classes"]
    picture = plots.contact_sheet(scenes, count=4)
    assert picture.svg.count("<image") == 4
    for name, sizes in counts.items():
        number = sum(sizes.values())
        assert (f"{number} {name}" in picture.alt) == bool(number)


# What was run


RUN = {
    "run": "0123456789ab",
    "state": "finished",
    "model": "eff_spinenet_m0",
    "seed": 0,
    "steps": 12,
    "images": 48,
    "wall_seconds": 9.6,
}


def test_just_ran_tells_what_ran_and_what_did_not() -> None:
    labels = {"0123456789ab": "first", "ffffffffffff": "second"}
    curves = {"first": pd.DataFrame({"step": [10, 12], "loss": [1.875, 1.5]})}
    frame = runs.just_ran(pd.DataFrame([RUN]), labels, curves)
    assert frame.loc["first"].tolist() == [
        "eff_spinenet_m0",
        0,
        12,
        48,
        "10",
        "1.88",
        "1.50",
        "yes",
    ]
    assert frame.loc["second", "finished"] == "no"
    assert frame.loc["second", "steps"] == "not run"
    partial = runs.just_ran(pd.DataFrame([RUN | {"state": "interrupted"}]), labels, {})
    assert partial.loc["first", ["finished", "first loss"]].tolist() == ["no", "not kept"]


def test_curves_are_read_where_their_run_is_kept(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path, "smoke")
    folder = store.folder / "runs" / "0123456789ab"
    folder.mkdir(parents=True)
    (folder / "curve.csv").write_text("step,learning_rate,loss\n10,0.1,2.5\n")
    curves = runs.read_curves(store, {"0123456789ab": "first", "ffffffffffff": "second"})
    assert curves.keys() == {"first"}
    assert curves["first"]["loss"].tolist() == [2.5]


# Provenance, status, claims


def test_provenance_links_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("proxy/table-08.csv", "proxy/runs.csv", "paper/table-08.csv", "paper_scale/x.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(provenance, "current_commit", lambda: "abc123+dirty")
    found = provenance.provenance("table-08", "table_08", tmp_path, tmp_path)
    assert set(found.files) == {"paper/table-08.csv", "proxy/table-08.csv", "proxy/runs.csv"}
    assert "<a" not in found._repr_html_()
    monkeypatch.setenv(provenance.BOOK_FILES_VARIABLE, "../files")
    monkeypatch.setenv(provenance.REPOSITORY_VARIABLE, "https://example.org/repo/")
    html = found._repr_html_()
    assert 'href="../files/notebooks/table_08.ipynb"' in html
    assert 'href="../files/results/proxy/table-08.csv"' in html
    assert 'href="https://example.org/repo/commit/abc123"' in html


def test_result_files_lists_each_file_once(tmp_path: Path) -> None:
    for name in ("proxy/table-08.csv", "paper/table-08.csv", "paper/table-09.csv", "notes.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listed = provenance.result_files(tmp_path, tmp_path).files
    assert sorted(listed) == ["paper/table-08.csv", "paper/table-09.csv", "proxy/table-08.csv"]


def test_status_counts_what_is_rebuilt() -> None:
    frame = pd.DataFrame(
        {
            "item": ["table-01", "table-08", "figure-01"],
            "title": ["a", "b", "c"],
            "notebook": ["table_01", "table_08", ""],
            "paper_values": [100, 16, 0],
            "cost_rows": [0, 4, 0],
            "proxy_rows": [0, 0, 0],
            "paper_scale_rows": [0, 0, 0],
        }
    )
    sentence = status.status_sentence(frame)
    assert "2 of 2 tables and 0 of 1 figures" in sentence
    assert "116 cells of 2 tables" in sentence
    shown = status.status_table(frame, ["table-08"], "caption").frame
    assert shown.loc["table-08", ["cost", "proxy"]].tolist() == ["measured", "not run"]
    assert shown.loc["table-01", "proxy"] == "–"
    assert shown.loc["figure-01", "rebuilt"] == "not yet"


def test_claims_are_counted_by_their_verdicts() -> None:
    frame = pd.DataFrame(
        {
            "statement": ["a < b", "b"],
            "section": ["1", "2"],
            "relation": ["less_than", "between"],
            "stated_low": [2.0, 1.0],
            "stated_high": [math.nan, 3.0],
            "unit": ["%", "B"],
            "computed": [2.5, 2.0],
            "verdict": ["mismatch", "holds"],
            "note": ["", "why"],
        }
    )
    assert claims.claims_sentence(frame) == "2 claims recomputed: 1 holds, 0 rounding, 1 mismatch."
    page = Cells(claims.claims_table(frame, "caption")._repr_html_())
    assert page.rows[1][:4] == ["a < b", "1", "less than 2 %", "2.5"]
    assert page.rows[2][2] == "1 to 3 B"


def test_the_browser_has_every_printed_cell_and_no_nan() -> None:
    frame = browser.measurements("does-not-exist")
    printed = [len(paper_values(f"table-{number:02d}")) for number in range(1, 12)]
    assert (frame["source"] == "paper").sum() == sum(printed)
    assert not frame.isin(["nan", "NaN", "<NA>", "None"]).any().any()
