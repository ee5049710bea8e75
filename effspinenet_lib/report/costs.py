"""The cost page: every printed cost beside the measured one."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from effspinenet_lib.report.style import (
    Picture,
    drawing,
    family_colour,
    new_figure,
    to_picture,
    words,
)
from effspinenet_lib.report.tables import METRIC_NAMES, Table, Text

CLOSE_PERCENT = 3.0  # what counts as a fit for the paper's own models
OWN_FAMILIES = ("eff_spinenet", "sp_efficientnet")
ROW_INCHES, WIDTH_INCHES = 0.24, 7.0


def is_own(model: str) -> bool:
    """Whether a model is one of the paper's, not one that it compares with."""
    return model.startswith(OWN_FAMILIES)


def printed(costs: pd.DataFrame) -> pd.DataFrame:
    """The rows that the paper prints a number for."""
    return costs.dropna(subset="printed")


def unprinted_table(costs: pd.DataFrame) -> Table:
    """The measured costs of models and tasks that the paper prints none for."""
    rows = costs[costs["printed"].isna()]
    wide = rows.pivot_table(
        index=["model", "task", "image_size"], columns="metric", values="measured", sort=False
    ).reset_index()
    frame = pd.DataFrame(
        {
            "task": wide["task"],
            "pixels": wide["image_size"].astype(str),
            **{
                f"{METRIC_NAMES[metric]} ({unit})": [
                    "" if pd.isna(value) else f"{value:#.3g}" for value in wide[metric]
                ]
                for metric, unit in (("multi_adds", "B"), ("parameters", "M"))
                if metric in wide
            },
        }
    ).set_index(pd.Index(wide["model"], name="model"))
    return Table(frame.fillna(""), "Costs that the paper does not print")


def cost_tables(costs: pd.DataFrame) -> list[Table]:
    """One table for each table of the paper: printed, measured and the difference.

    Args:
        costs: rows of the schema `cost`, printed ones.
    """
    return [_table(str(item), rows) for item, rows in costs.groupby("item", sort=True)]


def _table(item: str, rows: pd.DataFrame) -> Table:
    columns: dict[tuple[str, str], list[str]] = {}
    names = list(dict.fromkeys(rows["row"]))
    for metric in dict.fromkeys(rows["metric"]):
        cells = rows[rows["metric"] == metric].set_index("row")
        heading = f"{METRIC_NAMES[metric]} ({cells['unit'].iloc[0]})"
        columns[heading, "paper"] = [f"{cells['printed'][name]:g}" for name in names]
        columns[heading, "measured"] = [f"{cells['measured'][name]:#.3g}" for name in names]
        columns[heading, "difference"] = [
            f"{round(cells['difference_percent'][name], 1) + 0.0:+.1f} %" for name in names
        ]
    sizes = rows.drop_duplicates("row").set_index("row")["image_size"]
    columns["", "pixels"] = [str(sizes[name]) for name in names]
    frame = pd.DataFrame(columns, index=pd.Index(names, name="model"))
    frame.columns = pd.MultiIndex.from_tuples(list(columns))
    number = int(item.removeprefix("table-"))
    return Table(frame, f"Table {number}: printed and measured costs")


def note_table(costs: pd.DataFrame) -> Table:
    """What each model's cost rests on, and what is known where it misses the print."""
    rows = costs.drop_duplicates(["model", "task"])
    frame = pd.DataFrame(
        {
            "task": list(rows["task"]),
            "note": [Text(text) for text in rows["note"]],
        },
        index=pd.Index(rows["model"], name="model"),
    )
    return Table(frame, "Choices that the paper leaves open, and notes")


def fit_sentence(costs: pd.DataFrame) -> str:
    """How many cells are close to the print, in words, and which are not."""
    own = costs[costs["model"].map(is_own)]
    others = costs[~costs["model"].map(is_own)]
    close = own["difference_percent"].abs() <= CLOSE_PERCENT
    missed = [
        f"{cell.row} ({METRIC_NAMES[str(cell.metric)]} {cell.difference_percent:+.1f} %)"
        for cell in own[~close].itertuples(index=False)
    ]
    exceptions = f"; not so {words(missed)}" if missed else ""
    worst = others["difference_percent"].abs().max()
    return (
        f"Of the {len(own)} printed cells of Eff-SpineNet and SP-EfficientNet models {close.sum()} "
        f"are within {CLOSE_PERCENT:g} % under one set of choices{exceptions}. The {len(others)} "
        f"cells of the models that they are compared with are within {worst:.1f} %."
    )


def differences(costs: pd.DataFrame) -> Picture:
    """Draw the difference of every cell in percent, a row a model and task."""
    names = list(dict.fromkeys(_labels(costs)))
    with drawing():
        figure = new_figure(WIDTH_INCHES, 0.9 + ROW_INCHES * len(names))
        axes = figure.add_subplot()
        axes.axvspan(-CLOSE_PERCENT, CLOSE_PERCENT, color="0.5", alpha=0.15, linewidth=0)
        for metric, marker in (("multi_adds", "o"), ("parameters", "s")):
            cells = costs[costs["metric"] == metric]
            colours = [family_colour(name) for name in cells["row"]]
            axes.scatter(
                cells["difference_percent"],
                [names.index(label) for label in _labels(cells)],
                marker=marker,
                edgecolors=colours,
                facecolors=colours if metric == "multi_adds" else "none",
                label=METRIC_NAMES[metric],
            )
        axes.set_yticks(range(len(names)), names)
        axes.set(ylim=(len(names) - 0.5, -0.5), xlabel="measured over printed, difference in %")
        axes.legend(loc="lower left", title="grey band: ±3 %")
        return to_picture(figure, f"Differences of measured costs. {fit_sentence(costs)}")


def _labels(costs: pd.DataFrame) -> Sequence[str]:
    return [
        f"{cell.row}, table {int(str(cell.item).removeprefix('table-'))}"
        for cell in costs.itertuples(index=False)
    ]
