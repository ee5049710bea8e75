"""Checkpoints and weights: exact, whole, and clear about what does not fit."""

from __future__ import annotations

import errno
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import nn

from effspinenet_lib.errors import CheckpointError, UnknownName, UserError
from effspinenet_lib.models.weights import load_into, load_weights, model_card, save_weights
from effspinenet_lib.models.zoo import create_model
from effspinenet_lib.training import checkpoint as module
from effspinenet_lib.training.checkpoint import (
    Checkpoint,
    create_from_weights,
    list_checkpoints,
    load_latest,
    save_checkpoint,
)

RUN, MODEL = "0123456789ab", "eff_spinenet_m0"
METADATA: dict[str, Any] = {
    "image_size": 64,
    "model": MODEL,
    "task": "detection",
    "num_classes": 3,
    "options": {"stochastic_depth": 0.1},
    "categories": [{"id": 7, "name": "cat é"}],
    "metrics": {"AP": 12.25, "AP_L": None},
}


def small_network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return network.to(memory_format=torch.channels_last)


def make_checkpoint(step: int) -> Checkpoint:
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    return Checkpoint(
        run=RUN,
        model=MODEL,
        step=step,
        model_state=network.state_dict(),
        optimizer_state=optimizer.state_dict(),
        curve_state={"sums": {"box": 0.1 + 0.2}, "steps": 3},
        wall_seconds=1.5,
    )


def same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_the_two_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    assert load_latest(tmp_path, RUN, MODEL) is None
    for step in (2, 9, 10, 100):
        save_checkpoint(tmp_path, make_checkpoint(step))
    names = ["checkpoint-100.pt", "checkpoint-10.pt"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    newest = load_latest(tmp_path, RUN, MODEL)
    assert newest is not None
    assert newest.curve_state == {"sums": {"box": 0.1 + 0.2}, "steps": 3}
    assert newest.optimizer_state["state"]


def archive_of(contents: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


class Hostile:
    """An object that would make a folder if unpickling ran it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.target,)


@pytest.mark.parametrize(
    "damage",
    [
        lambda contents: b"",
        lambda contents: contents[:1],
        lambda contents: contents[: len(contents) // 2],
        lambda contents: contents[:-1],
        lambda contents: b"\0" * len(contents),
        lambda contents: b"not a checkpoint",
        lambda contents: pickle.dumps({"format": 1}),
        lambda contents: archive_of({"format": 1}),
    ],
    ids=[
        "empty",
        "one byte",
        "half",
        "last byte",
        "zeros",
        "text",
        "pickle",
        "no keys",
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    before = make_checkpoint(1)
    save_checkpoint(tmp_path, before)
    newest = save_checkpoint(tmp_path, make_checkpoint(2))
    newest.write_bytes(damage(newest.read_bytes()))
    with caplog.at_level(logging.WARNING):
        loaded = load_latest(tmp_path, RUN, MODEL)
    assert loaded is not None
    assert loaded.step == 1
    assert same_state(loaded.model_state, before.model_state)
    (record,) = caplog.records
    assert str(newest) in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    target = tmp_path / "made by the checkpoint"
    torch.save({"format": 1, "run": Hostile(target)}, tmp_path / "checkpoint-1.pt")
    assert load_latest(tmp_path, RUN, MODEL) is None
    assert not target.exists()


def test_a_checkpoint_of_a_later_format_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    save_checkpoint(tmp_path, make_checkpoint(1))
    monkeypatch.undo()
    assert load_latest(tmp_path, RUN, MODEL) is None
    assert "format 2" in caplog.text


@pytest.mark.parametrize(("run", "model"), [(RUN, "eff_spinenet_d0"), ("ffffffffffff", MODEL)])
def test_a_checkpoint_of_another_run_says_whose_it_is(tmp_path: Path, run: str, model: str) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(5))
    with pytest.raises(CheckpointError) as caught:
        load_latest(tmp_path, run, model)
    message = str(caught.value)
    assert str(path) in message
    assert MODEL in message
    assert RUN in message
    assert "\n" not in message


def test_a_full_disk_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, make_checkpoint(1))

    def write_some(contents: Any, handle: Any) -> None:
        handle.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", write_some)
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(tmp_path, make_checkpoint(2))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1.pt"]


def test_weights_are_plain_safetensors(tmp_path: Path) -> None:
    network = small_network()
    state = network.state_dict()
    state["tied"] = state["0.weight"]
    save_weights(tmp_path / "w.safetensors", state, METADATA)
    assert same_state(safetensors.torch.load_file(tmp_path / "w.safetensors"), state)
    loaded, metadata = load_weights(tmp_path / "w.safetensors")
    assert same_state(loaded, state)
    assert metadata == METADATA


def saved_model(tmp_path: Path, **changes: Any) -> tuple[nn.Module, Path]:
    torch.manual_seed(1)
    model = create_model(MODEL, num_classes=3, stochastic_depth=0.1)
    path = tmp_path / "model.safetensors"
    save_weights(path, model.state_dict(), {**METADATA, **changes})
    return model, path


def test_a_model_comes_back_from_its_weights(tmp_path: Path) -> None:
    model, path = saved_model(tmp_path)
    again, _ = create_from_weights(path)
    assert not again.training
    assert same_state(again.state_dict(), model.state_dict())
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, got = model.eval().network(images), again.network(images)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"num_classes": 4}, "class_head.predict"),
        ({"options": {"weighted_fusion": False}}, "fusions"),
        ({"options": {"squeeze_excitation": False}}, "backbone.groups"),
        ({"model": "eff_spinenet_m1"}, "backbone.groups"),
    ],
)
def test_weights_that_do_not_fit_name_the_first_tensor(
    tmp_path: Path, changes: dict[str, Any], tensor: str
) -> None:
    _, path = saved_model(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=tensor) as caught:
        create_from_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    network = small_network()
    state = network.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    del state["3.bias"]
    with pytest.raises(CheckpointError, match=r"3\.bias is missing"):
        load_into(network, {name: value + 1 for name, value in state.items()}, "w")
    assert same_state(network.state_dict(), before)


def test_weights_of_an_unknown_model_list_the_near_names(tmp_path: Path) -> None:
    _, path = saved_model(tmp_path, model="eff_spinenet_m00")
    with pytest.raises(UnknownName, match="eff_spinenet_m0"):
        create_from_weights(path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_weights_cut_short_are_one_clear_error(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, small_network().state_dict(), METADATA)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError) as caught:
        load_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_program_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"metadata lacks .*model"):
        load_weights(path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata={"model": "not json"})
    with pytest.raises(CheckpointError, match="not a complete"):
        load_weights(path)


def test_missing_weights_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such weights file"):
        load_weights(tmp_path / "absent.safetensors")


# --- weights by name, and their card --------------------------------------------------------


@pytest.mark.parametrize("by_hub", [False, True], ids=["library", "torch.hub"])
def test_a_model_by_name_with_its_weights(tmp_path: Path, repository: Path, by_hub: bool) -> None:
    model, path = saved_model(tmp_path)
    if by_hub:
        again = torch.hub.load(str(repository), MODEL, source="local", weights=path)
    else:
        again = create_model(MODEL, weights=path)
    assert same_state(again.state_dict(), model.state_dict())


def test_weights_of_another_model_or_task_are_refused(tmp_path: Path) -> None:
    _, path = saved_model(tmp_path)
    for name, task in (("eff_spinenet_m1", "detection"), (MODEL, "segmentation")):
        with pytest.raises(CheckpointError, match=f"is of {MODEL}, detection, not of {name}"):
            create_model(name, task, weights=path)
    with pytest.raises(CheckpointError, match="class_head"):
        create_model(MODEL, num_classes=4, weights=path)


def test_the_card_says_what_the_weights_say() -> None:
    facts = {
        **METADATA,
        "licence": "Apache-2.0",
        "normalisation": {"mean": [0.5, 0.25, 0.125], "std": [1.0, 1.0, 1.0]},
        "data": {"train": {"name": "dots", "images": 7}, "eval": {"name": "dots", "images": 3}},
        "commit": "abc123",
    }
    card = model_card(facts)
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "effspinenet",
        "pipeline_tag": "object-detection",
        "license": "apache-2.0",
    }
    for part in (
        "64 x 64",
        "0.5, 0.25, 0.125",
        "dots, 7 images",
        "abc123",
        "| AP | 12.25 |",
        "cat é",
    ):
        assert part in card, part
    assert "AP_L" not in card  # there was nothing to measure
    assert "commit" not in model_card(METADATA)
