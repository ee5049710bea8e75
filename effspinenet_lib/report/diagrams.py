"""Diagrams drawn from the specifications: the network's wiring and the resampling operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from numpy.typing import NDArray

from effspinenet_lib.models.specs import (
    MODELS,
    SPINENET_49,
    STEM_INPUT,
    BackboneSpec,
    BlockSpec,
    Wiring,
    level_side,
)
from effspinenet_lib.report.style import (
    FONT_SIZE,
    GROUND,
    INK,
    LEVEL_COLOURS,
    LEVEL_TEXT,
    Picture,
    drawing,
    new_figure,
    to_picture,
    words,
)

WIRING_WIDTH, WIRING_HEIGHT = 7.6, 4.6  # inches
STEM_LEVEL = 1
BOX_WIDTH, BOX_HEIGHT = 0.76, 0.58
LINE_OFFSET = 0.12  # of the two lines of a block's text from its middle
SMALLEST_BOX, LARGEST_BOX = 0.3, 0.62
OUTPUT_BORDER = 3.0
# A link's bow in levels, negative towards the higher resolution; the first that crosses the
# fewest boxes is drawn.
BENDS = (0.0, -0.3, 0.3, -0.5, 0.5, -0.7, 0.7, -0.9, 0.9)
CURVE_POINTS = 40
CLEARANCE = 0.06

Point = tuple[float, float]


@dataclass(frozen=True)
class Step:
    """One stage of a resampling: what was applied, and the features that it gives."""

    name: str
    level: int
    side: int
    channels: int


def resampling_steps(
    spec: BackboneSpec, source: int, target: int, input_size: int
) -> tuple[Step, ...]:
    """The features on the way from block `source` to the input of block `target` (Figure 2).

    As `models.layers.Resample` computes them: a norm follows each step but nearest neighbours, and
    an activation too unless it is the 1x1.

    Args:
        spec: the backbone, scaled or not.
        source: number of the block that gives the features.
        target: number of the block that takes them.
        input_size: side of the square input image in pixels.
    """
    start, end = spec.blocks[source - 1], spec.blocks[target - 1]
    level, channels = start.level, start.feature_dim

    def step(name: str) -> Step:
        return Step(name, level, level_side(input_size, level), channels)

    steps = [step(f"block {source}, L{level}")]
    if end.level < level:
        name, level = f"nearest ×{2 ** (level - end.level)}", end.level
        steps.append(step(name))
    elif end.level > level:
        level, channels = level + 1, 4 * channels
        steps.append(step("space-to-depth 2"))
        rest = end.level - level
        if rest:
            level, kernel = end.level, 3 if rest == 1 else 5
            steps.append(step(f"{kernel}×{kernel} depthwise /{2**rest}"))
    channels = end.feature_dim
    return (*steps, step("1×1 conv"))


def resampling(spec: BackboneSpec, source: int, target: int, input_size: int) -> Picture:
    """Draw how block `source` is brought to the resolution and dimension of block `target`."""
    steps = resampling_steps(spec, source, target, input_size)
    end = spec.blocks[target - 1]
    with drawing():
        figure = new_figure(1.4 * (len(steps) + 1), 1.8)
        axes = figure.add_subplot()
        largest = max(step.side for step in steps)
        for position, step in enumerate(steps):
            _draw_features(axes, position, step, largest)
        _arrow(axes, len(steps))
        label = f"fusion into\nblock {target}, L{end.level}"
        axes.text(len(steps) - 0.33, 0, label, ha="left", va="center")
        axes.set(xlim=(-0.55, len(steps) + 0.55), ylim=(-0.6, 0.6), aspect="equal")
        axes.axis("off")
        shapes = words(f"{step.name} ({step.side}×{step.side}×{step.channels})" for step in steps)
        alt = f"Resampling from block {source} to block {target}: {shapes}."
        return to_picture(figure, alt)


def connections(spec: BackboneSpec) -> list[tuple[int, int]]:
    """Every (source, target) pair of blocks that is resampled, in the order of the targets."""
    return [
        (source, block.index)
        for block in spec.blocks[spec.stem_blocks :]
        for source in block.inputs
    ]


def _draw_features(axes: Axes, position: int, step: Step, largest: int) -> None:
    size = SMALLEST_BOX + (LARGEST_BOX - SMALLEST_BOX) * (step.side / largest) ** 0.5
    axes.add_patch(_box(position, 0, size, size, fc=LEVEL_COLOURS[step.level], ec="none"))
    style: dict[str, Any] = {"ha": "center", "va": "center", "weight": "bold"}
    axes.text(position, 0, str(step.channels), color=LEVEL_TEXT[step.level], **style)
    axes.text(position, -0.38, f"{step.side} × {step.side}", ha="center", va="top")
    axes.text(position, 0.38, step.name, ha="center", va="bottom")
    if position:
        _arrow(axes, position)


def _arrow(axes: Axes, position: float) -> None:
    ends = (position - 0.65, 0), (position - 0.37, 0)
    axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=FONT_SIZE, color=INK))


def wirings() -> dict[str, Wiring]:
    """The wiring of every scale-permuted model, by its name."""
    scaled = {name: spec.backbone for name, spec in MODELS.items()}
    return {**scaled, "spinenet_49": SPINENET_49}


def wiring(spec: Wiring) -> Picture:
    """Draw the wiring of a scale-permuted network; see `wiring_figure`."""
    return to_picture(wiring_figure(spec), describe_wiring(spec))


def wiring_figure(spec: Wiring) -> Figure:
    """Draw a scale-permuted network: blocks in order, placed and coloured by level.

    A box holds the block's number and, below it, its channels; ×2 above it says that its
    layers repeat. Lines are the
    connections, drawn in the colour of the block that they come from; outputs have bold borders;
    a dashed line is an input that the rule for unconsumed blocks adds.
    """
    with drawing():
        figure = new_figure(WIRING_WIDTH, WIRING_HEIGHT)
        axes = figure.add_subplot()
        for block in spec.blocks:
            for source in block.inputs:
                _link(axes, spec, source, block.index, "solid")
            for source in spec.extra_inputs.get(block.index, ()):
                _link(axes, spec, source, block.index, "dashed")
        stem = _place(spec, STEM_INPUT)
        axes.add_patch(_box(*stem, BOX_WIDTH, BOX_HEIGHT, fc=GROUND, ec=INK))
        axes.text(*stem, "stem", ha="center", va="center", fontsize=FONT_SIZE - 3)
        for block in spec.blocks:
            _draw_block(axes, block)
        _level_axis(axes, spec)
        return figure


def describe_wiring(spec: Wiring) -> str:
    """The wiring in words, block by block."""
    dims = words(str(block.feature_dim) for block in spec.blocks)
    sentences = [f"Wiring of {len(spec.blocks)} blocks in order after the stem convolution."]
    for block in spec.blocks:
        sources = (*block.inputs, *spec.extra_inputs.get(block.index, ()))
        origin = "the stem" if sources == (STEM_INPUT,) else words(map(str, sources))
        role = f", output P{block.level}" if block.is_output else ""
        sentences.append(f"Block {block.index} at level {block.level} takes {origin}{role}.")
    sentences.append(f"Channels in order: {dims}.")
    return " ".join(sentences)


def _draw_block(axes: Axes, block: BlockSpec) -> None:
    axes.add_patch(
        _box(
            block.index,
            block.level,
            BOX_WIDTH,
            BOX_HEIGHT,
            facecolor=LEVEL_COLOURS[block.level],
            edgecolor=INK if block.is_output else "none",
            linewidth=OUTPUT_BORDER if block.is_output else 0,
            zorder=3,
        )
    )
    style: dict[str, Any] = {
        "ha": "center",
        "va": "center",
        "color": LEVEL_TEXT[block.level],
        "zorder": 4,
    }
    axes.text(block.index, block.level - LINE_OFFSET, str(block.index), weight="bold", **style)
    dim = str(block.feature_dim)
    axes.text(block.index, block.level + LINE_OFFSET, dim, fontsize=FONT_SIZE - 2, **style)
    if block.repeats > 1:
        above = block.level - 0.5 * BOX_HEIGHT - 0.03
        axes.text(
            block.index,
            above,
            f"×{block.repeats}",
            ha="center",
            va="bottom",
            fontsize=FONT_SIZE - 2,
        )
    if block.is_output:
        offset = 0.5 * BOX_HEIGHT + 0.1
        axes.text(
            block.index, block.level + offset, f"P{block.level}", ha="center", va="top", zorder=4
        )


def _link(axes: Axes, spec: Wiring, source: int, target: int, line: str) -> None:
    start, end = _place(spec, source), _place(spec, target)
    ends = (start[0] + BOX_WIDTH / 2, start[1]), (end[0] - BOX_WIDTH / 2, end[1])
    others = [_place(spec, block) for block in range(source + 1, target)]
    bend = min(BENDS, key=lambda bend: (_crossings(_curve(*ends, bend), others), abs(bend)))
    codes = [Path.MOVETO, Path.CURVE3, Path.CURVE3]
    axes.add_patch(
        FancyArrowPatch(
            path=Path([ends[0], _control(*ends, bend), ends[1]], codes),
            arrowstyle="-|>",
            mutation_scale=FONT_SIZE,
            color=LEVEL_COLOURS[round(start[1])],
            linestyle=line,
            linewidth=1.5,
            zorder=2,
        )
    )


def _place(spec: Wiring, block: int) -> Point:
    return (0.0, STEM_LEVEL) if block == STEM_INPUT else (block, spec.blocks[block - 1].level)


def _control(start: Point, end: Point, bend: float) -> Point:
    return (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 2 * bend


def _curve(start: Point, end: Point, bend: float) -> NDArray[np.float64]:
    """Points [CURVE_POINTS, 2] on the quadratic curve of a link."""
    t = np.linspace(0, 1, CURVE_POINTS)
    weights = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], axis=1)
    return weights @ np.array([start, _control(start, end, bend), end])


def _crossings(curve: NDArray[np.float64], boxes: list[Point]) -> int:
    reach = np.array([BOX_WIDTH, BOX_HEIGHT]) / 2 + CLEARANCE
    return sum(bool((np.abs(curve - box) < reach).all(axis=1).any()) for box in boxes)


def _level_axis(axes: Axes, spec: Wiring) -> None:
    levels = sorted({STEM_LEVEL, *(block.level for block in spec.blocks)})
    axes.set(xlim=(-0.6, len(spec.blocks) + 0.6), ylim=(max(levels) + 0.75, min(levels) - 0.6))
    axes.set_yticks(levels, [f"L{level}" for level in levels])
    axes.set_xticks([])
    axes.set_xlabel("blocks in the order in which they are computed →")
    axes.set_ylabel("level (resolution 1/2ᴸ)")
    axes.grid(visible=True, axis="y")
    axes.spines[["left", "bottom"]].set_visible(False)


def _box(x: float, y: float, width: float, height: float, **style: Any) -> FancyBboxPatch:
    corner = (x - width / 2, y - height / 2)
    return FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.1", **style)
