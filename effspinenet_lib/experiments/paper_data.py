"""The paper's data in a user's folder: COCO 2017, ImageNet, PASCAL VOC 2012 with SBD."""

from __future__ import annotations

from pathlib import Path

from effspinenet_lib.data import DataConfig, detect_format
from effspinenet_lib.data.config import UNKNOWN_ROOT
from effspinenet_lib.errors import DataError

# Format of a folder -> names that its parts to train and to evaluate on have, the paper's first.
SPLITS: dict[str, tuple[tuple[str, str], ...]] = {
    "coco": (("train2017", "val2017"), ("train", "val")),
    "imagenet": (("train", "val"),),
    "voc_segmentation": (("train_aug", "val"), ("train", "val")),
    "voc": (("train", "val"),),
}
# Task -> format of the data that the paper trains it on.
FORMATS: dict[str, str] = {
    "detection": "coco",
    "instances": "coco",
    "classification": "imagenet",
    "segmentation": "voc_segmentation",
}
# Format -> where the list of a part lies in the folder.
_LISTS: dict[str, str] = {
    "coco": "annotations/instances_{}.json",
    "imagenet": "{}",
    "voc_segmentation": "ImageSets/Segmentation/{}.txt",
    "voc": "ImageSets/Main/{}.txt",
}


def paper_data(root: Path | None, task: str) -> DataConfig:
    """The data of a task in a folder, in any layout that serves it, its parts found by name.

    Args:
        root: the folder; None takes the paper's layout without looking, to plan a run.
        task: of the model.

    Raises:
        DataError: the folder has no known layout, or none of the known parts.
    """
    layout = FORMATS[task] if root is None else detect_format(root, task)
    splits = SPLITS[layout]
    if root is None:
        return DataConfig(layout, UNKNOWN_ROOT, *splits[0])
    for names in splits:
        if all((root / _LISTS[layout].format(name)).exists() for name in names):
            return DataConfig(layout, str(root.resolve()), *names)
    wanted = " nor ".join(f"{train}/{evaluate}" for train, evaluate in splits)
    lists = _LISTS[layout].format("<part>")
    raise DataError(f"{root}: has no parts {wanted} ({lists}); name them so")
