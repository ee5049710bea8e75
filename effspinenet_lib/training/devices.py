"""Kinds of devices by name, and the variables that say on how many threads a process computes."""

from __future__ import annotations

AUTO = "auto"  # an accelerator where there is one
CPU, GPU, TPU = "cpu", "gpu", "tpu"  # GPU: the accelerator that torch finds, of any maker
ACCELERATORS = (AUTO, CPU, GPU, TPU)
XLA = "xla"  # torch's name of what computes on TPUs
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
