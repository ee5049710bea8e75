"""What the runs of tables and figures would take: images, Multi-Adds, memory and hours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from effspinenet_lib.errors import CheckpointError, UnknownName, UserError
from effspinenet_lib.experiments.items import ITEMS, PAPER, PROFILES, Item, Row
from effspinenet_lib.experiments.memory import activation_bytes, training_memory
from effspinenet_lib.experiments.parameters import Parameters, default_results_dir
from effspinenet_lib.experiments.reproduction import configure_row, has_recipe
from effspinenet_lib.models.cost import Cost, measure_cost
from effspinenet_lib.models.zoo import create_model
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.search.settings import get_search
from effspinenet_lib.training.config import RunConfig
from effspinenet_lib.training.devices import CPU
from effspinenet_lib.training.recipes import SEARCH_HELD_OUT_IMAGES

# A training step computes the network forwards, the gradients of its activations and those of its
# weights: three times the Multi-Adds of an image.
TRAINING_FACTOR = 3
OPERATIONS = 2  # a Multi-Add is a multiplication and an addition, as the makers of devices count
OWN, SEARCH, CARRIED = "own", "search", "carried"  # kinds of runs
MEASURED_STEPS = 100  # our choice: a shorter run says little about its speed
SEARCH_ITEM, SEARCH_SETTINGS = "figure-05", get_search(PAPER)
SEARCH_ROW = Row(
    f"sampled architectures, without {SEARCH_HELD_OUT_IMAGES:,} images", SEARCH_SETTINGS.model, ""
)


@dataclass(frozen=True)
class Device:
    """A device whose throughput is not measured but assumed from its maker's figure.

    Attributes:
        name: how it is asked for.
        tera_operations: 1e12 operations a second of dense matrix products in bfloat16 (float16
            where there is no bfloat16), one device.
        source: of that figure.
    """

    name: str
    tera_operations: float
    source: str


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("v100", 125, "NVIDIA's data sheet of the V100 (SXM2), tensor cores, float16"),
        Device("a100", 312, "NVIDIA's data sheet of the A100, bfloat16, dense"),
        Device("h100", 989, "NVIDIA's data sheet of the H100 (SXM), bfloat16, dense"),
        Device("tpu-v3", 123, "Google Cloud's TPU documentation, a chip, bfloat16"),
        Device("tpu-v4", 275, "Google Cloud's TPU documentation, a chip, bfloat16"),
    )
}
DEFAULT_DEVICE = "tpu-v3"  # paper 5.1.1: Cloud TPU v3
# Our choice, and no measurement: networks of depthwise convolutions move more than they compute and
# reach a few percent of such a figure. A measured throughput wins over it.
ASSUMED_SHARE = 0.02


@dataclass(frozen=True)
class Throughput:
    """Training images a second that no run measured.

    Attributes:
        images_per_second: stated, the same for every run; None takes the device's.
        device: of `DEVICES`.
        devices: so many of them, their rates added up.
    """

    images_per_second: float | None = None
    device: str = DEFAULT_DEVICE
    devices: int = 1

    def __post_init__(self) -> None:
        """Refuse what no run can have.

        Raises:
            UnknownName: no such device.
            UserError: a number is not positive.
        """
        if self.device not in DEVICES:
            raise UnknownName("device", self.device, DEVICES)
        if self.devices < 1 or (self.images_per_second is not None and self.images_per_second <= 0):
            raise UserError("images per second and devices must be positive")

    def of(self, multi_adds: int) -> tuple[float, str]:
        """Images a second of a model with so many forward Multi-Adds, and where that is from."""
        if self.images_per_second is not None:
            return self.images_per_second, "stated"
        peak = DEVICES[self.device].tera_operations * 1e12 * self.devices
        operations = OPERATIONS * TRAINING_FACTOR * multi_adds
        return peak * ASSUMED_SHARE / operations, "assumed"


@dataclass(frozen=True)
class _Entry:
    """A run of the plan, with the rows that share it."""

    item: Item
    row: Row
    config: RunConfig
    runs: int = 1


def plan(
    items: Iterable[str] = tuple(ITEMS),
    profile: str = PAPER,
    results_dir: Path | None = None,
    data_root: Path | None = None,
    seeds: tuple[int, ...] = (),
    throughput: Throughput | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """What the runs of items take that are not finished yet, nothing run and nothing written.

    Rows that share a run count once, with the first item that needs it. Rows without a recipe in
    the profile are left out.

    Args:
        items: ids; those that train nothing are passed over.
        profile: `smoke`, `proxy` or `paper`.
        results_dir: whose finished and partial runs count; default the checkout's.
        data_root: the data folder; only its parts' names matter.
        seeds: one run a seed; default the profile's own.
        throughput: of every run; None takes what recorded runs of the same model, task and image
            size measured, and where there is none assumes the paper's device.
        progress: show a bar where stderr is a terminal.

    Returns:
        One row a run: `item`, `row`, `model`, `task`, `seed`, `kind` (own; search: the samples of
        the search; carried: the paper took its numbers over), `runs`, `state` (missing or
        partial), `steps` (left), `batch`, `images` (left, repeats counted), `multi_adds` (of those
        images, training), `memory` (bytes for the batch on one device), `memory_image` (bytes of
        one more image), `images_per_second`, `throughput` (measured, stated or assumed), `hours`.

    Raises:
        UnknownName: no such item, profile or device.
    """
    if profile not in PROFILES:
        raise UnknownName("profile", profile, PROFILES)
    chosen = PROFILES[profile]
    folder = results_dir or default_results_dir()
    parameters = Parameters(chosen, data_root, folder, CPU, 1, seeds or chosen.seeds, False)
    store = ResultsStore(folder, profile)
    recorded = store.runs()
    rows: list[dict[str, Any]] = []
    seen: set[tuple[Any, ...]] = set()
    entries = [entry for name in items for entry in _entries(name, parameters)]
    for entry in tqdm(entries, "plan", disable=None if progress else True):
        identity = _identity(entry.config)
        if identity not in seen:
            seen.add(identity)
            rows.extend(_planned(entry, recorded, throughput))
    return pd.DataFrame(rows, columns=COLUMNS)


COLUMNS = [
    *("item", "row", "model", "task", "seed", "kind", "runs", "state", "steps", "batch"),
    *("images", "multi_adds", "memory", "memory_image", "images_per_second", "throughput", "hours"),
]


def _entries(name: str, parameters: Parameters) -> Iterator[_Entry]:
    if name not in ITEMS:
        raise UnknownName("item", name, ITEMS)
    item, profile = ITEMS[name], parameters.profile
    for seed in parameters.seeds:
        for row in item.rows:
            if has_recipe(row, profile):
                yield _Entry(item, row, configure_row(item, row, parameters, seed))
    if name == SEARCH_ITEM and profile.name == PAPER:
        config = configure_row(item, SEARCH_ROW, parameters, parameters.seeds[0])
        data = replace(
            config.data,
            train_split=SEARCH_SETTINGS.data.train_split,
            eval_split=SEARCH_SETTINGS.data.eval_split,
        )
        trial = replace(config, recipe=SEARCH_SETTINGS.recipe, data=data)
        yield _Entry(item, SEARCH_ROW, trial, SEARCH_SETTINGS.trials)


def _identity(config: RunConfig) -> tuple[Any, ...]:
    """What tells runs apart, whether the weights that they start from are there or not."""
    return replace(config, initial_weights=None).key, config.initial_weights


def _planned(
    entry: _Entry, recorded: pd.DataFrame, throughput: Throughput | None
) -> Iterator[dict[str, Any]]:
    """The row of a run; none where it is finished."""
    config, recipe = entry.config, entry.config.recipe
    done = _steps_done(config, recorded)
    if done >= recipe.steps:
        return
    # drop rates change neither
    options = tuple(sorted(entry.row.options.items()))
    cost, activations = _measure(config.model, config.task, config.image_size, options)
    memory = training_memory(cost.parameters, activations, recipe)
    measured = _measured_rate(config, recorded) if throughput is None else None
    rate, origin = measured or (throughput or Throughput()).of(cost.multi_adds)
    steps = recipe.steps - done
    images = steps * recipe.batch_size * entry.runs
    yield {
        "item": entry.item.id,
        "row": entry.row.label,
        "model": config.model,
        "task": config.task,
        "seed": config.seed,
        "kind": _kind(entry),
        "runs": entry.runs,
        "state": "partial" if done else "missing",
        "steps": steps,
        "batch": recipe.batch_size,
        "images": images,
        "multi_adds": TRAINING_FACTOR * cost.multi_adds * images,
        "memory": memory.of(recipe.batch_size),
        "memory_image": memory.image,
        "images_per_second": rate,
        "throughput": origin,
        "hours": images / rate / 3600,
    }


def _kind(entry: _Entry) -> str:
    if entry.row is SEARCH_ROW:
        return SEARCH
    return CARRIED if entry.row.carried else OWN


@cache
def _measure(
    model: str, task: str, image_size: int, options: tuple[tuple[str, Any], ...]
) -> tuple[Cost, int]:
    """The cost of a model with the paper's number of classes, and its `activation_bytes`."""
    with torch.device("meta"):
        built = create_model(model, task, **dict(options))
    return measure_cost(built, image_size), activation_bytes(built, image_size)


def _steps_done(config: RunConfig, recorded: pd.DataFrame) -> int:
    try:
        rows = recorded[recorded["run"] == config.key]
    except CheckpointError:  # the run that it starts from has not been trained
        return 0
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


def totals(planned: pd.DataFrame) -> pd.DataFrame:
    """Sums of `runs`, `images`, `multi_adds` and `hours` over a plan.

    Indexed by `own`, `search`, `carried` and `all`.
    """
    columns = ["runs", "images", "multi_adds", "hours"]
    parts = {kind: planned[planned["kind"] == kind] for kind in (OWN, SEARCH, CARRIED)}
    return pd.DataFrame(
        {name: part[columns].sum() for name, part in {**parts, "all": planned}.items()}
    ).T
