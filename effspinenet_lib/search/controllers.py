"""How samples are chosen: PPO, REINFORCE, random search and regularized evolution.

PPO and REINFORCE train a controller, as the searches that section 5.1.1 follows: a recurrent policy
(arXiv 1611.01578) chooses one beta a block and learns from the reward of its samples by proximal
policy optimisation (arXiv 1707.06347), as in MnasNet.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

Choices = tuple[int, ...]  # the index chosen at each position

# Regularized evolution (arXiv 1802.01548) had 100 and 25 for 20,000 samples; ours is the same
# shape for the tens of a small budget.
POPULATION = 16
TOURNAMENT = 4
MIN_POPULATION = 2  # our choice: with one there is no parent to choose


class Controller(ABC):
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
        """Restore what `state` gave."""
        self.generator.set_state(state["generator"])

    def _uniform(self, count: int) -> list[Choices]:
        shape = (count, self.positions)
        drawn = torch.randint(self.choices, shape, generator=self.generator).tolist()
        return [tuple(row) for row in drawn]

    def _below(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self.generator))


class RandomSearch(Controller):
    """Chooses uniformly."""

    def ask(self, count: int) -> list[Choices]:
        """Choose samples."""
        return self._uniform(count)

    def tell(self, samples: Sequence[Choices], rewards: Sequence[float]) -> None:
        """Learn nothing."""

    def entropy(self) -> float:
        """Entropy of a uniform choice."""
        return math.log(self.choices)


class Evolution(Controller):
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
        """Restore what `state` gave."""
        super().load(state)
        self.population = state["population"]


def population_size(trials: int) -> int:
    """Evolution's population for a search of `trials`: half of them at most, so that it evolves."""
    return max(MIN_POPULATION, min(POPULATION, trials // 2))


def _reward(member: tuple[Choices, float]) -> float:
    return member[1]


_MIN_SPREAD = 1e-9  # our choice: a spread below it, relative to the rewards, is rounding
_ENTROPY_SAMPLES = 64  # our choice: the estimate varies by under a hundredth


class _Policy(nn.Module):
    """Chooses position by position, each on what was chosen before."""

    def __init__(self, positions: int, choices: int, hidden: int) -> None:
        super().__init__()
        self.positions, self.choices = positions, choices
        self.chosen = nn.Embedding(choices + 1, hidden)  # the last: nothing chosen yet
        self.cell = nn.LSTMCell(hidden, hidden)
        heads = [nn.Linear(hidden, choices) for _ in range(positions)]
        for head in heads:  # the first samples are uniform
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw [count, positions] choices."""
        given = torch.full((count,), self.choices)
        state: tuple[Tensor, Tensor] | None = None
        drawn = []
        for head in self.heads:
            state = self.cell(self.chosen(given), state)
            probabilities = head(state[0]).softmax(dim=1)
            given = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            drawn.append(given)
        return torch.stack(drawn, dim=1)

    def distribution(self, chosen: Tensor) -> Categorical:
        """The distributions that `chosen` [N, positions] were drawn from, one a choice."""
        given = torch.cat([chosen.new_full((len(chosen), 1), self.choices), chosen[:, :-1]], dim=1)
        state: tuple[Tensor, Tensor] | None = None
        logits = []
        for position, head in enumerate(self.heads):
            state = self.cell(self.chosen(given[:, position]), state)
            logits.append(head(state[0]))
        return Categorical(logits=torch.stack(logits, dim=1))


class PolicySearch(Controller):
    """Samples from a policy and improves it on the rewards.

    Args:
        positions: choices a sample makes.
        choices: to choose from at each.
        seed: of the policy's weights and of the samples.
        epochs: gradient steps on a batch of samples.
    """

    clip = 0.2  # how far the probability of a choice may move on a batch: arXiv 1707.06347, 6.1
    # Our choices: a small policy that learns from tens of batches, where the papers had thousands;
    # tried on synthetic rewards (tests/test_search.py).
    hidden = 64  # width of the LSTM
    learning_rate = 0.006  # of Adam
    entropy_weight = 0.05  # keeps the policy from settling early
    baseline_decay = 0.8  # share of the old value in the moving averages of reward and spread
    clip_gradient_norm = 1.0

    def __init__(self, positions: int, choices: int, seed: int, epochs: int) -> None:
        super().__init__(positions, choices, seed)
        self.epochs = epochs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = _Policy(positions, choices, self.hidden)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), self.learning_rate)
        self.baseline: tuple[float, float] | None = None  # mean and spread of the rewards

    @torch.no_grad()
    def ask(self, count: int) -> list[Choices]:
        """Choose samples."""
        drawn = self.policy.sample(count, self.generator).tolist()
        return [tuple(row) for row in drawn]

    def tell(self, samples: Sequence[Choices], rewards: Sequence[float]) -> None:
        """Improve the policy on what samples gave; a single step of too few is left out."""
        if not samples:
            return
        chosen, gained = torch.tensor(samples), torch.tensor(rewards, dtype=torch.float64)
        advantages = self._advantages(gained).float()[:, None]
        with torch.no_grad():
            before = self.policy.distribution(chosen).log_prob(chosen)
        for _ in range(self.epochs):
            now = self.policy.distribution(chosen)
            ratio = (now.log_prob(chosen) - before).exp()
            gain = torch.minimum(
                ratio * advantages, ratio.clamp(1 - self.clip, 1 + self.clip) * advantages
            ).mean()
            loss = -gain - self.entropy_weight * now.entropy().mean()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), self.clip_gradient_norm)
            self.optimizer.step()

    def _advantages(self, gained: Tensor) -> Tensor:
        """Rewards, float64 [N], less their moving mean, over their moving spread.

        Rewards that have all been equal give 0: their mean is theirs to the last digit.
        """
        mean = float(gained[0] + (gained - gained[0]).mean())
        spread = float((gained - mean).square().mean().sqrt())
        if self.baseline is not None:
            moved = 1 - self.baseline_decay
            mean = self.baseline[0] + moved * (mean - self.baseline[0])
            spread = self.baseline[1] + moved * (spread - self.baseline[1])
        self.baseline = mean, spread
        least = _MIN_SPREAD * max(abs(mean), float(gained.abs().max()))
        return (gained - mean) / (max(spread, least) or 1.0)  # 0 where all of them are 0

    @torch.no_grad()
    def entropy(self) -> float:
        """Entropy of a choice in nats, the mean over a sample's; ln(choices) where uniform."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = self.policy.sample(_ENTROPY_SAMPLES, generator)
        return float(self.policy.distribution(drawn).entropy().mean())

    def state(self) -> dict[str, Any]:
        """Everything that the next samples depend on."""
        return {
            **super().state(),
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "baseline": self.baseline,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        super().load(state)
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.baseline = state["baseline"]


# (positions, choices, seed, trials of the profile's search) -> controller. The number of trials
# that a user asks for is not among them, so a search that is extended continues as it would have.
CONTROLLERS: dict[str, Callable[[int, int, int, int], Controller]] = {
    # our choice: with 5 or 10 epochs it settles too early on small batches
    "ppo": lambda positions, choices, seed, _: PolicySearch(positions, choices, seed, epochs=3),
    # one step a batch: the probabilities have not moved, so PPO's gradient is REINFORCE's
    "reinforce": lambda positions, choices, seed, _: PolicySearch(
        positions, choices, seed, epochs=1
    ),
    "random": lambda positions, choices, seed, _: RandomSearch(positions, choices, seed),
    "evolution": lambda positions, choices, seed, trials: Evolution(
        positions, choices, seed, population_size(trials)
    ),
}
