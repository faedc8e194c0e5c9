"""Does the runs, each in a process of its own and some side by side, until all have a record."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.claims import report
from bench.claims.experiments import (
    ARMS,
    BASE,
    FEW,
    FEWER,
    MATCHES,
    STUDENT,
    TRAIN,
    UPDATES,
    VAL,
    Task,
    needs,
    plan,
    task_of,
    updates_of,
)
from bench.claims.report import records
from deit.recipe import Distilled, MaskedImage, Recipe

# ------------------------------------------------------------------------------------------------------------ one run


def run_folder(work: Path, task: Task) -> Path:
    """The folder of a run that has the current length."""
    arm, seed = task
    return work / f"runs-{UPDATES}" / f"{arm}-{seed}"


def recipe_of(arm: str, seed: int, work: Path) -> Recipe:
    """The arm's recipe with its seed, and with the folders of the models it names."""

    def folder(name: str) -> str:
        arm = _matched() if name == "@matched" else name[1:]
        return str(run_folder(work, task_of(arm, seed)) / "model")

    recipe = replace(ARMS[arm], seed=seed)
    if recipe.start:
        recipe = replace(recipe, start=folder(recipe.start))
    if isinstance(recipe.objective, Distilled):
        recipe = replace(recipe, objective=replace(recipe.objective, teacher=folder(recipe.objective.teacher)))
    return recipe


def _matched() -> str:
    """The ConvNet that "@matched" stands for. It is chosen by validation images, never by test images."""
    found = records()
    wanted = found["transformer", 0]["validation"]
    return min(MATCHES, key=lambda arm: abs(found[arm, 0]["validation"] - wanted))


def run_arm(work: Path, arm: str, seed: int) -> dict[str, Any]:
    """Trains an arm, or continues it, and returns its record.

    The model with the best validation accuracy sees the test images once, at the end.
    """
    import torch
    from rich.console import Console

    from deit.data.batches import EvaluationBatches, processor_for
    from deit.data.folders import read_split
    from deit.evaluate.models import evaluate
    from deit.machine import resolve_precision
    from deit.model.load import load_model
    from deit.train.loop import Diverged, train

    began = time.perf_counter()
    if arm == "agreement":
        return {"test": agreement(work, seed), "seconds": round(time.perf_counter() - began, 1)}
    recipe, out = recipe_of(arm, seed, work), run_folder(work, (arm, seed))
    data = work / ("few" if arm in FEW else "data")
    train_split = read_split(data, "train")
    val_split, test_split = (read_split(data, split, train_split.classes) for split in ("val", "test"))
    record: dict[str, Any] = {"diverged": False}
    try:
        train(recipe, train_split, val_split, out, device="cpu", console=Console(width=120), resume=True)
    except Diverged:  # two arms of the paper's table 8 diverged too
        record["diverged"] = True
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    judged = [row for row in rows if "val_accuracy" in row or "val_loss" in row]
    if isinstance(recipe.objective, MaskedImage):
        record |= {"validation": judged[-1]["val_loss"], "test": {}}
    else:
        cpu = torch.device("cpu")  # with the precision of training, as on validation images
        heads = evaluate(
            load_model(out / "model"),
            EvaluationBatches(test_split, processor_for(recipe), 250),
            precision=resolve_precision(recipe.compute.precision, cpu),
        )
        record |= {
            "validation": max([row["val_accuracy"] for row in judged], default=0.0),
            "test": {head: accuracy.value for head, accuracy in heads.items()},
            "curve": [[row["images"], row["val_accuracy"]] for row in judged],
        }
    if "@matched" in str(ARMS[arm].objective):
        record["teacher"] = _matched()
    seconds = rows[-1]["seconds"] if rows else 0.0
    return record | {"seconds": seconds, "images_per_second": round(recipe.data.batch * updates_of(arm) / seconds, 1)}


def agreement(work: Path, seed: int) -> dict[str, float]:
    """Measures how alike models decide (table 4), and how alike the two tokens are (section 4), on the test images.

    Returns the share of images on which two models or heads decide differently, and the mean cosine between the class
    token and the distillation token at the input of the first block, after the first block and after the last block.
    """
    import torch

    from deit.data.batches import EvaluationBatches, processor_for
    from deit.data.folders import read_split
    from deit.model.heads import head_probabilities
    from deit.model.load import load_model

    batches = EvaluationBatches(read_split(work / "data", "test"), processor_for(BASE), 250)
    models = {arm: load_model(run_folder(work, task_of(arm, seed)) / "model") for arm in needs("agreement")}
    decisions: dict[str, list[Any]] = {}
    cosines: dict[str, list[Any]] = {}
    with torch.inference_mode():
        for batch in batches:
            for arm in ("convnet", "none"):
                decisions.setdefault(arm, []).append(models[arm](batch.pixels).logits.argmax(-1))
            trace: dict[str, Any] = {}
            for head, probabilities in head_probabilities(models["distilled"](batch.pixels, trace=trace)).items():
                decisions.setdefault(head, []).append(probabilities.argmax(-1))
            for name in ["embeddings", *(f"block{i:02}" for i in range(STUDENT.num_hidden_layers))]:
                tokens = trace[name]
                cosines.setdefault(name, []).append(torch.cosine_similarity(tokens[:, 0], tokens[:, 1], dim=-1))
    decided = {name: torch.cat(parts) for name, parts in decisions.items()}
    found = {
        f"{one} and {other}": float((decided[one] != decided[other]).float().mean())
        for one in ("convnet", "none")
        for other in ("none", "class", "distillation", "fused")
        if one != other
    }
    mean = [float(torch.cat(parts).mean()) for parts in cosines.values()]
    return found | {"cosine, input": mean[0], "cosine, first block": mean[1], "cosine, last block": mean[-1]}


# ------------------------------------------------------------------------------------------------------------- runner


def prepare(cifar: Path, work: Path) -> None:
    """Links the images that are used, in `work/data/{train,val,test}/CLASS/` and `work/few/...`.

    They are balanced over the classes and drawn with a fixed seed.
    """
    classes = sorted(path.name for path in (cifar / "train").iterdir() if path.is_dir())
    if (work / "data").exists():
        raise FileExistsError(f"{work / 'data'} exists already; remove it, or give another WORK")
    train, fewer, val = (count // len(classes) for count in (TRAIN, FEWER, VAL))
    for number, name in enumerate(classes):
        files = sorted((cifar / "train" / name).iterdir())
        random.Random(number).shuffle(files)
        chosen = {
            "data/train": files[:train],
            "few/train": files[:fewer],
            "data/val": files[train : train + val],
            "data/test": sorted((cifar / "test" / name).iterdir()),
        }
        for folder, members in chosen.items():
            (work / folder / name).mkdir(parents=True)
            for file in members:
                (work / folder / name / file.name).symlink_to(file.resolve())
    for split in ("val", "test"):
        (work / "few" / split).symlink_to((work / "data" / split).resolve())


def run(work: Path, experiments: Sequence[str], seeds: Sequence[int], jobs: int, minutes: float) -> int:
    """Does the runs without a record, `jobs` at a time, and returns the number of runs that are left.

    After `minutes` it stops the current runs, which continue at the next call.
    """
    if not (work / "data").is_dir():
        raise FileNotFoundError(f"{work} holds no data; run python -m bench.claims prepare CIFAR_DIR {work} first")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` below runs
    end = time.monotonic() + 60 * minutes
    waiting = [task for task in plan(experiments, seeds) if task not in records()]
    total, failed = len(waiting), set[Task]()
    running: dict[Task, subprocess.Popen[bytes]] = {}
    try:
        while (waiting or running) and time.monotonic() < end:
            for task in [task for task, process in running.items() if process.poll() is not None]:
                if not _finish(
                    work, task, running.pop(task).returncode, f"{total - len(waiting) - len(running)}/{total}"
                ):
                    failed.add(task)
            done = records()
            free = [(arm, seed) for arm, seed in waiting if all(task_of(other, seed) in done for other in needs(arm))]
            for task in free[: jobs - len(running)]:
                waiting.remove(task)
                running[task] = _start(work, task)
            if not running and not free:
                break  # the remaining runs need one that has failed
            time.sleep(0.5)
    finally:  # also on Ctrl-C; runs save their state when they are stopped
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()
    left = len(waiting) + len(running) + len(failed)
    print(f"{total - left} runs done, {left} left" + (f", {len(failed)} failed" if failed else ""))
    return left


def _start(work: Path, task: Task) -> subprocess.Popen[bytes]:
    folder = run_folder(work, task)
    folder.mkdir(parents=True, exist_ok=True)
    # One thread for each run, because OpenMP's threads would wait for each other if runs share cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "bench.claims", "one", str(work), task[0], str(task[1])],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _finish(work: Path, task: Task, status: int, progress: str) -> bool:
    """Appends the record that a run left, and returns whether there is one."""
    folder = run_folder(work, task)
    if status:
        last = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
        print(f"{task[0]}, seed {task[1]}: status {status}. {' / '.join(last)}", flush=True)
        return False
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    with open(report.RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    test = ", ".join(f"{head} {value:.3f}" for head, value in record["test"].items())
    print(f"{progress} {task[0]}, seed {task[1]}: {record['seconds']:.0f} s; {test}", flush=True)
    return True


def one(work: Path, arm: str, seed: int) -> None:
    """Does one run in this process, and leaves its record in the run's folder."""
    import torch

    from deit import __version__, files
    from deit.machine import described

    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        check=False,
        capture_output=True,
        text=True,
    )
    record = {
        "arm": arm,
        "seed": seed,
        "base": UPDATES,
        "updates": updates_of(arm),
        **run_arm(work, arm, seed),
        "cpu_seconds": round(time.process_time(), 1),
        "machine": described(torch.device("cpu")),
        "commit": git.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deit": __version__,
        "when": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }
    files.write_json(run_folder(work, (arm, seed)) / "record.json", record)
