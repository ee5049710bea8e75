"""What the proxy profile can see: the runs that chose its recipe and measure its precision.

    python -m benchmarks.instrument run rate --processes 2   # what is missing of a study
    python -m benchmarks.instrument list                     # the studies and their runs

Every run of every study is a row of `results/proxy/instrument.csv`, the bad ones too. A study is
data below: what is changed from where, on which seeds. Seeds from `TUNING_SEED` up chose the
recipe; no result uses them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effspinenet_lib.data import DataConfig
from effspinenet_lib.experiments.launcher import LOCAL, open_pool, run_many
from effspinenet_lib.files import read_json, write_json
from effspinenet_lib.results.paper import RESULTS_DIR
from effspinenet_lib.results.tables import upsert
from effspinenet_lib.training.config import RunConfig
from effspinenet_lib.training.recipe import Recipe
from effspinenet_lib.training.recipes import get_recipe

INSTRUMENT = RESULTS_DIR / "proxy" / "instrument.csv"
RUNS_DIR = Path("runs") / "instrument"
REFERENCE = "eff_spinenet_m0"
# 500 images left the sampling of images a larger noise than the seeds'
DATA = DataConfig("shapescenes", eval_images=2_000)
TUNING_SEED = 100
KEPT_METRICS = ("AP", "AP50", "AP_S", "AP_M", "AP_L", "top1", "mIOU", "AP_mask")
CPU_FILE = "cpu.json"

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
        return get_recipe("proxy_detection").replace(**{**self.base, **self.changes})

    def configs(self) -> Iterator[RunConfig]:
        """Its runs."""
        for seed in self.seeds:
            yield RunConfig(
                self.model,
                self.task,
                self.image_size,
                DATA,
                self.recipe,
                seed,
                dict(self.options),
            )


def _over(name: str, *values: Any, **common: Any) -> tuple[Trial, ...]:
    """One trial a value of a setting."""
    return tuple(
        Trial(f"{name} {value:g}", changes={name: value, **common.get("changes", {})})
        for value in values
    )


STUDIES: dict[str, tuple[Trial, ...]] = {
    "rate": _over("learning_rate", 0.016, 0.03, 0.008),
    "anchors": _over("anchor_size", 1.5, 1.0),
}


def train(config: dict[str, Any], runs_dir: str, **options: Any) -> None:
    """Train a run as `launcher.train` does, and keep the CPU time that it took."""
    from effspinenet_lib.training.run import train_run

    run = RunConfig.from_dict(config)
    path = Path(runs_dir) / run.key / CPU_FILE
    spent = read_json(path)["seconds"] if path.exists() else 0.0
    try:
        train_run(run, runs_dir, progress=False, **options)
    finally:
        write_json(path, {"seconds": spent + time.process_time()})


def run_studies(names: Sequence[str], processes: int, runs_dir: Path = RUNS_DIR) -> None:
    """Train what is missing of the studies, and add a run's rows as soon as it has ended.

    A run has one thread, however few run at once, so that its cost in CPU time is comparable.
    """
    trials: dict[str, list[tuple[str, Trial, RunConfig]]] = {}
    for name in names:
        for trial in STUDIES[name]:
            for config in trial.configs():
                trials.setdefault(config.key, []).append((name, trial, config))
    with open_pool(LOCAL, processes, "cpu") as pool:
        pool.threads = lambda runs: 1  # type: ignore[method-assign]
        configs = [known[0][2] for known in trials.values()]
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
    minutes = read_json(runs_dir / result.key / CPU_FILE)["seconds"] / 60
    yield {**common, "metric": "cpu_minutes", "value": round(minutes, 2), "unit": "min"}


def main() -> None:
    """Run or list studies."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    run = commands.add_parser("run")
    run.add_argument("studies", nargs="+", choices=STUDIES)
    run.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    if given.command == "list":
        for name, trials in STUDIES.items():
            for trial in trials:
                print(f"{name}: {trial.label}, seeds {trial.seeds}, {trial.recipe.steps} steps")
        return
    run_studies(given.studies, given.processes)


if __name__ == "__main__":
    main()
