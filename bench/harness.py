"""Compares the speed of contenders, each in a process of its own, in alternating rounds, and records each case.

A script describes a `Comparison` and calls its `main`. Every contender is another process of the same script, which
calls `work`. The processes take turns, so whatever else the machine does slows all of them alike.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SECONDS = 3.0
"""Approximate length of a contender's turn. A turn has at least one step."""
OURS = "deit"
HELD = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""The environment that holds PyTorch to AVX2 on a processor with more."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison of our code with its peers, in several cases."""

    module: str
    """The script's own name for `python -m`, which starts each contender's process."""
    description: str | None
    """Text of `--help`."""
    records: Path
    """Default of `--records`: the file to which each case appends a line of JSON."""
    cases: Mapping[str, Mapping[str, Any]]
    """The settings of each case. They are arguments of `work` and fields of the record."""
    contenders: Callable[[Mapping[str, Any]], Iterable[str]]
    """The names that take part with these settings: "PEER" or "PEER VARIANT". Our own peer is called "deit"."""
    work: Callable[..., None]
    """`work(name, **settings)` prepares a contender in its process and hands its step to `answer`."""
    step: str
    """The name of a step in the record."""
    images: str
    """The setting that says how many images a step takes."""
    packages: tuple[str, ...]
    """Packages whose versions the record gives."""
    held: Callable[[Mapping[str, Any]], Iterable[str]] | None = None
    """As `contenders`, for `--avx2`. They compute with PyTorch alone, in float32. None: there is no such option."""
    circumstances: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the record."""

    def measure(self, case: str, rounds: int, avx2: bool = False) -> dict[str, Any]:
        """Measures a case and returns its record. With `avx2`, the contenders do without newer instructions."""
        settings = self.cases[case]
        named = self.held if avx2 and self.held else self.contenders
        environment = {**os.environ, **HELD} if avx2 else None
        contenders = [Contender(self.module, name, case, environment) for name in named(settings)]
        for _ in range(rounds):
            for contender in contenders:
                contender.take_turn()
        for contender in contenders:
            contender.close()
        rates = {
            contender.name: [settings[self.images] / seconds for seconds in contender.seconds]
            for contender in contenders
        }
        return {
            "case": case,
            **settings,
            "rounds": rounds,
            **self.circumstances,
            "images_per_second": {name: round(statistics.median(found), 1) for name, found in rates.items()},
            f"first_{self.step}_seconds": {contender.name: round(contender.first, 2) for contender in contenders},
            "ratio_to_best": ratios(rates),
            **machine(*self.packages),
            **({"bfloat16": "held"} if avx2 else {}),
        }

    def main(self) -> None:
        """The command line of the script, and of its contenders."""
        parser = argparse.ArgumentParser(
            prog=f"python -m {self.module}",
            description=self.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--rounds", type=count, default=7, help="turns of each contender (default: %(default)s)")
        parser.add_argument(
            "--case", choices=tuple(self.cases), action="append", help="a case; may be repeated (default: all)"
        )
        parser.add_argument(
            "--records", type=Path, default=self.records, help="append to this file (default: %(default)s)"
        )
        if self.held:
            parser.add_argument(
                "--avx2", action="store_true", help="hold PyTorch to AVX2, the newest that most laptops have"
            )
        parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
        options = parser.parse_args()
        if options.work:
            name, case = options.work
            return self.work(name, **self.cases[case])
        for case in options.case or self.cases:
            record = self.measure(case, options.rounds, getattr(options, "avx2", False))
            with options.records.open("a", encoding="utf-8") as file:
                print(json.dumps(record), file=file)
            Console().print(self.table(record))
        return None

    def table(self, record: Mapping[str, Any]) -> Table:
        """A table of a record for people, with a row for each contender."""
        table = Table(
            "contender",
            title=f"{record['case']}, {record['rounds']} round{'s' * (record['rounds'] != 1)}, {record['machine']}",
            title_justify="left",
        )
        for heading in ("images/s", f"first {self.step}, s", "ours over it"):
            table.add_column(heading, justify="right")
        for name, rate in record["images_per_second"].items():
            first = record[f"first_{self.step}_seconds"][name]
            ratio = record["ratio_to_best"].get(name)
            over = f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else ""
            table.add_row(name, f"{rate:.1f}", f"{first:.2f}", over)
        return table


def answer(step: Callable[[], Any]) -> None:
    """Takes as many steps as each line of standard input says, and prints the seconds that they took."""
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(time.perf_counter() - began, flush=True)


class Contender:
    """A process that takes steps when it is told to. It has warmed up when this object exists."""

    def __init__(self, module: str, name: str, case: str, environment: Mapping[str, str] | None = None):
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--work", name, case],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.seconds: list[float] = []
        """Seconds for a step, one value for each turn."""
        self.first = self._timed(1)
        """Seconds of the very first step."""
        self._timed(2)
        self.steps = max(1, round(SECONDS / self._timed(1)))
        """Number of steps in a turn."""

    def take_turn(self) -> None:
        self.seconds.append(self._timed(self.steps) / self.steps)

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()

    def _timed(self, steps: int) -> float:
        """Seconds that these steps take together."""
        assert self.process.stdin
        assert self.process.stdout
        with suppress(BrokenPipeError):  # the process has ended; there is nothing to read then, which is reported below
            print(steps, file=self.process.stdin, flush=True)
        found = self.process.stdout.readline()
        if not found:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}; see its output above")
        return float(found)


def ratios(rates: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Divides our best variant's rate by that of each peer's best one: the median, lowest and highest ratio.

    The best variant has the highest median. `rates` has a value for each round, and a ratio divides two rates of the
    same round.
    """
    medians = {name: statistics.median(found) for name, found in rates.items()}
    best = {
        peer: max((name for name in medians if _peer(name) == peer), key=medians.__getitem__)
        for peer in sorted({_peer(name) for name in medians})
    }
    ours = rates[best.pop(OURS)]
    found = {name: [a / b for a, b in zip(ours, rates[name], strict=True)] for name in best.values()}
    return {
        name: [round(value, 3) for value in (statistics.median(values), min(values), max(values))]
        for name, values in found.items()
    }


def machine(*packages: str) -> dict[str, Any]:
    """The origin of a record: hardware, the versions of `packages`, commit and date."""
    import torch  # only here, because the contenders of other frameworks don't need it

    from deit.host import cores
    from deit.machine import described

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    processor = described(torch.device("cpu")).rpartition(", ")[0]
    features = torch.cpu.get_capabilities()
    return {
        "machine": f"{cores()} cores of {processor}",
        "bfloat16": "AMX" if features.get("amx_bf16") else "AVX512" if features.get("avx512_bf16") else "none",
        **{name: importlib.import_module(name).__version__ for name in packages},
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def peak() -> float:
    """The most memory that the process has had, in MiB."""
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def write_between(path: Path, name: str, text: str) -> None:
    """Puts tables between the markers of this name in a Markdown file."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    if not found or end not in rest:
        raise ValueError(f"{path} lacks the lines {begin} and {end}; put them where the tables belong")
    path.write_text(f"{before}{begin}\n\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def _peer(name: str) -> str:
    return name.partition(" ")[0]


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return int(text)
