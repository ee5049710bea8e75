"""Instance masks kept as run lengths, and semantic maps painted from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from effspinenet_lib.data.store import Shared
from effspinenet_lib.errors import DataError

# Semantic labels: 0 is the background, then the categories in order; this one does not count.
SEMANTIC_IGNORE = 255


@dataclass(frozen=True)
class RunLengths(Shared):
    """The masks of all annotations of a data set, as COCO's compressed run lengths.

    Their order is that of `Annotations`: by image, then as they stand in the file. They lie in
    one array of bytes, so that worker processes share them.

    Attributes:
        ids: int64 [B], the annotations' ids.
        counts: uint8 [C], the run lengths of all, one after the other.
        starts: int64 [B + 1], where those of each begin.
    """

    ids: NDArray[np.int64]
    counts: NDArray[np.uint8]
    starts: NDArray[np.int64]

    def decode(self, rows: slice, height: int, width: int, origin: str) -> NDArray[np.bool_]:
        """The masks of rows of the annotations, [M, height, width].

        Raises:
            DataError: the run lengths do not fill the image; names the annotation of `origin`.
        """
        masks = np.zeros((rows.stop - rows.start, height, width), np.bool_)
        for mask, row in zip(masks, range(rows.start, rows.stop), strict=True):
            counts = self.counts[self.starts[row] : self.starts[row + 1]].tobytes()
            try:
                mask[:] = coco_mask.decode({"size": [height, width], "counts": counts})
            except ValueError as error:
                raise _unreadable(f"{origin}: annotation {self.ids[row]}", error) from error
        return masks


def encode_masks(truth: Mapping[str, Any], origin: str) -> RunLengths:
    """Encode the `segmentation` of every annotation of a COCO dictionary.

    Raises:
        DataError: an annotation has no segmentation or one that cannot be read; names it.
    """
    images = {image["id"]: index for index, image in enumerate(truth["images"])}
    records = sorted(truth["annotations"], key=lambda record: images[record["image_id"]])
    encoded = [
        _encode(record, truth["images"][images[record["image_id"]]], origin) for record in records
    ]
    return RunLengths(
        ids=np.array([record["id"] for record in records], np.int64),
        counts=np.frombuffer(b"".join(encoded), np.uint8),
        starts=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
    )


def _encode(record: Mapping[str, Any], image: Mapping[str, Any], origin: str) -> bytes:
    where = f"{origin}: annotation {record['id']}"
    shape = record.get("segmentation")
    if not shape or (isinstance(shape, dict) and not shape.get("counts")):
        raise DataError(f"{where}: has no segmentation, which this task needs")
    height, width = image["height"], image["width"]
    try:
        if isinstance(shape, dict) and isinstance(shape["counts"], str | bytes):
            encoded = {"size": list(shape["size"]), "counts": shape["counts"]}
            if isinstance(shape["counts"], str):
                encoded["counts"] = shape["counts"].encode("ascii")
            coco_mask.area(encoded)
        else:
            parts = coco_mask.frPyObjects(shape, height, width)
            encoded = coco_mask.merge(parts) if isinstance(shape, list) else parts
    except Exception as error:  # pycocotools raises bare ones too
        raise _unreadable(where, error) from error
    if list(encoded["size"]) != [height, width]:
        raise DataError(
            f"{where}: its segmentation is of {encoded['size'][1]} x {encoded['size'][0]} pixels, "
            f"the image of {width} x {height}"
        )
    counts = encoded["counts"]
    assert isinstance(counts, bytes)
    return counts


def _unreadable(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: its segmentation cannot be read ({error})")


def paint_semantic(
    masks: NDArray[np.bool_], labels: NDArray[np.int64], areas: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Semantic labels uint8 [H, W] of instance masks [M, H, W]: 0, then the categories from 1.

    Smaller objects lie on larger ones (our choice).
    """
    painted = np.zeros(masks.shape[1:], np.uint8)
    for index in np.argsort(-areas, kind="stable"):
        painted[masks[index]] = labels[index] + 1
    return painted
