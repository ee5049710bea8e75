"""Data: ShapeScenes, COCO and VOC folders, augmentation and loaders.

Names are loaded when they are first used: the loaders need torch, the data sets do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effspinenet_lib.data.augment import Augmentation
    from effspinenet_lib.data.crops import ObjectCrops
    from effspinenet_lib.data.dataset import (
        Category,
        Dataset,
        Sample,
        classes_of,
        require_same_categories,
    )
    from effspinenet_lib.data.loader import Batch, evaluation_loader, training_loader
    from effspinenet_lib.data.scenes import ShapeScenes
    from effspinenet_lib.data.source import (
        DataConfig,
        detect_format,
        export_coco,
        open_dataset,
    )

_HOMES = {
    "Augmentation": "augment",
    "Batch": "loader",
    "Category": "dataset",
    "DataConfig": "source",
    "Dataset": "dataset",
    "ObjectCrops": "crops",
    "Sample": "dataset",
    "ShapeScenes": "scenes",
    "classes_of": "dataset",
    "detect_format": "source",
    "evaluation_loader": "loader",
    "export_coco": "source",
    "open_dataset": "source",
    "require_same_categories": "dataset",
    "training_loader": "loader",
}

__all__ = [
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
