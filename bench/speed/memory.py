"""Peak memory of training on the CPU, beside timm and transformers: steps of DeiT-Ti with distillation token.

    python -m bench.speed.memory [--rounds 3]

Each contender takes four steps of `bench.speed.train` on 64 images of 224 pixels, in a process of its own. Its memory
is what the process takes at its highest, beyond what it had with PyTorch, the model and the images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.harness import count, machine, peak
from bench.speed import train

RECORDS = Path(__file__).with_suffix(".jsonl")
CASE: Mapping[str, Any] = {"image": 224, "patch": 16, "batch": 64, "drop_path": 0.0}
PRECISIONS = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=count, default=3, help="processes of each contender (default: %(default)s)")
    parser.add_argument("--records", type=Path, default=RECORDS, help="append to this file (default: %(default)s)")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return print(taken(options.work))
    names = [f"{name} {precision}" for precision in PRECISIONS for name in train.MODELS]
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            command = [sys.executable, "-m", "bench.speed.memory", "--work", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[name].append(float(done.stdout.splitlines()[-1]))
    record = {**CASE, "rounds": options.rounds, "mib": {name: round(statistics.median(found[name])) for name in names}}
    record |= machine(*train.COMPARISON.packages)
    with options.records.open("a", encoding="utf-8") as file:
        print(json.dumps(record), file=file)
    print(table(record))
    return None


def taken(contender: str) -> float:
    """MiB that four steps of a contender take."""
    before: list[float] = []

    def steps(update: Callable[[], None]) -> None:
        before.append(peak())
        for _ in range(4):
            update()

    train.work(contender, **CASE, take=steps)
    return peak() - before[0]


def table(record: Mapping[str, Any]) -> str:
    """A row for each precision: MiB of ours and of each peer, and ours over it."""
    ours, *peers = train.MODELS
    rows = [
        f"| | {ours} | {' | '.join(f'{peer} (ours over it)' for peer in peers)} |",
        f"|---|---|{'---|' * len(peers)}",
    ]
    for precision in PRECISIONS:
        mib = {name: record["mib"][f"{name} {precision}"] for name in train.MODELS}
        cells = [f"{mib[peer]:,} ({mib[ours] / mib[peer]:.2f} x)" for peer in peers]
        rows.append(f"| {precision} | {mib[ours]:,} | {' | '.join(cells)} |")
    return "\n".join(rows) + f"\n\n{record['machine']}.\n"


if __name__ == "__main__":
    main()
