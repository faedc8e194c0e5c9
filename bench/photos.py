"""What `deit fit` makes of a folder of photos, and of a few photos of each class.

    python -m bench.photos run PHOTOS WORK                           # all photos, seeds 0 to 2, half an hour each
    python -m bench.photos run PHOTOS WORK --per-class 10 30 100 --minutes 10      # so many training photos of a class
    python -m bench.photos table --write docs/results.md

For each number of photos and each seed: a fit, and beside it the fit's student without a teacher, in the time that the
student and the teacher's labels had. PHOTOS has validation and test photos of its own, which all runs share. Each pair
of runs appends a line to photos.jsonl beside this file, and the table is made of these lines alone. A stopped command
goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import machine, write_between
from deit import files
from deit.data.folders import read_parts
from deit.recipe import Distilled, Recipe, Supervised

RECORDS = Path(__file__).with_suffix(".jsonl")
PARTS = {"frozen": "frozen baseline", "teacher": "teacher", "student": "student", "alone": "the same student alone"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="do every pair of runs without a record")
    verb.add_argument("photos", type=Path)
    verb.add_argument("work", type=Path)
    verb.add_argument("--per-class", type=int, nargs="+", default=[0], help="training photos of each class; 0 is all")
    verb.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    verb.add_argument("--minutes", type=float, default=30.0, help="time of a fit (default: %(default)s)")
    verb = verbs.add_parser("table", help="print the table of the records")
    verb.add_argument("--write", type=Path, help="write it between the markers of this Markdown file")
    options = parser.parse_args()
    if options.verb == "table":
        write_between(options.write, "photos", table()) if options.write else print(table())
        return
    for count in options.per_class:
        for seed in options.seeds:
            asked = (count, seed, options.minutes)
            if not any((each["per_class"], each["seed"], each["minutes"]) == asked for each in records()):
                record = one(
                    options.photos,
                    options.work / f"{count or 'all'}-{options.minutes:g}m-{seed}",
                    count,
                    seed,
                    options.minutes,
                )
                with RECORDS.open("a") as file:
                    file.write(json.dumps(record) + "\n")


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def one(photos: Path, work: Path, count: int, seed: int, minutes: float) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    data, out, alone = chosen(photos, work / "photos.csv", count, seed), work / "fit", work / "alone"
    deit(work, "fit", data, "--out", out, "--time", f"{minutes}m", "--seed", seed)
    fitted, state = files.read_json(out / "result.json"), files.read_json(out / "state.json")
    seconds = state["seconds"]
    recipe = Recipe.from_dict(files.read_json(out / "student.json"))
    assert isinstance(recipe.objective, Distilled)
    recipe = replace(
        recipe,
        name="alone",
        model=recipe.model.replace(distillation_token=False),
        objective=Supervised(smoothing=recipe.objective.smoothing),
    )
    files.write_json(work / "alone.json", recipe.to_dict())
    spent = seconds["labels"] + seconds["student"]
    deit(work, "train", work / "alone.json", "--data", data, "--out", alone, "--time", f"{spent:.0f}s", "--resume")
    judged = json.loads(deit(work, "eval", alone / "model", "--data", data, "--split", "test", "--json"))
    parts: dict[str, dict[str, Any]] = {
        name: {"accuracy": {head: each["value"] for head, each in found["heads"].items()}, "seconds": seconds[name]}
        for name, found in fitted["models"].items()
    }
    rows = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    right = {head: each["top1"]["value"] for head, each in judged["heads"].items()}
    parts["alone"] = {"accuracy": right, "seconds": rows[-1]["seconds"]}
    for name, folder in (("teacher", out / "teacher"), ("student", out / "student"), ("alone", alone)):
        if name not in parts:  # it did not fit into the time
            continue
        parts[name]["views"] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["images"]
    return {
        "per_class": count,
        "seed": seed,
        "minutes": minutes,
        "images": {name: len(split) for name, split in read_parts(data).items()},
        "parts": parts,
        "recommended": fitted["recommended"],
        "pairs": fitted["pairs"],
        "seconds": fitted["seconds"],
        **machine("torch", "timm", "sklearn"),
    }


def chosen(photos: Path, place: Path, count: int, seed: int) -> Path:
    """A list of the photos with their splits, with at most `count` training photos of each class if it is not 0."""
    draw, rows = np.random.default_rng(seed), []
    for name, split in read_parts(photos).items():
        for number, label in enumerate(split.classes):
            own = [file for file, each in zip(split.files, split.labels, strict=True) if each == number]
            if count and name == "train":
                own = [own[index] for index in sorted(draw.permutation(len(own))[:count])]
            rows += [(str(Path(file).resolve()), label, name) for file in own]
    with place.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return place


def deit(work: Path, *arguments: object) -> str:
    """What the command prints on standard output. Features that were kept elsewhere are not used."""
    environment = {**os.environ, "XDG_CACHE_HOME": str((work / "cache").resolve()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "deit", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def table() -> str:
    rows = []
    found = records()
    for count, limit in sorted({(each["per_class"] or sys.maxsize, each["minutes"]) for each in found}):
        runs = [each for each in found if (each["per_class"] or sys.maxsize, each["minutes"]) == (count, limit)]
        for name, shown in PARTS.items():
            parts = [each["parts"][name] for each in runs if name in each["parts"]]
            if not parts:
                continue
            values = [100 * part["accuracy"].get("fused", next(iter(part["accuracy"].values()))) for part in parts]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            minutes = statistics.fmean(part["seconds"] for part in parts) / 60
            chosen_of = f"{sum(each['recommended'] == name for each in runs)} of {len(runs)}"
            rows.append(
                f"| {'all' if count == sys.maxsize else f'{count} a class'}, {runs[0]['images']['train']:,} | "
                f"{limit:g} | {shown} | "
                f"{statistics.fmean(values):.1f}{spread} | {minutes:.1f} | "
                f"{'' if name == 'alone' else chosen_of} |"
            )
    machines = sorted({each["machine"] for each in found})
    head = (
        "| training photos | minutes of the fit | model | test photos right, %, mean (lowest to highest) | minutes of "
        "the step | recommended |\n|---|---|---|---|---|---|\n"
    )
    seeds = ", ".join(str(seed) for seed in sorted({each["seed"] for each in found}))
    return f"{head}{chr(10).join(rows)}\n\nSeeds {seeds}; {'; '.join(machines)}.\n"


if __name__ == "__main__":
    main()
