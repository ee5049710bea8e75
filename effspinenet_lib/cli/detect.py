"""`effspinenet detect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effspinenet_lib.cli.console import print_table
from effspinenet_lib.errors import DataError, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(detect)


def detect(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture to look at.")],
    weights: Annotated[Path, typer.Option(metavar="FILE", help="As `train` writes them.")],
    output: Annotated[Path, typer.Option(metavar="OUT.png", help="The picture with boxes.")] = Path(
        "detections.png"
    ),
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Boxes with a lower score are left out.")
    ] = 0.3,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="[default: as the model was trained]")
    ] = None,
) -> None:
    """Find objects in a picture; draw their boxes, and masks if the model gives them; list them.

    Example: `effspinenet detect street.jpg --weights model.safetensors --output found.png`
    """
    from effspinenet_lib.cli.drawing import draw_boxes, save_picture, tint
    from effspinenet_lib.data.released import FITTED
    from effspinenet_lib.training.checkpoint import create_from_weights

    model, facts = create_from_weights(weights)
    if facts["task"] not in ("detection", "instances"):
        raise UserError(f"{weights}: is a model for {facts['task']}; detect needs one that detects")
    pixels = read_picture(image)
    size = image_size or facts["image_size"]
    found = detections(model, pixels, size, facts.get("preprocessing", FITTED))
    kept = found["scores"] >= threshold
    boxes, scores, labels = (found[name][kept] for name in ("boxes", "scores", "labels"))
    names = [facts["categories"][label]["name"] for label in labels.tolist()]
    if "masks" in found:
        pixels = tint(pixels, found["masks"][kept].numpy(), labels.tolist())
    texts = [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist(), strict=True)]
    save_picture(draw_boxes(pixels, boxes.numpy(), labels.tolist(), texts), output)
    rows = [
        (name, f"{score:.2f}", *(f"{value:.0f}" for value in box))
        for name, score, box in zip(names, scores.tolist(), boxes.tolist(), strict=True)
    ]
    print_table(str(image), ("class", "score", "left", "top", "right", "bottom"), rows)
    typer.echo(f"{len(rows)} objects with a score of at least {threshold}; wrote {output}")


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Read a picture as uint8 [H, W, 3], RGB, turned as its EXIF record says.

    Raises:
        DataError: the file is missing or cannot be decoded.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded ({error}); save the picture again") from error


def detections(
    model: nn.Module, picture: NDArray[np.uint8], image_size: int, preprocessing: str = "fitted"
) -> dict[str, Tensor]:
    """Run a detector in evaluation mode on one picture.

    Args:
        model: as `create_model` gives it.
        picture: uint8 [H, W, 3].
        image_size: side of the square input; the picture's long side is resized to it.
        preprocessing: one of `data.released.PREPROCESSINGS`.

    Returns:
        `boxes` [K, 4] in pixels of the picture, `scores` [K] falling, `labels` int64 [K] and, of
        a model for instances, `masks` bool [K, H, W].
    """
    import torch

    from effspinenet_lib.data.released import fit_picture
    from effspinenet_lib.training.evaluate import paste_masks, to_original

    height, width = picture.shape[:2]
    image, scales = fit_picture(picture, image_size, preprocessing)
    with torch.inference_mode():
        device = next(model.parameters(), image).device
        found: dict[str, Tensor] = model(image[None].to(device))[0]
    boxes = to_original(found["boxes"], scales, (height, width))
    result = {"boxes": boxes, "scores": found["scores"].cpu(), "labels": found["labels"].cpu()}
    if "masks" in found:
        result["masks"] = paste_masks(found["masks"], boxes, (height, width))
    return result
