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
from effspinenet_lib.experiments.items import ITEMS, PROFILES, PROXY, Item, Row
from effspinenet_lib.experiments.plan import activation_bytes
from effspinenet_lib.models.zoo import create_model
from effspinenet_lib.report.claims import comparisons
from effspinenet_lib.report.tables import SMALLEST_DIFFERENCE
from effspinenet_lib.results.paper import RESULTS_DIR
from effspinenet_lib.results.tables import read_table, upsert
from effspinenet_lib.training.recipes import get_recipe

PLAN = RESULTS_DIR / "proxy" / "plan.csv"
# Cheapest and surest first.
ORDER = tuple(f"table-{number:02}" for number in (5, 9, 4, 8, 3, 10, 11, 7, 6))


def rows() -> Iterator[dict[str, Any]]:
    """One row for each row of a table that the proxy trains, in the order of the runs."""
    sheet = read_table(INSTRUMENT, "instrument")
    seen = sheet[sheet["study"] == SMALLEST_DIFFERENCE].set_index("setting")["value"]
    reference = get_recipe(PROFILES[PROXY].recipes["detection"])
    alike = (sheet["model"] == REFERENCE) & (sheet["steps"] == reference.steps)
    minutes = sheet[alike & (sheet["metric"] == "cpu_minutes")]["value"].mean()
    whole = reference.steps * reference.batch_size * _bytes(REFERENCE, "detection", 128, {})
    claims = _claims()
    number = 0
    for item in map(ITEMS.__getitem__, ORDER):
        for row in item.rows:
            if not row.trains_in(PROXY):
                continue
            number += 1
            found = _row(item, row, claims)
            recipe = get_recipe(found["recipe"])
            kept = _bytes(found["model"], row.task, found["image_size"], dict(row.options))
            found["minutes"] = round(minutes * recipe.steps * recipe.batch_size * kept / whole, 1)
            # the data sheet has a detector's AP alone
            if row.task == "detection":
                found["smallest_difference"] = seen.get(f"{found['seeds']} seeds")
            yield {"order": number, **found}


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


def _row(item: Item, row: Row, claims: dict[tuple[str, str], list[str]]) -> dict[str, Any]:
    profile = PROFILES[PROXY]
    model, size = row.model_in(profile)
    recipe = get_recipe(row.recipes.get(PROXY) or profile.recipes[row.task])
    return {
        "item": item.id,
        "row": row.label,
        "model": model,
        "task": row.task,
        "image_size": size,
        "recipe": recipe.name,
        "steps": recipe.steps,
        "seeds": len(row.seeds_in(PROXY, profile.seeds)),
        "claims": " ".join(claims.get((item.id, row.label), ())),
    }


def _bytes(model: str, task: str, image_size: int, options: dict[str, Any]) -> int:
    return activation_bytes(create_model(model, task, **options), image_size)


def main() -> None:
    """Write the plan, in place of an earlier one."""
    PLAN.unlink(missing_ok=True)
    planned = list(rows())
    upsert(PLAN, "plan", planned, "the plan")
    hours = sum(row["minutes"] * row["seeds"] for row in planned) / 60
    print(f"{PLAN.name}: {len(planned)} rows, {hours:.0f} hours of one core")


if __name__ == "__main__":
    main()
