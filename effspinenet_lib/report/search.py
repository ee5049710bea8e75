"""The search for a resource distribution: its record, and what was trained again."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from effspinenet_lib.choices.learned import BETAS, distributed, parse_betas
from effspinenet_lib.report.provenance import Provenance, ResultFiles
from effspinenet_lib.report.tables import NOT_PRINTED, NOT_RUN, PROXY, Spread, Table, spreads
from effspinenet_lib.results import REFERENCE, ResultsStore
from effspinenet_lib.results.store import TRIALS_FILE
from effspinenet_lib.specs import BackboneSpec

METHOD_NAMES = {
    "ppo": "PPO",
    "reinforce": "REINFORCE",
    "random": "random search",
    "evolution": "evolution",
}
SP, D0, FOUND = "SP-EfficientNet-B0", "Eff-SpineNet-D0", "search's best"
BILLION, MILLION = 1e9, 1e6
SECONDS_AN_HOUR = 3600
NOTHING = (
    "The proxy search is **not run**: no record of it is here. `effspinenet search --profile "
    "proxy` runs it in about three hours of one core."
)


def read_trials(*results_dirs: str | os.PathLike[str]) -> pd.DataFrame:
    """The proxy's search on record, of the first results folder that has one; empty without.

    A smoke search says nothing, so none is ever read.

    Args:
        results_dirs: at least one.

    Raises:
        DataError: a record is broken.
    """
    for folder in results_dirs:
        trials = ResultsStore(Path(folder), PROXY).trials()
        if len(trials):
            break
    return trials


def with_record(found: Provenance, *results_dirs: str | os.PathLike[str]) -> Provenance:
    """Where a page comes from that also shows the search; folders as for `read_trials`."""
    return replace(found, files=(*found.files, *record_files(*results_dirs).files))


def record_files(*results_dirs: str | os.PathLike[str]) -> ResultFiles:
    """The proxy's record as a file to look at, if there is one; folders as for `read_trials`."""
    name = f"{PROXY}/{TRIALS_FILE}"
    there = any((Path(folder) / name).is_file() for folder in results_dirs)
    return ResultFiles((name,) if there else ())


def searched(trials: pd.DataFrame) -> pd.DataFrame:
    """The samples of the methods that have an AP, in the order of the record."""
    return trials[(trials["method"] != REFERENCE) & trials["AP"].notna()]


def sampled(trials: pd.DataFrame) -> pd.DataFrame:
    """As `searched`, each trained model once."""
    return searched(trials).drop_duplicates("run")


def searches(trials: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """The searches on record: their name for people, the method, and the samples in order."""
    rows = searched(trials)
    for method in METHOD_NAMES:
        own = rows[rows["method"] == method]
        for seed, samples in own.groupby("seed"):
            several = own["seed"].nunique() > 1
            name = METHOD_NAMES[method] + (f", seed {seed}" if several else "")
            yield name, method, samples.sort_values("trial")


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
    return None if best is None else distributed(parse_betas(best["betas"]))


def found_sentence(trials: pd.DataFrame) -> str:
    """Say which sample the search's best is."""
    best = best_sample(trials)
    if best is None:
        return NOTHING
    return (
        f"The {FOUND} of the proxy is {where(best)}, with an AP of {best['AP']:.2f} (seed "
        f"{best['seed']}): β {_listed(best['betas'])}; feature dimensions at D0 "
        f"{_listed(best['feature_dims'])}."
    )


def _listed(joint: str) -> str:
    return joint.replace("-", ", ")


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


def summary_table(trials: pd.DataFrame) -> Table:
    """One row a search: what it ran, the best and the mean of what it found, and the time."""
    rows: dict[str, dict[str, Any]] = {}
    for name, method, samples in searches(trials):
        every = trials[(trials["method"] == method) & (trials["seed"] == samples["seed"].iloc[0])]
        states = every["state"].value_counts()
        rows[name] = {
            "samples": len(every),
            "trained": int(states.get("finished", 0)),
            "duplicates": int(states.get("duplicate", 0)),
            "failed": int(states.get("failed", 0)),
            "best AP": f"{samples['AP'].max():.2f}",
            "mean AP": f"{samples['AP'].mean():.2f}",
            "sd of AP": f"{samples['AP'].std():.2f}",
            "core hours": f"{every['seconds'].sum() / SECONDS_AN_HOUR:.1f}",
        }
    columns = ["samples", "trained", "duplicates", "failed", "best AP", "mean AP", "sd of AP"]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=[*columns, "core hours"])
    title = f"Searches on record: {setting(trials)}" if rows else f"Searches: {NOT_RUN}"
    return Table(frame.rename_axis("method"), title)


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
    return D0 if betas == BETAS else found.get(text, f"β {text}")


def reference_measurements(trials: pd.DataFrame) -> pd.DataFrame:
    """The runs of `references` as measurements of the proxy, for plots and tables."""
    rows = references(trials)[["row", "AP", "seed"]].rename(columns={"AP": "value"})
    return rows.assign(item=REFERENCE, metric="AP", source=PROXY)


def reference_spreads(trials: pd.DataFrame) -> dict[str, Spread]:
    """AP over seeds of each chosen distribution, by name."""
    found = spreads(reference_measurements(trials))
    return {row: spread for (row, _, _), spread in found.items()}


def reference_table(trials: pd.DataFrame) -> Table:
    """The search's best beside the distributions that no search chose, at equal budget."""
    known, again, found = reference_spreads(trials), references(trials), _names(trials)
    chosen = searched(trials)
    rows = {}
    for name in reference_names(trials):
        picked = best_sample(chosen[chosen["betas"].map(found) == name])
        first = again[again["row"] == name].head(1)
        source = picked if first.empty else first.iloc[0]
        rows[name] = {
            "AP (%), mean ± sd (seeds)": _spread(known.get(name)),
            "AP (%) it was chosen for": NOT_PRINTED if picked is None else f"{picked['AP']:.2f}",
            "#FLOPs at D0 (B)": _scaled(source, "multi_adds_d0", BILLION),
            "#Params at D0 (M)": _scaled(source, "parameters_d0", MILLION),
        }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("distribution")
    return Table(frame, f"Equal training of chosen distributions: {setting(trials) or NOT_RUN}")


def _spread(found: Spread | None) -> str:
    if found is None:
        return NOT_RUN
    spread = "" if math.isnan(found.sd) else f" ± {found.sd:.2f}"
    return f"{found.mean:.2f}{spread} ({found.seeds})"


def _scaled(source: Any | None, column: str, unit: float) -> str:
    return NOT_PRINTED if source is None else f"{source[column] / unit:.2f}"
