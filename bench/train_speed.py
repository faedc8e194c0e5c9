"""Training speed on the CPU beside timm's and transformers': one update of DeiT-Ti with distillation token.

    python bench/train_speed.py [--rounds 7] [--case small|large|...]

Each contender is a process of its own with all cores; they take turns, round by round, so that what else the machine
does meets all alike. An update is forward, the cross-entropies of both heads (labels and a teacher's decisions),
backward, and a fused AdamW step. The peers run in their own float32 and bfloat16 autocast; the best of the two counts.
Appends a record to bench/speed.jsonl: images per second, median over the rounds, and the ratio round by round.
"""

from __future__ import annotations

import argparse
import importlib
import json
import operator
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CASES = {
    "32/4": {"image": 32, "patch": 4, "batch": 128, "drop_path": 0.0},
    "32/4 stochastic depth": {"image": 32, "patch": 4, "batch": 128, "drop_path": 0.1},
    "224/16": {"image": 224, "patch": 16, "batch": 16, "drop_path": 0.0},
    "224/16 stochastic depth": {"image": 224, "patch": 16, "batch": 16, "drop_path": 0.1},
}
CONTENDERS = ("deit", "timm float32", "timm bfloat16", "transformers float32", "transformers bfloat16")
WIDTH, DEPTH, HEADS, CLASSES = 192, 12, 3, 10
HEADS_OF = ("cls_logits", "distillation_logits")
SECONDS = 3.0
"""Of each round, about."""


def deit_model(image: int, patch: int, drop_path: float) -> Any:
    from deit import DeiTConfig, DeiTForImageClassificationWithTeacher
    from deit.machine import keep_memory

    keep_memory()
    config = DeiTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        layer_norm_eps=1e-6,
        image_size=image,
        patch_size=patch,
        encoder_stride=patch,
        num_labels=CLASSES,
        drop_path_rate=drop_path,
    )
    model = DeiTForImageClassificationWithTeacher(config)
    return model, lambda pixels: operator.attrgetter(*HEADS_OF)(model(pixels))


def timm_model(image: int, patch: int, drop_path: float) -> Any:
    from timm.models.deit import VisionTransformerDistilled

    model = VisionTransformerDistilled(
        img_size=image,
        patch_size=patch,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=CLASSES,
        drop_path_rate=drop_path,
    )
    model.set_distilled_training(True)
    return model, model


def transformers_model(image: int, patch: int, drop_path: float) -> Any:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    assert not drop_path, "transformers has no stochastic depth"
    config = DeiTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=image,
        patch_size=patch,
        num_labels=CLASSES,
    )
    model = DeiTForImageClassificationWithTeacher(config)
    return model, lambda pixels: operator.attrgetter(*HEADS_OF)(model(pixels))


MODELS: dict[str, Callable[..., Any]] = {"deit": deit_model, "timm": timm_model, "transformers": transformers_model}


def work(contender: str, image: int, patch: int, batch: int, drop_path: float) -> None:
    """A contender."""
    import torch
    import torch.nn.functional as F

    from deit.machine import resolve_precision

    name, _, precision = contender.partition(" ")
    torch.manual_seed(0)
    model, heads = MODELS[name](image, patch, drop_path)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    dtype = getattr(torch, precision) if precision else resolve_precision("auto", torch.device("cpu"))
    pixels, labels = torch.randn(batch, 3, image, image), torch.randint(CLASSES, (batch,))
    taught = torch.randint(CLASSES, (batch,))

    def update() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            own, distilled = heads(pixels)
        loss = (F.cross_entropy(own.float(), labels) + F.cross_entropy(distilled.float(), taught)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    answer(update)


def answer(step: Callable[[], Any]) -> None:
    """Takes as many steps as each line of standard input says, and answers with the seconds."""
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(time.perf_counter() - began, flush=True)


class Contender:
    def __init__(self, script: str, name: str, case_name: str, batch: int):
        self.process = subprocess.Popen(
            [sys.executable, script, "--work", name, case_name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.batch, self.steps, self.rates = batch, 1, list[float]()
        self.first = self._timed(1)
        self._timed(2)
        self.steps = max(1, round(SECONDS / self._timed(1)))

    def _timed(self, steps: int) -> float:
        assert self.process.stdin
        assert self.process.stdout
        print(steps, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def round(self) -> None:
        self.rates.append(self.batch * self.steps / self._timed(self.steps))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def contest(script: str, names: Iterable[str], case_name: str, batch: int, rounds: int, step: str) -> dict[str, Any]:
    """Rates of the contenders, each a process of `script`, and the ratio of our best to the best of each peer."""
    contenders = {name: Contender(script, name, case_name, batch) for name in names}
    for _ in range(rounds):
        for contender in contenders.values():
            contender.round()
    for contender in contenders.values():
        contender.close()
    rates = {name: contender.rates for name, contender in contenders.items()}
    medians = {name: statistics.median(found) for name, found in rates.items()}
    best = {
        peer: max((name for name in medians if name.partition(" ")[0] == peer), key=medians.__getitem__)
        for peer in sorted({name.partition(" ")[0] for name in medians})
    }
    ours = best.pop("deit")
    return {
        "images_per_second": {name: round(median, 1) for name, median in medians.items()},
        f"first_{step}_seconds": {name: round(contender.first, 2) for name, contender in contenders.items()},
        "ratio_to_best": {
            name: [round(value, 3) for value in _spread(rates[ours], rates[name])] for name in best.values()
        },
    }


def measure(case_name: str, rounds: int) -> dict[str, Any]:
    case = CASES[case_name]
    names = [name for name in CONTENDERS if not (case["drop_path"] and name.startswith("transformers"))]
    return {
        "case": case_name,
        **case,
        "rounds": rounds,
        **contest(__file__, names, case_name, case["batch"], rounds, "update"),
        **machine(),
    }


def _spread(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Median, lowest and highest of the ratios round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def machine(*packages: str) -> dict[str, Any]:
    """Hardware, versions and date; of `packages`, or else of this comparison's."""
    import torch

    models = (
        [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else [platform.processor()]
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
    )
    features = torch.cpu.get_capabilities()
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores of {models[0]}",
        "bfloat16": "AMX" if features.get("amx_bf16") else "AVX512" if features.get("avx512_bf16") else "none",
        **{name: importlib.import_module(name).__version__ for name in packages or ("torch", "timm", "transformers")},
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def run(
    description: str,
    cases: dict[str, dict[str, Any]],
    measure: Callable[[str, int], dict[str, Any]],
    work: Callable[..., None],
    records: Path,
) -> None:
    """The command line of a comparison, and of its contenders."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", choices=tuple(cases), action="append", help="may be repeated; all when not given")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        name, case = options.work
        return work(name, **cases[case])
    for case in options.case or cases:
        record = measure(case, options.rounds)
        with records.open("a") as file:
            print(json.dumps(record), file=file)
        print(f"{case}: {record['images_per_second']}; ratio to the best of each peer {record['ratio_to_best']}")
    return None


if __name__ == "__main__":
    run(__doc__, CASES, measure, work, HERE / "speed.jsonl")
