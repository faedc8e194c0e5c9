"""Puts the speeds that were measured into the tables of README.md, README.zh-CN.md and docs/performance.md.

    python -m bench.speed

The tables are made of the records beside this file alone. Of each case, they have the latest record of each kind of
processor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import OURS, write_between
from bench.speed import memory

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Language:
    """The words of the tables."""

    machine: str
    over: str
    """The heading of a peer's column."""
    kinds: Mapping[str, str]
    """Kinds of processors, by `bfloat16` of a record."""
    names: Mapping[str, str]
    """Contenders that have another name for readers."""
    cases: Mapping[str, str]


ENGLISH = Language(
    machine="machine",
    over="{} (ours over it)",
    kinds={"none": "AVX2", "held": "held to AVX2", "AVX512": "AVX-512, bfloat16", "AMX": "AMX"},
    names={"pytorch": "deit, PyTorch", "timm-packed": "timm, the packed files"},
    cases={
        "32/4": "32 pixels, patches of 4, batch 128",
        "32/4 stochastic depth": "32 pixels, stochastic depth 0.1",
        "224/16": "224 pixels, patches of 16, batch 16",
        "224/16 stochastic depth": "224 pixels, stochastic depth 0.1",
        "tiny 1": "tiny, one by one",
        "tiny 32": "tiny, batches of 32",
        "base 1": "base, one by one",
        "base 32": "base, batches of 32",
        "photos for a GPU": "photos, RandAugment on the GPU",
        "12 megapixels for a GPU": "12 megapixels, RandAugment on the GPU",
        "packed photos for a GPU": "packed photos, RandAugment on the GPU",
    },
)
CHINESE = Language(
    machine="机器",
    over="{}（我们是它的几倍）",
    kinds={"none": "AVX2", "held": "限制为 AVX2", "AVX512": "AVX-512，bfloat16", "AMX": "AMX"},
    names={"pytorch": "deit，PyTorch"},
    cases={
        "32/4": "32 像素，图块 4，批大小 128",
        "32/4 stochastic depth": "32 像素，随机深度 0.1",
        "224/16": "224 像素，图块 16，批大小 16",
        "224/16 stochastic depth": "224 像素，随机深度 0.1",
        "tiny 1": "tiny，逐张",
        "tiny 32": "tiny，批大小 32",
        "base 1": "base，逐张",
        "base 32": "base，批大小 32",
    },
)
PAGES = {
    "README.md": (ENGLISH, ("train", "keras", "predict"), False),
    "README.zh-CN.md": (CHINESE, ("train", "keras", "predict"), False),
    "docs/performance.md": (ENGLISH, ("train", "keras", "predict", "reading"), True),
}
"""For each page: its language, the comparisons that it shows, and whether its tables are whole."""


def latest(records: Path) -> list[Record]:
    """The last record of each case and kind of processor, in the order of the cases' first records."""
    found: dict[tuple[str, str], Record] = {}
    order: dict[str, int] = {}
    for line in records.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        order.setdefault(record["case"], len(order))
        found[record["case"], record["bfloat16"]] = record
    return sorted(found.values(), key=lambda each: (order[each["case"]], list(ENGLISH.kinds).index(each["bfloat16"])))


def table(records: list[Record], language: Language, whole: bool) -> str:
    """A row for each record: our best rate in images/s, that of each peer's best variant, and ours over it. The `whole`
    table also names the processor, and the lowest and highest ratio."""
    peers = list(dict.fromkeys(_peer(name) for record in records for name in sorted(record["ratio_to_best"])))
    heads = ["", language.machine, OURS, *(language.over.format(language.names.get(peer, peer)) for peer in peers)]
    rows = []
    for record in records:
        rates, best = record["images_per_second"], {_peer(name): name for name in record["ratio_to_best"]}
        ours = max(rate for name, rate in rates.items() if _peer(name) == OURS)
        kind = language.kinds[record["bfloat16"]]
        row = [
            language.cases.get(record["case"], record["case"]),
            f"{record['machine']}, {kind}" if whole else kind,
            _rate(ours),
        ]
        for peer in peers:
            cell = "–"
            if name := best.get(peer):
                median, low, high = record["ratio_to_best"][name]
                cell = f"{_rate(rates[name])} ({median:.2f} x{f', {low:.2f} to {high:.2f}' if whole else ''})"
            row.append(cell)
        rows.append(row)
    top = f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
    return top.replace("|  |", "| |") + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _peer(name: str) -> str:
    return name.partition(" ")[0]


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def write(root: Path) -> None:
    """Writes the tables into the pages below `root`."""
    for page, (language, comparisons, whole) in PAGES.items():
        for name in comparisons:
            shown = [each for each in latest(HERE / f"{name}.jsonl") if _is_shown(each)]
            write_between(root / page, f"speed {name}", table(shown, language, whole))

    newest = json.loads(memory.RECORDS.read_text(encoding="utf-8").splitlines()[-1])
    write_between(root / "docs/performance.md", "speed memory", memory.table(newest))


def _is_shown(record: Record) -> bool:
    """Whether a record compares whole programs, and not parts of one."""
    return not record.get("network") and not record.get("divided")


if __name__ == "__main__":
    write(ROOT)
