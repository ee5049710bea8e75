"""A trained model as a program that runs without this library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effspinenet_lib.files import atomic_write
from effspinenet_lib.models.base import TaskModel


class _Network(nn.Module):
    """What is exported: the layers, without decoding."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model.network(images)


def export_model(model: TaskModel, image_size: int, path: str | os.PathLike[str]) -> Path:
    """Write the network of a model with `torch.export`, for images [1, 3, S, S].

    `torch.export.load(path).module()` maps normalised images to what the model's `network`
    gives.

    Args:
        model: of any task; on the CPU.
        image_size: S, in pixels.
        path: the file to write; `.pt2` is torch's ending.

    Raises:
        UserError: the image size is too small, or the file cannot be written.
    """
    images = torch.zeros(1, 3, image_size, image_size)
    training = model.training
    network = _Network(model).eval()
    try:
        with torch.no_grad():
            model.network(images)  # refuses a wrong size, and makes what it keeps for this one
            program = torch.export.export(network, (images,))
    finally:
        model.train(training)
    with atomic_write(path, "wb") as handle:
        torch.export.save(program, handle)
    return Path(path)
