"""The device of this process, and the processes that it shares a run with."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import is_torch_xla_available

from effspinenet_lib.training.devices import GPU, TPU


def present_accelerators() -> set[str]:
    """The kinds of accelerators that this machine has."""
    found = torch.accelerator.current_accelerator(check_available=True)
    present = set() if found is None else {GPU}
    return present | {TPU} if is_torch_xla_available() else present


def make_accelerator() -> Accelerator:
    """The device of this process and the others of its `torchrun`, `accelerate` or `launch`.

    In float32: the loop opens its own autocast, for accelerate fixes one precision for the whole
    process. Processes without an accelerator of their own share a run by gloo.
    """
    # of processes on processors accelerate takes only those for one run that ask for the processor
    return Accelerator(mixed_precision="no", cpu=not present_accelerators())
