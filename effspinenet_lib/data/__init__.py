"""Data: ShapeScenes, COCO, VOC, YOLO and ImageNet folders, augmentation and loaders.

What needs torch is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from effspinenet_lib.data.config import DataConfig, detect_format, export_coco, open_dataset
from effspinenet_lib.data.dataset import (
    Annotations,
    Category,
    Dataset,
    ObjectCrops,
    Sample,
    classes_of,
)
from effspinenet_lib.data.shapescenes import ShapeScenes

if TYPE_CHECKING:
    from effspinenet_lib.data.augment import Augmentation
    from effspinenet_lib.data.loader import Batch, evaluation_loader, training_loader

_NEED_TORCH = {
    "Augmentation": "augment",
    "Batch": "loader",
    "evaluation_loader": "loader",
    "training_loader": "loader",
}

__all__ = [
    "Annotations",
    "Augmentation",
    "Batch",
    "Category",
    "DataConfig",
    "Dataset",
    "ObjectCrops",
    "Sample",
    "ShapeScenes",
    "classes_of",
    "detect_format",
    "evaluation_loader",
    "export_coco",
    "open_dataset",
    "training_loader",
]


def __getattr__(name: str) -> Any:
    """Load a name that needs torch on first use."""
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
