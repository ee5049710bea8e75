"""Former names of `store` and `tables`."""

from effspinenet_lib.results.store import config_hash as run_key
from effspinenet_lib.results.tables import current_commit, today

__all__ = ["current_commit", "run_key", "today"]
