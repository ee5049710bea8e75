"""COCO- and VOC-format folders: what is read, and how bad input is refused."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from effspinenet_lib.data import (
    DataConfig,
    Dataset,
    detect_format,
    open_dataset,
)
from effspinenet_lib.data import dataset as dataset_module
from effspinenet_lib.data.records import DataWarning, InvalidData
from effspinenet_lib.errors import DataError, Preempted

WIDTH, HEIGHT = 40, 30


def open_folder(root: Path, split: str = "train", images: int | None = None) -> Dataset:
    config = DataConfig(detect_format(root), str(root), train_split=split, train_images=images)
    return open_dataset(config, "train")


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, np.uint8)).save(path)


def coco_content() -> dict[str, Any]:
    """Three images, listed out of id order, and categories with a gap."""
    return {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT}
            for number in (30, 10, 20)
        ],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 7, "bbox": [1, 2, 10, 5], "area": 44,
             "iscrowd": 0, "segmentation": [[1, 2, 11, 2, 11, 7]]},
            {"id": 2, "image_id": 30, "category_id": 3, "bbox": [5, 5, 50, 10], "area": 500},
            {"id": 3, "image_id": 10, "category_id": 3, "bbox": [0, 0, 30, 30], "iscrowd": 1},
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }  # fmt: skip


def write_coco(root: Path, content: Any, images: str = "train2017") -> Path:
    for number in (10, 20, 30):
        save_image(root / images / f"{number}.png")
    path = root / "annotations" / "instances_train2017.json"
    path.parent.mkdir()
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def one_line(caught: pytest.ExceptionInfo[DataError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


# COCO


@pytest.mark.parametrize("split", ["train", "val", "train2017"])
def test_real_coco_reads_as_pycocotools_reads_it(tiny_coco: Path, split: str) -> None:
    dataset = open_folder(tiny_coco, split)
    year = split.removesuffix("2017") + "2017"
    reference = COCO(tiny_coco / "annotations" / f"instances_{year}.json")
    assert [dataset.image_id(i) for i in range(len(dataset))] == sorted(reference.imgs)
    crowds = 0
    for index in range(len(dataset)):
        sample = dataset.load(index)
        records = reference.imgToAnns[sample.image_id]
        image = reference.imgs[sample.image_id]
        assert sample.image.shape == (image["height"], image["width"], 3)
        assert sample.file_name == image["file_name"]
        assert len(records) == len(sample.boxes)
        for row, record in enumerate(records):
            x, y, w, h = record["bbox"]
            assert np.allclose(sample.boxes[row], [x, y, x + w, y + h], atol=1e-3)
            assert dataset.categories[sample.labels[row]].id == record["category_id"]
            assert sample.area[row] == pytest.approx(record["area"], rel=1e-6)
            assert sample.iscrowd[row] == record["iscrowd"]
            crowds += record["iscrowd"]
    assert crowds == dataset.describe()["crowds"] > 0
    names = {category.id: category.name for category in dataset.categories}
    assert names == {key: value["name"] for key, value in reference.cats.items()}


def test_ground_truth_of_real_coco_has_its_boxes_and_masks(tiny_coco: Path) -> None:
    truth = COCO()
    truth.dataset = open_folder(tiny_coco, "val").ground_truth(masks=True)
    truth.createIndex()
    reference = COCO(tiny_coco / "annotations" / "instances_val2017.json")
    for image, records in reference.imgToAnns.items():
        ours = truth.imgToAnns[image]
        for key in ("category_id", "iscrowd"):
            assert [one[key] for one in ours] == [one[key] for one in records]
        for one, record in zip(ours, records, strict=True):
            assert one["bbox"] == pytest.approx(record["bbox"], abs=1e-9)
            assert (truth.annToMask(one) == reference.annToMask(record)).all()


def test_images_and_labels_follow_their_ids_and_missing_fields_have_defaults(
    tmp_path: Path,
) -> None:
    write_coco(tmp_path, coco_content())
    dataset = open_folder(tmp_path)
    assert [dataset.image_id(i) for i in range(len(dataset))] == [10, 20, 30]
    assert [(c.id, c.name) for c in dataset.categories] == [(3, "dog"), (7, "cat")]
    sample = dataset.load(0)
    assert sample.labels.tolist() == [1, 0]
    assert sample.iscrowd.tolist() == [False, True]
    assert sample.area.tolist() == [44, 900]
    # Boxes are clipped, those of the ground truth too.
    assert dataset.load(2).boxes.tolist() == [[5, 5, WIDTH, 15]]
    assert dataset.ground_truth()["annotations"][2]["bbox"] == [5, 5, WIDTH - 5, 10]
    few = open_folder(tmp_path, images=2)
    assert [few.image_id(i) for i in range(len(few))] == [10, 20]
    assert [record["image_id"] for record in few.ground_truth()["annotations"]] == [10, 10]
    assert few.load(1).boxes.shape == (0, 4)
    assert few.describe()["images_without_boxes"] == 1


@pytest.mark.parametrize(
    "images", ["train", "train2017", "images/train", "images/train2017", "images", "."]
)
def test_images_are_found_in_the_common_places(tmp_path: Path, images: str) -> None:
    write_coco(tmp_path, coco_content(), images)
    assert open_folder(tmp_path).load(0).image.shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("ids", [(0, 1, 2), (5, 5, 6), (None, None, None), ("a", "b", "c")])
def test_unusable_annotation_ids_are_numbered_anew(tmp_path: Path, ids: tuple[Any, ...]) -> None:
    content = coco_content()
    for record, number in zip(content["annotations"], ids, strict=True):
        record["id"] = number
    write_coco(tmp_path, content)
    truth = open_folder(tmp_path).ground_truth()
    assert [record["id"] for record in truth["annotations"]] == [1, 2, 3]


def test_degenerate_boxes_are_dropped_with_one_counted_warning(tmp_path: Path) -> None:
    content = coco_content()
    bad = ([3, 3, 0, 5], [3, 3, 5, -1], [50, 3, 5, 5], [-9, -9, 9, 9], [1, 1, 1e-4, 5])
    content["annotations"] += [
        {"id": 10 + n, "image_id": 20, "category_id": 3, "bbox": bbox, "area": 1, "iscrowd": 0}
        for n, bbox in enumerate(bad)
    ]
    path = write_coco(tmp_path, content)
    with pytest.warns(DataWarning) as caught:
        dataset = open_folder(tmp_path)
    (warning,) = (one for one in caught if ": dropped" in str(one.message))
    assert str(path) in str(warning.message)
    assert "5 degenerate boxes (first: annotation 10, 20.png)" in str(warning.message)
    assert dataset.load(1).boxes.shape == (0, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(dataset.ground_truth()["annotations"]) == 3


GONE = object()
# A record's place, what changes in it, and what is said of it; () changes the whole file.
BAD_COCO: list[tuple[tuple[Any, ...], Any, str]] = [
    (("images", 1), {"id": 30}, "image 30: the id occurs twice"),
    (("images", 0), {"height": 0}, "image 30: height is 0"),
    (("images", 0), {"id": None}, "image number 1: id is None"),
    (("images", 0), {"width": "x"}, "image 30: width is 'x'"),
    (("images", 0), {"file_name": "gone.png"}, "names the image gone.png, not found in"),
    (("images", 0), {"file_name": "../../etc/passwd"}, "image 30: the file name .* leads out"),
    (("images", 0), {"file_name": "/etc/passwd"}, "leads out of the data folder"),
    (("images", 0), {"file_name": "..\\x.png"}, "leads out of the data folder"),
    (("images", 0), {"file_name": ""}, "is not a name"),
    (("annotations", 0), {"bbox": GONE}, "annotation 1: lacks the key 'bbox'"),
    (("annotations", 1), {"category_id": 99}, "annotation 2: category 99 is not listed"),
    (("annotations", 2), {"image_id": 99}, "annotation 3: image 99 is not listed"),
    (("annotations", 0), {"bbox": [1, 2, 3]}, "annotation 1: bbox is"),
    (("annotations", 0), {"bbox": [1, 2, 3, "4"]}, "annotation 1: bbox is"),
    (("annotations", 0), {"bbox": [1, 2, 3, float("nan")]}, "annotation 1: bbox is"),
    (("annotations", 0), {"area": "big"}, "area is 'big'"),
    (("annotations", 0), {"iscrowd": 2}, "iscrowd is 2"),
    (("annotations", 0), {"id": GONE, "bbox": 3}, "annotation number 1: bbox is"),
    (("annotations", 0), {"bbox": [1, 2, 3, 10**400]}, "annotation 1: bbox is"),
    ((), '{"images": [', r"is not JSON \(line 1"),
    ((), "[]", "must be an object"),
    ((), {"annotations": GONE}, "lacks the key 'annotations'"),
    ((), {"images": {}}, "images must be a list"),
    ((), {"images": [3]}, "image number 1: must be an object"),
    ((), {"images": [], "annotations": []}, "lists no images"),
    ((), {"categories": [], "annotations": []}, "lists no categories"),
]


def changed(record: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**record, **changes}.items() if value is not GONE}


def refused(root: Path, content: Any, message: str) -> DataError:
    path = write_coco(root, content)
    with pytest.raises(DataError, match=message) as caught:
        open_folder(root)
    assert one_line(caught).startswith(str(path))
    return caught.value


@pytest.mark.parametrize(("place", "changes", "message"), BAD_COCO)
def test_bad_annotation_files_are_refused_in_one_line(
    tmp_path: Path, place: tuple[Any, ...], changes: Any, message: str
) -> None:
    content: Any = coco_content()
    if place:
        table, index = place
        content[table][index] = changed(content[table][index], changes)
    else:
        content = changed(content, changes) if isinstance(changes, dict) else changes
    refused(tmp_path, content, message)


def test_all_faults_of_a_folder_are_found_at_once(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][0]["bbox"] = [1, 2]
    content["annotations"][2]["category_id"] = 99
    error = refused(tmp_path / "a", content, r"annotation 1: bbox is .*\(2 faults; `.* data check`")
    assert isinstance(error, InvalidData)
    named = [fault.text.split(": ")[1] for fault in error.faults]
    assert named == ["annotation 1", "annotation 3"]
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.faults) == (str(error), error.faults)
    content = coco_content()
    for record in content["images"][:2]:
        record["file_name"] = f"gone {record['id']}.png"
    error = refused(tmp_path / "b", content, r"\(2 faults;")
    assert isinstance(error, InvalidData)
    assert [fault.file for fault in error.faults] == ["gone 10.png", "gone 30.png"]


def test_an_unknown_split_lists_those_found(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content())
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    with pytest.raises(DataError, match=r"splits found: train2017$"):
        open_folder(tmp_path, "test")


def test_the_layout_is_recognised_or_none_is(tiny_coco: Path, bccd: Path, tmp_path: Path) -> None:
    assert detect_format(tiny_coco) == "coco"
    assert detect_format(bccd) == "voc"
    with pytest.raises(
        DataError, match=r"holds nothing; this is neither a COCO folder .* nor a VOC"
    ):
        detect_format(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        detect_format(tmp_path / "gone")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-60]), "cannot be decoded"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "not an image|cannot be decoded"),
        (lambda path: path.write_text("<html>"), "is not an image"),
        (lambda path: path.unlink(), "no such image"),
        (lambda path: Image.new("RGB", (5, 6)).save(path), "is 5 x 6 pixels, .* say 40 x 30"),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_unreadable_images_are_named(
    tmp_path: Path, spoil: Callable[[Path], Any], message: str, suffix: str
) -> None:
    content = coco_content()
    content["images"][1]["file_name"] = f"10.{suffix}"
    write_coco(tmp_path, content)
    picture = tmp_path / "train2017" / f"10.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(picture)
    dataset = open_folder(tmp_path)
    spoil(picture)
    with pytest.raises(DataError, match=message) as caught:
        dataset.load(0)
    assert one_line(caught).startswith(str(picture))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": "P" * 20}, "annotation 1: its segmentation is inv"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 6]}, "annotation 1: .* do not sum to 1200"),
        ({"size": [WIDTH, HEIGHT], "counts": "P"}, "annotation 1: its segmentation is of the siz"),
        ([[1, 2, 3, 4]], "annotation 1: its segmentation has a polygon of 4 values"),
        ([1, 2, 3, 4, 5, 6], "annotation 1: its segmentation is a list of int"),
        ([[1, 2, 3, 4, 5, "6"]], "annotation 1: its segmentation has a polygon of 6 values"),
        ([], "annotation 1: has no segmentation, which this task needs"),
    ],
)
def test_masks_that_cannot_be_used_are_named(tmp_path: Path, mask: Any, message: str) -> None:
    content = coco_content()
    for record in content["annotations"]:
        record["segmentation"] = mask
    path = write_coco(tmp_path, content)
    with pytest.raises(DataError, match=f"{path}: {message}"):
        open_folder(tmp_path).masks(0)


# VOC


def voc_object(name: str, box: tuple[Any, Any, Any, Any], extra: str = "") -> str:
    left, top, right, bottom = box
    return (
        f"<object><name>{name}</name>{extra}<bndbox><xmin>{left}</xmin><ymin>{top}</ymin>"
        f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
    )


def voc_xml(objects: str, width: Any = WIDTH) -> str:
    return (
        f"<annotation><size><width>{width}</width><height>{HEIGHT}</height></size>"
        f"{objects}</annotation>"
    )


def write_voc(root: Path, files: dict[str, str], splits: dict[str, str]) -> None:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for stem, text in files.items():
        (root / "Annotations" / f"{stem}.xml").write_text(text)
        save_image(root / "JPEGImages" / f"{stem}.jpg")
    for split, text in splits.items():
        path = root / "ImageSets" / "Main" / f"{split}.txt"
        path.write_text(text, errors="surrogateescape")


def test_voc_coordinates_are_one_based_and_name_the_last_pixel(tmp_path: Path) -> None:
    whole = voc_object("cat", (1, 1, WIDTH, HEIGHT))
    small = voc_object("ant", (3, 5, 4, 9), "<part><bndbox><xmin>9</xmin></bndbox></part>")
    hard = voc_object("cat", (2.5, 2, 8, 9), "<difficult>1</difficult>")
    write_voc(tmp_path, {"b": voc_xml(whole + small + hard)}, {"train": "b\n\n"})
    dataset = open_folder(tmp_path)
    sample = dataset.load(0)
    assert sample.boxes.tolist() == [[0, 0, WIDTH, HEIGHT], [2, 4, 4, 9], [1.5, 1, 8, 9]]
    assert [dataset.categories[label].name for label in sample.labels] == ["cat", "ant", "cat"]
    assert sample.iscrowd.tolist() == [False, False, True]
    assert sample.area.tolist() == [WIDTH * HEIGHT, 10, 52]


def test_voc_classes_are_those_of_all_splits(tmp_path: Path) -> None:
    files = {
        "1": voc_xml(voc_object("zebra", (1, 1, 9, 9))),
        "2": voc_xml(voc_object("ant", (1, 1, 9, 9)) + voc_object("Cow", (1, 1, 5, 5))),
    }
    write_voc(tmp_path, files, {"train": "1  1\n", "test": "2 -1\n"})
    train, test = open_folder(tmp_path), open_folder(tmp_path, "test")
    assert train.categories == test.categories
    assert [(c.id, c.name) for c in train.categories] == [(1, "Cow"), (2, "ant"), (3, "zebra")]


def test_real_voc_reads_as_its_text_says(bccd: Path) -> None:
    """Against a reading by regular expressions; every split warns of its degenerate boxes."""
    dropped = 0
    for split in ("train", "val", "test"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset = open_folder(bccd, split)
        messages = [str(one.message) for one in caught if one.category is DataWarning]
        assert len(messages) <= 1
        dropped += sum("dropped 1 degenerate box " in message for message in messages)
        assert [category.name for category in dataset.categories] == ["Platelets", "RBC", "WBC"]
        stems = sorted((bccd / "ImageSets" / "Main" / f"{split}.txt").read_text().split())
        assert len(stems) == len(dataset)
        for index, stem in enumerate(stems):
            text = (bccd / "Annotations" / f"{stem}.xml").read_text()
            names = re.findall(r"<object>\s*<name>(\w+)</name>", text)
            numbers = [
                [int(n) for n in re.findall(rf"<{side}>(\d+)</{side}>", text)]
                for side in ("xmin", "ymin", "xmax", "ymax")
            ]
            expected = [
                (name, (x1 - 1, y1 - 1, x2, y2))
                for name, x1, y1, x2, y2 in zip(names, *numbers, strict=True)
                if x2 > x1 and y2 > y1
            ]
            rows = dataset.annotations.rows(index)
            table = dataset.annotations
            read = [
                (dataset.categories[label].name, tuple(box))
                for label, box in zip(table.labels[rows], table.boxes[rows].tolist(), strict=True)
            ]
            assert read == expected
        assert dataset.load(0).image.shape == (480, 640, 3)
    assert dropped == 2


ENTITIES = "".join(
    f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' if n else '<!ENTITY a0 "ha">' for n in range(12)
)
BAD_VOC: dict[str, tuple[str, str]] = {
    "not XML": ("<annotation><size>", "is not XML"),
    "empty": ("", "is not XML"),
    "bomb": (f"<!DOCTYPE x [{ENTITIES}]><annotation>&a11;</annotation>", "is not XML"),
    "width of text": (voc_xml("", "wide"), "width is 'wide'"),
    "width of nan": (voc_xml("", "nan"), "width is nan"),
    "width negative": (voc_xml("", -1), "width is -1"),
    "no name": (voc_xml("<object></object>"), "object 1: lacks name"),
    "no box": (voc_xml("<object><name>a</name></object>"), "object 1: lacks bndbox"),
    "no corner": (
        voc_xml("<object><name>a</name><bndbox><xmin>1</xmin></bndbox></object>"),
        "object 1: bndbox has xmin 1.0, ymin ''",
    ),
    "corner of text": (voc_xml(voc_object("a", (1, "x", 3, 4))), "ymin 'x'"),
}


@pytest.mark.parametrize("case", BAD_VOC)
def test_bad_voc_files_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    text, message = BAD_VOC[case]
    good = voc_xml(voc_object("a", (1, 1, 5, 5)))
    write_voc(tmp_path, {"1": good, "2": good}, {"train": "1\n2\n"})
    path = tmp_path / "Annotations" / "2.xml"
    path.write_text(text)
    # A reader that expanded the bomb, 2 * 10**11 letters, would not come to an end.
    with pytest.raises(DataError, match=message) as caught:
        open_folder(tmp_path)
    assert one_line(caught).startswith(str(path))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"val": "1\n"}, "no such split; splits found: val"),
        ({"train": "1\nmissing\n"}, "train.txt: names missing, but .*Annotations has no XML"),
        ({"train": "\n"}, "lists no images"),
        ({"train": "x" * 5000}, "names x+, but"),
        ({"train": "../1\n"}, "train.txt: .* leads out"),
    ],
)
def test_bad_voc_splits_are_refused(tmp_path: Path, splits: dict[str, str], message: str) -> None:
    write_voc(tmp_path, {"1": voc_xml(voc_object("a", (1, 1, 5, 5)))}, splits)
    with pytest.raises(DataError, match=message) as caught:
        open_folder(tmp_path)
    one_line(caught)


def test_a_missing_voc_image_is_named_with_its_split(tmp_path: Path) -> None:
    named = voc_xml("<filename>1.jpg</filename>" + voc_object("a", (1, 1, 5, 5)))
    write_voc(tmp_path, {"1": named}, {"train": "1\n"})
    (tmp_path / "JPEGImages" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"train.txt: names the image 1.jpg, not found in"):
        open_folder(tmp_path)


def test_a_signal_while_masks_are_encoded_is_no_fault_of_the_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*args: object) -> None:
        raise Preempted.by("SIGTERM")

    monkeypatch.setattr(dataset_module.coco_mask, "frPyObjects", stopped)
    with pytest.raises(Preempted):
        dataset_module._encode([[0, 0, 4, 0, 4, 4]], 8, 8, "annotation 1")
