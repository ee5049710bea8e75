"""Data: ShapeScenes, COCO, VOC, YOLO and ImageNet folders.

What needs torch, `augment` and `loader`, is imported by its own name.
"""

from __future__ import annotations

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

__all__ = [
    "Annotations",
    "Category",
    "DataConfig",
    "Dataset",
    "ObjectCrops",
    "Sample",
    "ShapeScenes",
    "classes_of",
    "detect_format",
    "export_coco",
    "open_dataset",
]
