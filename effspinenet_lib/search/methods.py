"""How samples are chosen: what every method does, random search and regularized evolution."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

Choices = tuple[int, ...]  # the index chosen at each position

# Regularized evolution (arXiv 1802.01548) had 100 and 25 for 20,000 samples; ours is the same
# shape for the tens of a small budget.
POPULATION = 16
TOURNAMENT = 4
LEAST_POPULATION = 2  # our choice: of one there is no parent to choose


class Method(ABC):
    """Chooses samples and learns what they gave.

    Args:
        positions: choices a sample makes.
        choices: to choose from at each.
        seed: of the samples.
    """

    def __init__(self, positions: int, choices: int, seed: int) -> None:
        self.positions, self.choices, self.seed = positions, choices, seed
        self.generator = torch.Generator().manual_seed(seed)

    @abstractmethod
    def ask(self, count: int) -> list[Choices]:
        """Choose samples."""

    @abstractmethod
    def tell(self, samples: Sequence[Choices], rewards: Sequence[float]) -> None:
        """Learn what samples gave; those that gave nothing are left out."""

    def entropy(self) -> float:
        """Entropy in nats of a choice, the mean over positions; NaN where there is no policy."""
        return math.nan

    def state(self) -> dict[str, Any]:
        """Everything that the next samples depend on, as tensors and plain values."""
        return {"generator": self.generator.get_state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.generator.set_state(state["generator"])

    def _uniform(self, count: int) -> list[Choices]:
        shape = (count, self.positions)
        drawn = torch.randint(self.choices, shape, generator=self.generator).tolist()
        return [tuple(row) for row in drawn]

    def _below(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self.generator))


class RandomSearch(Method):
    """Chooses uniformly."""

    def ask(self, count: int) -> list[Choices]:
        """Choose samples."""
        return self._uniform(count)

    def tell(self, samples: Sequence[Choices], rewards: Sequence[float]) -> None:
        """Learn nothing."""

    def entropy(self) -> float:
        """Entropy of a uniform choice."""
        return math.log(self.choices)


class Evolution(Method):
    """Regularized evolution: mutate the best of a few; the oldest of the population dies.

    Args:
        positions: choices a sample makes.
        choices: to choose from at each.
        seed: of the samples.
        size: of the population, see `population_size`.
    """

    def __init__(self, positions: int, choices: int, seed: int, size: int = POPULATION) -> None:
        super().__init__(positions, choices, seed)
        self.size = size
        self.population: list[tuple[Choices, float]] = []

    def ask(self, count: int) -> list[Choices]:
        """Choose samples: at random until the population is full, then children."""
        if len(self.population) < self.size:
            return self._uniform(count)
        return [self._child() for _ in range(count)]

    def tell(self, samples: Sequence[Choices], rewards: Sequence[float]) -> None:
        """Let samples join the population."""
        self.population += zip(samples, rewards, strict=True)
        self.population = self.population[-self.size :]

    def _child(self) -> Choices:
        """The best of a tournament with one choice changed to another."""
        drawn = torch.randperm(len(self.population), generator=self.generator)[:TOURNAMENT]
        parent, _ = max((self.population[index] for index in drawn.tolist()), key=_reward)
        place = self._below(self.positions)
        shift = 1 + self._below(self.choices - 1)
        changed = (parent[place] + shift) % self.choices
        return (*parent[:place], changed, *parent[place + 1 :])

    def state(self) -> dict[str, Any]:
        """Everything that the next samples depend on."""
        return {**super().state(), "population": self.population}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        super().load(state)
        self.population = state["population"]


def population_size(trials: int) -> int:
    """Evolution's population for a search of `trials`: half of them at most, so that it evolves."""
    return max(LEAST_POPULATION, min(POPULATION, trials // 2))


def _reward(member: tuple[Choices, float]) -> float:
    return member[1]
