"""Timing things in turn, so that a machine whose speed drifts still gives fair ratios.

Work of this process on one thread is timed by the CPU time that it took, which other
programs on the machine change little; work of several processes by the clock on the wall.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Clock = Callable[[], float]
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Ratio:
    """How two things compare: the medians in seconds, and the paired ratios' median and range.

    `ratio` is the peer's time over ours: above 1, ours is the faster one.
    """

    ours: float
    peer: float
    ratio: float
    lowest: float
    highest: float
    pairs: int


def time_in_turn(
    works: Mapping[str, Callable[[], object]], rounds: int, clock: Clock = time.process_time
) -> Times:
    """Seconds of each work in each of `rounds` rounds, after a round that is not counted."""
    times: Times = {name: [] for name in works}
    for counted in [False] + [True] * rounds:
        for name, work in works.items():
            start = clock()
            work()
            if counted:
                times[name].append(clock() - start)
    return times


def compare(ours: list[float], peer: list[float]) -> Ratio:
    """Compare times round by round."""
    ratios = [other / own for own, other in zip(ours, peer, strict=True)]
    return Ratio(
        statistics.median(ours),
        statistics.median(peer),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        len(ratios),
    )


def fastest(times: Times) -> str:
    """The name of the work with the lowest median."""
    return min(times, key=lambda name: statistics.median(times[name]))
