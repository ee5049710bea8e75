"""Data: ShapeScenes, COCO, VOC and ImageNet folders, augmentation and loaders.

Names are loaded when they are first used: the loaders need torch, the data sets do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effspinenet_lib.data.augment import Augmentation
    from effspinenet_lib.data.config import DataConfig, detect_format, export_coco, open_dataset
    from effspinenet_lib.data.dataset import (
        Annotations,
        Category,
        Dataset,
        ObjectCrops,
        Sample,
        classes_of,
        require_same_categories,
    )
    from effspinenet_lib.data.loader import Batch, evaluation_loader, training_loader
    from effspinenet_lib.data.shapescenes import ShapeScenes

_NAMES = {
    "augment": ("Augmentation",),
    "config": ("DataConfig", "detect_format", "export_coco", "open_dataset"),
    "dataset": ("Annotations", "Category", "Dataset", "ObjectCrops", "Sample", "classes_of",
                "require_same_categories"),
    "loader": ("Batch", "evaluation_loader", "training_loader"),
    "shapescenes": ("ShapeScenes",),
}  # fmt: skip
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

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
    "require_same_categories",
    "training_loader",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
