"""`effspinenet data`: fetch a data set, look at one, make ShapeScenes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effspinenet_lib.cli.console import (
    FAILED_CHECK,
    draw,
    print_table,
    readable,
    save_picture,
    sheet,
)
from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.files import ensure_folder

if TYPE_CHECKING:
    from effspinenet_lib.data import DataConfig, Dataset
    from effspinenet_lib.data.records import Fault

SHAPESCENES, SHAPEGRID = "shapescenes", "shapegrid"
SCENES = (SHAPESCENES, SHAPEGRID)
CHECKS = Path("runs") / "checks"

Data = Annotated[
    str,
    typer.Option(
        metavar="DIR|shapescenes",
        help="A folder in COCO, VOC, YOLO or class-folder layout, or scenes that are drawn once "
        "and kept in `$EFFSPINENET_CACHE` (default `~/.cache/effspinenet`): `shapescenes`, or "
        "`shapegrid` for classification.",
    ),
]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side of a scene.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the scenes.")]
EvalSplit = Annotated[str, typer.Option(help="Split of the data to evaluate on.")]
Workers = Annotated[
    int, typer.Option(min=0, help="Data loading workers; 0: the training process loads.")
]

app = typer.Typer(
    no_args_is_help=True,
    help="Fetch or check a data set, make the embedded one (ShapeScenes), draw samples.",
)


def data_config(
    data: str,
    train_split: str = "train",
    eval_split: str = "val",
    images: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    task: str = "detection",
) -> DataConfig:
    """The data that `--data` and the options after it name.

    Args:
        data: a folder, `shapescenes` or `shapegrid`.
        train_split: split to train on.
        eval_split: split to evaluate on.
        images: use only so many of each split.
        image_size: of ShapeScenes.
        seed: of ShapeScenes, and of a split that is made.
        task: decides between boxes and label maps where a folder holds both (VOC).

    Raises:
        UserError: no such folder.
        DataError: the folder is in no known layout.
    """
    from effspinenet_lib.data import DataConfig, detect_format

    scenes = data in SCENES
    if not scenes and not Path(data).is_dir():
        raise UserError(
            f"{data}: no such folder; give a data set's folder, `{SHAPESCENES}` or `{SHAPEGRID}`"
        )
    return DataConfig(
        format=data if scenes else detect_format(data, task),
        # the same run from whichever folder it is named
        root=None if scenes else str(Path(data).resolve()),
        train_split=train_split,
        eval_split=eval_split,
        train_images=images,
        eval_images=images,
        seed=seed,
        image_size=image_size if scenes else None,
    )


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="`coco`, `voc` or `imagenet`.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The data folder to make.")],
    source: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Fetch the archives from here, not their publishers."),
    ] = None,
    archives: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Archives that you have; they are checked and kept. ImageNet needs it.",
        ),
    ] = None,
) -> None:
    """Make the folder of a public data set: fetch its archives, check them, unpack them.

    - `coco`: COCO 2017's train and val images with their boxes and masks (20 GB to fetch)
    - `voc`: VOC 2012 with SBD's label maps, and the list `train_aug` of 10,582 images (3.4 GB)
    - `imagenet`: ILSVRC 2012, from the archives that its site gives to registered users

    The same command resumes what was interrupted, and does nothing if all is done.

    Example: `effspinenet data fetch voc voc2012`
    """
    from effspinenet_lib.data.fetch import fetch as fetch_set

    made = fetch_set(name, folder, source, archives)
    typer.echo(f"{folder}: {'complete' if made else 'was fetched before'}")
    typer.echo(f"Next: effspinenet data check {folder} --expect {name}")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="In a layout that `train` takes.")],
    task: Annotated[
        str, typer.Option(help="`detection`, `instances`, `classification` or `segmentation`.")
    ] = "detection",
    train_split: Annotated[str, typer.Option(help="Split of the data to train on.")] = "train",
    eval_split: EvalSplit = "val",
    pictures: Annotated[bool, typer.Option(help="Also decode every picture.")] = True,
    expect: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The data set expected: `coco`, `voc` or `imagenet`."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write counts and problems to a .json or .csv file. "
            f"[default: one in {CHECKS}, if there are problems]",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decoding threads. [default: one a core]")
    ] = None,
) -> None:
    """Count what each split of a data set holds and name all that is wrong with it.

    `train` refuses the same. The exit code is 1 if there are problems.

    For example:

    - `effspinenet data check my_pictures`
    - `effspinenet data check my_pictures --task instances`
    - `effspinenet data check coco --expect coco --report coco.csv`
    """
    from effspinenet_lib.data import DataConfig, detect_format
    from effspinenet_lib.data.check import (
        REPORT_SUFFIXES,
        check_parts,
        count_rows,
        mask_faults,
        write_report,
    )
    from effspinenet_lib.data.config import only_task, split_names
    from effspinenet_lib.data.fetch import KNOWN_SETS
    from effspinenet_lib.data.records import Fault, fault_lines
    from effspinenet_lib.models.specs import TASKS

    if task not in TASKS:
        raise UnknownName("task", task, TASKS)
    if expect is not None and expect not in KNOWN_SETS:
        raise UnknownName("data set to expect", expect, KNOWN_SETS)
    if report is not None and report.suffix not in REPORT_SUFFIXES:
        raise UnknownName("report format", report.suffix, REPORT_SUFFIXES)
    known = KNOWN_SETS[expect] if expect else None
    layout = known.format if known else detect_format(folder, task)
    task = only_task(layout) or task
    typer.echo(f"{folder}: {layout.upper()} layout, checked for {task}")
    config = DataConfig(layout, str(folder), train_split, eval_split)
    expected = {part.split: part for part in known.parts} if known else {}
    wanted = [(name, None) for name in expected or split_names(config)]
    datasets, faults = check_parts(config, wanted, task, pictures=pictures, workers=workers)
    rows = []
    for (name, _), dataset in zip(wanted, datasets, strict=True):
        if dataset is not None:
            _print_counts(name, dataset)
            rows += count_rows(name, dataset, expected.get(name))
    unexpected = [Fault(row.problem, part=row.part) for row in rows if row.problem]
    if task == "detection":
        names = [name for name, _ in wanted]
        _print_unusable_masks(mask_faults(dict(zip(names, datasets, strict=True))))
    if faults and report is None:
        report = CHECKS / f"{folder.resolve().name}.csv"
    if report is not None:
        ensure_folder(report.parent)
        write_report(report, str(folder), faults, rows)
        typer.echo(f"Wrote {report}")
    for line in fault_lines([*unexpected, *faults]):
        typer.echo(line, err=True)
    if count := len(unexpected) + len(faults):
        typer.echo(f"{count} problem{'s' if count > 1 else ''}")
        raise typer.Exit(FAILED_CHECK)
    typer.echo("Every split can be used.")


def _print_unusable_masks(faults: list[Fault]) -> None:
    from effspinenet_lib.data.records import fault_lines

    for line in fault_lines(faults):
        typer.echo(line.replace("problem: ", "for --task instances: ", 1), err=True)
    if faults:
        typer.echo(f"{len(faults)} masks cannot be used; detection does not need them.", err=True)


def _open(config: DataConfig) -> Dataset:
    from effspinenet_lib.data import open_dataset
    from effspinenet_lib.data.config import only_task

    return open_dataset(config, "train", only_task(config.format) or "detection")


def _print_counts(split: str, dataset: Dataset) -> None:
    facts = dataset.describe()
    if dataset.photographs or not facts["objects"] + facts["crowds"]:
        typer.echo(f"{split}: {facts['images']} images, {len(facts['classes'])} classes")
        return
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


@app.command()
def make(
    name: Annotated[
        str, typer.Argument(help="The data set to make: `shapescenes` or `shapegrid`.")
    ],
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

    if name not in SCENES:
        raise UnknownName("data set to make", name, SCENES)
    config = DataConfig(
        format=name,
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
    split: Annotated[str, typer.Option(help="Split of the data.")] = "train",
    count: Annotated[int, typer.Option(min=1, help="Images on the sheet.")] = 12,
    columns: Annotated[int, typer.Option(min=1, help="Images in a row.")] = 4,
    image_size: ImageSize = None,
    seed: Seed = 0,
) -> None:
    """Draw the first images of a data set with their boxes on one sheet.

    Example: `effspinenet data sheet sheet.png --data my_pictures --split val`
    """
    import torch

    dataset = _open(
        data_config(data, train_split=split, images=count, image_size=image_size, seed=seed)
    )
    names = [category.name for category in dataset.categories]
    pictures = []
    for index in range(min(count, len(dataset))):
        sample = dataset.load(index)
        labels = sample.labels.tolist()
        texts = [readable(names[label], label) for label in labels]
        pictures.append(draw(sample.image, torch.from_numpy(sample.boxes), labels, texts))
    save_picture(sheet(pictures, columns), output)
    typer.echo(f"Wrote {output}: {len(pictures)} images of {dataset.name}")
