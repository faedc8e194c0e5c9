"""Tests the claims of Touvron et al. 2020 (arXiv 2012.12877) on a small problem for a CPU: 5,000 images of CIFAR-10.

    python -m bench.claims prepare CIFAR_DIR WORK     # link the images used; CIFAR_DIR/{train,test}/CLASS/*.jpg
    python -m bench.claims run WORK                   # do every run without a record; a stopped command can continue
    python -m bench.claims table --write docs/results.md

`experiments` describes the runs and the claims, `runs` trains, and `report` judges. Each run appends a record to
results.jsonl beside this file, and everything printed comes from there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.claims import report
from bench.claims.experiments import ARMS, EXPERIMENTS
from bench.claims.runs import one, prepare, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("prepare", help="link the images used")
    verb.add_argument("cifar", type=Path)
    verb.add_argument("work", type=Path)
    verb = verbs.add_parser("run", help="do every run without a record")
    verb.add_argument("work", type=Path)
    verb.add_argument("experiments", nargs="*", help=f"any of {', '.join(EXPERIMENTS)} (default: all)")
    verb.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    verb.add_argument("--jobs", type=int, default=2, help="runs side by side (default: %(default)s)")
    verb.add_argument("--minutes", type=float, default=float("inf"), help="stop after this many minutes")
    verb = verbs.add_parser("one", help="do one run; `run` starts this command")
    verb.add_argument("work", type=Path)
    verb.add_argument("arm", choices=[*ARMS, "agreement"])
    verb.add_argument("seed", type=int)
    verb = verbs.add_parser("table", help="print tables and verdicts from the records")
    verb.add_argument(
        "--write", type=Path, help="write them between the markers of this Markdown file, and draw the pictures"
    )
    options = parser.parse_args()
    if options.verb == "prepare":
        prepare(options.cifar, options.work)
    elif options.verb == "run":
        if unknown := set(options.experiments) - set(EXPERIMENTS):
            parser.error(f"there is no experiment {min(unknown)}; choose from {', '.join(EXPERIMENTS)}")
        return min(
            1, run(options.work, options.experiments or list(EXPERIMENTS), options.seeds, options.jobs, options.minutes)
        )
    elif options.verb == "one":
        one(options.work, options.arm, options.seed)
    elif options.write:
        report.draw()
        report.write(options.write, report.table())
    else:
        print(report.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
