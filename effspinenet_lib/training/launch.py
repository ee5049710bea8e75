"""Several training processes from a notebook or a program, without a command line."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import notebook_launcher
from accelerate.utils import patch_environment
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from effspinenet_lib.errors import Preempted, UserError

# Our choice: how long a process that cannot go on without another one lets that one end first. The
# launcher ends it as soon as it sees that.
LINGER_SECONDS = 5.0


def launch(function: Callable[..., Any], processes: int, *arguments: Any) -> None:
    """Call `function(*arguments)` in several processes at once, one for each device.

    `train_run` called in them shares every batch and the evaluation among them, as under
    `torchrun`; without an accelerator each computes on one core. Nothing is returned: what a run
    gave is read from its folder (`run.read_result`). For example, in a notebook:

        launch(train_run, 4, config, "runs")
        result = read_result(Path("runs") / config.key)

    This notebook must not have used a device, or trained, before: the processes start as copies
    of its own (accelerate's `notebook_launcher`). On the TPUs of Colab and Kaggle all cores are
    used, whatever `processes` is.

    Raises:
        UserError: a process failed (its message), or the processes cannot be started.
    """
    if processes < 1:
        raise UserError(f"{processes} processes cannot be started; 1 is the least")
    try:
        with patch_environment(omp_num_threads=1):
            notebook_launcher(
                _call,
                (function, *arguments),
                num_processes=processes,
                rdzv_backend="c10d",  # finds a free port itself
                rdzv_endpoint="127.0.0.1:0",
            )
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        told: Any = failure.message
        said = told["message"] if isinstance(told, dict) else told
        raise UserError(f"process {rank} of {processes} failed: {said}") from error
    except ValueError as error:
        if "Accelerator" not in str(error):
            raise
        raise UserError(
            "this notebook has trained before, and its processes would share what that left "
            "behind; restart it and launch first"
        ) from error


def _call(function: Callable[..., Any], *arguments: Any) -> None:
    # a copy of a process that has computed on several threads hangs as soon as it does
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except Preempted:  # the launcher tells of the process that ends first: not of this one
        time.sleep(LINGER_SECONDS)
        raise
