"""Former names of schemas."""

from effspinenet_lib.results.tables import COST_UNITS

MEASUREMENT, RUN, COST, CHOICE = "measurement", "run", "cost", "choice"
SPACE, PARITY, EVALUATION = "space", "parity", "evaluation"

__all__ = ["CHOICE", "COST", "COST_UNITS", "EVALUATION", "MEASUREMENT", "PARITY", "RUN", "SPACE"]
