"""The search space, distributions as files, and what is read from a record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import effspinenet_lib as esn
from effspinenet_lib.cli import app
from effspinenet_lib.data import DataConfig
from effspinenet_lib.errors import DataError, UnknownName, UserError
from effspinenet_lib.files import read_json
from effspinenet_lib.models.specs import (
    LARGEST_BETA,
    LEARNED_BETAS,
    MODELS,
    SCALES,
    SEARCH_SPACE,
    backbone_spec,
    betas_text,
    block_multi_adds,
    check_betas,
    parse_betas,
    round_dim,
)
from effspinenet_lib.results import ResultsStore, read_table, validate
from effspinenet_lib.search.export import best_trial, export_distribution
from effspinenet_lib.search.record import equal_betas, plan_betas
from effspinenet_lib.search.running import Penalty
from effspinenet_lib.search.settings import get_search
from effspinenet_lib.search.space import base_dims, detector_costs, round_dims, sample_betas
from effspinenet_lib.search.statements import space_statements, write_statements
from effspinenet_lib.training.recipes import get_recipe
from effspinenet_lib.training.run import RunConfig

PROXY = get_search("proxy")


def dims_of(name: str) -> list[int]:
    return [
        block.feature_dim
        for block in MODELS[
            {"eff_spinenet": "eff_spinenet_d0", "sp_efficientnet": "sp_efficientnet_b0"}[name]
        ].backbone.blocks
    ]


def test_the_papers_betas_give_table_1_and_equal_ones_sp_efficientnet():
    assert base_dims(np.array([LEARNED_BETAS])).tolist() == [dims_of("eff_spinenet_d0")]
    for beta in SEARCH_SPACE:
        assert base_dims(np.full((1, 18), beta)).tolist() == [dims_of("sp_efficientnet_b0")]
    assert [block.feature_dim for block in backbone_spec(LEARNED_BETAS).blocks] == dims_of(
        "eff_spinenet"
    )


@pytest.mark.parametrize("approximate", [False, True])
def test_equation_4_keeps_the_computation_of_the_blocks(approximate: bool):
    """Before rounding; Equation 2 written out here, with and without its depthwise part."""
    betas = sample_betas(50, seed=1)
    base = MODELS["sp_efficientnet_b0"].backbone
    sides = np.array([math.ceil(512 / 2**block.level) for block in base.blocks])
    dims = np.array(dims_of("sp_efficientnet_b0"), float)
    depthwise = 0 if approximate else 9 * dims * 6
    costs = sides**2 * (2 * dims**2 * 6 + depthwise)
    alphas = costs.sum() / (betas @ costs)[:, None] * betas
    np.testing.assert_allclose((alphas * costs).sum(axis=1), costs.sum(), rtol=1e-12)
    wanted = [[round_dim(dim, 8) for dim in row] for row in (np.sqrt(alphas) * dims).tolist()]
    assert base_dims(betas, approximate).tolist() == wanted
    if not approximate:
        np.testing.assert_allclose(costs, block_multi_adds(base, 512))


def test_rounding_is_the_models():
    values = np.random.default_rng(0).uniform(0.5, 700, size=2000)
    for multiple in (4, 8):
        wanted = [round_dim(value, multiple) for value in values]
        assert round_dims(values, multiple).tolist() == wanted


@pytest.mark.parametrize(("scale", "size", "classes"), [("D0", 512, 90), ("M0", 96, 12)])
def test_costs_are_those_of_the_built_model(scale: str, size: int, classes: int):
    betas = np.concatenate([sample_betas(10, seed=2), [LEARNED_BETAS], [equal_betas()]])
    multi_adds, parameters = detector_costs(base_dims(betas), SCALES[scale], classes, size)
    for row, adds, count in zip(betas.tolist(), multi_adds, parameters, strict=True):
        with torch.device("meta"):
            model = esn.create_model(
                f"eff_spinenet_{scale.lower()}", num_classes=classes, betas=betas_text(row)
            )
        cost = esn.measure_cost(model, size)
        assert (cost.multi_adds, cost.parameters) == (adds, count)


def test_costs_with_repeated_layers():
    betas = sample_betas(3, seed=3)
    multi_adds, parameters = detector_costs(base_dims(betas), SCALES["D2"], 90, 768)
    for row, adds, count in zip(betas.tolist(), multi_adds, parameters, strict=True):
        with torch.device("meta"):
            model = esn.create_model("eff_spinenet_d2", betas=betas_text(row))
        cost = esn.measure_cost(model, 768)
        assert (cost.multi_adds, cost.parameters) == (adds, count)


@pytest.mark.parametrize(
    "betas",
    [
        "",
        "1-2",
        "-".join(["1"] * 19),
        "-".join(["0"] * 18),
        "a" * 18,
        "1.5-" * 17 + "1",
        "-".join([str(LARGEST_BETA + 1)] * 18),
        "-".join(["9" * 5000] * 18),
    ],
)
def test_betas_that_are_none_are_refused(betas: str):
    with pytest.raises(UserError, match="betas are"):
        parse_betas(betas)
    if betas:
        with pytest.raises(UserError, match="betas are"):
            esn.create_model("eff_spinenet_m0", betas=betas)


def test_betas_are_bounded_and_the_message_says_by_what():
    extreme = (LARGEST_BETA, *[1] * 17)
    assert check_betas(extreme) == extreme
    assert len(backbone_spec(extreme).blocks) == 18
    for huge in (LARGEST_BETA + 1, 10**400, 10**5000):
        with pytest.raises(UserError, match=f"from 1 to {LARGEST_BETA}") as refused:
            backbone_spec((huge, *[1] * 17))
        assert len(str(refused.value)) < 300


@pytest.fixture
def found(tmp_path: Path) -> Path:
    """The file of a distribution."""
    store = ResultsStore(tmp_path / "results", "smoke")
    store.add_trials(trials([5.0]))
    path = tmp_path / "found.json"
    export_distribution(store, path)
    return path


def trials(rewards: list[float], method: str = "ppo") -> list[dict[str, Any]]:
    drawn = [tuple(row) for row in sample_betas(len(rewards), seed=5).tolist()]
    planned = plan_betas(get_search("smoke"), drawn, method, 0, 0, 0)
    return [
        {**row, "state": "finished", "attempts": 1, "AP": reward, "reward": reward}
        for row, reward in zip(planned, rewards, strict=True)
    ]


def test_a_distribution_stands_for_its_model_wherever_it_lies(found: Path, tmp_path: Path):
    betas = json.loads(found.read_text())["betas"]
    by_file = esn.create_model(str(found), num_classes=3)
    by_name = esn.create_model("eff_spinenet_m0", num_classes=3, betas=betas_text(betas))
    shapes = [
        {name: tuple(value.shape) for name, value in model.state_dict().items()}
        for model in (by_file, by_name)
    ]
    assert shapes[0] == shapes[1]
    moved = found.rename(tmp_path / "moved.json")
    recipe, data = get_recipe("smoke_detection"), DataConfig("shapescenes")
    keys = {
        RunConfig(str(moved), "detection", 64, data, recipe).key,
        RunConfig(
            "eff_spinenet_m0",
            "detection",
            64,
            data,
            recipe,
            model_options={"betas": betas_text(betas)},
        ).key,
    }
    assert len(keys) == 1
    config = RunConfig(str(moved), "detection", 64, data, recipe)
    assert RunConfig.from_dict(config.to_dict()).key == config.key


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"betas": [1, 2]}, DataError, "broken distribution"),
        ({"feature_dims": [8] * 18}, DataError, "its betas give"),
        ({"format": "other"}, DataError, "is no resource distribution"),
        ({"model": "resnet50_fpn"}, UnknownName, "scale-permuted model"),
        ({"betas": [10**400] * 18}, DataError, f"whole numbers from 1 to {LARGEST_BETA}"),
        ({"origin": [1]}, DataError, "its origin is no object"),
        ({"origin": [["a", 1]]}, DataError, "its origin is no object"),
    ],
)
def test_a_file_that_is_no_distribution_is_refused(
    found: Path, change: dict[str, Any], error: type[Exception], message: str
):
    found.write_text(json.dumps({**json.loads(found.read_text()), **change}))
    with pytest.raises(error, match=message):
        esn.create_model(str(found))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"betas": ' + "1" * 5000 + "}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": 1,\n}', r"is not JSON \(line 2, column 1"),
    ],
)
def test_json_that_cannot_be_read_is_said_in_one_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "broken.json"
    path.write_text(text)
    for read in (read_json, esn.create_model):
        with pytest.raises(DataError, match=rf"broken\.json: {message}") as refused:
            read(str(path))
        assert "\n" not in str(refused.value)


def test_a_name_below_a_file_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be read: Not a directory"):
        esn.create_model(str(tmp_path / "file" / "a.json"))


def test_a_distribution_that_is_missing_or_has_betas_beside_it(found: Path, tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        esn.create_model(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="betas of its own"):
        esn.create_model(str(found), betas=betas_text(LEARNED_BETAS))


def test_the_best_trial_is_of_the_highest_reward_and_no_reference(tmp_path: Path):
    store = ResultsStore(tmp_path, "smoke")
    store.add_trials(trials([1.0, 7.0, 3.0]))
    store.add_trials(trials([2.0, 9.0], "random"))
    store.add_trials(trials([99.0], "reference"))
    record = store.trials()
    assert best_trial(record)["reward"] == 9.0
    assert best_trial(record, "ppo")["reward"] == 7.0
    with pytest.raises(UserError, match="no finished trial of evolution"):
        best_trial(record, "evolution")


def test_the_papers_distribution_is_exported_with_what_remains(tmp_path: Path):
    path = tmp_path / "paper.json"
    result = CliRunner().invoke(
        app, ["search", "export", str(path), "--method", "paper", "--results-dir", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert written["betas"] == list(LEARNED_BETAS)
    assert written["feature_dims"] == dims_of("eff_spinenet_d0")
    assert written["origin"]["largest_difference_channels"] == 0
    with torch.device("meta"):
        given = esn.measure_cost(esn.create_model(str(path)), 256)
        own = esn.measure_cost(esn.create_model("eff_spinenet_m0"), 256)
    assert given == own


def test_statements_on_the_space_are_counted_and_valid(tmp_path: Path):
    rows = space_statements(2000, seed=0)
    path = write_statements(tmp_path, rows)
    assert path == tmp_path / "search" / "space.csv"
    frame = read_table(path, "space")
    exact = frame[frame["equation"] == "exact"].set_index("claim")["computed"]
    betas = sample_betas(2000, seed=0)
    multi_adds, parameters = detector_costs(base_dims(betas), SCALES["D0"], 90, 512)
    with torch.device("meta"):
        target = esn.measure_cost(esn.create_model("sp_efficientnet_b0"), 512)
    within = np.abs(multi_adds - target.multi_adds) <= 0.1 * target.multi_adds
    assert exact["multi-adds-within-10-percent"] == pytest.approx(100 * within.mean(), abs=1e-3)
    fewer = 100 * (parameters < target.parameters).mean()
    assert exact["parameters-reduced"] == pytest.approx(fewer, abs=1e-3)
    assert not [problem for problem in validate(tmp_path) if "space.csv" in problem]


def test_the_penalty_is_mnasnets():
    assert Penalty().reward(30.0, 1.3) == 30.0
    assert Penalty(-0.07).reward(30.0, 2.0) == pytest.approx(30.0 * 2.0**-0.07)


def test_held_out_images_are_in_no_split_that_a_table_uses():
    assert PROXY.data.eval_split not in (PROXY.data.train_split, "train", "val")
    assert PROXY.config(LEARNED_BETAS, 0).to_dict()["data"]["eval_split"] == "search"


def test_the_papers_search_is_section_5_1_1s_on_the_users_folder(tmp_path: Path):
    found = get_search("paper").on(tmp_path)
    config = found.config(LEARNED_BETAS, seed=0)
    assert (found.trials, found.model, found.image_size) == (5_000, "eff_spinenet_d0", 512)
    assert (config.data.train_split, config.data.eval_split) == (
        "train2017-rest-7392",
        "train2017-held-7392",
    )
    assert (config.recipe.batch_size, config.recipe.steps) == (256, 4_500)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert get_search("paper").on(elsewhere).config(LEARNED_BETAS, 0).key == config.key
    scaled = get_search("paper").on(tmp_path, batch_size=64).config(LEARNED_BETAS, 0).recipe
    assert (scaled.batch_size, scaled.steps) == (64, 4 * 4_500)
    assert scaled.learning_rate == pytest.approx(0.28 / 4)


def test_a_search_is_refused_on_data_that_it_cannot_take(tmp_path: Path):
    with pytest.raises(UserError, match="name its folder with --data"):
        get_search("paper").on(None)
    with pytest.raises(UserError, match="is none"):
        get_search("paper").on(tmp_path / "missing")
    with pytest.raises(UserError, match="data of its own"):
        get_search("smoke").on(tmp_path)


def test_the_papers_search_on_a_processor_is_refused_with_what_to_do(tmp_path: Path):
    folders = ["--data", str(tmp_path), "--results-dir", str(tmp_path)]
    result = CliRunner().invoke(
        app, ["search", "--profile", "paper", "--accelerator", "cpu", *folders]
    )
    assert result.exit_code != 0
    assert isinstance(result.exception, UserError)
    assert "--micro-batch or --batch-size" in str(result.exception)
