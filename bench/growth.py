"""How time and memory of training grow, on the CPU: with the batch, the resolution, the width, the classes, the images.

    python -m bench.growth run             # measures every curve, each point in a process of its own
    python -m bench.growth table           # prints them; --write FILE puts them between the markers of a page

A step is the forward pass of a distilled DeiT with both heads, the losses, the backward pass and fused AdamW, on random
pixels, in the precision that `deit train` takes here. Memory is what the process takes beyond PyTorch itself,
at its highest. The points of a curve take turns, and the lowest of each counts, because other work only adds to it.

Each run appends its points to growth.jsonl beside this file, and the table is made of the last run.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness import machine, peak, write_between

RECORDS = Path(__file__).with_suffix(".jsonl")
USUAL = {"batch": 16, "image": 224, "width": 192, "classes": 1000}
CURVES: Mapping[str, tuple[int, ...]] = {
    "batch": (4, 8, 16, 32, 64),
    "image": (112, 224, 336, 448),
    "width": (96, 192, 384, 768),
    "classes": (10, 1000, 21000),
    "images": (1000, 10000, 100000),
}
"""The values of each curve. The other settings of a point are `USUAL`, apart from those of `WITH`."""
WITH: Mapping[str, Mapping[str, int]] = {"image": {"batch": 8}, "width": {"batch": 8}}
SHOWN = {
    "batch": "images in a batch",
    "image": "pixels of a side",
    "width": "width (channels)",
    "classes": "classes",
    "images": "images in the folder",
}
_SECONDS, _STEPS, _ROUNDS = 2.0, 5, 3
"""How long a point is measured at least in a round, in how many steps, and the number of rounds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="measure the curves")
    verb.add_argument("--curve", choices=tuple(CURVES), action="append", help="a curve; may be repeated (default: all)")
    verb.add_argument("--records", type=Path, default=RECORDS, help="append to this file (default: %(default)s)")
    verb = verbs.add_parser("table", help="print the table of the records")
    verb.add_argument("--write", type=Path, help="write it between the markers of this Markdown file")
    verbs.add_parser("point").add_argument("settings", type=json.loads)
    options = parser.parse_args()
    if options.verb == "point":
        print(json.dumps(point(options.settings)))
    elif options.verb == "table":
        text = table(records(RECORDS))
        write_between(options.write, "growth", text) if options.write else print(text)
    else:
        for curve in options.curve or CURVES:
            points = lowest([[measured(settings(curve, value)) for value in CURVES[curve]] for _ in range(_ROUNDS)])
            with options.records.open("a", encoding="utf-8") as file:
                print(json.dumps({"curve": curve, "points": points, **machine("torch")}), file=file)


def settings(curve: str, value: int) -> dict[str, int]:
    return {"images": value} if curve == "images" else {**USUAL, **WITH.get(curve, {}), curve: value}


def measured(given: Mapping[str, int]) -> dict[str, Any]:
    """A point, measured in a process of its own."""
    command = [sys.executable, "-m", "bench.growth", "point", json.dumps(given)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {**given, **json.loads(done.stdout.splitlines()[-1])}


def lowest(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Each point of the rounds, with the lowest of what was measured."""
    return [{name: min(each[name] for each in found) for name in found[0]} for found in zip(*rounds, strict=True)]


def point(given: Mapping[str, int]) -> dict[str, float]:
    return listed(given["images"]) if "images" in given else trained(**given)


def trained(batch: int, image: int, width: int, classes: int) -> dict[str, float]:
    """Seconds of a step, the median, and MiB of memory."""
    import torch
    import torch.nn.functional as F

    from deit import DeiTConfig, DeiTForImageClassificationWithTeacher
    from deit.machine import keep_memory, resolve_precision

    keep_memory()
    torch.manual_seed(0)
    before = peak()
    config = DeiTConfig(
        hidden_size=width,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        image_size=image,
        num_labels=classes,
    )
    model = DeiTForImageClassificationWithTeacher(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    precision = resolve_precision("auto", torch.device("cpu"))
    pixels, labels = torch.randn(batch, 3, image, image), torch.randint(classes, (batch,))

    def step() -> None:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            out = model(pixels)
        loss = F.cross_entropy(out.cls_logits.float(), labels) + F.cross_entropy(
            out.distillation_logits.float(), labels
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    seconds: list[float] = []
    while len(seconds) < _STEPS or sum(seconds) < _SECONDS:
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return {"seconds": round(statistics.median(seconds), 4), "memory": round(peak() - before, 1)}


def listed(images: int) -> dict[str, float]:
    """Seconds from a folder of so many small files to a data set whose content has a fingerprint, and MiB of memory."""
    from PIL import Image

    from deit.data.folders import fingerprint, read_split

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    content = buffer.getvalue()
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(10):
            folder = Path(scratch) / "train" / f"class{number}"
            folder.mkdir(parents=True)
            for each in range(images // 10):
                (folder / f"{each}.png").write_bytes(content)
        before, began = peak(), time.perf_counter()
        fingerprint(read_split(Path(scratch), "train"))
        return {"seconds": round(time.perf_counter() - began, 4), "memory": round(peak() - before, 1)}


def records(file: Path) -> dict[str, Mapping[str, Any]]:
    """The last record of each curve."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = {record["curve"]: record for record in map(json.loads, lines)}
    return {curve: found[curve] for curve in CURVES if curve in found}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    rows = ["| | values | seconds | grow as | MiB | grow as |", "|---|---|---|---|---|---|"]
    for curve, record in found.items():
        points = record["points"]
        values = [each[curve] for each in points]
        cells = [", ".join(f"{value:,}" for value in values)]
        for name in ("seconds", "memory"):
            numbers = [each[name] for each in points]
            if not any(numbers):  # less than what PyTorch took before
                cells += ["–", "–"]
                continue
            cells += [", ".join(f"{number:.3g}" if number < 1000 else f"{number:,.0f}" for number in numbers)]
            # The zero turns a rounded -0.0 into 0.0.
            grown = [f"{round(power, 1) + 0.0:.1f}" for power in powers(values, numbers)]
            cells += [" to ".join(dict.fromkeys(grown))]
        rows.append(f"| {SHOWN[curve]} | {' | '.join(cells)} |")
    machines = "; ".join(sorted({f"{each['machine']} ({each['bfloat16']})" for each in found.values()}))
    return "\n".join(rows) + f"\n\n{machines}.\n"


def powers(values: list[int], numbers: list[float]) -> list[float]:
    """With which power of the value a number grows, between the first two points and between the last two."""
    kept = [max(number, 1e-9) for number in numbers]
    return [
        math.log(kept[last] / kept[first]) / math.log(values[last] / values[first])
        for first, last in ((0, 1), (-2, -1))
    ]


if __name__ == "__main__":
    main()
