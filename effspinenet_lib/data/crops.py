"""Cut-outs of single objects, for classification."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from effspinenet_lib.data.dataset import AnnotationsBuilder, Dataset, image_labels_truth

# Side of a cut-out over the long side of the object (our choice).
CROP_CONTEXT = 1.25


class ObjectCrops(Dataset):
    """Square cut-outs of the single objects of a data set, crowds left out.

    Each is an image with one box, that of its object; the label of the box is the image's. The
    side is `CROP_CONTEXT` times the long side of the object's box; what lies beyond the edge of
    the image repeats it.
    """

    def __init__(self, whole: Dataset) -> None:
        table = whole.annotations
        self._whole = whole
        self._rows = np.flatnonzero(~table.iscrowd)
        self._owners = np.searchsorted(table.starts, self._rows, side="right") - 1
        corners = table.boxes[self._rows]
        long_sides = (corners[:, 2:] - corners[:, :2]).max(axis=1, initial=0)
        self._sides = np.maximum(1, np.round(CROP_CONTEXT * long_sides)).astype(np.int64)
        centres = (corners[:, :2] + corners[:, 2:]) / 2
        self._corners = centres.astype(np.int64) - self._sides[:, None] // 2  # left, top
        builder = AnnotationsBuilder()
        for number, (row, owner) in enumerate(zip(self._rows, self._owners, strict=True), start=1):
            side = int(self._sides[number - 1])
            name = f"{table.file_name(owner)}#{row - table.starts[owner] + 1}"
            index = builder.add_image(number, name, side, side)
            left, top = self._corners[number - 1]
            x1, y1, x2, y2 = table.boxes[row].tolist()
            box = (x1 - left, y1 - top, x2 - left, y2 - top)
            builder.add_box(index, box, int(table.labels[row]), False, float(table.area[row]))
        super().__init__(f"objects of {whole.name}", whole.categories, builder.build())

    def load_image(self, index: int) -> NDArray[np.uint8]:
        """Cut-out `index` as uint8 [C, C, 3], RGB."""
        image = self._whole.load_image(int(self._owners[index]))
        left, top = self._corners[index]
        offsets = np.arange(self._sides[index])
        rows = np.clip(top + offsets, 0, image.shape[0] - 1)
        columns = np.clip(left + offsets, 0, image.shape[1] - 1)
        return image[rows[:, None], columns]

    def ground_truth(self) -> dict[str, Any]:
        """The annotations as a COCO dictionary: one box an image."""
        return image_labels_truth(self)
