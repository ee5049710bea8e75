"""Former names of schemas."""

from effspinenet_lib.results.tables import COST_UNITS

MEASUREMENT, RUN, COST = "measurement", "run", "cost"
SPACE, PARITY, EVALUATION = "space", "parity", "evaluation"

__all__ = ["COST", "COST_UNITS", "EVALUATION", "MEASUREMENT", "PARITY", "RUN", "SPACE"]
