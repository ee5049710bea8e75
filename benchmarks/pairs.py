"""Timing two things in turn, so that a machine whose speed drifts still gives a fair ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

PAIRS = 5
WARMUPS = 1


@dataclass(frozen=True)
class Pair:
    """The median seconds of two things and the median of their paired ratios.

    `ratio` is the peer's time over ours: above 1, ours is the faster one.
    """

    name: str
    ours: float
    peer: float
    ratio: float
    lowest: float
    highest: float


def time_pair(
    name: str, ours: Callable[[], object], peer: Callable[[], object], pairs: int = PAIRS
) -> Pair:
    """Time `ours` and `peer` in turn, after a warmup of each."""
    for _ in range(WARMUPS):
        ours()
        peer()
    times = [(_seconds(ours), _seconds(peer)) for _ in range(pairs)]
    ratios = [other / own for own, other in times]
    return Pair(
        name,
        statistics.median(own for own, _ in times),
        statistics.median(other for _, other in times),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
