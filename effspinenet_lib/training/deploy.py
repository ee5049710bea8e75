"""An exported detector on a picture, without torch: NumPy, Pillow and ONNX Runtime.

Needs nothing else of this library, so the file can be copied to where a model is used.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
FITTED = "fitted"  # what `prepare` does, in the metadata of weights


def prepare(picture: NDArray[np.uint8], image_size: int) -> tuple[NDArray[np.float32], float]:
    """Resize the long side of a picture to the input, normalise, pad with zeros.

    Pillow's resizing differs from torch's by at most 2 of 255 levels.

    Args:
        picture: uint8 [H, W, 3], RGB.
        image_size: side of the square input in pixels.

    Returns:
        float32 [1, 3, S, S], and input pixels per pixel of the picture.
    """
    height, width = picture.shape[:2]
    scale = image_size / max(height, width)
    rows, columns = _fitted(height, width, scale)
    shown = (0, 0, min(width, columns / scale), min(height, rows / scale))
    small = Image.fromarray(picture).resize((columns, rows), Image.Resampling.BILINEAR, box=shown)
    images = np.zeros((1, 3, image_size, image_size), np.float32)
    normalised = (np.asarray(small, np.float32) / 255 - MEAN) / STD
    images[0, :, :rows, :columns] = normalised.transpose(2, 0, 1)
    return images, scale


def _fitted(height: int, width: int, scale: float) -> tuple[int, int]:
    """Rows and columns that a picture has in the input; the rest is padding."""
    # with a little more, lest rounding takes a row
    return max(1, int(height * scale * (1 + 1e-9))), max(1, int(width * scale * (1 + 1e-9)))


class OnnxDetector:
    """A file that `effspinenet export --format onnx` wrote of a model for detection.

    Args:
        path: of the file.

    Raises:
        ValueError: the model takes pictures that are prepared otherwise, as released ones do.

    Attributes:
        metadata: of the weights: `image_size`, `categories`, `model` and more.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(os.fspath(path))
        texts = self.session.get_modelmeta().custom_metadata_map
        self.metadata: dict[str, Any] = {name: json.loads(text) for name, text in texts.items()}
        if self.metadata.get("preprocessing", FITTED) != FITTED:
            raise ValueError(f"{path}: its model takes pictures that are not prepared as here")

    def __call__(self, picture: NDArray[np.uint8], threshold: float = 0.3) -> list[dict[str, Any]]:
        """Find objects in a picture, uint8 [H, W, 3]; the best first.

        Returns:
            `box` (x1, y1, x2, y2 in pixels of the picture), `score` and `category`, its name.
        """
        images, scale = prepare(picture, self.metadata["image_size"])
        boxes, scores, labels = (found[0] for found in self.session.run(None, {"images": images}))
        height, width = picture.shape[:2]
        rows, columns = _fitted(height, width, scale)
        boxes = np.minimum(boxes, np.array([columns, rows, columns, rows], np.float32)) / scale
        names = [category["name"] for category in self.metadata["categories"]]
        return [
            {"box": box.tolist(), "score": float(score), "category": names[label]}
            for box, score, label in zip(boxes, scores, labels, strict=True)
            # a box in the padding has no area in the picture
            if score > 0 and score >= threshold and (box[2:] > box[:2]).all()
        ]
