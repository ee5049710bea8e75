"""The tables of the page on training at the paper's scale."""

from __future__ import annotations

import pandas as pd

from effspinenet_lib.report.plan import plan_table
from effspinenet_lib.report.recipes import recipe_table
from effspinenet_lib.training.recipes import RECIPES


def test_a_plan_is_summed_by_table_and_kind() -> None:
    runs = [
        ("table-03", "own", 1, 76_876_800, 2.5e18, 3 * 2**30, 10.0),
        ("table-03", "own", 1, 23_123_200, 0.5e18, 2**29, 20.0),
        ("figure-05", "search", 5_000, 5_760_000_000, 43.4e18, 2**30, 400.0),
    ]
    names = ["item", "kind", "runs", "images", "multi_adds", "memory_image", "hours"]
    planned = pd.DataFrame(runs, columns=names).assign(throughput=["stated", "measured", "stated"])
    table = plan_table(planned)
    first, second, total = table.frame.to_dict("records")
    assert first == {
        "runs of": "the authors' own models",
        "runs": "2",
        "images, millions": "100",
        "Multi-Adds, 1e18": "3.0",
        "GiB an image": "3.00",
        "hours": "30",
    }
    assert (second["runs"], total["runs"]) == ("5,000", "5,002")
    assert (total["hours"], total["images, millions"]) == ("430", "5,860")
    assert list(table.frame.index) == ["table-03", "figure-05", "all"]
    assert "measured, stated" in table.caption


def test_a_recipe_shows_every_sourced_setting() -> None:
    frame = recipe_table("paper_detection").frame
    assert set(frame.index) == set(RECIPES["paper_detection"].sources)
    assert frame.loc["learning_rate", "value"] == "0.28"  # section 5.1.1
    assert frame.loc["learning_rate", "source"] == "paper 5.1.1"


def test_beside_another_recipe_only_what_differs_is_shown() -> None:
    frame = recipe_table("paper_segmentation", beside="paper_detection").frame
    one, other = RECIPES["paper_segmentation"], RECIPES["paper_detection"]
    differing = {name for name in one.sources if getattr(one, name) != getattr(other, name)}
    assert set(frame.index) == differing
    assert frame.loc["schedule", ["paper_segmentation", "paper_detection"]].tolist() == [
        "cosine",
        "step",
    ]
