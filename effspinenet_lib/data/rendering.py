"""Integer rasterisation of textured shapes.

Everything is int16 or int32 arithmetic on a raw PCG64 stream, so that the same seed gives the
same bytes on every machine and with every NumPy: NumPy promises that the raw stream stays the
same, and promises it neither for `Generator`'s methods nor for floating-point functions.

Lengths and positions are in subpixels, `SUBPIXELS` to a pixel. A shape is a function from the
object's own coordinates to an inside distance (positive inside); coverage follows from the
distance, which gives antialiased edges without supersampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SUBPIXELS = 64
ANGLES = 256
_TRIG_BITS = 14
# Rounded to 1/16384, far coarser than the last-bit differences between maths libraries.
_SINE = [round(math.sin(2 * math.pi * k / ANGLES) * (1 << _TRIG_BITS)) for k in range(ANGLES)]
_RATIO_BITS = 10

IntArray = NDArray[np.int32]
Distance = Callable[[IntArray, IntArray, int], IntArray]
Mix = Callable[[IntArray, IntArray, int], IntArray]


class Draws:
    """Random integers from the raw PCG64 stream of the entropy words given."""

    _BLOCK = 256

    def __init__(self, *entropy: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(entropy))
        self._block: list[int] = []

    def integer(self, low: int, high: int) -> int:
        """Draw an integer from `low` to `high`, both included."""
        if not self._block:
            self._block = self._bits.random_raw(self._BLOCK).tolist()
        return low + ((self._block.pop() >> 32) * (high - low + 1) >> 32)

    def chance(self, permille: int) -> bool:
        """Draw true in `permille` of 1,000 cases."""
        return self.integer(0, 999) < permille

    def choice(self, count: int, weights: Sequence[int]) -> int:
        """Draw an index below `count` with the integer weights given."""
        point = self.integer(0, sum(weights[:count]) - 1)
        for index in range(count):
            point -= weights[index]
            if point < 0:
                return index
        raise AssertionError("the weights sum to more than any point drawn")

    def octets(self, count: int) -> NDArray[np.uint8]:
        """Draw `count` uniform bytes."""
        words = self._bits.random_raw(-(-count // 8)).astype("<u8")
        return words.view(np.uint8)[:count]


def cosine(angle: int) -> int:
    """Cosine of `angle` (in 1/256 turns), in 1/16384."""
    return _SINE[(angle + ANGLES // 4) % ANGLES]


def sine(angle: int) -> int:
    """Sine of `angle` (in 1/256 turns), in 1/16384."""
    return _SINE[angle % ANGLES]


def _ratio(value: float) -> int:
    return round(value * (1 << _RATIO_BITS))


def _scaled(value: int, ratio: int) -> int:
    return value * ratio >> _RATIO_BITS


# Inside distances. `r` is the shape's radius (half side, circumradius) in subpixels.


def _disc(u: IntArray, v: IntArray, r: int) -> IntArray:
    return (r * r - u * u - v * v) // (2 * r)


def _square(u: IntArray, v: IntArray, r: int) -> IntArray:
    return r - np.maximum(np.abs(u), np.abs(v))


def _half_planes(u: IntArray, v: IntArray, inradius: int, turns: Sequence[int]) -> list[IntArray]:
    return [inradius - ((u * cosine(turn) + v * sine(turn)) >> _TRIG_BITS) for turn in turns]


_TRIANGLE_NORMALS = tuple(round(ANGLES * (0.25 + k / 3)) for k in range(3))
_STAR_NORMALS = tuple(round(ANGLES * (0.25 + k / 5)) for k in range(5))
_STAR_INRADIUS = _ratio(math.cos(2 * math.pi / 5))
_CROSS_ARM = _ratio(0.42)
_RING_HOLE = _ratio(0.5)
_BAR_WIDTH = _ratio(0.25)


def _triangle(u: IntArray, v: IntArray, r: int) -> IntArray:
    first, second, third = _half_planes(u, v, r // 2, _TRIANGLE_NORMALS)
    return np.minimum(np.minimum(first, second), third)


def _cross(u: IntArray, v: IntArray, r: int) -> IntArray:
    along, across = np.abs(u), np.abs(v)
    arm = _scaled(r, _CROSS_ARM)
    return np.maximum(
        np.minimum(r - along, arm - across),
        np.minimum(arm - along, r - across),
    )


def _ring(u: IntArray, v: IntArray, r: int) -> IntArray:
    return np.minimum(_disc(u, v, r), -_disc(u, v, _scaled(r, _RING_HOLE)))


def _star(u: IntArray, v: IntArray, r: int) -> IntArray:
    # A point of the pentagram lies outside at most one of its five lines.
    lowest = second = np.full(u.shape, np.iinfo(np.int32).max, np.int32)
    for plane in _half_planes(u, v, _scaled(r, _STAR_INRADIUS), _STAR_NORMALS):
        second = np.minimum(second, np.maximum(lowest, plane))
        lowest = np.minimum(lowest, plane)
    return second


def _bar(u: IntArray, v: IntArray, r: int) -> IntArray:
    return np.minimum(r - np.abs(u), _scaled(r, _BAR_WIDTH) - np.abs(v))


@dataclass(frozen=True)
class Shape:
    """A shape: its inside distance and two ratios (in 1/1024).

    `radius` is the radius of the shape of area 1, `extent` its circumradius over its radius.
    """

    distance: Distance
    radius: int
    extent: int


SHAPES: dict[str, Shape] = {
    "disc": Shape(_disc, _ratio(1 / math.sqrt(math.pi)), _ratio(1)),
    "square": Shape(_square, _ratio(0.5), _ratio(math.sqrt(2))),
    "triangle": Shape(_triangle, _ratio(1 / math.sqrt(0.75 * math.sqrt(3))), _ratio(1)),
    "cross": Shape(_cross, _ratio(0.5 / math.sqrt(1 - 0.58**2)), _ratio(math.sqrt(1 + 0.42**2))),
    "ring": Shape(_ring, _ratio(1 / math.sqrt(0.75 * math.pi)), _ratio(1)),
    "star": Shape(_star, _ratio(1 / math.sqrt(1.1226)), _ratio(1)),
    "bar": Shape(_bar, _ratio(1), _ratio(math.sqrt(1 + 0.25**2))),
}


# Textures: how much of the second colour, 0 to SUBPIXELS. `p` is the period in subpixels.


def _ramp(distance: IntArray) -> IntArray:
    return np.clip(distance + SUBPIXELS // 2, 0, SUBPIXELS)


def _fold(u: IntArray, p: int) -> IntArray:
    # the distance to the nearest multiple of p: a dot in the middle, which no shape cuts off
    return np.abs((u + p // 2) % p - p // 2)


def _striped(u: IntArray, v: IntArray, p: int) -> IntArray:
    del v
    return _ramp(_fold(u, p) - p // 4)


def _checked(u: IntArray, v: IntArray, p: int) -> IntArray:
    columns, rows = _striped(u, v, p), _striped(v, u, p)
    return (columns * (SUBPIXELS - rows) + rows * (SUBPIXELS - columns)) // SUBPIXELS


def _dotted(u: IntArray, v: IntArray, p: int) -> IntArray:
    return _ramp(_disc(_fold(u, p), _fold(v, p), 5 * p // 16))


TEXTURES: dict[str, Mix | None] = {
    "plain": None,
    "striped": _striped,
    "checked": _checked,
    "dotted": _dotted,
}

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Patch:
    """One textured shape, placed: `side` is the square root of its area; all in subpixels."""

    shape: str
    texture: str
    side: int
    x: int
    y: int
    angle: int
    texture_angle: int
    period: int
    colours: tuple[Colour, Colour]

    @property
    def radius(self) -> int:
        """The shape's own radius in subpixels."""
        return max(SUBPIXELS, _scaled(self.side, SHAPES[self.shape].radius))

    @property
    def reach(self) -> int:
        """The circumradius in subpixels."""
        return _scaled(self.radius, SHAPES[self.shape].extent) + 1


@dataclass(frozen=True)
class Drawn:
    """Where a patch came to lie: its window on the canvas and the pixels that it covers there."""

    rows: slice
    columns: slice
    mask: NDArray[np.bool_]


def _window(centre: int, reach: int, size: int) -> slice:
    low = max(0, (centre - reach) // SUBPIXELS - 1)
    return slice(min(low, size), min(size, max(low, (centre + reach) // SUBPIXELS + 2)))


def _rotated(dx: IntArray, dy: IntArray, angle: int) -> tuple[IntArray, IntArray]:
    cos, sin = cosine(angle), sine(angle)
    u = ((dx * cos)[None, :] + (dy * sin)[:, None]) >> _TRIG_BITS
    v = ((dy * cos)[:, None] - (dx * sin)[None, :]) >> _TRIG_BITS
    return u, v


def draw(canvas: NDArray[np.int16], patch: Patch) -> Drawn:
    """Blend `patch` into `canvas` [S, S, 3] in place; pixels outside the canvas are cut off."""
    size = canvas.shape[0]
    rows, columns = _window(patch.y, patch.reach, size), _window(patch.x, patch.reach, size)
    dx = np.arange(columns.start, columns.stop, dtype=np.int32) * SUBPIXELS
    dy = np.arange(rows.start, rows.stop, dtype=np.int32) * SUBPIXELS
    dx += SUBPIXELS // 2 - patch.x
    dy += SUBPIXELS // 2 - patch.y
    distance = SHAPES[patch.shape].distance(*_rotated(dx, dy, patch.angle), patch.radius)
    coverage = _ramp(distance).astype(np.int16)[:, :, None]

    paint = np.asarray(patch.colours[0], np.int16)
    mix = TEXTURES[patch.texture]
    if mix is not None:
        share = mix(*_rotated(dx, dy, patch.texture_angle), patch.period).astype(np.int16)
        change = np.asarray(patch.colours[1], np.int16) - paint
        paint = paint + (share[:, :, None] * change >> 6)
    window = canvas[rows, columns]
    # |colour - canvas| * SUBPIXELS <= 255 * 64 fits int16.
    window += (paint - window) * coverage + SUBPIXELS // 2 >> 6
    return Drawn(rows, columns, coverage[:, :, 0] * 2 >= SUBPIXELS)


def smooth_field(grid: NDArray[np.uint8], size: int) -> NDArray[np.int16]:
    """Interpolate a coarse grid [G, G, C] of bytes bilinearly to [size, size, C]."""
    cells, channels = grid.shape[0] - 1, grid.shape[2]
    weights = np.zeros((size, cells + 1), np.float32)
    position = np.arange(size) * (cells * SUBPIXELS // 4) // size
    low, part = position // (SUBPIXELS // 4), position % (SUBPIXELS // 4)
    weights[np.arange(size), low] = SUBPIXELS // 4 - part
    weights[np.arange(size), low + 1] = part
    # Products stay below 2**24, so that float32 sums are exact in any order.
    across = weights @ grid.astype(np.float32).transpose(2, 0, 1) @ weights.T
    whole = across.astype(np.int32) // (SUBPIXELS // 4) ** 2
    return np.ascontiguousarray(whole.transpose(1, 2, 0).astype(np.int16)).reshape(
        size, size, channels
    )
