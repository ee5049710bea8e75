"""The transcribed tables, their misprints, and the paper's statements about them."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pandas as pd
import pytest

from effspinenet_lib.errors import DataError, UnknownName
from effspinenet_lib.models.specs import MODELS, block_multi_adds
from effspinenet_lib.results.paper import (
    ITEMS,
    OPERATIONS,
    STATED,
    claims,
    misprints,
    paper_values,
    paper_values_corrected,
    printed_table,
)
from effspinenet_lib.results.tables import schema

# Rows and numeric cells of each printed table, counted on the page. Tables 4 and 5 have a row
# here for each column of the page, table 1 one for each block of three models.
ROWS = {1: 54, 2: 6, 3: 11, 4: 10, 5: 5, 6: 3, 7: 9, 8: 2, 9: 3, 10: 6, 11: 4}
NUMBERS = {
    1: 16 * 3 + 18 * 3 + 18 * 3,
    2: 6 * (1 + 1 + 16 + 1 + 1),
    3: 8 * 8 + 3 * 3,
    4: 5 + 4 + 4 + 3,
    5: 5 + 5 + 4,
    6: 3 * 8,
    7: 4 * 6 + 5 * 3,
    8: 2 * 8,
    9: 3 * 5,
    10: 6 * 6,
    11: 4 * 5,
}


def cells(item: str, corrected: bool = False) -> pd.Series:
    frame = (paper_values_corrected if corrected else paper_values)(item)
    return frame.set_index(["row", "metric"])["value"]


@pytest.mark.parametrize("number", ROWS)
def test_every_cell_of_every_table_is_there(number: int) -> None:
    frame = paper_values(f"table-{number:02d}")
    assert list(frame.columns) == schema("measurement").columns
    assert set(frame["source"]) == {"paper"}
    assert frame["row"].nunique() == ROWS[number]
    assert frame["value"].notna().sum() == NUMBERS[number]
    empty = frame[frame["value"].isna()]
    assert empty["note"].str.contains("printed (?:-|N/A)", regex=True).all()


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(UnknownName, match="table-11"):
        paper_values("table-12")
    assert ITEMS[0] == "table-01"
    assert len(ITEMS) == 11


def test_the_digits_are_those_of_the_print(repository: Path) -> None:
    text = (repository / "results" / "paper" / "table-10.csv").read_text()
    assert ",parameters,5.30,M," in text
    assert ",multi_adds,1.00,B," in text
    assert ",parameters,9.20,M," in text


def test_a_printed_table_has_the_digits_of_the_print() -> None:
    table = printed_table("table-07")
    assert table.loc["MobileNetV2-FPN", "parameters"] == "2.20"
    assert table.loc["MobileNetV2-FPN", "AP_S"] == ""
    assert list(table.index[:2]) == ["Eff-SpineNet-M0", "MobileNetV3-Small-SSDLite"]


def test_a_claim_can_be_checked_on_counted_costs() -> None:
    cell = ("table-08", "Eff-SpineNet-D0", "parameters")
    checked = claims(counted={cell: 4.4}).set_index("claim")
    assert checked.loc["parameters-saved", "computed"] == 0
    assert checked.loc["parameters-after", "verdict"] == "mismatch"


def test_models_are_named_where_the_library_has_them() -> None:
    frame = paper_values("table-03").drop_duplicates("row").set_index("row")["model"]
    assert frame["Eff-SpineNet-D1"] == "eff_spinenet_d1"
    assert frame["EfficientNet-B2-FPN"] == "efficientnet_b2_fpn"
    assert frame["EfficientDet-D0"] == "efficientdet_d0"
    assert frame["ResNet-50-FPN"] == "resnet50_fpn"
    assert frame["SpineNet-49"] == "spinenet_49"
    assert set(paper_values("table-09")["model"]) == {"eff_spinenet_d0"}


def test_table_1_has_the_feature_dimensions_of_the_print() -> None:
    table = cells("table-01")
    learned = [table[f"Eff-SpineNet-D0 block {n}", "feature_dim"] for n in range(1, 19)]
    assert learned == [
        *(16, 24, 16, 16, 104, 48, 120, 40, 120, 168, 96, 192, 136, 104, 40, 136, 136, 40)
    ]
    assert pd.isna(table["EfficientNet-B0 block 17", "level"])


@pytest.mark.parametrize("item", ["table-03", "table-06", "table-07", "table-08"])
def test_precision_falls_with_the_threshold_and_rises_with_the_size(item: str) -> None:
    """Holds for every detector; a swapped or misread column would break it."""
    table = cells(item, corrected=True).unstack()
    for low, high in (("AP75", "AP50"), ("AP", "AP50"), ("AP_S", "AP_M"), ("AP_M", "AP_L")):
        if {low, high} <= set(table.columns):
            pairs = table[[low, high]].dropna()
            assert (pairs[low] < pairs[high]).all()
            assert len(pairs) >= 2


def test_a_larger_model_costs_more_and_detects_better() -> None:
    for item in ("table-03", "table-06", "table-10"):
        table = cells(item).unstack()
        for metric in ("multi_adds", "parameters"):
            assert table.loc[[f"Eff-SpineNet-D{k}" for k in "012"], metric].is_monotonic_increasing


def test_every_misprint_is_on_the_page_and_is_put_right() -> None:
    listed = misprints()
    assert listed["item"].value_counts().to_dict() == {
        **{"table-02": 12, "table-03": 2, "table-04": 1, "table-11": 1}
    }
    for misprint in listed.to_dict("records"):
        key = (misprint["row"], misprint["metric"])
        printed, right = cells(misprint["item"]), cells(misprint["item"], corrected=True)
        if pd.isna(misprint["printed"]):
            assert key not in printed.index
        else:
            assert printed[key] == misprint["printed"] != misprint["corrected"]
        assert right[key] == misprint["corrected"]


def test_nothing_but_the_misprints_differs_in_the_corrected_tables() -> None:
    for item in ITEMS:
        printed, right = paper_values(item), paper_values_corrected(item)
        kept = right[~right["note"].str.startswith("corrected; printed")]
        listed = misprints().query("item == @item")
        assert len(right) - len(kept) == len(listed)
        merged = printed.merge(kept, how="inner")
        assert len(merged) == len(kept) == len(printed) - listed["printed"].notna().sum()


def test_the_corrected_repeats_are_18_and_those_of_the_larger_models_follow_each_other() -> None:
    table = cells("table-02", corrected=True).unstack()
    repeats = table[sorted(column for column in table if column.startswith("repeats_"))]
    assert repeats.shape == (6, 18)
    assert repeats.loc[["M0", "M1", "M2", "D0"]].eq(1).all(axis=None)
    assert repeats.loc["D1"].tolist() == [2, 2, 1, 1, 2, 2, 2, 1, 1, 2, 1, 2, *[1] * 6]
    assert repeats.loc["D1"].equals(repeats.loc["D2"])


@pytest.fixture(scope="module")
def checked() -> pd.DataFrame:
    return claims().set_index("claim")


def test_statements_that_do_not_hold_are_known(checked: pd.DataFrame) -> None:
    assert checked.query("verdict == 'mismatch'")["computed"].round(1).to_dict() == {
        "sp-outperforms-efficientdet": -0.5,
        "sp-outperforms-fpn": -0.5,
        "sp-fewer-parameters": 0.7,
        "sp-similar-parameters": 118.9,
        "classification-flops-d2": 89.0,
        "larger-models": 2,
        "dimension-l5": 217.6,
        "repeats-listed": 16,
        "flops-below-fpn-d1": 0.2,
        "flops-below-fpn-d2": 0.3,
        "m2-mobilenetv2-fpn-parameters": 0.2,
        "same-d0-ap": 0.9,
        "order-d1-sizes": 22.4,
    }


def test_statements_that_only_rounding_could_save_are_known(checked: pd.DataFrame) -> None:
    assert set(checked.query("verdict == 'rounding'").index) == {
        "outperforms-efficientdet-d2",
        "top1-drop-intro-d0",
        "flops-below-fpn-d0",
        "m1-mobilenetv3-ssd-flops",
        "table-04-eff-spinenet-d2-ms-train",
    }


@pytest.mark.parametrize(
    ("claim", "by_hand"),
    [
        ("parameters-saved", 100 * (4.4 - 3.6) / 4.4),
        ("classification-parameters-d0", 100 * (5.30 - 3.57) / 5.30),
        ("classification-parameters-d1", 100 * (7.80 - 4.97) / 7.80),
        ("classification-parameters-d2", 100 * (9.20 - 5.83) / 9.20),
        ("segmentation-gain-d0", 76.0 - 75.3),
        ("segmentation-flops-d0", 100 * (2.8 - 2.1) / 2.8),
        ("segmentation-flops-d2", 100 * (81.0 - 3.8) / 81.0),
        ("gain-over-fpn-d0", 34.7 - 33.5),
        ("longer-training", 42.5 - 34.8),
        ("drop-multi-scale", 40.1 - 32.6),
        ("drop-space-to-depth", 33.8 - 33.1),
        ("dimension-l4", (3 * 80 + 3 * 112) / 6),
        ("dimension-l5", (4 * 192 + 320) / 5),
        ("sp-similar-parameters", 100 * 4.4 / 3.7),
        ("space-to-depth-flops", 100 * 2.5 / 2.4),
        ("segmentation-comparable-d2", 100 * 78.0 / 80.5),
        ("large-margin-m1", 25.0 - 23.8),
        ("trade-off-fpn-d1", 39.9 - (38.8 + (41.4 - 38.8) * (6.0 - 5.8) / (10.0 - 5.8))),
        ("trade-off-efficientdet-d2", 42.5 - (39.1 + (42.5 - 39.1) * (10.3 - 6) / (11 - 6))),
        # blocks 2, 3 and 4: 24, 24, 24 before, 24, 16, 16 after
        ("levels-l2", 2 * 6 * (2 * (16**2 - 24**2) + 9 * (16 - 24)) / 1000),
        ("side-p6", 4),
        ("side-p7", 2),
    ],
)
def test_claims_compute_what_a_hand_calculation_gives(
    checked: pd.DataFrame, claim: str, by_hand: float
) -> None:
    assert checked.loc[claim, "computed"] == pytest.approx(by_hand, abs=1e-9)


def test_equation_3_is_that_of_the_specifications(checked: pd.DataFrame) -> None:
    after, before = (
        sum(block_multi_adds(MODELS[name].backbone, 512))
        for name in ("eff_spinenet_d0", "sp_efficientnet_b0")
    )
    computed = checked.loc["equation-3-total", "computed"]
    assert computed == pytest.approx(100 * after / before)
    assert computed == pytest.approx(103.6, abs=0.05)  # rounding to multiples of 8


def test_every_printed_gain_is_checked_by_a_claim(checked: pd.DataFrame) -> None:
    for item in ("table-04", "table-05"):
        gains = cells(item).unstack()["AP_gain"].dropna()
        own = checked[checked.index.str.startswith(item)]
        rows = own["cells"].str.split("|").str[1]
        assert dict(zip(rows, own["stated_low"], strict=True)) == gains.to_dict()


def test_every_operation_is_used_and_described(checked: pd.DataFrame, repository: Path) -> None:
    assert set(checked["operation"]) == {*OPERATIONS, STATED}
    readme = (repository / "results" / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in (*OPERATIONS, STATED))


@pytest.fixture
def copy(tmp_path: Path, repository: Path) -> Path:
    """A results folder that a test may change."""
    shutil.copytree(repository / "results" / "paper", tmp_path / "paper")
    return tmp_path


def change_claim(results_dir: Path, **changes: str) -> None:
    """Keep one claim, D0's 1.2 AP over EfficientNet-B0-FPN, with changes."""
    path = results_dir / "paper" / "claims.csv"
    with open(path, newline="") as handle:
        reader = csv.DictReader(handle)
        (row,) = [row for row in reader if row["claim"] == "gain-over-fpn-d0"]
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerow(row | changes)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"relation": "equals", "stated_low": "1.2"}, "holds"),
        ({"relation": "equals", "stated_low": "1"}, "holds"),
        ({"relation": "equals", "stated_low": "1.3"}, "rounding"),
        ({"relation": "equals", "stated_low": "1.4"}, "mismatch"),
        ({"relation": "between", "stated_low": "1.0", "stated_high": "1.1"}, "rounding"),
        ({"relation": "between", "stated_low": "0.5", "stated_high": "1.0"}, "mismatch"),
        ({"relation": "between", "stated_low": "1.25", "stated_high": "1.26"}, "rounding"),
        ({"relation": "less_than", "stated_low": "1.2"}, "rounding"),
        ({"relation": "less_than", "stated_low": "1.1"}, "mismatch"),
        ({"relation": "more_than", "stated_low": "1.1"}, "holds"),
        ({"relation": "more_than", "stated_low": "1.3"}, "mismatch"),
        ({"relation": "around", "stated_low": "1.3"}, "holds"),
        ({"relation": "around", "stated_low": "1.5"}, "mismatch"),
    ],
)
def test_a_verdict_allows_for_the_rounding_of_the_print(
    copy: Path, changes: dict[str, str], verdict: str
) -> None:
    """The cells are 34.7 and 33.5: the true difference lies within 1.1 and 1.3."""
    change_claim(copy, **{"stated_high": "", **changes})
    assert claims(copy)["verdict"].tolist() == [verdict]


def test_a_claim_follows_the_cells(copy: Path) -> None:
    path = copy / "paper" / "table-03.csv"
    path.write_text(path.read_text().replace(",AP,34.7,", ",AP,36.0,"))
    checked = claims(copy).set_index("claim").loc["gain-over-fpn-d0"]
    assert (checked["computed"], checked["verdict"]) == (2.5, "mismatch")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operation": "differences"}, "unknown operation of claims.csv, claim gain-over-fpn-d0"),
        ({"operation": "__import__"}, "unknown operation"),
        ({"operation": "value"}, "value takes 1 cells, found 2"),
        ({"operation": "remainder", "cells": "table-03|EfficientDet-D0|AP"}, "needs an argument"),
        ({"cells": "table-03|Eff-SpineNet-D9|AP"}, "no number is printed at"),
        ({"cells": "table-03|EfficientDet-D0|AP50"}, "no number is printed at"),
        ({"cells": "table-03|AP"}, "is not item|row|metric"),
        ({"relation": "near"}, "'near' is not one of equals"),
    ],
)
def test_a_claim_that_cannot_be_checked_is_named(
    copy: Path, changes: dict[str, str], message: str
) -> None:
    change_claim(copy, **changes)
    with pytest.raises((DataError, UnknownName), match=message):
        claims(copy)


def test_missing_tables_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"table-01.csv: no such file"):
        paper_values("table-01", tmp_path)
