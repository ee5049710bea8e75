"""What the runs of tables and figures would take: images, multiply-adds, memory and hours."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.experiments.cost_table import model_cost
from effspinenet_lib.experiments.items import (
    ITEMS,
    PAPER,
    PROFILES,
    Item,
    Row,
    default_results_dir,
    get_item,
)
from effspinenet_lib.experiments.reproduction import (
    RunParameters,
    planned_runs,
)
from effspinenet_lib.models.base import TaskModel
from effspinenet_lib.models.zoo import create_model
from effspinenet_lib.training.config import RunConfig
from effspinenet_lib.training.recipe import Recipe
from effspinenet_lib.training.recipes import SEARCH_HELD_OUT_IMAGES

# A training step computes the network forwards, the gradients of its activations and those of its
# weights: three times the multiply-adds of an image.
TRAINING_FACTOR = 3
OPERATIONS = 2  # a multiply-add is a multiplication and an addition, as makers of devices count
OWN, SEARCH, QUOTED = "own", "search", "quoted"  # kinds of runs
MEASURED_STEPS = 100  # our choice: a shorter run says little about its speed
WEIGHT_BYTES = 4  # weights, gradients and the optimizer's state are float32 at every precision
# Numbers that an optimizer keeps for each weight: its momentum, RMSProp the mean of squares too.
OPTIMIZER_NUMBERS = {"sgd": 1, "rmsprop": 2, "adamw": 2}

SEARCH_ITEM = "figure-05"
SEARCH_TRIALS = 5_000  # paper 5.1.1: about 5k architectures are sampled
SEARCH_ROW = Row(
    f"sampled architectures, without {SEARCH_HELD_OUT_IMAGES:,} images",
    "eff_spinenet_d0",  # paper 5.1.1: SP-EfficientNet-B0 at 512
    recipes={PAPER: "paper_search_trial"},
)
# A device -> 1e12 operations a second of dense matrix products in bfloat16 (float16 where there is
# no bfloat16) by its maker's figure: NVIDIA's data sheets of the V100 (SXM2), A100 and H100 (SXM),
# Google Cloud's TPU documentation for a chip.
DEVICES = {"v100": 125, "a100": 312, "h100": 989, "tpu-v3": 123, "tpu-v4": 275}
DEFAULT_DEVICE = "tpu-v3"  # paper 5.1.1: Cloud TPU v3
# Our choice, not measured: networks of depthwise convolutions move more than they compute and reach
# a few percent of such a figure. A measured throughput replaces it.
ASSUMED_SHARE = 0.02
COLUMNS = [
    *("item", "row", "model", "task", "seed", "kind", "runs", "state", "steps", "batch"),
    *("images", "multi_adds", "memory", "memory_image", "images_per_second", "throughput", "hours"),
]


@dataclass(frozen=True)
class Throughput:
    """Training images a second that no run measured.

    Attributes:
        images_per_second: stated, the same for every run; None takes the device's.
        device: of `DEVICES`.
        devices: so many of them, their rates added up.

    Raises:
        UnknownName: no such device.
        UserError: a number is not positive.
    """

    images_per_second: float | None = None
    device: str = DEFAULT_DEVICE
    devices: int = 1

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise UnknownName("device", self.device, DEVICES)
        if self.devices < 1 or (self.images_per_second is not None and self.images_per_second <= 0):
            raise UserError("images per second and devices must be positive")

    def of(self, multi_adds: int) -> tuple[float, str]:
        """Images a second of a model with so many forward multiply-adds, and where that is from."""
        if self.images_per_second is not None:
            return self.images_per_second, "stated"
        peak = DEVICES[self.device] * 1e12 * self.devices
        return peak * ASSUMED_SHARE / (OPERATIONS * TRAINING_FACTOR * multi_adds), "assumed"


def plan(
    items: Iterable[str] = tuple(ITEMS),
    profile: str = PAPER,
    results_dir: Path | None = None,
    data_root: Path | None = None,
    throughput: Throughput | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """What the runs of items take that are not finished yet; nothing is run or written.

    Rows that share a run count once, with the first item that needs it. Rows that the profile does
    not train are left out.

    Args:
        items: ids; those that train nothing are passed over.
        profile: `smoke`, `proxy` or `paper`.
        results_dir: whose finished and partial runs count; default the checkout's.
        data_root: the data folder; only the names of its splits matter.
        throughput: of every run; None takes what recorded runs of the same model, task and image
            size measured, and where there is none assumes the paper's device.
        progress: show a bar where stderr is a terminal.

    Returns:
        One row a run: `item`, `row`, `model`, `task`, `seed`, `kind` (own; search: the samples of
        the search; quoted: the paper quotes its numbers), `runs`, `state` (missing or partial),
        `steps` (left), `batch`, `images` (left, repeats counted), `multi_adds` (of those images,
        training), `memory` (bytes for the batch on one device), `memory_image` (bytes of one more
        image), `images_per_second`, `throughput` (measured, stated or assumed), `hours`.

    Raises:
        UnknownName: no such item or profile.
    """
    if profile not in PROFILES:
        raise UnknownName("profile", profile, PROFILES)
    chosen = PROFILES[profile]
    folder = results_dir or default_results_dir()
    parameters = RunParameters(chosen, data_root, folder, chosen.seeds)
    recorded = parameters.store.runs()
    needed: dict[str, tuple[Item, Row, RunConfig]] = {}
    for item in map(get_item, items):
        if item.id == SEARCH_ITEM and profile == PAPER:
            item = replace(item, rows=(SEARCH_ROW,))
        for run in planned_runs(item, parameters):
            needed.setdefault(run.config.key, (item, run.row, run.config))
    found = [
        _planned(item, row, config, recorded, throughput)
        for item, row, config in tqdm(needed.values(), "plan", disable=None if progress else True)
    ]
    return pd.DataFrame([row for row in found if row], columns=COLUMNS)


def _planned(
    item: Item,
    row: Row,
    config: RunConfig,
    recorded: pd.DataFrame,
    throughput: Throughput | None,
) -> dict[str, Any] | None:
    """The row of a run; None where it is finished."""
    recipe, searched = config.recipe, row is SEARCH_ROW
    done = 0 if searched else _steps_done(config, recorded)
    if done >= recipe.steps:
        return None
    size, options = config.image_size, tuple(row.options.items())
    cost = model_cost(config.model, config.task, size, options)
    image = model_activations(config.model, config.task, size, options)
    measured = _measured_rate(config, recorded) if throughput is None else None
    rate, origin = measured or (throughput or Throughput()).of(cost.multi_adds)
    steps, runs = recipe.steps - done, SEARCH_TRIALS if searched else 1
    images = steps * recipe.batch_size * runs
    return {
        "item": item.id,
        "row": row.label,
        "model": config.model,
        "task": config.task,
        "seed": config.seed,
        "kind": SEARCH if searched else QUOTED if row.quoted else OWN,
        "runs": runs,
        "state": "partial" if done else "missing",
        "steps": steps,
        "batch": recipe.batch_size,
        "images": images,
        "multi_adds": TRAINING_FACTOR * cost.multi_adds * images,
        "memory": fixed_bytes(cost.parameters, recipe) + recipe.batch_size * image,
        "memory_image": image,
        "images_per_second": rate,
        "throughput": origin,
        "hours": images / rate / 3600,
    }


def _steps_done(config: RunConfig, recorded: pd.DataFrame) -> int:
    rows = recorded[recorded["run"] == config.key]
    return int(rows["steps"].max()) if len(rows) else 0


def _measured_rate(config: RunConfig, recorded: pd.DataFrame) -> tuple[float, str] | None:
    """The median speed of recorded runs of the same model, task and image size."""
    sizes = recorded["config"].map(lambda text: json.loads(text)["image_size"])
    same = recorded[
        (recorded["model"] == config.model)
        & (recorded["task"] == config.task)
        & (sizes == config.image_size)
        & (recorded["steps"] >= MEASURED_STEPS)
    ]
    rates = same["images_per_second"].dropna()
    return None if rates.empty else (float(rates.median()), "measured")


def fixed_bytes(parameters: int, recipe: Recipe) -> int:
    """Bytes that training takes whatever the batch: weights, gradients, optimizer, average.

    With `activation_bytes` an image it is an estimate in float32. Left out: losses and targets,
    two-stage heads beyond the proposals of one evaluation, gradients of activations, work space of
    convolutions, what the allocator wastes, and the loader. In bfloat16 the activations take about
    half.

    Args:
        parameters: trained numbers of the model.
        recipe: names the optimizer and the average.
    """
    kept = 2 + OPTIMIZER_NUMBERS[recipe.optimizer] + (recipe.ema_decay is not None)
    return WEIGHT_BYTES * kept * parameters


def activation_bytes(model: TaskModel, image_size: int) -> int:
    """Bytes that autograd keeps for the backward pass of each image, each storage once.

    On the meta device nothing is computed. Two images are counted and halved: one alone is too
    few for norms of features of one pixel. The model's mode is restored.
    """
    known = {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    was_training = model.training
    device = next(model.parameters()).device
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.train().network(torch.zeros(2, 3, image_size, image_size, device=device))
    finally:
        model.train(was_training)
    return sum(storage.nbytes() for storage in saved.values()) // 2


@cache
def model_activations(
    model: str, task: str, image_size: int, options: tuple[tuple[str, Any], ...]
) -> int:
    """`activation_bytes` of a model by its name, task, image size and options."""
    with torch.device("meta"):
        built = create_model(model, task, **dict(options))
    return activation_bytes(built, image_size)


def totals(planned: pd.DataFrame) -> pd.DataFrame:
    """Sums of `runs`, `images`, `multi_adds` and `hours` over a plan.

    Indexed by `own`, `search`, `quoted` and `all`.
    """
    columns = ["runs", "images", "multi_adds", "hours"]
    parts = {kind: planned[planned["kind"] == kind] for kind in (OWN, SEARCH, QUOTED)}
    return pd.DataFrame(
        {name: part[columns].sum() for name, part in {**parts, "all": planned}.items()}
    ).T
