"""The plan of the proxy's runs: what is trained for which claim, and what it could see.

    python -m benchmarks.campaign          # writes results/proxy/plan.csv
    effspinenet reproduce all --profile proxy

It is written and committed before the runs. A row's minutes come from the reference's runs, in
proportion to the steps and to the numbers that training keeps of an image, which on a CPU decide
the time more than the multiply-adds do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.instrument import INSTRUMENT, REFERENCE
from effspinenet_lib.experiments.items import ITEMS, PROFILES, PROXY
from effspinenet_lib.experiments.plan import model_activations
from effspinenet_lib.experiments.reproduction import RunParameters, configure_row
from effspinenet_lib.report.claims import comparisons
from effspinenet_lib.report.tables import SMALLEST_DIFFERENCE
from effspinenet_lib.results.paper import RESULTS_DIR
from effspinenet_lib.results.tables import read_table, upsert
from effspinenet_lib.training.recipes import get_recipe

PLAN = RESULTS_DIR / "proxy" / "plan.csv"
# Cheapest and surest first.
ORDER = tuple(f"table-{number:02}" for number in (5, 9, 4, 8, 3, 10, 7, 11, 6))


def rows() -> Iterator[dict[str, Any]]:
    """One row for each row of a table that the proxy trains, in the order of the runs."""
    sheet = read_table(INSTRUMENT, "instrument")
    seen = sheet[sheet["study"] == SMALLEST_DIFFERENCE].set_index("setting")["value"]
    profile = PROFILES[PROXY]
    parameters = RunParameters(profile, None, RESULTS_DIR, profile.seeds)
    reference = get_recipe(profile.recipes["detection"])
    alike = (sheet["model"] == REFERENCE) & (sheet["steps"] == reference.steps)
    minutes = sheet[alike & (sheet["metric"] == "cpu_minutes")]["value"].mean()
    whole = reference.steps * reference.batch_size
    whole *= model_activations(REFERENCE, "detection", profile.image_size or 0, ())
    claims = _claims()
    trained = [(ITEMS[item], row) for item in ORDER for row in ITEMS[item].rows]
    trained = [(item, row) for item, row in trained if row.trains_in(PROXY)]
    for number, (item, row) in enumerate(trained, start=1):
        config = configure_row(item, row, parameters, profile.seeds[0])
        recipe, options = config.recipe, tuple(row.options.items())
        kept = model_activations(config.model, row.task, config.image_size, options)
        seeds = len(row.seeds_in(PROXY, profile.seeds))
        yield {
            "order": number,
            "item": item.id,
            "row": row.label,
            "model": config.model,
            "task": row.task,
            "image_size": config.image_size,
            "recipe": recipe.name,
            "steps": recipe.steps,
            "seeds": seeds,
            "minutes": round(minutes * recipe.steps * recipe.batch_size * kept / whole, 1),
            "claims": " ".join(claims.get((item.id, row.label), ())),
            # the data sheet has a detector's AP alone
            "smallest_difference": seen.get(f"{seeds} seeds") if row.task == "detection" else None,
        }


def _claims() -> dict[tuple[str, str], list[str]]:
    """(item, row) -> the claims that compare it with another row of which both are trained."""
    trained = {
        (item.id, row.label) for item in ITEMS.values() for row in item.rows if row.trains_in(PROXY)
    }
    found: dict[tuple[str, str], list[str]] = {}
    for claim, pair in comparisons().items():
        if trained.issuperset(pair):
            for place in pair:
                found.setdefault(place, []).append(claim)
    return found


def main() -> None:
    """Write the plan, in place of an earlier one."""
    PLAN.unlink(missing_ok=True)
    planned = list(rows())
    upsert(PLAN, "plan", planned, "the plan")
    hours = sum(row["minutes"] * row["seeds"] for row in planned) / 60
    print(f"{PLAN.name}: {len(planned)} rows, {hours:.0f} hours of one core")


if __name__ == "__main__":
    main()
