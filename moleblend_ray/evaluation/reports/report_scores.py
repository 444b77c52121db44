"""The part of reports about scores: a table of all models, their differences and what is chance of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from moleblend_ray.evaluation.reports.score_text import (
    mean_and_std_text,
    metric_name,
    rank_key,
    score_text,
    table_cell,
    values_text,
)

_WITHOUT_INTERVAL: Final = (
    "None is given where it would look surer than it is: of fewer than ten different test molecules or about five of a class, of a "
    "score that is the same in all draws (a perfect one), and of one that is too high or low in them on average, as a mean PR-AUC of "
    "columns with few positives is."
)


def score_rows(
    task: Mapping[str, Any], final: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The model (in bold) and the baselines, sorted by validation score, best first."""
    ranked = sorted(
        (final, *baselines),
        key=lambda entry: rank_key(entry["valid"]["mean"], task["higher_is_better"]),
    )
    rows = []
    for entry in ranked:
        rows.append(_score_row(entry, is_bold=entry is final))
        if entry is final and "ensemble" in final:
            rows.append(_ensemble_row(final))
    return rows


def _score_row(entry: Mapping[str, Any], *, is_bold: bool) -> str:
    test, valid = entry["test"], entry["valid"]
    cells = [
        entry["name"],
        score_text(valid["mean"]),
        mean_and_std(test),
        limits_text(entry.get("test_interval"), test["mean"]),
    ]
    if is_bold:
        cells = [f"**{cell}**" if cell else "" for cell in cells]
    cells.append(values_text(test["mean"], test["values"]))
    return f"| {' | '.join(cells)} |"


def _ensemble_row(final: Mapping[str, Any]) -> str:
    """All seeds together: what a user of the predictions gets."""
    together = final["ensemble"]
    name = f"{_ensemble_name(final)}, as `moleblend predict` gives it"
    limits = limits_text(together.get("test_interval"), together["test"])
    return f"| {name} | {score_text(together['valid'])} | {score_text(together['test'])} | {limits} | |"


def limits_text(limits: Sequence[float] | None, like: float) -> str:
    """The limits of an interval, with the digits of the score ``like``; nothing of results that have none."""
    return " to ".join(score_text(limit, like) for limit in limits) if limits else ""


def _ensemble_name(final: Mapping[str, Any]) -> str:
    return f"mean of these {len(final['seeds'])} models"


def mean_and_std(spread: Mapping[str, Any]) -> str:
    """The mean of a score over seeds or folds, and the deviation if there are several."""
    return mean_and_std_text(spread["mean"], spread["std"], len(spread["values"]))


def comparison(
    task: Mapping[str, Any], final: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The model compared with the baseline that a user would have chosen without the test part."""
    if not baselines:
        return []
    best = min(
        baselines, key=lambda entry: rank_key(entry["valid"]["mean"], task["higher_is_better"])
    )
    gain = _gain(task, final, best)
    verdict = "better" if gain > 0 else "worse"
    means = [entry["test"]["mean"] for entry in (best, final)]
    smallest = min(filter(None, means), key=abs, default=0.0)
    than = f"{score_text(abs(gain), smallest)} {verdict} in {metric_name(task)} than"
    if gain == 0:
        than = f"as good in {metric_name(task)} as"
    limits = best.get("model_is_better_by")
    is_unsure = limits is not None and limits[0] <= 0 <= limits[1]
    remark = (
        " With other test molecules it might be the other way round, see below."
        if is_unsure
        else ""
    )
    return [
        f"On the test molecules {final['name']} is {than} {best['name']}, the best of the baselines by validation.{remark}",
        "",
    ]


def _gain(task: Mapping[str, Any], final: Mapping[str, Any], baseline: Mapping[str, Any]) -> float:
    """By how much the model is better than a baseline on the test molecules; negative if it is worse."""
    difference: float = final["test"]["mean"] - baseline["test"]["mean"]
    return difference if task["higher_is_better"] else -difference


def differences_section(results: Mapping[str, Any]) -> list[str]:
    """By how much the model is better than each baseline, and how sure that is; nothing of results of earlier versions."""
    task, final = results["task"], results["final"]
    if not results.get("resampling"):
        return []
    how = _about_intervals(results)
    compared = list(filter(_is_compared, results["baselines"]))
    if not compared:
        return [how, ""]
    lines = [
        f"{how} Differences are on the same draws, and so surer than the scores:",
        "",
        f"| {final['name']} compared with | better by (negative: worse) | 95 % interval |",
        "|---|---|---|",
    ]
    for entry in compared:
        gain, limits = _gain(task, final, entry), entry["model_is_better_by"]
        smallest = min(
            filter(None, (final["test"]["mean"], entry["test"]["mean"])), key=abs, default=0.0
        )
        lines.append(
            f"| {entry['name']} | {score_text(gain, smallest)} | {limits_text(limits, smallest)} |"
        )
    return [*lines, ""]


def _about_intervals(results: Mapping[str, Any]) -> str:
    """What the intervals of scores and of differences are, and why some or all are absent."""
    entries = results["final"], results["final"].get("ensemble"), *results["baselines"]
    of_scores = [bool(entry.get("test_interval")) for entry in entries if entry]
    if not any(of_scores) and not any(map(_is_compared, results["baselines"])):
        return f"There are no 95 % intervals of scores. {_WITHOUT_INTERVAL}"
    resampling = results["resampling"]
    drawn = f"{resampling['units']:,} test molecules"
    if resampling["of"] != "molecules":
        of = resampling["of"].removesuffix("s")
        ways = (
            *(["without rings"] if of == "scaffold" else []),
            *([f"of a {of} of more than half a fold"] if "folds" in results else []),
        )
        alone = f" (one {' or '.join(ways)} counts as its own)" if ways else ""
        drawn = f"{resampling['units']:,} {of}s of the test molecules{alone}"
    how = (
        f"95 % intervals are those of the scores on {resampling['draws']:,} draws of the {drawn}, with replacement: what other "
        "test molecules of this kind might have given. " + _beside_intervals(results)
    )
    return how if all(of_scores) else f"{how} {_WITHOUT_INTERVAL}"


def _beside_intervals(results: Mapping[str, Any]) -> str:
    if "folds" in results:
        return "That other molecules would have trained other models comes on top."
    return "The deviation over seeds comes on top."


def _is_compared(baseline: Mapping[str, Any]) -> bool:
    """Whether there is an interval of the difference to it."""
    return bool(baseline.get("model_is_better_by"))


def other_scores_section(
    task: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What the other metrics say of the test part; nothing was chosen by them."""
    metrics = list(
        dict.fromkeys(name for entry in entries for name in entry.get("test_others", {}))
    )
    if not metrics:
        return []
    rows = []
    for entry in entries:
        others = entry.get("test_others", {})
        cells = [mean_and_std(others[name]) if name in others else "" for name in metrics]
        rows.append(f"| {' | '.join([entry['name'], *cells])} |")
        if "ensemble" in entry:
            together = entry["ensemble"]["test_others"]
            cells = [score_text(together[name]) if name in together else "" for name in metrics]
            rows.append(f"| {' | '.join([_ensemble_name(entry), *cells])} |")
    # A unit such as log|S| must not end a cell.
    heads = [table_cell(metric_name({**task, "metric": name})) for name in metrics]
    return [
        "Other scores of the same test predictions, by which nothing was chosen:",
        "",
        f"| model | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
        *rows,
        "",
    ]
