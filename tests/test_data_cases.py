"""Data as people's tools write it: each kind is read rightly, or refused with all its faults."""

from __future__ import annotations

import json
import os
import random
import shutil
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from effspinenet_lib.data import DataConfig, Dataset, detect_format
from effspinenet_lib.data.check import check_parts, mask_faults, open_checked
from effspinenet_lib.data.config import split_names
from effspinenet_lib.data.pictures import picture_size, read_picture
from effspinenet_lib.data.records import DataWarning, Fault, InvalidData
from effspinenet_lib.errors import DataError, UserError
from effspinenet_lib.training.config import describe_data

WIDTH, HEIGHT = 48, 32
RED, GREEN = {"id": 1, "name": "red"}, {"id": 2, "name": "green"}
BOXES = ([4, 6, 10, 12], [20, 3, 16, 20])


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(small).resize(size).save(path)


def content(first: int, count: int, prefix: str = "") -> dict[str, Any]:
    images = [
        {"id": n, "file_name": f"{prefix}img{n}.jpg", "width": WIDTH, "height": HEIGHT}
        for n in range(first, first + count)
    ]
    annotations = [
        {"id": 10 * n + k, "image_id": n, "category_id": k + 1, "bbox": box,
         "area": box[2] * box[3], "iscrowd": 0, "segmentation": [[
             box[0], box[1], box[0] + box[2], box[1], box[0] + box[2], box[1] + box[3]]]}
        for n in range(first, first + count) for k, box in enumerate(BOXES)
    ]  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": [RED, GREEN]}


def write(path: Path, text: Any, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding=encoding)


def coco(root: Path, change: Callable[[dict[str, Any]], Any] = lambda part: None) -> Path:
    for part, first, count in (("train", 1, 4), ("val", 5, 2)):
        truth = content(first, count)
        change(truth)
        write(root / "annotations" / f"instances_{part}.json", truth)
        for n in range(first, first + count):
            picture(root / part / f"img{n}.jpg", n)
    return root


def xml(name: str, extra: str = "") -> str:
    objects = "".join(
        f"<object><name>{category['name']}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
        f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for category, (x, y, w, h) in zip((RED, GREEN), BOXES, strict=True)
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    return f"<annotation><filename>{name}.jpg</filename>{size}{objects}{extra}</annotation>"


def voc(root: Path, name: str = "img{}", lists: bool = True) -> Path:
    for n in range(1, 7):
        write(root / "Annotations" / f"{name.format(n)}.xml", xml(name.format(n)))
        picture(root / "JPEGImages" / f"{name.format(n)}.jpg", n)
    for part, numbers in (("train", range(1, 5)), ("val", (5, 6))) if lists else ():
        text = "".join(f"{name.format(n)}\n" for n in numbers)
        write(root / "ImageSets" / "Main" / f"{part}.txt", text)
    return root


def yolo(root: Path, val: str = "val") -> Path:
    for part, first, count in (("train", 1, 4), (val, 5, 2)):
        for n in range(first, first + count):
            picture(root / part / "images" / f"img{n}.jpg", n)
            lines = [
                f"{k} {(x + w / 2) / WIDTH} {(y + h / 2) / HEIGHT} {w / WIDTH} {h / HEIGHT}"
                for k, (x, y, w, h) in enumerate(BOXES)
            ]
            write(root / part / "labels" / f"img{n}.txt", "\n".join(lines))
    settings = {"train": "../train/images", "val": f"../{val}/images", "nc": 2}
    write(root / "data.yaml", yaml.dump({**settings, "names": ["red", "green"]}))
    return root


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    """Warnings are looked at where they are expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        yield


def config_of(root: Path, task: str = "detection") -> DataConfig:
    return DataConfig(detect_format(root, task), str(root))


def trained(root: Path, task: str = "detection", skip_bad: bool = False) -> list[Dataset]:
    """What `train` opens."""
    return open_checked(config_of(root, task), [("train", None), ("val", None)], task, skip_bad)


def faults_of(root: Path, task: str = "detection") -> list[Fault]:
    """What `data check` finds."""
    config = config_of(root, task)
    return check_parts(config, [(name, None) for name in split_names(config)], task)[1]


def refused(root: Path, *said: str, task: str = "detection") -> None:
    """Check and train say the same, once a fault."""
    with pytest.raises(InvalidData) as caught:
        trained(root, task)
    texts = [fault.text for fault in faults_of(root, task)]
    assert texts == [fault.text for fault in caught.value.faults]
    assert len(texts) == len(said)
    for text, wanted in zip(texts, said, strict=True):
        assert wanted in text
        assert "\n" not in text


def expect_usual(root: Path, counts: tuple[int, int] = (4, 2)) -> None:
    """Both parts are read with the boxes that were written."""
    assert faults_of(root) == []
    datasets = trained(root)
    assert tuple(map(len, datasets)) == counts
    for dataset in datasets:
        for index in range(len(dataset)):
            sample = dataset.load(index)
            names = [dataset.categories[label].name for label in sample.labels]
            expected = {"red": BOXES[0], "green": BOXES[1]}
            assert sorted(names) == ["green", "red"]
            for name, (x1, y1, x2, y2) in zip(names, sample.boxes.tolist(), strict=True):
                assert [x1, y1, x2 - x1, y2 - y1] == pytest.approx(expected[name], abs=1e-3)
            assert sample.image.shape == (HEIGHT, WIDTH, 3)


# Pictures


def test_16_bits_keep_their_upper_8(tmp_path: Path) -> None:
    values = np.linspace(20817, 35466, 64 * 96).astype(np.uint16).reshape(64, 96)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = read_picture(tmp_path / "a.png")
    assert (pixels == (values >> 8)[:, :, None]).all()
    assert (pixels.min(), pixels.max()) == (81, 138)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr"])
def test_pictures_of_every_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(path)
    assert read_picture(path).shape == (4, 5, 3)
    assert (read_picture(path) == 255).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 100.0, 200.0], [0, 100, 200]),
     ([-1.0, 0.0, 1.0], [0, 128, 255]), ([0.0, 25600.0, 51200.0], [0, 100, 200])],
)  # fmt: skip
def test_floats_are_scaled(tmp_path: Path, values: list[float], expected: list[int]) -> None:
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "a.tif")
    assert read_picture(tmp_path / "a.tif")[0, :, 0].tolist() == expected
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(DataError, match=r"b\.tif: .* not finite"):
        read_picture(tmp_path / "b.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_a_viewer_turns_them(tmp_path: Path, orientation: int) -> None:
    """The pixel that EXIF calls the top left one comes to the top left."""
    stored = np.zeros((8, 16, 3), np.uint8)
    row, column = {1: (0, 0), 2: (0, 8), 3: (4, 8), 4: (4, 0),
                   5: (0, 0), 6: (4, 0), 7: (4, 8), 8: (0, 8)}[orientation]  # fmt: skip
    stored[row : row + 4, column : column + 8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    pixels = read_picture(tmp_path / "a.png")
    turned = orientation >= 5
    assert pixels.shape[:2] == picture_size(tmp_path / "a.png") == ((16, 8) if turned else (8, 16))
    assert pixels[0, 0, 0] == 255
    assert pixels.mean() == 255 / 4
    as_stored = read_picture(tmp_path / "a.png", (8, 16))
    assert (as_stored == (stored if turned else pixels)).all()
    with pytest.raises(DataError, match="EXIF" if orientation > 1 else "is 16 x 8"):
        read_picture(tmp_path / "a.png", (9, 9))


def test_a_truncated_picture_is_refused_or_left_out(tmp_path: Path) -> None:
    root = coco(tmp_path)
    path = root / "train" / "img2.jpg"
    path.write_bytes(path.read_bytes()[:-80])
    (root / "val" / "img5.jpg").unlink()
    refused(root, "img2.jpg: the image cannot be decoded", "names the image img5.jpg, not found")
    train, val = trained(root, skip_bad=True)
    assert (len(train), len(val)) == (3, 1)
    assert train.describe()["skipped"] == ["img2.jpg"]
    assert val.describe()["skipped"] == ["img5.jpg"]
    assert {train.load(index).file_name for index in range(3)} == {
        "img1.jpg", "img3.jpg", "img4.jpg",
    }  # fmt: skip
    instances = trained(root, "instances", skip_bad=True)[0]
    assert instances.masks(1).any()


# One gate


def test_a_part_may_lack_a_category(tmp_path: Path) -> None:
    root = coco(tmp_path)
    truth = content(5, 2)
    truth["categories"] = [GREEN]
    truth["annotations"] = [one for one in truth["annotations"] if one["category_id"] == 2]
    write(root / "annotations" / "instances_val.json", truth)
    assert faults_of(root) == []
    train, val = trained(root)
    assert [c.name for c in val.categories] == [c.name for c in train.categories]
    assert {val.categories[label].name for label in val.load(0).labels} == {"green"}
    assert [c["id"] for c in val.ground_truth()["categories"]] == [2]
    truth["categories"] = [{"id": 2, "name": "blue"}]
    write(root / "annotations" / "instances_val.json", truth)
    refused(root, "2 of 'blue'")


@pytest.mark.parametrize("shape", [[4, 6, 14, 6, 14, 18], [[4, 6, 14, 18]]])
def test_masks_are_refused_where_they_are_needed(tmp_path: Path, shape: Any) -> None:
    root = coco(
        tmp_path, lambda truth: [a.update(segmentation=shape) for a in truth["annotations"]]
    )
    assert faults_of(root) == []
    datasets = dict(zip(("train", "val"), trained(root), strict=True))
    assert len(mask_faults(datasets)) == 12
    said = [f"annotation {10 * n + k}: its segmentation" for n in range(1, 7) for k in range(2)]
    refused(root, *said, task="instances")


def test_all_faults_are_listed(tmp_path: Path) -> None:
    def damage(truth: dict[str, Any]) -> None:
        for record, change in zip(
            truth["annotations"],
            ({"bbox": [1, 2, float("nan"), 4]}, {"bbox": ["1", 2, 3, 4]}, {"category_id": 99},
             {"image_id": 999}),
            strict=False,
        ):  # fmt: skip
            record.update(change)

    root = coco(tmp_path, damage)
    said = ("bbox is [1, 2, nan, 4]", "bbox is ['1'", "category 99", "image 999")
    refused(root, *said, *said)


def test_categories_of_one_name_count_for_themselves(tmp_path: Path) -> None:
    twice = [RED, GREEN, {"id": 3, "name": "red"}]
    root = coco(tmp_path, lambda truth: truth.update(categories=twice))
    with pytest.warns(DataWarning, match="categories 1, 3 are all named 'red'"):
        train, _ = trained(root)
    counts = {name: sum(sizes.values()) for name, sizes in train.describe()["classes"].items()}
    assert counts == {"red (id 1)": 4, "green": 4, "red (id 3)": 0}


def test_boxes_outside_are_clipped_for_training_and_evaluation(tmp_path: Path) -> None:
    boxes = ([-10, -5, 30, 20], [40, 20, 60, 60], [500, 500, 20, 20], [30, 20, -9, -9])

    def damage(truth: dict[str, Any]) -> None:
        first = truth["images"][0]["id"]
        truth["annotations"] = [
            {"id": n, "image_id": first, "category_id": 1, "bbox": box, "area": 900}
            for n, box in enumerate(boxes, start=1)
        ]

    root = coco(tmp_path, damage)
    with pytest.warns(DataWarning, match="clipped to the image 2 boxes") as caught:
        _, val = trained(root)
    assert sum("clipped to the image" in str(one.message) for one in caught) == 2  # once a part
    assert val.load(0).boxes.tolist() == [[0, 0, 20, 15], [40, 20, WIDTH, HEIGHT]]
    truth = COCO()
    truth.dataset = val.ground_truth()
    truth.createIndex()
    found = [
        {"image_id": val.image_id(0), "category_id": 1, "score": 0.9,
         "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for x1, y1, x2, y2 in val.load(0).boxes.tolist()
    ]  # fmt: skip
    evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


# Names


def test_names_are_found_in_other_forms(tmp_path: Path) -> None:
    """Ids as text or of any size, another Unicode form or case, a byte order mark, hidden files."""
    root = coco(tmp_path)
    truth = content(1, 4)
    for one in truth["images"]:
        one["id"] = f"picture {one['id']}"
    for one in truth["annotations"]:
        one.update(image_id=f"picture {one['image_id']}", category_id=str(one["category_id"]))
    truth["images"][0]["file_name"] = unicodedata.normalize("NFD", "Küche.jpg")
    truth["images"][1]["file_name"] = "IMG2.JPG"
    (root / "train" / "img1.jpg").rename(root / "train" / unicodedata.normalize("NFC", "Küche.jpg"))
    write(root / "annotations" / "instances_train.json", truth, "utf-8-sig")
    other = content(5, 2)
    for record in (*other["images"], *other["annotations"]):
        for key in ("id", "image_id"):
            if key in record and (key == "image_id" or "file_name" in record):
                record[key] += 10**30
    write(root / "annotations" / "instances_val.json", other)
    (root / "annotations" / "._instances_x.json").write_bytes(b"\0\5")
    expect_usual(root)


def test_class_names_of_any_script_stay_as_they_are(tmp_path: Path) -> None:
    names = ["汽车", 'a "b", c', "=1+1"]
    categories = [{"id": n, "name": name} for n, name in enumerate(names, start=1)]
    train, _ = trained(coco(tmp_path, lambda truth: truth.update(categories=categories)))
    assert [c.name for c in train.categories] == names


# Layouts


def test_roboflows_layouts(tmp_path: Path) -> None:
    for part, first, count in (("train", 1, 4), ("valid", 5, 2)):
        truth = content(first, count)
        truth["categories"] = [{"id": 0, "name": "things", "supercategory": "none"}, RED, GREEN]
        write(tmp_path / "a" / part / "_annotations.coco.json", truth)
        for n in range(first, first + count):
            picture(tmp_path / "a" / part / f"img{n}.jpg", n)
            picture(tmp_path / "b" / part / f"img{n}.jpg", n)
            write(tmp_path / "b" / part / f"img{n}.xml", xml(f"img{n}"))
    expect_usual(tmp_path / "a")
    expect_usual(tmp_path / "b")


@pytest.mark.parametrize("val", ["val", "valid"])
def test_yolos_layout(tmp_path: Path, val: str) -> None:
    assert detect_format(yolo(tmp_path, val), "classification") == "yolo"
    expect_usual(tmp_path)
    lines = "0 0.1 0.2 0.5 0.2 0.5 0.9\n"
    write(tmp_path / "train" / "labels" / "img1.txt", lines)
    train, _ = trained(tmp_path)
    x1, y1, x2, y2 = train.load(0).boxes[0].tolist()
    assert [x1 / WIDTH, y1 / HEIGHT, x2 / WIDTH, y2 / HEIGHT] == pytest.approx([0.1, 0.2, 0.5, 0.9])
    write(tmp_path / "train" / "labels" / "img2.txt", "0 1 2 3\n7 .5 .5 .1 .1\n0 90 9 9 9\nred")
    (tmp_path / "train" / "labels" / "img3.txt").unlink()
    refused(
        tmp_path, "img2.txt: line 1: has 4 values", "line 3: has 90; coordinates are shares",
        "line 4: is 'red'", "line 2: category 7 is not listed",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("file", "folder", "prefix"),
    [("annotations/instances_default.json", "images", ""),
     ("annotations.json", "JPEGImages", "JPEGImages/"), ("result.json", "images", "images\\")],
)  # fmt: skip
def test_single_files_are_split_by_a_rule(
    tmp_path: Path, file: str, folder: str, prefix: str
) -> None:
    write(tmp_path / file, content(1, 10, prefix))
    for n in range(1, 11):
        picture(tmp_path / folder / f"img{n}.jpg", n)
    expect_usual(tmp_path, (8, 2))
    train, val = trained(tmp_path)
    assert describe_data(val)["split"] == {"side": "val", "share": 0.2, "seed": 0}
    names = [{data.load(i).file_name for i in range(len(data))} for data in (train, val)]
    assert not names[0] & names[1]
    again = trained(tmp_path)[1]
    assert {again.load(i).file_name for i in range(2)} == names[1]
    other = DataConfig("coco", str(tmp_path), seed=1)
    seeded = open_checked(other, [("val", None)], "detection")[0]
    assert {seeded.load(i).file_name for i in range(2)} != names[1]


def test_vocs_lists_and_folders(tmp_path: Path) -> None:
    """Names with spaces, lists of classes, hidden files, no lists, other folders, no sizes."""
    expect_usual(voc(tmp_path / "spaces", "Screen Shot {}"))
    root = voc(tmp_path / "flags")
    for part, numbers in (("train", range(1, 5)), ("val", (5, 6))):
        text = "".join(f"img{n}  {1 if n % 2 else -1}\n" for n in numbers)
        write(root / "ImageSets" / "Main" / f"red_{part}.txt", text)
    for hidden in ("Annotations/._img1.xml", "ImageSets/Main/._train.txt", ".DS_Store"):
        (root / hidden).write_bytes(b"\0\5\26\7")
    expect_usual(root)
    assert split_names(config_of(root)) == ["train", "val"]
    expect_usual(voc(tmp_path / "whole", lists=False), (5, 1))
    root = voc(tmp_path / "kaggle", lists=False)
    (root / "Annotations").rename(root / "annots")
    (root / "JPEGImages").rename(root / "images")
    path = root / "annots" / "img1.xml"
    path.write_text(path.read_text().replace(f"<width>{WIDTH}<", "<width>0<"))
    expect_usual(root, (5, 1))


def test_class_folders_without_parts_are_split_by_class(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for n in range(5):
            picture(tmp_path / name / f"{n}.JPG", n)
    assert faults_of(tmp_path, "classification") == []
    train, val = trained(tmp_path, "classification")
    assert np.bincount(train.annotations.labels).tolist() == [4, 4]
    assert np.bincount(val.annotations.labels).tolist() == [1, 1]


def test_a_folder_that_is_not_understood_says_what_it_holds(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "img1.jpg")
    (tmp_path / "a" / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"1 pictures; the other files notes\.txt.* YOLO folder"):
        detect_format(tmp_path / "a")
    yolo(tmp_path / "b")
    (tmp_path / "b" / "data.yaml").unlink()
    with pytest.raises(DataError, match=r"write a data\.yaml"):
        detect_format(tmp_path / "b", "classification")
    voc(tmp_path / "c" / "VOC2012")
    with pytest.raises(DataError, match=r"VOC2012 is a VOC folder .*: give that folder"):
        detect_format(tmp_path / "c")


# Identity


def test_a_runs_identity_covers_pictures_and_masks(tmp_path: Path) -> None:
    root = coco(tmp_path)
    before = describe_data(trained(root, "instances")[0])
    assert describe_data(trained(root, "instances")[0]) == before
    picture(root / "train" / "img1.jpg", 99)
    after = describe_data(trained(root, "instances")[0])
    assert after["files"] != before["files"]
    assert after["digest"] == before["digest"]
    truth = content(1, 4)
    truth["annotations"][0]["segmentation"] = [[4, 6, 14, 6, 14, 10]]
    write(root / "annotations" / "instances_train.json", truth)
    assert describe_data(trained(root, "instances")[0])["masks"] != before["masks"]


# Random damage


def damage_bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    kind = rng.randrange(4)
    place = rng.randrange(max(1, len(data)))
    if kind == 0:
        data = data[:place]
    elif kind == 1 and data:
        data[place] = rng.randrange(256)
    elif kind == 2:
        data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    else:
        del data[place : place + rng.randrange(1, 40)]
    path.write_bytes(data)


VALUES = ("nan", "-1", "1e400", "", "x", "null", "[]", "99999999999999999999", "0", "\0", "-0.5")


def damage_value(path: Path, rng: random.Random) -> None:
    """Replace a number of a text file by something else."""
    text = path.read_text(errors="surrogateescape")
    places = [i for i, letter in enumerate(text) if letter.isdigit()]
    if places:
        start = rng.choice(places)
        end = start
        while end < len(text) and (text[end].isdigit() or text[end] == "."):
            end += 1
        text = text[:start] + rng.choice(VALUES) + text[end:]
    path.write_text(text, errors="surrogateescape")


def damage(root: Path, rng: random.Random) -> None:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix != ".jpg"]
    kind = rng.randrange(8)
    if kind < 4:
        damage_value(rng.choice(texts), rng)
    elif kind < 6:
        damage_bytes(rng.choice(texts if rng.random() < 0.6 else files), rng)
    elif kind == 6:
        rng.choice(files).unlink()
    else:
        path = rng.choice(files)
        path.rename(path.with_name(rng.choice((".hidden", "other" + path.suffix, "ü ö.x"))))


@pytest.mark.parametrize(("make", "seed"), [(coco, 0), (voc, 1), (yolo, 2)])
def test_random_damage_gives_clean_errors_or_right_data(
    tmp_path: Path, make: Callable[[Path], Path], seed: int
) -> None:
    rng, good = random.Random(seed), make(tmp_path / "good")
    outcomes = {"refused": 0, "read": 0}
    for number in range(90):
        root = tmp_path / f"{number}"
        shutil.copytree(good, root, copy_function=os.link)
        for path in [path for path in root.rglob("*") if path.is_file()]:
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
        for _ in range(rng.randrange(1, 3)):
            damage(root, rng)
        task = rng.choice(("detection", "instances")) if make is coco else "detection"
        try:
            check = [
                fault.text for fault in faults_of(root, task) if fault.part in ("train", "val")
            ]
        except UserError as error:
            check = [str(error)]
        try:
            datasets, train = trained(root, task), []
        except InvalidData as error:
            train = [fault.text for fault in error.faults]
        except UserError as error:
            train = [str(error)]
        assert check == train, number
        for text in train:
            assert "\n" not in text
            assert "Traceback" not in text
        outcomes["refused" if train else "read"] += 1
        for dataset in datasets if not train else ():
            for index in range(len(dataset)):
                sample = dataset.load(index, task)
                height, width = sample.image.shape[:2]
                assert np.isfinite(sample.boxes).all()
                assert (sample.boxes >= 0).all()
                assert (sample.boxes <= [width, height, width, height]).all()
                assert (sample.labels < len(dataset.categories)).all()
        shutil.rmtree(root)
    assert min(outcomes.values()) > 5, outcomes  # neither is the rule
