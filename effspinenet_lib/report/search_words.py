"""What the record of a search says, in computed sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import pandas as pd

from effspinenet_lib.report.search import (
    D0,
    FOUND,
    POLICIES,
    SECONDS_AN_HOUR,
    SP,
    TOO_FEW,
    absent,
    best_sample,
    bullets,
    chosen,
    nothing,
    profile_of,
    reference_names,
    reference_spreads,
    references,
    sampled,
    searched,
    searches,
    setting,
    source_of,
    where,
)
from effspinenet_lib.report.style import words
from effspinenet_lib.report.tables import PROXY
from effspinenet_lib.report.verdict import LEAST_SEEDS, difference

PERCENT = 100.0


def comparison_sentences(trials: pd.DataFrame) -> str:
    """Compare the search's best, SP-EfficientNet-B0 and Eff-SpineNet-D0 over seeds, as a list."""
    rows = references(trials)
    if rows.empty:
        return (
            "The search's best and SP-EfficientNet-B0 were **not run** with several seeds at equal "
            "budget, so nothing can be said."
        )
    known = (SP, D0, FOUND)
    others = [(name, SP) for name in reference_names(trials) if name not in known]
    pairs = ((FOUND, SP), (D0, SP), (FOUND, D0), *others)
    return bullets([*(_compared(rows, *pair) for pair in pairs), chosen_sentence(trials)])


def _compared(rows: pd.DataFrame, first: str, second: str) -> str:
    samples = [rows.loc[rows["row"] == name, "AP"] for name in (first, second)]
    counts = [len(sample) for sample in samples]
    if min(counts) == 0:
        names = zip((first, second), counts, strict=True)
        missing = words(name for name, count in names if not count)
        return f"{_upper(_the(first))} against {second}: {missing} not run, so nothing can be said."
    found = difference(*samples)
    means = [f"{statistics.fmean(sample):.2f}" for sample in samples]
    opening = (
        f"{_upper(_the(first))} against {second}: {words(means)} AP ({counts[0]} and {counts[1]} "
        f"seeds), a difference of {found.mean:+.2f}"
    )
    if math.isnan(found.half_width):
        return f"{opening}: inconclusive, a single seed has no spread."
    opening += f" ± {found.half_width:.2f} (95 % interval):"
    if not found.conclusive:
        return f"{opening} inconclusive, no larger than the spread over seeds makes by chance."
    ahead = first if found.mean > 0 else second
    return f"{opening} larger than the spread over seeds, and {_the(ahead)} is ahead."


def chosen_sentence(trials: pd.DataFrame) -> str:
    """Set the AP that the best sample was chosen for beside what other seeds give it."""
    best, again = best_sample(trials), reference_spreads(trials).get(FOUND)
    if best is None:
        return f"No sample was chosen: {absent(trials)}."
    opening = (
        f"The search's best ({where(best)}) was chosen with an AP of {best['AP']:.2f} out of "
        f"{len(sampled(trials))} samples"
    )
    if again is None:
        return f"{opening}; it was not run with other seeds."
    return (
        f"{opening}. Trained with {again.seeds} other {_plural('seed', again.seeds)} it has "
        f"{again.mean:.2f} ({again.mean - best['AP']:+.2f}): the highest of many is in part luck, "
        "so only other seeds are compared."
    )


def progress_sentences(trials: pd.DataFrame) -> str:
    """Each search from its first to its last batch, and against random search, as a list."""
    found = list(searches(trials))
    if not found:
        return nothing(trials)
    lines = [_progress(name, samples) for name, _, samples in found]
    return bullets([*lines, *_against_random(found)])


def _progress(name: str, samples: pd.DataFrame) -> str:
    batches = samples.groupby("step")["reward"].mean()
    best = samples.sort_values("reward", ascending=False, kind="stable").iloc[0]
    return (
        f"{_upper(name)}: mean reward {batches.iloc[0]:.2f} in the first batch, "
        f"{batches.iloc[-1]:.2f} in the last ({len(batches)} batches); best {best['reward']:.2f}, "
        f"at sample {best['trial'] + 1} of {len(samples)}."
    )


def _against_random(found: Sequence[tuple[str, str, pd.DataFrame]]) -> Iterable[str]:
    """Later halves of the searches against random search's, where its samples are all alike."""
    chance = [samples["reward"] for _, method, samples in found if method == "random"]
    if not chance:
        return
    for name, method, samples in found:
        if method == "random":
            continue
        later, every = samples["reward"].iloc[len(samples) // 2 :], pd.concat(chance)
        if min(len(later), len(every)) < LEAST_SEEDS:
            yield f"{_upper(name)} against random search: {TOO_FEW}."
            continue
        shift = difference(later, every)
        yield (
            f"The second half of {name}'s samples is on average {shift.mean:+.2f} ± "
            f"{shift.half_width:.2f} (95 % interval) from random search's: "
            f"{_shift_word(shift.mean, shift.conclusive)}."
        )


def _shift_word(mean: float, conclusive: bool) -> str:
    if not conclusive:
        return "inconclusive"
    return "it learned to choose better ones" if mean > 0 else "it chooses worse ones"


def entropy_sentence(trials: pd.DataFrame) -> str:
    """How far each policy settled, in words."""
    parts = []
    for name, method, samples in searches(trials):
        known = samples["entropy"].dropna()
        if method not in POLICIES or known.empty:
            continue
        first, last = known.iloc[0], known.iloc[-1]
        parts.append(
            f"{name} from {first:.2f} to {last:.2f} nats, as if choosing among "
            f"{math.exp(last):.1f} values where it began with {math.exp(first):.1f}"
        )
    if not parts:
        return f"Entropy of a policy: {absent(trials[trials['method'].isin(POLICIES)])}."
    return f"Entropy of a choice: {words(parts)}."


def noise(trials: pd.DataFrame) -> tuple[float, float]:
    """Standard deviations of the AP: over seeds of one distribution, and over samples.

    Returns:
        Pooled over the chosen distributions with several seeds, and of random search's samples;
        NaN where there are too few.
    """
    groups = [own["AP"] for _, own in references(trials).groupby("row")]
    freedom = sum(len(values) - 1 for values in groups)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in groups)
    rows = sampled(trials)
    blind = rows.loc[rows["method"] == "random", "AP"]
    seeds = math.sqrt(squares / freedom) if freedom else math.nan
    return seeds, float(blind.std())


def noise_sentence(trials: pd.DataFrame) -> str:
    """How much of the difference between samples is the seed's, and what one trial can tell."""
    seeds, samples = noise(trials)
    if math.isnan(seeds) or math.isnan(samples):
        return (
            "How much of the difference between samples is noise cannot be said: it takes samples "
            "of random search and distributions with several seeds, and not both are on record."
        )
    opening = (
        f"One distribution trained with other seeds varies by {seeds:.2f} AP (standard deviation, "
        f"{len(references(trials))} runs); the samples of random search, all different, vary by "
        f"{samples:.2f}."
    )
    if seeds >= samples:
        return (
            f"{opening} So the seed alone explains all of it: one trial cannot tell two "
            "distributions apart."
        )
    share = 1 - (seeds / samples) ** 2
    right = 1 / 2 + math.asin(math.sqrt(share)) / math.pi
    return (
        f"{opening} So about {PERCENT * (1 - share):.0f} % of the variance between samples is the "
        f"seed's, and one trial each puts two random distributions into the right order in "
        f"{PERCENT * right:.0f} % of the cases (were both normal; a coin: 50 %)."
    )


def scale_sentence(trials: pd.DataFrame, steps: int) -> str:
    """Set the search on record beside the paper's (section 5.1.1).

    Args:
        trials: from `read_trials`.
        steps: of the training of a trial of the proxy.
    """
    found = [(name, len(samples)) for name, _, samples in searches(trials)]
    if not found:
        return nothing(trials)
    counts = words(f"{count} {_plural('sample', count)} of {name}" for name, count in found)
    trial = f"{counts}. A trial is {setting(trials)}."
    if source_of(trials) != PROXY:
        return f"What stands here was searched at these settings: {trial}"
    return (
        f"What stands here is smaller in all of this: {steps} steps a trial; {trial} The paper's "
        "own search is **not run**; `effspinenet plan figure-05` says what it takes."
    )


def limits_sentence(trials: pd.DataFrame) -> str:
    """Say what a search of this size and source cannot show."""
    rows = sampled(trials)
    if rows.empty:
        return nothing(trials)
    count = f"{len(rows)} {_plural('sample', len(rows))} of a space of 5¹⁸"
    if source_of(trials) == PROXY:
        return (
            "A difference between two distributions here need not be one on COCO at the paper's "
            "scale, least of all at levels that small images leave without objects. So few as "
            f"{count} say how the methods begin, not where they would end."
        )
    return (
        "A trial is a short training: a difference between two distributions here need not be one "
        f"after a full training. Another search than this one, of {count}, may end elsewhere."
    )


def conclusions(trials: pd.DataFrame) -> str:
    """What the record shows and what it cannot, as a list."""
    rows, asked = searched(trials), chosen(trials)
    if rows.empty:
        return nothing(trials)
    methods, failed = asked["method"].nunique(), len(asked) - len(rows)
    hours = trials["seconds"].sum() / SECONDS_AN_HOUR
    return bullets(
        (
            f"Run: the search of the profile `{profile_of(trials)}`, {len(trials)} trials in "
            f"{hours:.1f} hours of training and evaluation. {methods} {_plural('method', methods)} "
            f"chose {len(asked)} of them; {failed} failed. A trial is {setting(trials)}; it "
            f"reached {rows['AP'].mean():.2f} AP on average, {rows['AP'].max():.2f} at best.",
            _compared(references(trials), FOUND, SP),
            chosen_sentence(trials),
            *_against_random(list(searches(trials))),
            noise_sentence(trials),
        )
    )


def _the(name: str) -> str:
    return f"the {name}" if name == FOUND or name.startswith("best of") else name


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
