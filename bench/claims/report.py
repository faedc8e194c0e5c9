"""Turns records into tables, verdicts and curves."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.claims.curves import PICTURES, curves
from bench.claims.experiments import ARMS, EXPERIMENTS, ONCE, UPDATES, Expected, Reading, Task
from bench.harness import write_between

RESULTS = Path(__file__).parent / "results.jsonl"

Record = dict[str, Any]
"""The results of a run, as `runs.one` writes them."""


def records() -> dict[Task, Record]:
    """The last record of each run that has the current length."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    found = [json.loads(line) for line in lines]
    return {
        (record["arm"], record["seed"]): record
        for record in found
        if record["arm"] in {*ARMS, "agreement"} and record["base"] == UPDATES
    }


_T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
)
"""The 97.5 % quantile of Student's distribution for 1, 2, … degrees of freedom."""


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of 2 to 20 paired differences, and the ends of its two-sided 95 % interval (Student's)."""
    mean = statistics.fmean(values)
    half = _T[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def verdict(differences: Sequence[float], expected: Expected) -> str:
    """Judges a claim by the rule that was fixed before the runs. Fewer than three seeds decide nothing.

    `above` and `below` hold if the 95 % interval of the paired difference lies wholly on that side of 0, and don't hold
    if it lies wholly on the other side. `equal` holds if the interval lies within one point (0.01) of 0, and doesn't
    hold if it lies wholly outside. Otherwise the claim is not decided.
    """
    if len(differences) < 3:
        return "not decided"
    _, low, high = interval(differences)
    if expected == "equal":
        holds, fails = low >= -0.01 and high <= 0.01, low > 0.01 or high < -0.01
    else:
        holds, fails = (low > 0, high < 0) if expected == "above" else (high < 0, low > 0)
    return "holds" if holds else "does not hold" if fails else "not decided"


def _values(found: dict[Task, Record], reading: Reading) -> dict[int, float]:
    """The numbers of a reading, by seed. A model with one head has only `fused`."""
    arm, head = reading
    return {
        seed: record["test"][head] for (name, seed), record in found.items() if name == arm and head in record["test"]
    }


def _paired(found: dict[Task, Record], one: Reading, other: Reading) -> list[float]:
    """The differences between two readings, for the seeds that both have."""
    ours, theirs = _values(found, one), _values(found, other)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def _difference(values: Sequence[float]) -> str:
    """Paired differences in a cell of a table: their mean in points, and its interval if there is one."""
    if not values:
        return ""
    if len(values) < 2:
        return f"{100 * values[0]:+.1f}"
    mean, low, high = (100 * value for value in interval(values))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def table() -> str:
    """Returns all experiments as Markdown tables, with numbers in percent."""
    found = records()
    parts = [_teachers(found)]
    for name, experiment in EXPERIMENTS.items():
        rows = ["| arm | read from | mean | s.d. | n | difference to the control, 95 % |", "|---|---|---|---|---|---|"]
        for arm in experiment.arms:
            heads = dict.fromkeys(
                head for (other, _), record in found.items() if other == arm for head in record["test"]
            )
            for head in (
                heads if {"class", "distillation"} <= set(heads) or arm == "agreement" else set(heads) & {"fused"}
            ):
                values = list(_values(found, (arm, head)).values())
                spread = f"{100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
                compared = (
                    "control"
                    if (arm, head) == experiment.control
                    else ""
                    if head.startswith("cosine")
                    else _difference(_paired(found, (arm, head), experiment.control))
                )
                rows.append(
                    f"| `{arm}` | {head} | {100 * statistics.fmean(values):.1f} | {spread} | {len(values)} | "
                    f"{compared} |"
                )
        rows += ["", "| claim | source | difference, 95 % | n | verdict |", "|---|---|---|---|---|"]
        for claim in experiment.claims:
            differences = _paired(found, claim.one, claim.other)
            rows.append(
                f"| {claim.text} | {claim.source} | {_difference(differences)} | {len(differences)} | "
                f"{verdict(differences, claim.expected)} |"
            )
        picture = PICTURES / f"claims-{name}.svg"
        shown = [f"![validation accuracy by images seen](pictures/{picture.name})", ""] if picture.exists() else []
        parts.append("\n".join([f"### {experiment.title}", "", *shown, *rows]))
    return "\n\n".join(parts) + "\n"


def _teachers(found: dict[Task, Record]) -> str:
    """The table of the teachers."""
    rows = ["### Teachers", "", "| arm | steps | validation | test |", "|---|---|---|---|"]
    chosen = {record["teacher"] for record in found.values() if "teacher" in record}
    for arm in ONCE:
        if record := found.get((arm, 0)):
            rows.append(
                f"| `{arm}`{' (matched)' if arm in chosen else ''} | {record['updates']} | "
                f"{100 * record['validation']:.1f} | {100 * record['test']['fused']:.1f} |"
            )
    return "\n".join(rows)


def draw() -> None:
    """Draws validation accuracy over the images seen, as a mean over seeds, for each experiment with curves."""
    found = records()
    for name, experiment in EXPERIMENTS.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for arm in experiment.arms:
            runs = [record["curve"] for (other, _), record in found.items() if other == arm and "curve" in record]
            if runs:
                lines[arm] = [
                    (points[0][0], 100 * statistics.fmean(point[1] for point in points))
                    for points in zip(*runs, strict=False)
                ]
        if lines:
            PICTURES.mkdir(parents=True, exist_ok=True)
            (PICTURES / f"claims-{name}.svg").write_text(
                curves(experiment.title, lines, "images seen", "validation accuracy, %"), encoding="utf-8"
            )


def write(path: Path, text: str) -> None:
    """Puts the tables between the markers of a Markdown file."""
    write_between(path, "claims", text)
