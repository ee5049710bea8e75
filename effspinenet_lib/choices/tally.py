"""Adding up layers: Multi-Adds, parameters and what else is counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from effspinenet_lib.choices.settings import COUNTED, Choices

KERNEL = 3
# Operations an element: a norm multiplies and adds, swish multiplies its argument by its sigmoid,
# squeeze-and-excitation multiplies by the gate, sums and biases add. Two are one Multi-Add.
OPERATIONS = {"norm": 2, "activation": 1, "gate": 1, "sum": 1, "bias": 1}
OPERATIONS_A_MULTI_ADD = 2


class ModelCost(NamedTuple):
    """What one image costs, and how many numbers are trained."""

    multi_adds: int
    parameters: int


@dataclass
class Tally:
    """Adds up layers.

    Attributes:
        choices: what is counted, among others.
        multi_adds: of convolutions and linear layers.
        parameters: trained numbers.
        operations: single products and sums of the other layers that are counted.
    """

    choices: Choices
    multi_adds: int = 0
    parameters: int = 0
    operations: int = 0
    counted: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.counted = COUNTED[self.choices.counted]

    @property
    def cost(self) -> ModelCost:
        """The sum."""
        return ModelCost(
            self.multi_adds + self.operations // OPERATIONS_A_MULTI_ADD, self.parameters
        )

    def elements(self, kind: str, count: int) -> None:
        """Count what is done once an element."""
        if kind in self.counted:
            self.operations += OPERATIONS[kind] * count

    def norm(self, channels: int, area: int, copies: int = 1) -> None:
        """A norm, of which `copies` share the positions."""
        self.parameters += self.choices.norm_parameters * channels * copies
        self.elements("norm", channels * area)

    def bias(self, channels: int, area: int) -> None:
        """A bias."""
        self.parameters += channels
        self.elements("bias", channels * area)

    def weights(self, count: int, area: int) -> None:
        """Weights that are each used once a position."""
        self.parameters += count
        self.multi_adds += count * area

    def conv(
        self, inputs: int, outputs: int, area: int, norm: bool = True, active: bool = False
    ) -> None:
        """A 1x1 convolution with its norm and activation."""
        self.weights(inputs * outputs, area)
        if norm:
            self.norm(outputs, area)
        if active:
            self.elements("activation", outputs * area)

    def depthwise(self, channels: int, area: int, kernel: int = KERNEL) -> None:
        """A depthwise convolution with its norm."""
        self.weights(channels * kernel**2, area)
        self.norm(channels, area)
