"""`effspinenet data`: look at a data set, make ShapeScenes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effspinenet_lib.cli.console import FAILED_CHECK, print_table
from effspinenet_lib.errors import DataError, UnknownName, UserError

if TYPE_CHECKING:
    from effspinenet_lib.data import DataConfig, Dataset

SHAPESCENES = "shapescenes"
COCO_PREFIX = "instances_"
DATA_HELP = (
    "A folder in COCO or VOC layout, or `shapescenes` for the embedded data set, which is made "
    "once and kept in `$EFFSPINENET_CACHE` (default `~/.cache/effspinenet`)."
)

Data = Annotated[str, typer.Option(metavar="DIR|shapescenes", help=DATA_HELP)]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side of a ShapeScenes image.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the ShapeScenes images.")]
EvalSplit = Annotated[str, typer.Option(help="Part of the data to evaluate on.")]
Workers = Annotated[
    int, typer.Option(min=0, help="Processes that load images; 0: none but the trainer itself.")
]

app = typer.Typer(
    no_args_is_help=True,
    help="Check a data set, make the embedded one (ShapeScenes), draw samples.",
)


def data_config(
    data: str,
    train_split: str = "train",
    eval_split: str = "val",
    images: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> DataConfig:
    """What `--data` and the options beside it ask for.

    Args:
        data: a folder, or `shapescenes`.
        train_split: part to train on.
        eval_split: part to evaluate on.
        images: use only so many of each part.
        image_size: of ShapeScenes.
        seed: of ShapeScenes.

    Raises:
        UserError: no such folder.
        DataError: the folder is in no known layout.
    """
    from effspinenet_lib.data import DataConfig, detect_format

    if data == SHAPESCENES:
        return DataConfig(
            format=SHAPESCENES,
            train_split=train_split,
            eval_split=eval_split,
            train_images=images,
            eval_images=images,
            image_size=image_size,
            seed=seed,
        )
    if not Path(data).is_dir():
        raise UserError(f"{data}: no such folder; give a data set's folder, or `{SHAPESCENES}`")
    return DataConfig(
        format=detect_format(data),
        root=str(Path(data).resolve()),  # the same run from whichever folder it is named
        train_split=train_split,
        eval_split=eval_split,
        train_images=images,
        eval_images=images,
    )


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="In COCO or VOC layout.")],
    pictures: Annotated[bool, typer.Option(help="Also decode every picture.")] = True,
) -> None:
    """Count what each part of a data set holds and name what is wrong with it.

    The exit code is 1 if a part cannot be used as it is.

    Example: `effspinenet data check my_pictures`
    """
    from effspinenet_lib.data import detect_format

    layout = detect_format(folder)
    typer.echo(f"{folder}: {layout.upper()} layout")
    problems: list[str] = []
    for split in _splits(folder, layout):
        try:
            dataset = _open(data_config(str(folder), train_split=split))
        except DataError as error:
            problems.append(str(error))
            continue
        _print_counts(split, dataset)
        if pictures:
            problems += _unreadable(dataset)
    for problem in problems:
        typer.echo(f"problem: {problem}", err=True)
    if problems:
        raise typer.Exit(FAILED_CHECK)
    typer.echo("Every part can be used.")


def _splits(folder: Path, layout: str) -> list[str]:
    """Names of the parts that a data folder has."""
    if layout == "coco":
        files = (folder / "annotations").glob("*.json")
        found = sorted(path.stem.removeprefix(COCO_PREFIX) for path in files)
    else:
        found = sorted(path.stem for path in (folder / "ImageSets" / "Main").glob("*.txt"))
    if not found:
        raise DataError(f"{folder}: a {layout.upper()} layout without any split")
    return found


def _open(config: DataConfig) -> Dataset:
    from effspinenet_lib.data import open_dataset

    return open_dataset(config, "train")


def _print_counts(split: str, dataset: Dataset) -> None:
    facts = dataset.describe()
    classes = facts["classes"]
    rows = [
        (name, *sizes.values(), sum(sizes.values()))
        for name, sizes in classes.items()
        if any(sizes.values())
    ]
    rows.append(("all", *facts["sizes"].values(), facts["objects"]))
    print_table(
        f"{split}: {facts['images']} images, {facts['images_without_boxes']} without boxes; "
        f"{facts['crowds']} crowd regions; {len(rows) - 1} of {len(classes)} classes occur",
        ("class", *facts["sizes"], "objects"),
        rows,
    )


def _unreadable(dataset: Dataset) -> Iterator[str]:
    """Say of each picture that cannot be decoded what is wrong."""
    from tqdm.auto import tqdm

    for index in tqdm(range(len(dataset)), desc=dataset.name, unit="picture", disable=None):
        try:
            dataset.load_image(index)
        except DataError as error:
            yield str(error)


@app.command()
def make(
    name: Annotated[str, typer.Argument(help="The data set to make: `shapescenes`.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where its files go.")],
    train_images: Annotated[
        int | None, typer.Option(min=1, help="Images to train on. [default: 8000]")
    ] = None,
    eval_images: Annotated[
        int | None, typer.Option(min=1, help="Images to evaluate on. [default: 500]")
    ] = None,
    image_size: ImageSize = None,
    seed: Seed = 0,
) -> None:
    """Write the embedded data set as a folder in COCO layout. The same seed, the same bytes.

    Example: `effspinenet data make shapescenes scenes --train-images 200 --image-size 256`
    """
    from effspinenet_lib.data import DataConfig, export_coco

    if name != SHAPESCENES:
        raise UnknownName("data set to make", name, [SHAPESCENES])
    config = DataConfig(
        format=SHAPESCENES,
        train_images=train_images,
        eval_images=eval_images,
        image_size=image_size,
        seed=seed,
    )
    for path in export_coco(config, folder):
        typer.echo(f"Wrote {path}")


@app.command(name="sheet")
def contact_sheet(
    output: Annotated[Path, typer.Argument(metavar="OUT.png", help="The picture to write.")],
    data: Data = SHAPESCENES,
    split: Annotated[str, typer.Option(help="Part of the data.")] = "train",
    count: Annotated[int, typer.Option(min=1, help="Images on the sheet.")] = 12,
    columns: Annotated[int, typer.Option(min=1, help="Images in a row.")] = 4,
    image_size: ImageSize = None,
    seed: Seed = 0,
) -> None:
    """Draw the first images of a data set with their boxes on one sheet.

    Example: `effspinenet data sheet sheet.png --data my_pictures --split val`
    """
    from effspinenet_lib.cli.drawing import draw_boxes, save_picture, sheet

    dataset = _open(
        data_config(data, train_split=split, images=count, image_size=image_size, seed=seed)
    )
    names = [category.name for category in dataset.categories]
    pictures = []
    for index in range(min(count, len(dataset))):
        sample = dataset.load(index)
        texts = [names[label] for label in sample.labels]
        pictures.append(draw_boxes(sample.image, sample.boxes, sample.labels.tolist(), texts))
    save_picture(sheet(pictures, columns), output)
    typer.echo(f"Wrote {output}: {len(pictures)} images of {dataset.name}")
