"""What the paper leaves open, and how well each answer fits its cost columns.

`cost` counts a model in closed form under any `Choices`; `scan` compares the answers on every
printed #FLOPs and #Params cell of the scale-permuted models. `effspinenet results choices` writes
the comparison.
"""

from effspinenet_lib.choices.arithmetic import cost
from effspinenet_lib.choices.scan import fit, read_scan, scan, write_scan
from effspinenet_lib.choices.settings import (
    CHOICES,
    CLOSEST,
    LIBRARY,
    RELEASED,
    SETS,
    Choice,
    Choices,
)
from effspinenet_lib.choices.tally import ModelCost

__all__ = [
    "CHOICES",
    "CLOSEST",
    "LIBRARY",
    "RELEASED",
    "SETS",
    "Choice",
    "Choices",
    "ModelCost",
    "cost",
    "fit",
    "read_scan",
    "scan",
    "write_scan",
]
