"""The paper's specification tables and claims, checked against the library's specifications."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from effspinenet_lib.models.specs import (
    EFFICIENTNET_B0,
    MODELS,
    SCALES,
    BackboneSpec,
    block_multi_adds,
    level_side,
)

NOT_PRINTED = "–"
DIFFERENT = "≠"
REPEATS = "repeats_"  # the metric of block 1 is repeats_01
PERCENT = 100.0
DIM_TOLERANCE = 1.0  # channels: an average that Table 1 would print as the next whole number
# Section 5.1.4 names these groups of levels; level 1 is in neither.
LEVEL_GROUPS = {"L2": (2,), "L3 to L5": (3, 4, 5), "L6 and L7": (6, 7)}

Cells = Mapping[tuple[str, str], float]


def table_01_cells() -> dict[tuple[str, str], float]:
    """Table 1 by the library's specifications: (row, metric) to value."""
    columns = {
        "EfficientNet-B0": EFFICIENTNET_B0,
        "SP-EfficientNet-B0": _block_rows(MODELS["sp_efficientnet_b0"].backbone),
        "Eff-SpineNet-D0": _block_rows(MODELS["eff_spinenet_d0"].backbone),
    }
    metrics = ("level", "kernel", "feature_dim")
    return {
        (f"{model} block {index}", metric): value
        for model, blocks in columns.items()
        for index, block in enumerate(blocks, start=1)
        for metric, value in zip(metrics, block, strict=True)
    }


def _block_rows(spec: BackboneSpec) -> list[tuple[int, int, int]]:
    return [(block.level, block.kernel, block.feature_dim) for block in spec.blocks]


def table_02_cells() -> dict[tuple[str, str], float]:
    """Table 2 by the library's scales: (row, metric) to value."""
    cells: dict[tuple[str, str], float] = {}
    for scale in SCALES.values():
        cells[scale.id, "input_size"] = scale.input_size
        cells[scale.id, "feature_multiplier"] = scale.feature_multiplier
        cells[scale.id, "head_dim"] = scale.head_dim
        cells[scale.id, "head_layers"] = scale.head_layers
        for index, repeats in enumerate(scale.repeats, start=1):
            cells[scale.id, f"repeats_{index:02d}"] = repeats
    return cells


def compare_cells(paper: pd.DataFrame, library: Cells) -> pd.DataFrame:
    """Set every cell of a printed table beside the library's value for it.

    Returns:
        Columns `row`, `metric`, `paper`, `library` (NaN where there is no number) and `agrees`;
        a cell that the paper leaves empty, or that the print lost, is no disagreement.
    """
    keys = zip(paper["row"], paper["metric"], strict=True)
    printed = dict(zip(keys, paper["value"].astype(float), strict=True))
    cells = pd.DataFrame(dict.fromkeys((*printed, *library)).keys(), columns=["row", "metric"])
    pairs = list(zip(cells["row"], cells["metric"], strict=True))
    cells["paper"] = [printed.get(pair, float("nan")) for pair in pairs]
    cells["library"] = [library.get(pair, float("nan")) for pair in pairs]
    cells["agrees"] = cells["paper"].isna() | (cells["paper"] == cells["library"])
    return cells


def agreement(cells: pd.DataFrame) -> str:
    """Say how many printed cells the library's values match."""
    printed = cells[cells["paper"].notna()]
    wrong = printed[~printed["agrees"]]
    counts = f"{len(printed) - len(wrong)} agree, {len(wrong)} differ"
    names = ", ".join(f"{row} {metric}" for row, metric in wrong[["row", "metric"]].to_numpy())
    return f"Of {len(printed)} printed cells {counts}{': ' if names else ''}{names}."


def cell_text(paper: float, library: float) -> str:
    """Both values of a cell as text: "24 / 24", or with an unequal sign where they differ."""
    sign = "/" if math.isnan(paper) or paper == library else DIFFERENT
    return f"{_number(paper)} {sign} {_number(library)}"


def table_01_frame(cells: pd.DataFrame) -> pd.DataFrame:
    """Compared cells of Table 1 in its printed layout, one row a block."""
    columns: dict[tuple[str, str], dict[int, str]] = {}
    for cell in _cells(cells):
        model, _, block = cell.row.rpartition(" block ")
        column = columns.setdefault((model, cell.metric.replace("_", " ")), {})
        column[int(block)] = cell_text(cell.paper, cell.library)
    return pd.DataFrame(columns).rename_axis("block id")


def table_02_frame(cells: pd.DataFrame) -> pd.DataFrame:
    """Compared cells of Table 2 without the repeats, one row a scale."""
    rows: dict[str, dict[str, str]] = {}
    for cell in _cells(cells):
        if not cell.metric.startswith(REPEATS):
            row = rows.setdefault(cell.row, {})
            row[cell.metric.replace("_", " ")] = cell_text(cell.paper, cell.library)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model id")


def table_02_repeats(cells: pd.DataFrame) -> pd.DataFrame:
    """The repeats of Table 2, block by block: a row for the paper and one for the library."""
    rows: dict[str, dict[str, str]] = {}
    for cell in _cells(cells):
        if cell.metric.startswith(REPEATS):
            block = str(int(cell.metric.removeprefix(REPEATS)))
            rows.setdefault(f"{cell.row}, paper", {})[block] = _number(cell.paper)
            rows.setdefault(f"{cell.row}, library", {})[block] = _number(cell.library)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("block")


def dimensions_frame(backbones: Mapping[str, BackboneSpec]) -> pd.DataFrame:
    """Feature dimensions of the blocks, one row a block and one column a backbone."""
    columns = {name: [block.feature_dim for block in b.blocks] for name, b in backbones.items()}
    first = next(iter(backbones.values()))
    names = [f"{block.index}, L{block.level}" for block in first.blocks]
    return pd.DataFrame(columns, index=pd.Index(names, name="block, level"))


def _cells(cells: pd.DataFrame) -> Iterator[Any]:
    return cells.itertuples(index=False)


def _number(value: float) -> str:
    return NOT_PRINTED if math.isnan(value) else f"{value:g}"


def level_averages() -> pd.DataFrame:
    """Check of section 3.1: each level's dimension is the mean over EfficientNet-B0's blocks.

    Levels 6 and 7, which EfficientNet-B0 lacks, are to have the dimension of level 5.

    Returns:
        Index: level. Columns: the blocks averaged, their mean, the dimension in Table 1 and
        whether the statement holds.
    """
    printed = {
        block.level: block.feature_dim for block in MODELS["sp_efficientnet_b0"].backbone.blocks
    }
    rows = {}
    for level, dim in sorted(printed.items()):
        dims = [own for own_level, _, own in EFFICIENTNET_B0 if own_level == level]
        expected = sum(dims) / len(dims) if dims else float(printed[5])
        rows[f"L{level}"] = {
            "EfficientNet-B0 dimensions": ", ".join(map(str, dims)) or "none, as L5",
            "stated rule gives": f"{expected:g}",
            "Table 1 prints": str(dim),
            "holds": "yes" if abs(expected - dim) < DIM_TOLERANCE else "no",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("level")


def block_parameters(spec: BackboneSpec) -> tuple[float, ...]:
    """Weights of each block by Equation 2, without the feature map's sides, repeats included."""
    side = 2 ** max(block.level for block in spec.blocks)
    costs = block_multi_adds(spec, side)
    return tuple(
        cost / level_side(side, block.level) ** 2
        for cost, block in zip(costs, spec.blocks, strict=True)
    )


def level_shift(specs: Mapping[str, BackboneSpec], input_size: int) -> pd.DataFrame:
    """Parameters and Multi-Adds of the blocks by group of levels (section 5.1.4).

    Args:
        specs: the distribution before and the one after learning, by printed name.
        input_size: side of the square input image in pixels.

    Returns:
        Index: group of levels. Columns: (quantity, name) and (quantity, "change").
    """
    quantities = {
        "parameters (k)": {
            name: _by_group(s, block_parameters(s), 1e3) for name, s in specs.items()
        },
        "Multi-Adds (M)": {
            name: _by_group(s, block_multi_adds(s, input_size), 1e6) for name, s in specs.items()
        },
    }
    columns = {}
    for quantity, values in quantities.items():
        before, after = values.values()
        for name, groups in values.items():
            columns[quantity, name] = [f"{value:.0f}" for value in groups.values()]
        columns[quantity, "change"] = [f"{after[group] - before[group]:+.0f}" for group in before]
    return pd.DataFrame(columns, index=pd.Index(list(before), name="levels"))


def shift_verdict(before: BackboneSpec, after: BackboneSpec) -> str:
    """Say whether parameters moved from L2 and L6 to L7 into L3 to L5, as section 5.1.4 says."""
    totals = [_by_group(spec, block_parameters(spec), 1e3) for spec in (before, after)]
    change = {group: totals[1][group] - totals[0][group] for group in LEVEL_GROUPS}
    holds = change["L2"] < 0 < change["L3 to L5"] and change["L6 and L7"] < 0
    listed = ", ".join(f"{group} {value:+.0f} k" for group, value in change.items())
    return (
        f"Change of block parameters: {listed}. The claim {'holds' if holds else 'does not hold'}."
    )


def _by_group(spec: BackboneSpec, values: Sequence[float], unit: float) -> dict[str, float]:
    def total(levels: tuple[int, ...]) -> Iterator[float]:
        return (v for v, block in zip(values, spec.blocks, strict=True) if block.level in levels)

    groups = {"L1": (1,), **LEVEL_GROUPS, "all": tuple(range(1, 8))}
    return {group: sum(total(levels)) / unit for group, levels in groups.items()}
