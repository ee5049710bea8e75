"""What one attempt at a trial is: the function that a worker process runs."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effspinenet_lib.training.devices import CPU

# (request) -> the columns of the record that a trial fills. A request is what `trial_request`
# gives: JSON types only. A `UserError` that is no `TrainingError` and an `OSError` end the search;
# whatever else it raises is the trial's failure.
Trial = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Device:
    """What each trial computes on.

    Attributes:
        kind: `cpu`, on one thread; or the accelerator of the worker process.
        workers: processes that load a trial's images; 0: none beside it.
    """

    kind: str = CPU
    workers: int = 0


ONE_THREAD = Device()


class TrialFailed(Exception):  # noqa: N818 - it says what happened
    """An attempt at a trial gave nothing; the message says why."""


def trial_request(
    config: Mapping[str, Any],
    runs_dir: str | os.PathLike[str],
    device: Device,
    micro_batch: int | None = None,
) -> dict[str, Any]:
    """What a worker needs: the run's configuration, and where and how it is trained."""
    return {
        "config": dict(config),
        "runs_dir": os.fspath(runs_dir),
        "device": asdict(device),
        "micro_batch": micro_batch,
    }


def run_trial(request: Mapping[str, Any]) -> dict[str, Any]:
    """Train and evaluate a sample, or go on where an attempt stopped.

    Returns:
        `AP` in percent, `seconds` of training and evaluation, and the `precision` computed in.

    Raises:
        TrialFailed: the AP is not defined.
        TrainingError: a loss is not finite, or memory is too small.
        UserError: as `training.run.train_run`.
    """
    import torch

    from effspinenet_lib.training.run import RunConfig, train_run

    device = Device(**request["device"])
    if device.kind == CPU:
        torch.set_num_threads(1)
    config = RunConfig.from_dict(request["config"])
    result = train_run(
        config,
        request["runs_dir"],
        workers=device.workers,
        progress=False,
        micro_batch=request["micro_batch"],
    )
    if not math.isfinite(result.metrics["AP"]):
        raise TrialFailed("no AP: there is nothing to find in the held-out images")
    return {
        "AP": result.metrics["AP"],
        "seconds": result.wall_seconds,
        "precision": result.record["precision"],
    }


def drop_run(run: str, runs_dir: str | os.PathLike[str]) -> None:
    """Remove the folder of a recorded trial."""
    shutil.rmtree(Path(runs_dir) / run, ignore_errors=True)
