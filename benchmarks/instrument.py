"""What the proxy profile can see: the runs that chose its recipe and measure its precision.

    python -m benchmarks.instrument run rate --processes 2   # what is missing of a study
    python -m benchmarks.instrument list                     # the studies and their runs
    python -m benchmarks.instrument sheet                    # the rows that sum them up

Every run of every study is a row of `results/proxy/instrument.csv`, the bad ones too. A study is
data below: what is changed from where, on which seeds. Seeds from `TUNING_SEED` up chose the
recipe; no result uses them.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from scipy import optimize, stats

from effspinenet_lib.data import classes_of, open_dataset
from effspinenet_lib.data.augment import Augmentation
from effspinenet_lib.data.loader import training_loader
from effspinenet_lib.experiments.items import PROFILES, PROXY, PROXY_DATA
from effspinenet_lib.experiments.launcher import LOCAL, open_pool, run_many
from effspinenet_lib.files import read_json, write_json
from effspinenet_lib.models.specs import (
    LEARNED_BETAS,
    MODELS,
    SCALES,
    ModelSpec,
    Scale,
    betas_text,
)
from effspinenet_lib.models.zoo import create_model
from effspinenet_lib.report.statistics import (
    CONFIDENCE,
    LEAST_SEEDS,
    difference,
    t_quantile,
)
from effspinenet_lib.report.tables import SMALLEST_DIFFERENCE
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.results.paper import RESULTS_DIR
from effspinenet_lib.results.tables import read_table, upsert
from effspinenet_lib.search.space import sample_betas
from effspinenet_lib.training.config import RunConfig
from effspinenet_lib.training.evaluate import coco_metrics
from effspinenet_lib.training.loop import freeze_norms
from effspinenet_lib.training.recipe import Recipe
from effspinenet_lib.training.recipes import EVALUATION_BATCH, get_recipe
from effspinenet_lib.training.run import PREDICTIONS, WEIGHTS

INSTRUMENT = RESULTS_DIR / "proxy" / "instrument.csv"
SHEET, PRECISION = "sheet", "precision"
RUNS_DIR = ResultsStore(RESULTS_DIR, PROXY).runs_folder  # the tables' runs are found there too
REFERENCE = "eff_spinenet_m0"
TUNING_SEED = 100
KEPT_METRICS = ("AP", "AP50", "AP_S", "AP_M", "AP_L", "top1", "mIOU", "AP_mask")
CPU_FILE, LOSS_FILE = "cpu.json", "loss.json"
BOOTSTRAPS = 200
POWER_REPETITIONS, LARGEST_DIFFERENCE = 20_000, 30.0  # in standard deviations of a row
POWER = 0.8  # chance to see the smallest difference that a design is said to see

# Where the tuning started: the first measurements with AdamW, made on an earlier network. The batch
# is 16: below that, on one thread, torch takes a path for 1x1 convolutions that costs half as much
# again for each image.
START = {
    "steps": 1_200,
    "batch_size": 16,
    "optimizer": "adamw",
    "momentum": 0.9,
    "optimizer_decay": 0.99,
    "optimizer_epsilon": 1e-8,
    "learning_rate": 0.016,
    "weight_decay": 1e-4,
    "schedule": "cosine",
    "lr_drops": (),
    "warmup_steps": 100,
    "scale_jitter": (0.8, 1.25),
    "clip_gradient_norm": 5.0,
    "ema_decay": 0.99,
    "norm_momentum": 0.97,
    "norm_freeze_steps": 0,
    "renorm_values": 0,
    "stochastic_depth": 0.0,
    "precision": "float32",
}


@dataclass(frozen=True)
class Trial:
    """Runs of one setting.

    Attributes:
        label: what is changed.
        seeds: one run a seed.
        changes: of the recipe, from `base`.
        model: that is trained.
        task: of the model.
        image_size: in pixels.
        options: of `create_model`.
        base: settings of `proxy_detection` that are changed before `changes`.
    """

    label: str
    seeds: tuple[int, ...] = (TUNING_SEED,)
    changes: Mapping[str, Any] = field(default_factory=dict)
    model: str = REFERENCE
    task: str = "detection"
    image_size: int = 128
    options: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=lambda: START)

    @property
    def recipe(self) -> Recipe:
        """The recipe of its runs."""
        return get_recipe(PROFILES[PROXY].recipes[self.task]).replace(
            **{**self.base, **self.changes}
        )

    def configs(self) -> Iterator[RunConfig]:
        """Its runs."""
        for seed in self.seeds:
            yield RunConfig(
                self.model,
                self.task,
                self.image_size,
                PROXY_DATA,
                self.recipe,
                seed,
                dict(self.options),
            )


def _start(label: str, seeds: tuple[int, ...] = (TUNING_SEED,), **changes: Any) -> Trial:
    """`START` at its best rate, and what is changed of it."""
    return Trial(label, seeds, {"learning_rate": 0.03, **changes})


def _precision(base: Mapping[str, Any]) -> tuple[Trial, ...]:
    plain = {"squeeze_excitation": False, "activation": "relu"}
    return (
        Trial("the reference", SEEDS, base=base),
        Trial(VARIANT, SEEDS, options=plain, base=base),
        Trial(HALF, SEEDS, model=HALF_MODEL.name, base=base),
    )


def _first_steps(label: str, **changes: Any) -> Trial:
    seeds = tuple(range(TUNING_SEED, TUNING_SEED + 4))
    return Trial(label, seeds, {"steps": 500, "schedule": "step", **changes}, base=BEFORE)


# A family whose best rate is another than the reference's gets its own recipe.
RATE_FACTORS = (0.5, 1.0, 2.0)
FAMILIES = (
    ("sp_efficientnet_m0", "detection", 128),
    ("efficientnet_b0_fpn", "detection", 128),
    ("efficientdet_d0", "detection", 128),
    ("mobilenetv3_small_ssdlite", "detection", 160),
    (REFERENCE, "instances", 128),
    (REFERENCE, "classification", 64),
    (REFERENCE, "segmentation", 128),
)
# A model that is worse on purpose, a variant of the reference (Table 4 without two of its gains),
# and the reference twice: what the instrument must, may and must not tell apart.
HALF, AGAIN = "half the channels", "the reference again, other seeds"
VARIANT = "ReLU, no squeeze-and-excitation"
HALF_SCALE = Scale("M0/2", 256, 0.2, 1.0, head_dim=12)
HALF_MODEL = ModelSpec("eff_spinenet_m0_half", LEARNED_BETAS, HALF_SCALE.id)
BEFORE = {"renorm_values": 128}  # what the recipe had before a run ran away
SEEDS, OTHER_SEEDS = tuple(range(5)), tuple(range(5, 10))
SEARCH_SEEDS, SEARCH_SAMPLES = (0, 1, 2), 12
SEARCH_STEPS = (100, 200, 400)


def _families() -> Iterator[Trial]:
    for model, task, size in FAMILIES:
        for factor in RATE_FACTORS:
            rate = get_recipe(PROFILES[PROXY].recipes[task]).learning_rate * factor
            yield Trial(
                f"learning_rate {rate:g}",
                changes={"learning_rate": rate},
                model=model,
                task=task,
                image_size=size,
                base={},
            )


def _distributions(steps: int) -> Iterator[Trial]:
    """Random distributions, as random search draws them, trained for so many steps."""
    full = get_recipe("proxy_detection")
    short = full.scale_to_steps(steps)
    changes = {"steps": steps, "warmup_steps": short.warmup_steps}
    for number, betas in enumerate(sample_betas(SEARCH_SAMPLES, seed=TUNING_SEED)):
        text = betas_text(tuple(betas.tolist()))
        yield Trial(f"{number}: {text}", SEARCH_SEEDS, changes, options={"betas": text}, base={})


@cache
def studies() -> dict[str, tuple[Trial, ...]]:
    """All studies by name."""
    full = get_recipe("proxy_detection").steps
    return {
        "weight decay": (
            _start("weight_decay 0.02", (TUNING_SEED, TUNING_SEED + 1), weight_decay=0.02),
        ),
        "renormalisation": (
            _start("renorm_values 128", (TUNING_SEED, TUNING_SEED + 1), renorm_values=128),
        ),
        "longer": tuple(
            _start(f"renorm_values 128, steps {steps}", seeds, renorm_values=128, steps=steps)
            for steps, seeds in ((2_400, (TUNING_SEED, TUNING_SEED + 1)), (1_800, (TUNING_SEED,)))
        ),
        # The first 500 steps alone, at a constant rate: do seeds come apart in them?
        "first steps": (
            _first_steps("as the recipe"),
            _first_steps("warmup_steps 300", warmup_steps=300),
            _first_steps("clip_gradient_norm 1.0", clip_gradient_norm=1.0),
        ),
        "rate": tuple(
            Trial(f"learning_rate {rate:g}", changes={"learning_rate": rate}, base=BEFORE)
            for rate in (0.015, 0.06)  # 0.03 is in the study of lengths
        ),
        # Half the channels, seed 3, ran away in evaluation: what prevents that, and what it costs.
        "running away": tuple(
            Trial(f"{name} {value}", (3,), {name: value}, model=HALF_MODEL.name, base=BEFORE)
            for name, value in (("norm_freeze_steps", 480), ("renorm_values", 2_048))
        ),
        "more renormalised": (
            Trial("renorm_values 2048", tuple(range(TUNING_SEED, TUNING_SEED + 4)), base={}),
        ),
        "jitter": (
            _start(
                "renorm_values 128, scale_jitter 1",
                (TUNING_SEED, TUNING_SEED + 1),
                renorm_values=128,
                scale_jitter=(1.0, 1.0),
            ),
        ),
        PRECISION: _precision({}),
        f"{PRECISION}, renorm_values 128": _precision(BEFORE),
        "other seeds": (Trial(AGAIN, OTHER_SEEDS, base={}),),
        "families": tuple(_families()),
        **{
            f"distributions, {steps} steps": tuple(_distributions(steps))
            for steps in (*SEARCH_STEPS, full)
        },
    }


def add_half_model() -> None:
    """Make the model of half the channels known to this process; no user needs it."""
    SCALES[HALF_SCALE.id], MODELS[HALF_MODEL.name] = HALF_SCALE, HALF_MODEL


def train(config: dict[str, Any], runs_dir: str, **options: Any) -> None:
    """Train a run as `launcher.train` does, and keep the CPU time that it took."""
    from effspinenet_lib.training.run import train_run

    add_half_model()
    run = RunConfig.from_dict(config)
    path = Path(runs_dir) / run.key / CPU_FILE
    spent = read_json(path)["seconds"] if path.exists() else 0.0
    try:
        train_run(run, runs_dir, progress=False, **options)
        if run.task == "detection":
            write_json(path.with_name(LOSS_FILE), {"loss": _evaluation_loss(run, path.parent)})
    finally:
        write_json(path, {"seconds": spent + time.process_time()})


def _evaluation_loss(run: RunConfig, folder: Path) -> float:
    """The training loss of a run's weights on the evaluation images, without augmentation."""
    dataset = open_dataset(run.data, "eval", run.task)
    model = create_model(run.model, run.task, classes_of(dataset, run.task), **run.options)
    model.load_state_dict(load_file(folder / WEIGHTS))
    freeze_norms(model.train())
    plain = Augmentation((1.0, 1.0), 0.0)
    steps = len(dataset) // EVALUATION_BATCH
    batches = training_loader(
        dataset, run.image_size, EVALUATION_BATCH, plain, 0, 0, steps, task=run.task
    )
    with torch.no_grad():
        losses = [sum(model(one.images, one.targets).values()).item() for one in batches]
    return sum(losses) / len(losses)


def run_studies(names: Sequence[str], processes: int, runs_dir: Path = RUNS_DIR) -> None:
    """Train what has no rows yet of the studies, and add a run's as soon as it has ended.

    A run has one thread, however few run at once, so that its cost in CPU time is comparable.
    """
    known = read_table(INSTRUMENT, "instrument")
    measured = set(zip(known["study"], known["setting"], known["run"], strict=True))
    trials: dict[str, list[tuple[str, Trial, RunConfig]]] = {}
    for name in names:
        for trial in studies()[name]:
            for config in trial.configs():
                if (name, trial.label, config.key) not in measured:
                    trials.setdefault(config.key, []).append((name, trial, config))
    os.environ["OMP_NUM_THREADS"] = "1"
    with open_pool(LOCAL, processes, "cpu") as pool:
        configs = [wanted[0][2] for wanted in trials.values()]
        for outcome in run_many(configs, runs_dir, pool, function=f"{__spec__.name}:train"):
            for name, trial, config in trials[outcome.config.key]:
                label = f"{name}: {trial.label}, seed {config.seed}"
                if outcome.result is None:
                    print(f"{label}: {outcome.error}", flush=True)
                    continue
                rows = list(_rows(name, trial, config, outcome.result, runs_dir))
                upsert(INSTRUMENT, "instrument", rows, f"run {config.key}")
                shown = ", ".join(f"{row['metric']} {row['value']:.1f}" for row in rows)
                print(f"{label}: {shown}", flush=True)


def _rows(
    study: str, trial: Trial, config: RunConfig, result: Any, runs_dir: Path
) -> Iterator[dict[str, Any]]:
    """Rows of a run: its metrics, and the minutes of CPU that it took."""
    common = {
        "study": study,
        "setting": trial.label,
        "model": trial.model,
        "task": trial.task,
        "image_size": trial.image_size,
        "seed": config.seed,
        "steps": result.steps,
        "run": result.key,
        "commit": result.record["commit"],
        "date": result.record["date"],
    }
    for metric in KEPT_METRICS:
        if metric in result.metrics:
            yield {**common, "metric": metric, "value": result.metrics[metric], "unit": "%"}
    loss = runs_dir / result.key / LOSS_FILE
    if loss.exists():
        value = read_json(loss)["loss"]
        yield {**common, "metric": "evaluation_loss", "value": round(value, 5), "unit": "1"}
    minutes = read_json(runs_dir / result.key / CPU_FILE)["seconds"] / 60
    yield {**common, "metric": "cpu_minutes", "value": round(minutes, 2), "unit": "min"}


def sheet(runs_dir: Path = RUNS_DIR, study: str = PRECISION) -> list[dict[str, Any]]:
    """The rows that sum up the runs of a study of precision: the data sheet."""
    measured = read_table(INSTRUMENT, "instrument")
    measured = measured[measured["seed"].notna()]
    runs = measured[measured["study"].isin([study, "other seeds"])]
    values = {
        (setting, metric): own.set_index("seed")["value"]
        for (setting, metric), own in runs.groupby(["setting", "metric"])
    }
    reference = values["the reference", "AP"]
    again = values.get((AGAIN, "AP"), pd.Series(dtype=float))
    every = pd.concat([reference, again])
    rows = [_summary("AP of the reference, mean over seeds", every.mean(), "%")]
    rows.append(_summary("seeds of the reference", len(every)))
    spread = sd_interval(every)
    rows.append(_summary("AP of the reference, sd over seeds", spread, "%"))
    variant = values[VARIANT, "AP"]
    for name, other in ((HALF, values[HALF, "AP"]), (VARIANT, variant), (AGAIN, again)):
        if other.empty:
            continue
        gap = difference(reference, other)
        found = Estimate(gap.mean, gap.mean - gap.half_width, gap.mean + gap.half_width)
        rows.append(_summary(f"AP of the reference less: {name}", found, "%"))
    gaps = (reference - variant).dropna()
    rows.append(_summary("AP, sd of a difference in pairs of a seed", sd_interval(gaps), "%"))
    apart = math.hypot(reference.loc[gaps.index].std(), variant.std())
    rows.append(_summary("AP, sd of the same difference without pairs", apart, "%"))
    pooled = sd_interval(every, variant)
    rows.append(_summary("AP, sd over seeds of the reference and the variant", pooled, "%"))
    for seeds in (3, 5, 8):
        width = t_quantile(2 * seeds - 2) * pooled.value * math.sqrt(2 / seeds)
        rows.append(_summary(f"AP, half width of an interval, {seeds} seeds", width, "%"))
        ends = (smallest_difference(sd, seeds) for sd in asdict(pooled).values())
        seen = _summary(f"{seeds} seeds", Estimate(*ends), "%")
        rows.append({**seen, "study": SMALLEST_DIFFERENCE, "metric": "AP", "task": "detection"})
    minutes = values["the reference", "cpu_minutes"].mean()
    images = runs["steps"].max() * get_recipe("proxy_detection").batch_size
    rows.append(_summary("minutes of CPU a run", minutes, "min"))
    rows.append(_summary("images trained a second of CPU", images / minutes / 60, "images/s"))
    key = runs.loc[runs["setting"] == "the reference", "run"].iloc[0]
    if (runs_dir / key / PREDICTIONS).exists():  # else the row stays as it is
        rows.append(_summary("AP, sd over images (bootstrap)", _bootstrap_sd(runs_dir / key), "%"))
    return [*rows, *_search_rows(measured)]


def _summary(setting: str, found: float | Estimate, unit: str = "") -> dict[str, Any]:
    known = found if isinstance(found, Estimate) else Estimate(found, math.nan, math.nan)
    rounded = {name: round(float(number), 3) for name, number in asdict(known).items()}
    return {"study": SHEET, "setting": setting, "metric": "summary", "unit": unit, **rounded}


def _search_rows(measured: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """For each length of a trial and each reward: its share of variance, and how it ranks."""
    lengths = (*SEARCH_STEPS, get_recipe("proxy_detection").steps)
    studies = {steps: f"distributions, {steps} steps" for steps in lengths}
    tables: dict[tuple[int, str], pd.DataFrame] = {
        (steps, str(metric)): own.pivot(index="seed", columns="setting", values="value")
        for steps, study in studies.items()
        for metric, own in measured[measured["study"] == study].groupby("metric")
    }
    for (steps, metric), table in tables.items():
        if metric not in ("AP", "evaluation_loss") or table.isna().any(axis=None):
            continue
        label = f"{steps} steps, {metric}"
        yield _summary(f"share of variance between distributions: {label}", variance_share(table))
        truth = tables.get((lengths[-1], "AP"))
        if truth is not None and steps != lengths[-1]:
            sign = 1 if metric == "AP" else -1
            ranks = rank_correlation(sign * table.mean(), truth.mean())
            yield _summary(f"rank correlation with {lengths[-1]} steps: {label}", ranks)


# What the sheet computes


def smallest_difference(sd: float, seeds: int) -> float:
    """Smallest true difference of two rows that is seen in 80 % of simulated repetitions.

    Seen means that the 95 % interval (Welch's) leaves out zero.

    Args:
        sd: standard deviation over seeds of each row.
        seeds: of each row; NaN below two.
    """
    if seeds < LEAST_SEEDS:
        return math.nan
    first, second = np.random.default_rng(0).standard_normal((2, POWER_REPETITIONS, seeds))

    def missed(difference: float) -> float:
        found = stats.ttest_ind(first + difference, second, axis=1, equal_var=False)
        return POWER - float((found.pvalue < 1 - CONFIDENCE).mean())

    return sd * float(optimize.brentq(missed, 0.0, LARGEST_DIFFERENCE, xtol=1e-4))


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


def sd_interval(*samples: pd.Series[float]) -> Estimate:
    """Standard deviation that samples share, with its interval (chi-squared)."""
    freedom = sum(len(values) - 1 for values in samples)
    squares = sum(float(values.var()) * (len(values) - 1) for values in samples)
    ends = stats.chi2.ppf(((1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2), freedom)
    return Estimate(*(math.sqrt(squares / by) for by in (freedom, *ends)))


def variance_share(groups: pd.DataFrame) -> Estimate:
    """Share of the variance that lies between groups: the intraclass correlation, interval by F.

    Args:
        groups: one column a group, one row a repetition, none missing; a one-way random model.
    """
    repeats, count = groups.shape
    within = float(groups.var().mean())
    between = repeats * float(groups.mean().var())
    freedom = (count - 1, count * (repeats - 1))
    tail = (1 + CONFIDENCE) / 2
    ratio = between / within

    def share(f: float) -> float:
        return (f - 1) / (f + repeats - 1)

    low = share(ratio / float(stats.f.ppf(tail, *freedom)))
    return Estimate(share(ratio), low, share(ratio * float(stats.f.ppf(tail, *freedom[::-1]))))


def rank_correlation(first: pd.Series[float], second: pd.Series[float]) -> Estimate:
    """Spearman's correlation of two rankings of the same things (index).

    The interval is Bonett and Wright's (2000): Fisher's z with variance (1 + r^2 / 2) / (n - 3).
    """
    pairs = pd.concat([first, second], axis=1, join="inner").dropna()
    found = float(pairs.iloc[:, 0].corr(pairs.iloc[:, 1], method="spearman"))
    width = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    width *= math.sqrt((1 + found**2 / 2) / (len(pairs) - 3))
    z = math.atanh(min(max(found, -0.999999), 0.999999))
    return Estimate(found, math.tanh(z - width), math.tanh(z + width))


def _bootstrap_sd(folder: Path) -> float:
    """Standard deviation of a run's AP over images drawn with replacement."""
    dataset = open_dataset(PROXY_DATA, "eval")
    truth = dataset.ground_truth()
    found = read_json(folder / PREDICTIONS)
    annotations, detections = _by_image(truth["annotations"]), _by_image(found)
    images = [image["id"] for image in truth["images"]]
    draws, values = np.random.default_rng(0), []
    for _ in range(BOOTSTRAPS):
        drawn = list(enumerate(draws.choice(images, len(images)).tolist()))
        sample = {
            **truth,
            "images": [{"id": number} for number, _ in drawn],
            "annotations": _renumbered(annotations, drawn),
        }
        values.append(coco_metrics(sample, _renumbered(detections, drawn))["AP"])
    return float(np.std(values, ddof=1))


def _by_image(records: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        found[record["image_id"]].append(record)
    return found


def _renumbered(
    records: Mapping[int, list[dict[str, Any]]], drawn: Iterable[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Records of the images drawn, each draw an image of its own."""
    return [
        {**record, "image_id": number}
        for number, image in drawn
        for record in records.get(image, ())
    ]


def main() -> None:
    """Run, list or sum up studies."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    summed = commands.add_parser("sheet")
    summed.add_argument("--study", default=PRECISION, choices=studies())
    run = commands.add_parser("run")
    run.add_argument("studies", nargs="+", choices=studies())
    run.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    add_half_model()
    if given.command == "list":
        for name, trials in studies().items():
            for trial in trials:
                print(f"{name}: {trial.label}, seeds {trial.seeds}, {trial.recipe.steps} steps")
        return
    if given.command == "sheet":
        upsert(INSTRUMENT, "instrument", sheet(study=given.study), "the data sheet")
        return
    run_studies(given.studies, given.processes)


if __name__ == "__main__":
    main()
