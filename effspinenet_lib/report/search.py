"""The search for a resource distribution: its record, and what was trained again."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pandas as pd

from effspinenet_lib.models.specs import (
    LEARNED_BETAS,
    MODELS,
    BackboneSpec,
    backbone_spec,
    betas_text,
    parse_betas,
)
from effspinenet_lib.report.provenance import Provenance, ResultFiles
from effspinenet_lib.report.tables import (
    NOT_PRINTED,
    NOT_RUN,
    PAPER_SCALE,
    PROXY,
    Spread,
    Table,
    spreads,
)
from effspinenet_lib.results import FOLDERS, REFERENCE, ResultsStore
from effspinenet_lib.results.paper import RESULTS_DIR
from effspinenet_lib.results.tables import read_table

METHOD_NAMES = {
    "ppo": "PPO",
    "reinforce": "REINFORCE",
    "random": "random search",
    "evolution": "evolution",
}
POLICIES = ("ppo", "reinforce")  # the methods that learn one
SP, D0, FOUND = "SP-EfficientNet-B0", "Eff-SpineNet-D0", "search's best"
GIVEN = "given distribution"
BILLION, MILLION = 1e9, 1e6
SECONDS_AN_HOUR = 3600
ALL_FAILED, TOO_FEW = "every trial failed", "too few samples"
NOTHING = (
    "The search is **not run**: no sample of it is on record. `effspinenet search --profile proxy` "
    "runs a small one in about three hours of one core, `--profile paper` the paper's on "
    "accelerators."
)
# What the pages call the AP of a record, by its source; the first source that there is is shown.
# A smoke search says nothing, so none is ever read.
SOURCE_NAMES = {PAPER_SCALE: "paper's settings", PROXY: "proxy"}
PROFILE_OF = {source: profile for profile, source in FOLDERS.items()}


class Given(Protocol):
    """A distribution that stands in a file, as `zoo.distributions.read_distribution` gives it."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def betas(self) -> tuple[int, ...]:
        """Of the 18 blocks."""


def read_trials(*results_dirs: str | os.PathLike[str]) -> pd.DataFrame:
    """The search on record, of one source: at the paper's settings, or else the proxy's.

    Args:
        results_dirs: at least one; the first that has a record of the source is read.

    Returns:
        The columns of the record and `source`; empty where there is no record.

    Raises:
        DataError: a record is broken.
    """
    for source in SOURCE_NAMES:
        for folder in results_dirs:
            trials = ResultsStore(Path(folder), PROFILE_OF[source]).trials()
            if len(trials):
                return trials.assign(source=source)
    return trials.assign(source="")


def source_of(trials: pd.DataFrame) -> str:
    """Where the trials of `read_trials` are from; the proxy where there are none."""
    return PROXY if trials.empty else str(trials["source"].iloc[0])


def profile_of(trials: pd.DataFrame) -> str:
    """The profile whose search is shown; the proxy's where there is none."""
    return PROFILE_OF[source_of(trials)]


def source_name(trials: pd.DataFrame) -> str:
    """What an AP of these trials is called on axes and in sentences."""
    return SOURCE_NAMES[source_of(trials)]


def with_files(found: Provenance, *lists: ResultFiles) -> Provenance:
    """Where a page comes from that also shows other files."""
    return replace(found, files=(*found.files, *(file for one in lists for file in one.files)))


def record_files(trials: pd.DataFrame) -> ResultFiles:
    """The record that `read_trials` read as a file to look at; none where there is none."""
    return ResultFiles(() if trials.empty else (f"{source_of(trials)}/search_trials.csv",))


def chosen(trials: pd.DataFrame) -> pd.DataFrame:
    """The samples of the methods, failed ones too."""
    return trials[trials["method"] != REFERENCE]


def absent(trials: pd.DataFrame) -> str:
    """Why trials without any AP have none, in a few words."""
    return NOT_RUN if chosen(trials).empty else ALL_FAILED


def nothing(trials: pd.DataFrame) -> str:
    """Why a record without any sample that has an AP has none, as a sentence."""
    count = len(chosen(trials))
    if not count:
        return NOTHING
    return (
        f"The search has no result: {ALL_FAILED} ({count} of {count}); the column `note` of the "
        "record says why."
    )


def searched(trials: pd.DataFrame) -> pd.DataFrame:
    """The samples of the methods that have an AP, in the order of the record."""
    rows = chosen(trials)
    return rows[rows["AP"].notna()]


def sampled(trials: pd.DataFrame) -> pd.DataFrame:
    """As `searched`, each trained model once."""
    return searched(trials).drop_duplicates("run")


def every_search(trials: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """The searches on record: their name for people, the method, and all their trials in order."""
    for method in METHOD_NAMES:
        own = trials[trials["method"] == method]
        for seed, rows in own.groupby("seed"):
            several = own["seed"].nunique() > 1
            name = METHOD_NAMES[method] + (f", seed {seed}" if several else "")
            yield name, method, rows.sort_values("trial")


def searches(trials: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """As `every_search`, of the trials that have an AP; a search without any is left out."""
    for name, method, rows in every_search(trials):
        samples = searched(rows)
        if len(samples):
            yield name, method, samples


def best_sample(trials: pd.DataFrame) -> Any | None:
    """The sample that `effspinenet search export` takes; None without samples.

    It has the highest reward; of several such, the fewest parameters.
    """
    rows = searched(trials)
    if rows.empty:
        return None
    order = rows.sort_values(["reward", "parameters", "trial"], ascending=[False, True, True])
    return order.iloc[0]


def found_spec(trials: pd.DataFrame) -> BackboneSpec | None:
    """The distribution of the best sample at the scale D0; None without samples."""
    best = best_sample(trials)
    return None if best is None else backbone_spec(parse_betas(best["betas"]))


def shown_distribution(trials: pd.DataFrame, given: Given | None = None) -> dict[str, BackboneSpec]:
    """The distribution beside the paper's two, by its name: the one given, else the best sample's.

    Empty where none is given and no sample is on record.
    """
    if given is not None:
        return {GIVEN: backbone_spec(given.betas)}
    found = found_spec(trials)
    return {} if found is None else {FOUND: found}


def shown_sentence(trials: pd.DataFrame, given: Given | None = None) -> str:
    """Say what `shown_distribution` gives."""
    if given is not None:
        return f"The {GIVEN} is {given.name}: {_described(given.betas)}"
    best = best_sample(trials)
    if best is None:
        return nothing(trials)
    return (
        f"The {FOUND} is {where(best)} ({source_name(trials)}, seed {best['seed']}), with an AP of "
        f"{best['AP']:.2f}: {_described(parse_betas(best['betas']))} A trial is {setting(trials)}."
    )


def _described(betas: Sequence[int]) -> str:
    dims = ", ".join(str(block.feature_dim) for block in backbone_spec(betas).blocks)
    return f"β {', '.join(map(str, betas))}; feature dimensions at D0 {dims}."


def bullets(sentences: Iterable[str]) -> str:
    """Sentences as a Markdown list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def best_of(method: str) -> str:
    """What the best sample of a method is called."""
    return f"best of {METHOD_NAMES[method]}"


def where(sample: Any) -> str:
    """A sample by its search and number: "PPO's trial 41"."""
    return f"{METHOD_NAMES[sample['method']]}'s trial {sample['trial']}"


def setting(trials: pd.DataFrame) -> str:
    """What a trial is, in the record's own words."""
    return "; ".join(dict.fromkeys(trials["setting"]))


def trial_sentence(trials: pd.DataFrame) -> str:
    """Say which record is shown, and what a trial of it is."""
    if searched(trials).empty:
        return nothing(trials)
    return (
        f"Shown is the search of the profile `{profile_of(trials)}`. A trial is {setting(trials)}."
    )


def summary_table(trials: pd.DataFrame) -> Table:
    """One row a search: what it ran, the best and the mean of what it found, and the time."""
    rows: dict[str, dict[str, Any]] = {}
    for name, _, every in every_search(trials):
        states, found = every["state"].value_counts(), every["AP"].dropna()
        rows[name] = {
            "samples": len(every),
            "trained": int(states.get("finished", 0)),
            "duplicates": int(states.get("duplicate", 0)),
            "failed": int(states.get("failed", 0)),
            "best AP": two_digits(found.max()),
            "mean AP": two_digits(found.mean()),
            "sd of AP": two_digits(found.std()),
            "hours of trials": f"{every['seconds'].sum() / SECONDS_AN_HOUR:.1f}",
        }
    columns = ["samples", "trained", "duplicates", "failed", "best AP", "mean AP", "sd of AP"]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=[*columns, "hours of trials"])
    title = f"Searches on record: {setting(trials)}" if rows else f"Searches: {NOT_RUN}"
    return Table(frame.rename_axis("method"), title)


def two_digits(value: float) -> str:
    """A number as a cell; a dash where it is not defined."""
    return NOT_PRINTED if math.isnan(value) else f"{value:.2f}"


class ModelCost(NamedTuple):
    """Multiply-adds and parameters of a detector."""

    multi_adds: int
    parameters: int


def cost_at_d0(name: str) -> ModelCost:
    """What the detector of a distribution costs at the scale D0, from `cost/costs.csv`."""
    costs = read_table(RESULTS_DIR / "cost" / "costs.csv", "cost")
    rows = costs[(costs["model"] == name) & (costs["task"] == "detection")]
    of = rows.drop_duplicates("metric").set_index("metric")["measured"]
    return ModelCost(round(of["multi_adds"] * 1e9), round(of["parameters"] * 1e6))


# Distributions that were trained with several seeds


def references(trials: pd.DataFrame) -> pd.DataFrame:
    """Runs of chosen distributions with several seeds, with a column `row` that names them.

    A run that a search chose the distribution by is left out: it was picked for being high.
    """
    rows = trials[(trials["method"] == REFERENCE) & trials["AP"].notna()]
    rows = rows[~rows["run"].isin(searched(trials)["run"])]
    found = _names(trials)
    names = {betas: _name(betas, found) for betas in rows["betas"].unique()}
    return rows.assign(row=rows["betas"].map(names).astype(str))


def reference_names(trials: pd.DataFrame) -> list[str]:
    """SP-EfficientNet-B0, Eff-SpineNet-D0 and the search's best, then what else was run."""
    return list(dict.fromkeys((SP, D0, FOUND, *references(trials)["row"])))


def _names(trials: pd.DataFrame) -> dict[str, str]:
    """Names by betas: of the best sample of each method, and of all."""
    rows = searched(trials)
    groups = [(best_of(method), rows[rows["method"] == method]) for method in METHOD_NAMES]
    found = ((name, best_sample(own)) for name, own in [*groups, (FOUND, rows)])
    return {best["betas"]: name for name, best in found if best is not None}


def _name(text: str, found: Mapping[str, str]) -> str:
    betas = parse_betas(text)
    if len(set(betas)) == 1:
        return SP
    return D0 if betas == LEARNED_BETAS else found.get(text, f"β {text}")


def reference_measurements(trials: pd.DataFrame) -> pd.DataFrame:
    """The runs of `references` as measurements of the record's source, for plots and tables."""
    rows = references(trials)[["row", "AP", "seed"]].rename(columns={"AP": "value"})
    return rows.assign(item=REFERENCE, metric="AP", source=source_of(trials))


def reference_spreads(trials: pd.DataFrame) -> dict[str, Spread]:
    """AP over seeds of each chosen distribution, by name."""
    found = spreads(reference_measurements(trials))
    return {row: spread for (row, _, _), spread in found.items()}


def reference_table(trials: pd.DataFrame, given: Given | None = None) -> Table:
    """The search's best beside the distributions that no search chose, at equal budget.

    Args:
        trials: from `read_trials`.
        given: a distribution in a row of its own, with its AP where the record has its betas.
    """
    known, again, found = reference_spreads(trials), references(trials), _names(trials)
    named = {name: betas for betas, name in found.items()}
    named |= dict(again[["row", "betas"]].itertuples(index=False, name=None))
    specs = {name: backbone_spec(parse_betas(betas)) for name, betas in named.items()}
    specs |= {SP: MODELS["sp_efficientnet_b0"].backbone, D0: MODELS["eff_spinenet_d0"].backbone}
    picked = {name: best_sample(_with_betas(trials, betas)) for betas, name in found.items()}
    names = reference_names(trials)
    if given is not None:
        text = betas_text(given.betas)
        names, specs[GIVEN] = [*names, GIVEN], backbone_spec(given.betas)
        picked[GIVEN] = best_sample(_with_betas(trials, text))
        same = _with_betas(again, text)
        if len(same):
            known[GIVEN] = known[same["row"].iloc[0]]
    rows = {
        name: _reference_row(known.get(name), picked.get(name), specs.get(name)) for name in names
    }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("distribution")
    return Table(frame, f"Equal training of chosen distributions: {setting(trials) or NOT_RUN}")


def _with_betas(trials: pd.DataFrame, betas: str) -> pd.DataFrame:
    return trials[trials["betas"] == betas]


def _reference_row(
    spread: Spread | None, picked: Any | None, spec: BackboneSpec | None
) -> dict[str, str]:
    costs: ModelCost | None = None
    return {
        "AP (%), mean ± sd (seeds)": _spread(spread),
        "AP (%) it was chosen for": NOT_PRINTED if picked is None else f"{picked['AP']:.2f}",
        "#FLOPs at D0 (B)": NOT_PRINTED if costs is None else f"{costs.multi_adds / BILLION:.2f}",
        "#Params at D0 (M)": NOT_PRINTED if costs is None else f"{costs.parameters / MILLION:.2f}",
    }


def _spread(found: Spread | None) -> str:
    if found is None:
        return NOT_RUN
    spread = "" if math.isnan(found.sd) else f" ± {found.sd:.2f}"
    return f"{found.mean:.2f}{spread} ({found.seeds})"
