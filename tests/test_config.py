"""A run's configuration: its key, which never changes, and what is checked when it is made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from effspinenet_lib.data import DataConfig
from effspinenet_lib.errors import CheckpointError, UnknownName
from effspinenet_lib.results import config_hash
from effspinenet_lib.training import config as module
from effspinenet_lib.training.config import RunConfig, file_digest
from effspinenet_lib.training.recipes import RECIPES, get_recipe

SCENES = DataConfig("shapescenes", train_images=24, eval_images=4, image_size=64)
SMOKE = RunConfig("eff_spinenet_m0", "detection", 64, SCENES, get_recipe("smoke_detection"))
COCO = DataConfig("coco", root="/x")

# Results on users' disks are named by these.
KEYS = {
    "aec182fa6eb0": RunConfig(
        "eff_spinenet_d0",
        "detection",
        512,
        DataConfig("coco", root="/data", train_split="train2017", eval_split="val2017"),
        get_recipe("paper_detection"),
    ),
    "92cc1ce9b407": RunConfig(
        "eff_spinenet_d1", "instances", 640, COCO, get_recipe("paper_instances"), seed=3
    ),
    "175268f99350": RunConfig(
        "eff_spinenet_d0",
        "classification",
        224,
        DataConfig("imagenet", root="/data"),
        get_recipe("paper_classification"),
    ),
    "65f7fa5adb0f": RunConfig(
        "eff_spinenet_d2",
        "segmentation",
        512,
        DataConfig("voc_segmentation", root="/data", train_split="train_aug"),
        get_recipe("paper_segmentation"),
    ),
    "5590cc665710": RunConfig(
        "eff_spinenet_m0",
        "detection",
        128,
        DataConfig("shapescenes"),
        get_recipe("proxy_detection"),
        seed=1,
    ),
    "5f940b745dcc": RunConfig(
        "resnet50_fpn", "detection", 640, COCO, get_recipe("paper_detection_200_epochs")
    ),
    "4a5ebee0c2c4": RunConfig(
        "mobilenetv3_small_ssdlite",
        "detection",
        320,
        DataConfig("voc", root="/d", train_images=10, eval_images=5),
        get_recipe("small_data_detection"),
    ),
    "f670afd0ef89": RunConfig(
        "eff_spinenet_m1",
        "detection",
        256,
        COCO,
        get_recipe("smoke_detection").replace(learning_rate=0.5, ema_decay=0.9),
    ),
    "ece6b3e47949": RunConfig(
        "eff_spinenet_m2", "detection", 320, COCO, get_recipe("paper_detection").scale_to_batch(4)
    ),
    "829071a1ce52": RunConfig(
        "eff_spinenet_m0",
        "detection",
        128,
        COCO,
        get_recipe("small_data_detection").scale_to_steps(100),
    ),
    "3c1fc8a74cbd": RunConfig(
        "eff_spinenet_d0",
        "detection",
        512,
        COCO,
        get_recipe("paper_strategies_baseline"),
        model_options={"space_to_depth": False, "stochastic_depth": 0.1},
    ),
}
# Of a recipe: its own hash, for twice the batch, over 37 steps.
RECIPE_HASHES = {
    "paper_detection": ("14fc8fc2d6c4", "e41293dd9a4c", "0774a7750821"),
    "paper_detection_72_epochs": ("521298258cb6", "72d4d4b8d04d", "ced15128a042"),
    "paper_detection_200_epochs": ("a1b7a4c8fea3", "a635d8f7ad1c", "6112e45d1362"),
    "paper_detection_350_epochs": ("8bb62c8c7ac9", "b1ef785c0433", "f671afd236bc"),
    "paper_detection_500_epochs": ("40fdc22a6ef3", "b5e3b3dbde19", "127e6b9241ed"),
    "paper_detection_250_epochs": ("093ab86b7d07", "d3d2322e9e86", "fbb610b0442a"),
    "paper_strategies_baseline": ("da5289198520", "e1eda4b330a3", "05c2a065d116"),
    "paper_strategies_ms_train": ("fd637fdf305a", "807ffeed39ea", "b46b7fb64396"),
    "paper_strategies_ms_train_250_epochs": ("82d08b3326b4", "b19c0eb87591", "6ce1ed6d6e60"),
    "paper_search_trial": ("8de12f09c4ad", "4c94d193750d", "2871b23c1130"),
    "paper_instances": ("87cb545f1c08", "3abcec2dc7c0", "dabd780c466a"),
    "paper_classification": ("1cf7c3ac7cea", "b89a4072fef3", "17b0a37c6f62"),
    "paper_segmentation": ("d42bf57c7550", "de8d14974de8", "9da626aa2475"),
    "proxy_detection": ("445870ced395", "dc5722343d7c", "1bfb35d1ad86"),
    "proxy_classification": ("b507d17df490", "448f18c213bb", "e2addf549c79"),
    "proxy_segmentation": ("d8583a6823ad", "9edc11dec874", "204bb005846e"),
    "proxy_detection_72_epochs": ("a3d2bb3aee4b", "6d2c037faa73", "fc6d11ba28a8"),
    "proxy_detection_200_epochs": ("dddea043d10e", "8aef6424d722", "666bd8f74a4f"),
    "proxy_detection_350_epochs": ("ba14533a417a", "2ea04bd960f7", "e88947473317"),
    "proxy_detection_500_epochs": ("2bf4ba4e9dca", "8e7dec1d50be", "3f6e5f6c090c"),
    "proxy_detection_650_epochs": ("74b7eec12e08", "63bcee15a723", "18b408ff5022"),
    "proxy_strategies_baseline": ("dc6bb13d002e", "5313ee4ac336", "140bc8c2624a"),
    "proxy_strategies_long": ("c89ed2d4b616", "ce41fb2ebe32", "e2eb79195d87"),
    "proxy_strategies_ms_train": ("07ed90ed5724", "729e7059e417", "b4ff9c4ea1f2"),
    "proxy_strategies_stochastic_depth": ("b5c2df617610", "2ac6f48d38c4", "24dff471cb0d"),
    "small_data_detection": ("081ba8266c7a", "3071a0f654ad", "d80aef2734f9"),
    "small_data_classification": ("260141df48ea", "6c9e92a8266b", "672603b26ef9"),
    "small_data_segmentation": ("c441569fa27f", "bd8c688d2640", "1d8c2492884b"),
    "smoke_detection": ("46841d07d74e", "40b8ee0cd9c4", "97bb806abec4"),
    "proxy_search": ("f3c0221d754c", "77263d8fcdcb", "a5c9fd3e857c"),
    "smoke_search": ("aaca79275afd", "aa5e83fc0a45", "2cb36a6a77a8"),
}


@pytest.mark.parametrize("key", KEYS)
def test_keys_never_change(key: str) -> None:
    assert KEYS[key].key == key
    again = RunConfig.from_dict(json.loads(json.dumps(KEYS[key].to_dict())))
    assert (again.key, again.recipe) == (key, KEYS[key].recipe)


@pytest.mark.parametrize("name", RECIPE_HASHES)
def test_recipes_scaled_or_not_hash_as_ever(name: str) -> None:
    recipe = get_recipe(name)
    scaled = (recipe, recipe.scale_to_batch(2 * recipe.batch_size), recipe.scale_to_steps(37))
    assert tuple(config_hash(one.to_dict()) for one in scaled) == RECIPE_HASHES[name]


def test_every_recipe_is_pinned() -> None:
    assert set(RECIPE_HASHES) == set(RECIPES)


def test_configurations_that_differ_have_different_keys() -> None:
    others = [
        replace(SMOKE, seed=1),
        replace(SMOKE, image_size=128),
        replace(SMOKE, model="eff_spinenet_m1"),
        replace(SMOKE, data=replace(SCENES, seed=1)),
        replace(SMOKE, model_options={"space_to_depth": False}),
        *(replace(SMOKE, recipe=recipe) for recipe in RECIPES.values()),
    ]
    assert len({config.key for config in others}) == len(others)
    assert SMOKE.key in {config.key for config in others}  # smoke_detection is its recipe
    assert replace(SMOKE, model_options={"stochastic_depth": 0.2}).key == SMOKE.key


@pytest.mark.parametrize(
    ("changes", "near"),
    [
        ({"model": "eff_spinenet_m00"}, "eff_spinenet_m0"),
        ({"task": "detections"}, "detection"),
        ({"model_options": {"space_to_dept": True}}, "space_to_depth"),
    ],
)
def test_names_are_checked_when_it_is_made(changes: dict, near: str) -> None:
    with pytest.raises(UnknownName, match=near):
        replace(SMOKE, **changes)


def test_initial_weights_count_by_their_content(tmp_path: Path) -> None:
    paths = {"a": b"weights", "b": b"weights", "c": b"other weights"}
    for name, content in paths.items():
        (tmp_path / name).write_bytes(content)
    first, copied, other = (
        replace(SMOKE, initial_weights=str(tmp_path / name)).key for name in paths
    )
    assert first == copied
    assert len({SMOKE.key, first, other}) == 3
    assert "initial_weights" not in SMOKE.to_dict()
    # what the program sha256sum prints for these bytes
    assert file_digest(str(tmp_path / "a")).startswith("9a129038d9a00aed0cf6a7ea059ca50a")


def test_initial_weights_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    read = []
    monkeypatch.setattr(module, "file_digest", lambda path: read.append(path) or "digest")
    config = replace(SMOKE, initial_weights=str(tmp_path / "weights"))
    assert config.key == config.key
    assert len(read) == 1


def test_missing_initial_weights_are_one_clear_line() -> None:
    with pytest.raises(CheckpointError, match=r"^/nowhere: the initial weights cannot be read"):
        _ = replace(SMOKE, initial_weights="/nowhere").key
