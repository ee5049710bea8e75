"""Weights files: safetensors with metadata that say what they are, and the card made of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from effspinenet_lib.errors import CheckpointError
from effspinenet_lib.files import atomic_write

logger = logging.getLogger(__name__)

BACKBONE = "backbone."  # prefix of the names of its tensors, in the models of every task
NEEDED_METADATA = {"model", "task", "num_classes", "options", "categories", "image_size"}
LICENCE = "Apache-2.0"  # the library's own; the training data has terms of its own
# The hub's names of the tasks.
PIPELINES = {
    "detection": "object-detection",
    "instances": "image-segmentation",
    "classification": "image-classification",
    "segmentation": "image-segmentation",
}


def save_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write weights as safetensors; each value of `metadata` is stored as JSON.

    Raises:
        UserError: the file cannot be written.
    """
    # safetensors takes dense tensors that share no memory
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    with atomic_write(path, "wb") as handle:
        handle.write(safetensors.torch.save(tensors, metadata=texts))


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict and the metadata of a weights file.

    Raises:
        CheckpointError: the file is missing, cut short or not one that `save_weights` wrote.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {name: json.loads(text) for name, text in texts.items()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is not a complete safetensors weights file ({error}); copy it again, or "
            "rerun the training that wrote it"
        ) from error
    if missing := sorted(NEEDED_METADATA - metadata.keys()):
        raise CheckpointError(
            f"{path}: its metadata lacks {', '.join(missing)}; it was not written by "
            "`effspinenet train`"
        )
    return state, metadata


def load_into(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load a complete state dict into a model; where it does not fit, the model is unchanged.

    Raises:
        CheckpointError: a tensor is missing, of another shape or too many; names the first.
    """
    expected = model.state_dict()
    for name in [*expected, *state]:
        own, given = (list(t[name].shape) if name in t else "missing" for t in (expected, state))
        if own != given:
            raise CheckpointError(f"{origin}: {name} is {given}, the model's is {own}")
    model.load_state_dict(dict(state))


def load_backbone(model: nn.Module, path: str | Path) -> None:
    """Start a model from the weights of another, which may be of another task.

    Taken is every tensor whose name and shape both have: all of the backbone, and of the rest
    what fits.

    Raises:
        CheckpointError: the file cannot be read, or the backbones differ; names the first tensor.
    """
    state, metadata = load_weights(path)
    expected = model.state_dict()
    fitting = {n: t for n, t in state.items() if n in expected and t.shape == expected[n].shape}
    for name in expected:
        if name.startswith(BACKBONE) and name not in fitting:
            raise CheckpointError(
                f"{path} (model {metadata['model']}): its {name} is missing or of another shape; "
                "start from weights of the same backbone"
            )
    model.load_state_dict({**expected, **fitting})
    logger.info("%s: %d of the model's %d tensors taken", path, len(fitting), len(expected))


# --- The card ------------------------------------------------------------------------------------


def model_card(facts: Mapping[str, Any]) -> str:
    """A model card in Markdown from the metadata of a weights file."""
    name, task = facts["model"], facts["task"]
    described = {
        "image size": f"{facts['image_size']} x {facts['image_size']}",
        "classes": facts["num_classes"],
        "options": ", ".join(f"{key}={value}" for key, value in facts["options"].items()),
        "steps": facts.get("steps"),
        "run": facts.get("run"),
        "commit": facts.get("commit"),
        "source": facts.get("source"),
        "licence": facts.get("licence"),
    }
    described |= {
        f"{key} of the normalised pixels, 0 to 1": ", ".join(map(str, values))
        for key, values in facts.get("normalisation", {}).items()
    }
    for part, meaning in (("train", "trained on"), ("eval", "measured on")):
        if data := facts.get("data", {}).get(part):
            described[meaning] = f"{data['name']}, {data['images']} images"
    measured = {
        metric: f"{value:.2f}" for metric, value in facts["metrics"].items() if value is not None
    }
    categories = ", ".join(category["name"] for category in facts["categories"])
    front = {"library_name": "effspinenet", "pipeline_tag": PIPELINES[task]}
    if "licence" in facts:
        front["license"] = facts["licence"].lower()
    return "\n".join(
        [
            "---",
            *(f"{key}: {value}" for key, value in front.items()),
            "---",
            "",
            f"# {name}, {task}",
            "",
            *_table(("", ""), {key: value for key, value in described.items() if value}),
            "",
            "## Metrics",
            "",
            *_table(("metric", "%"), measured),
            "",
            "## Use",
            "",
            "```python",
            "import effspinenet_lib as esn",
            "",
            f'model = esn.create_model("{name}", "{task}", weights="model.safetensors").eval()',
            "```",
            "",
            "## Classes",
            "",
            categories,
            "",
        ]
    )


def _table(columns: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    return [
        f"| {columns[0]} | {columns[1]} |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
