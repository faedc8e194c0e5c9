"""The claims of Touvron et al. 2020 (arXiv 2012.12877) on a problem that a CPU can hold: 5,000 images of CIFAR-10.

    python bench/claims.py prepare CIFAR_DIR WORK     # CIFAR_DIR/{train,test}/CLASS/*.jpg; links the images used
    python bench/claims.py run WORK                   # every run that has no record yet; again, it goes on
    python bench/claims.py table --write docs/results.md

An arm is the base recipe with settings changed, as `deit train --set` would. An experiment is arms, each with the arm
it is compared to. A claim says which difference the paper found, and is judged by one rule (`verdict`). A record of
each run is appended to results.jsonl beside this file, and everything printed comes from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deit.config import ConvNetConfig, DeiTConfig
from deit.recipe import (
    AdamW,
    Augment,
    Compute,
    Cosine,
    Data,
    Distilled,
    Erase,
    MaskedImage,
    Mix,
    RandAugment,
    Recipe,
    SimpleCrop,
    Supervised,
    override,
    steps,
)

UPDATES = 1200
"""Of every student; all other lengths follow from it."""
TRAIN, FEWER, VAL = 5000, 1000, 1000
"""Images; `FEWER` of the training images are what the arms in `FEW` see. All of the test folder's are test images."""
RESULTS = Path(__file__).parent / "results.jsonl"
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"

# --------------------------------------------------------------------------------------------------------------- arms

_FINETUNING = UPDATES // 3
# 16 patches of 8 pixels, not 64 of 4: an update costs a quarter, and at the same cost four times as many of them, 15
# passes over the images and not 4, taught a student of this width more.
_STUDENT = DeiTConfig(hidden_size=96, num_hidden_layers=6, num_attention_heads=3, intermediate_size=384,
                      layer_norm_eps=1e-6, image_size=32, patch_size=8, encoder_stride=8, distillation_token=False,
                      drop_path_rate=0.05)
# One process with one thread each, so that runs side by side do not disturb each other.
_COMPUTE = Compute(workers=0, save_minutes=0.5)


def _every(updates: int) -> str:
    """Evaluations are few, because they cost time: five."""
    return f"evaluate=steps({max(1, updates // 5)})"


def _lasting(updates: int) -> list[str]:
    return [f"schedule.total=steps({updates})", f"schedule.warmup=steps({updates // 20})", _every(updates)]


BASE = Recipe(
    name="none",
    model=_STUDENT,
    # Repeated augmentation as in the paper.
    data=Data(batch=64, repeats=3, crop_ratio=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    # The paper's kinds of augmentation at strengths for 15 passes and not 300: one operation of RandAugment, Mixup or
    # CutMix on half of the batches. At full strength a run this short only learns less, and leaving anything out helps.
    augment=Augment(crop=SimpleCrop(padding=4), flip=0.5, policy=RandAugment(magnitude=9, std=0.5, layers=1),
                    erase=Erase(probability=0.25), mix=Mix(mixup=0.8, cutmix=1.0, probability=0.5)),
    objective=Supervised(smoothing=0.1),
    optim=AdamW(lr=1e-3, per_images=64, weight_decay=0.05),
    schedule=Cosine(total=steps(UPDATES), warmup=steps(UPDATES // 20)),
    evaluate=steps(max(1, UPDATES // 5)),
    compute=_COMPUTE,
)
_TEACHER = replace(
    BASE, name="convnet", model=ConvNetConfig(widths=(16, 32, 64), depth=2, image_size=32),
    data=replace(BASE.data, repeats=1), augment=Augment(crop=SimpleCrop(padding=4), flip=0.5),
    optim=AdamW(lr=2e-3, per_images=64, weight_decay=0.05))
ARMS: dict[str, Recipe] = {}
"""By name. A teacher or start "@NAME" is the model of that arm, of the same seed unless it is one of `ONCE`."""


def _arm(name: str, base: Recipe, *settings: str) -> Recipe:
    ARMS[name] = replace(override(base, settings), name=name)
    return ARMS[name]


_arm("none", BASE)
_arm("convnet", _TEACHER, *_lasting(2 * UPDATES))
_arm("convnet_24", ARMS["convnet"], "model.image_size=24")
_arm("transformer", BASE, *_lasting(4 * UPDATES))
MATCHES = [_arm(f"convnet_{width}", _TEACHER, f"model.widths=({width}, {2 * width}, {4 * width})").name
           for width in (3, 4, 6, 8)]
"""ConvNets, of which "@matched" is the one whose validation accuracy is nearest to the transformer's."""
ONCE = ("convnet", "convnet_24", "transformer", *MATCHES)
"""Teachers: trained with seed 0 only, and the same for the students of all seeds."""

_arm("soft", BASE, "objective=Distilled(teacher='@convnet', kind='soft', token='class', smoothing=0.1)")
_arm("soft_elements", ARMS["soft"], "objective.normalisation=elements")
_arm("hard", BASE, "objective=Distilled(teacher='@convnet', token='class', smoothing=0.1)")
_distilled = _arm("distilled", BASE, "objective=Distilled(teacher='@convnet', smoothing=0.1)",
                  "model.distillation_token=True")
_arm("distilled_by_matched", _distilled, "objective.teacher=@matched")
_arm("distilled_by_transformer", _distilled, "objective.teacher=@transformer")

_small = _arm("distilled_24", _distilled, "model.image_size=24", "objective.teacher=@convnet_24")
# A fifth of the rate: to adapt, not to begin anew.
_finetuned = _arm("finetuned_24", _small, "start=@distilled_24", "optim.lr=2e-4", *_lasting(_FINETUNING))
_arm("finetuned_32_teacher_24", _finetuned, "model.image_size=32")
_arm("finetuned_32", ARMS["finetuned_32_teacher_24"], "objective.teacher=@convnet")
_arm("finetuned_32_labels", ARMS["finetuned_32"], "objective.weight=0.0")

FEW = (_arm("few", BASE).name, *(_arm(name, BASE, setting).name for name, setting in {
    "no_randaugment": "augment.policy=None",
    "no_mixup": "augment.mix.mixup=0.0",
    "no_cutmix": "augment.mix.cutmix=0.0",
    "no_mixing": "augment.mix=None",
    "no_erasing": "augment.erase=None",
    "no_stochastic_depth": "model.drop_path_rate=0.0",
    "no_repeats": "data.repeats=1",
    "sgd": "optim=SGD(lr=0.03, per_images=64, weight_decay=1e-4)",
    "dropout": "model.hidden_dropout_prob=0.1",
    # The average's half-life is 4.6 % of the run, as the original code's 0.99996 is of 300 epochs.
    "ema": f"ema={0.5 ** (1 / max(1.0, 0.046 * UPDATES)):.4f}",
}.items()))
"""Table 8's arms see a fifth of the images five times as often. The paper's recipe is there to keep 300 epochs from
learning the images by heart; in the few passes over all of them there is nothing yet to be kept from."""
_arm("masked", BASE, "objective=MaskedImage(ratio=0.6, unit=8)", "augment.mix=None", "augment.erase=None",
     "augment.policy=None", "data.repeats=1", "model.drop_path_rate=0.0")
_arm("masked_finetuned", BASE, "start=@masked")
_arm("none_twice", BASE, *_lasting(2 * UPDATES))

# -------------------------------------------------------------------------------------------------------- experiments

Head = str
Reading = tuple[str, Head]
"""An arm and which of its numbers: a head's test accuracy, or what `agreement` found."""


@dataclass(frozen=True)
class Claim:
    """What the paper found of `one` minus `other`: above 0, below 0, or within a point of 0 (`equal`)."""

    text: str
    source: str
    one: Reading
    other: Reading
    expected: str = "above"


@dataclass(frozen=True)
class Experiment:
    title: str
    arms: tuple[str, ...]
    control: Reading
    """All rows of the table are compared to it, seed by seed."""
    claims: tuple[Claim, ...]


_NONE, _FEW = ("none", "fused"), ("few", "fused")
EXPERIMENTS = {
    "distillation": Experiment("Kinds of distillation (table 3)", ("none", "soft", "hard", "distilled"), _NONE, (
        Claim("hard distillation beats labels alone", "table 3: 83.0, 81.8", ("hard", "fused"), _NONE),
        Claim("hard distillation beats soft", "table 3: 83.0, 81.8", ("hard", "fused"), ("soft", "fused")),
        Claim("soft distillation is no better than labels alone", "table 3: 81.8, 81.8", ("soft", "fused"), _NONE,
              "equal"),
        Claim("the distillation token beats labels alone", "table 3: 83.4, 81.8", ("distilled", "fused"), _NONE),
        Claim("the distillation token beats hard distillation of the class token", "table 3: 83.4, 83.0",
              ("distilled", "fused"), ("hard", "fused")),
        Claim("of its two heads the teacher's is the better", "table 3: 83.1, 83.0", ("distilled", "distillation"),
              ("distilled", "class")),
        Claim("both heads together beat the better one", "table 3: 83.4, 83.1", ("distilled", "fused"),
              ("distilled", "distillation")))),
    "agreement": Experiment("Who decides like whom (table 4)", ("agreement",), ("agreement", "convnet and none"), (
        Claim("the class head decides more like the ConvNet than an undistilled DeiT does", "table 4: .112, .133",
              ("agreement", "convnet and class"), ("agreement", "convnet and none"), "below"),
        Claim("the distillation head decides more like the ConvNet than the class head does", "table 4: .100, .112",
              ("agreement", "convnet and distillation"), ("agreement", "convnet and class"), "below"),
        Claim("both tokens begin different and end alike", "section 4: cosine .06, .93",
              ("agreement", "cosine, last block"), ("agreement", "cosine, input")))),
    "teachers": Experiment("Who teaches (table 2)", ("distilled_by_transformer", "distilled_by_matched", "distilled"),
                           ("distilled_by_transformer", "fused"), (
        Claim("a ConvNet teaches better than a transformer of its accuracy", "table 2: 82.7, 81.9",
              ("distilled_by_matched", "fused"), ("distilled_by_transformer", "fused")),
        Claim("a better ConvNet teaches better", "table 2: 83.1, 82.7", ("distilled", "fused"),
              ("distilled_by_matched", "fused")))),
    "ingredients": Experiment("One ingredient left out or put in (table 8)", FEW, _FEW, (
        Claim("RandAugment helps", "table 8: 79.6 without, 81.8", ("no_randaugment", "fused"), _FEW, "below"),
        Claim("Mixup helps", "table 8: 78.7 without, 81.8", ("no_mixup", "fused"), _FEW, "below"),
        Claim("CutMix helps", "table 8: 80.0 without, 81.8", ("no_cutmix", "fused"), _FEW, "below"),
        Claim("Mixup and CutMix together help", "table 8: 75.8 without, 81.8", ("no_mixing", "fused"), _FEW, "below"),
        Claim("random erasing helps", "table 8: 4.3 (diverged) without, 81.8", ("no_erasing", "fused"), _FEW, "below"),
        Claim("stochastic depth helps", "table 8: 3.4 (diverged) without, 81.8", ("no_stochastic_depth", "fused"),
              _FEW, "below"),
        Claim("repeated augmentation helps", "table 8: 76.5 without, 81.8", ("no_repeats", "fused"), _FEW, "below"),
        Claim("SGD is worse than AdamW", "table 8: 74.5, 81.8", ("sgd", "fused"), _FEW, "below"),
        Claim("dropout hurts", "table 8: 81.3, 81.8", ("dropout", "fused"), _FEW, "below"),
        Claim("the average of the weights changes little", "table 8: 81.9, 81.8", ("ema", "fused"), _FEW, "equal"))),
    "resolution": Experiment("Fine-tuning at a higher resolution (sections 4 and 6)", (
        "distilled_24", "finetuned_24", "finetuned_32_teacher_24", "finetuned_32", "finetuned_32_labels"),
        ("finetuned_24", "fused"), (
        Claim("a higher resolution helps", "table 5: 84.5, 83.4", ("finetuned_32", "fused"), ("finetuned_24", "fused")),
        Claim("the teacher at the higher resolution helps", "section 4", ("finetuned_32", "fused"),
              ("finetuned_32_teacher_24", "fused")),
        # Each with the head that was trained: without the teacher's share, the class token's.
        Claim("the teacher helps in fine-tuning too", "section 4", ("finetuned_32", "fused"),
              ("finetuned_32_labels", "class")))),
    "normalisation": Experiment("Soft distillation: equation 2 and the original code", ("soft", "soft_elements"),
                                ("soft_elements", "fused"), (
        Claim("the mean over images (equation 2) beats the original code's over images and classes", "ours: the paper "
              "does not compare them", ("soft", "fused"), ("soft_elements", "fused")),)),
    "masked": Experiment("Masked images first (SimMIM, Xie et al. 2021)", (
        "none", "masked", "masked_finetuned", "none_twice"), _NONE, (
        Claim("fine-tuning after masked images beats as many updates from scratch", "SimMIM: 83.8, DeiT-B: 81.8",
              ("masked_finetuned", "fused"), _NONE),
        Claim("it beats as many updates in all from scratch", "ours", ("masked_finetuned", "fused"),
              ("none_twice", "fused")))),
}
"""The most important first."""


def needs(arm: str) -> list[str]:
    """The arms that must be there before this one."""
    if arm == "agreement":
        return ["convnet", "none", "distilled"]
    recipe = ARMS[arm]
    named = [recipe.start, recipe.objective.teacher if isinstance(recipe.objective, Distilled) else ""]
    return [arm for name in named if name for arm in ([*MATCHES, "transformer"] if name == "@matched" else [name[1:]])]


def updates_of(arm: str) -> int:
    return 0 if arm == "agreement" else round(ARMS[arm].schedule.total.amount)


def plan(experiments: Iterable[str], seeds: Iterable[int]) -> list[tuple[str, int]]:
    """(arm, seed) in the order in which they should run, each once, after those it needs."""
    order: dict[tuple[str, int], None] = {}

    def add(arm: str, seed: int) -> None:
        seed = 0 if arm in ONCE else seed
        for other in needs(arm):
            add(other, seed)
        order[arm, seed] = None

    for experiment in experiments:
        for seed in seeds:
            for arm in EXPERIMENTS[experiment].arms:
                add(arm, seed)
    return list(order)


# ------------------------------------------------------------------------------------------------------------ one run


def run_folder(work: Path, arm: str, seed: int) -> Path:
    return work / "runs" / f"{arm}-{0 if arm in ONCE else seed}"


def recipe_of(arm: str, seed: int, work: Path) -> Recipe:
    """The arm's recipe with its seed, and with the folders of the models it names."""
    def folder(name: str) -> str:
        return str(run_folder(work, _matched() if name == "@matched" else name[1:], seed) / "model")

    recipe = replace(ARMS[arm], seed=seed)
    if recipe.start:
        recipe = replace(recipe, start=folder(recipe.start))
    if isinstance(recipe.objective, Distilled):
        recipe = replace(recipe, objective=replace(recipe.objective, teacher=folder(recipe.objective.teacher)))
    return recipe


def _matched() -> str:
    """Chosen on validation images, never on test images."""
    found = records()
    wanted = found["transformer", 0]["validation"]
    return min(MATCHES, key=lambda arm: abs(found[arm, 0]["validation"] - wanted))


def run_arm(work: Path, arm: str, seed: int) -> dict[str, Any]:
    """Trains an arm, or goes on with it, and returns its record. Test images are seen once, at the end, by the model
    with the best validation accuracy."""
    import torch
    from rich.console import Console

    from deit.data import EvaluationBatches, processor_for, read_split
    from deit.evaluate import evaluate
    from deit.machine import resolve_precision
    from deit.predict import load_model
    from deit.train import Diverged, train

    began = time.perf_counter()
    if arm == "agreement":
        return {"test": agreement(work, seed), "seconds": round(time.perf_counter() - began, 1)}
    recipe, out = recipe_of(arm, seed, work), run_folder(work, arm, seed)
    data = work / ("few" if arm in FEW else "data")
    train_split = read_split(data, "train")
    val_split, test_split = (read_split(data, split, train_split.classes) for split in ("val", "test"))
    record: dict[str, Any] = {"diverged": False}
    try:
        train(recipe, train_split, val_split, out, device="cpu", console=Console(width=120), resume=True)
    except Diverged:  # of the paper's table 8 too, two did
        record["diverged"] = True
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    judged = [row for row in rows if "val_accuracy" in row or "val_loss" in row]
    if isinstance(recipe.objective, MaskedImage):
        record |= {"validation": judged[-1]["val_loss"], "test": {}}
    else:
        cpu = torch.device("cpu")  # in training's precision, as on validation images
        heads = evaluate(load_model(out / "model"), EvaluationBatches(test_split, processor_for(recipe), 250),
                         precision=resolve_precision(recipe.compute.precision, cpu))
        record |= {"validation": max([row["val_accuracy"] for row in judged], default=0.0),
                   "test": {head: accuracy.value for head, accuracy in heads.items()},
                   "curve": [[row["images"], row["val_accuracy"]] for row in judged]}
    if "@matched" in str(ARMS[arm].objective):
        record["teacher"] = _matched()
    seconds = rows[-1]["seconds"] if rows else 0.0
    return record | {"seconds": seconds, "images_per_second": round(recipe.data.batch * updates_of(arm) / seconds, 1)}


def agreement(work: Path, seed: int) -> dict[str, float]:
    """Table 4: the share of test images on which two decide differently; and the mean cosine between class and
    distillation token, at the input of the first block and after each block, over the test images (section 4)."""
    import torch

    from deit.data import EvaluationBatches, processor_for, read_split
    from deit.model import head_probabilities
    from deit.predict import load_model

    batches = EvaluationBatches(read_split(work / "data", "test"), processor_for(BASE), 250)
    models = {arm: load_model(run_folder(work, arm, seed) / "model") for arm in needs("agreement")}
    decisions: dict[str, list[Any]] = {}
    cosines: dict[str, list[Any]] = {}
    with torch.inference_mode():
        for batch in batches:
            for arm in ("convnet", "none"):
                decisions.setdefault(arm, []).append(models[arm](batch.pixels).logits.argmax(-1))
            trace: dict[str, Any] = {}
            for head, found in head_probabilities(models["distilled"](batch.pixels, trace=trace)).items():
                decisions.setdefault(head, []).append(found.argmax(-1))
            for name in ["embeddings", *(f"block{i:02}" for i in range(_STUDENT.num_hidden_layers))]:
                tokens = trace[name]
                cosines.setdefault(name, []).append(torch.cosine_similarity(tokens[:, 0], tokens[:, 1], dim=-1))
    decided = {name: torch.cat(parts) for name, parts in decisions.items()}
    found = {f"{one} and {other}": float((decided[one] != decided[other]).float().mean())
             for one in ("convnet", "none") for other in ("none", "class", "distillation", "fused") if one != other}
    mean = [float(torch.cat(parts).mean()) for parts in cosines.values()]
    return found | {"cosine, input": mean[0], "cosine, first block": mean[1], "cosine, last block": mean[-1]}


# ------------------------------------------------------------------------------------------------------------- runner


def prepare(cifar: Path, work: Path) -> None:
    """Links to the images used, `work/data/{train,val,test}/CLASS/` and `work/few/...`: balanced over the classes,
    drawn with a fixed seed."""
    classes = sorted(path.name for path in (cifar / "train").iterdir() if path.is_dir())
    if (work / "data").exists():
        raise FileExistsError(f"{work / 'data'} is there already; remove it, or give another WORK")
    train, fewer, val = (count // len(classes) for count in (TRAIN, FEWER, VAL))
    for number, name in enumerate(classes):
        files = sorted((cifar / "train" / name).iterdir())
        random.Random(number).shuffle(files)
        chosen = {"data/train": files[:train], "few/train": files[:fewer], "data/val": files[train:train + val],
                  "data/test": sorted((cifar / "test" / name).iterdir())}
        for folder, members in chosen.items():
            (work / folder / name).mkdir(parents=True)
            for file in members:
                (work / folder / name / file.name).symlink_to(file.resolve())
    for split in ("val", "test"):
        (work / "few" / split).symlink_to((work / "data" / split).resolve())


def records() -> dict[tuple[str, int], dict[str, Any]]:
    """The last record of each (arm, seed) of the present length."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    found = [json.loads(line) for line in lines]
    return {(record["arm"], record["seed"]): record for record in found
            if record["arm"] in {*ARMS, "agreement"} and record["base"] == UPDATES}


def run(work: Path, experiments: Sequence[str], seeds: Sequence[int], jobs: int, minutes: float) -> int:
    """Runs what has no record, `jobs` at a time; after `minutes` those under way are stopped, to go on another time.
    Returns how many are left."""
    if not (work / "data").is_dir():
        raise FileNotFoundError(f"{work} holds no data; first: python bench/claims.py prepare CIFAR_DIR {work}")
    end = time.monotonic() + 60 * minutes
    waiting = [task for task in plan(experiments, seeds) if task not in records()]
    total, failed = len(waiting), set[tuple[str, int]]()
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    try:
        while (waiting or running) and time.monotonic() < end:
            for task in [task for task, process in running.items() if process.poll() is not None]:
                if not _finish(work, task, running.pop(task).returncode, f"{total - len(waiting) - len(running)}/"
                               f"{total}"):
                    failed.add(task)
            done = records()
            free = [task for task in waiting
                    if all((arm, 0 if arm in ONCE else task[1]) in done for arm in needs(task[0]))]
            for task in free[:jobs - len(running)]:
                waiting.remove(task)
                running[task] = _start(work, task)
            if not running and not free:
                break  # the rest needs what has failed
            time.sleep(0.5)
    finally:  # also on Ctrl-C: they save their state
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()
    left = len(waiting) + len(running) + len(failed)
    print(f"{total - left} runs done, {left} left" + (f", {len(failed)} failed" if failed else ""))
    return left


def _start(work: Path, task: tuple[str, int]) -> subprocess.Popen[bytes]:
    folder = run_folder(work, *task)
    folder.mkdir(parents=True, exist_ok=True)
    # One thread for each: OpenMP's would wait for each other where runs share cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen([sys.executable, __file__, "one", str(work), task[0], str(task[1])], stdout=log,
                                stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def _finish(work: Path, task: tuple[str, int], status: int, progress: str) -> bool:
    """Appends the record that a run left; whether there is one."""
    folder = run_folder(work, *task)
    if status:
        last = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
        print(f"{task[0]}, seed {task[1]}: status {status}. {' / '.join(last)}", flush=True)
        return False
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    test = ", ".join(f"{head} {value:.3f}" for head, value in record["test"].items())
    print(f"{progress} {task[0]}, seed {task[1]}: {record['seconds']:.0f} s; {test}", flush=True)
    return True


def one(work: Path, arm: str, seed: int) -> None:
    """What each process does: one run, whose record it leaves beside it."""
    import torch

    from deit import __version__, files

    git = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], check=False,
                         capture_output=True, text=True)
    record = {"arm": arm, "seed": seed, "base": UPDATES, "updates": updates_of(arm), **run_arm(work, arm, seed),
              "cpu_seconds": round(time.process_time(), 1), "machine": machine(),
              "commit": git.stdout.strip() or "unknown", "python": platform.python_version(),
              "torch": torch.__version__, "deit": __version__, "when": time.strftime("%Y-%m-%d %H:%M", time.gmtime())}
    files.write_json(run_folder(work, arm, seed) / "record.json", record)


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1].strip() if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


# --------------------------------------------------------------------------------------------------- tables, verdicts

_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093)
"""The 97.5 % quantile of Student's distribution for 1, 2, … degrees of freedom."""


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and the ends of its two-sided 95 % interval (Student); of 2 to 20 values."""
    mean = statistics.fmean(values)
    half = _T[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def verdict(differences: Sequence[float], expected: str) -> str:
    """The rule for every claim, fixed before the runs. Fewer than three seeds decide nothing.

    above, below: holds where the 95 % interval of the paired difference lies wholly on that side of 0, does not hold
    where it lies wholly on the other. equal: holds where it lies within one point (0.01) of 0, does not hold where it
    lies wholly outside. Otherwise it is not decided.
    """
    if len(differences) < 3:
        return "not decided"
    _, low, high = interval(differences)
    if expected == "equal":
        holds, fails = low >= -0.01 and high <= 0.01, low > 0.01 or high < -0.01
    else:
        holds, fails = (low > 0, high < 0) if expected == "above" else (high < 0, low > 0)
    return "holds" if holds else "does not hold" if fails else "not decided"


def _values(found: dict[tuple[str, int], dict[str, Any]], reading: Reading) -> dict[int, float]:
    """By seed. A model of one head has only `fused`."""
    arm, head = reading
    return {seed: record["test"][head] for (name, seed), record in found.items()
            if name == arm and head in record["test"]}


def _paired(found: dict[tuple[str, int], dict[str, Any]], one: Reading, other: Reading) -> list[float]:
    ours, theirs = _values(found, one), _values(found, other)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def _difference(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) < 2:
        return f"{100 * values[0]:+.1f}"
    mean, low, high = (100 * value for value in interval(values))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def table() -> str:
    """All experiments as Markdown, numbers in percent."""
    found = records()
    parts = [_teachers(found)]
    for name, experiment in EXPERIMENTS.items():
        rows = ["| arm | read from | mean | s.d. | n | difference to the control, 95 % |", "|---|---|---|---|---|---|"]
        for arm in experiment.arms:
            heads = dict.fromkeys(head for (other, _), record in found.items() if other == arm
                                  for head in record["test"])
            for head in heads if {"class", "distillation"} <= set(heads) or arm == "agreement" else set(heads) & {
                    "fused"}:
                values = list(_values(found, (arm, head)).values())
                spread = f"{100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
                compared = ("control" if (arm, head) == experiment.control else "" if head.startswith("cosine") else
                            _difference(_paired(found, (arm, head), experiment.control)))
                rows.append(f"| `{arm}` | {head} | {100 * statistics.fmean(values):.1f} | {spread} | {len(values)} | "
                            f"{compared} |")
        rows += ["", "| claim | source | difference, 95 % | n | verdict |", "|---|---|---|---|---|"]
        for claim in experiment.claims:
            differences = _paired(found, claim.one, claim.other)
            rows.append(f"| {claim.text} | {claim.source} | {_difference(differences)} | {len(differences)} | "
                        f"{verdict(differences, claim.expected)} |")
        picture = PICTURES / f"claims-{name}.svg"
        shown = [f"![validation accuracy by images seen](pictures/{picture.name})", ""] if picture.exists() else []
        parts.append("\n".join([f"### {experiment.title}", "", *shown, *rows]))
    return "\n\n".join(parts) + "\n"


def _teachers(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    rows = ["### Teachers", "", "| arm | updates | validation | test |", "|---|---|---|---|"]
    chosen = {record["teacher"] for record in found.values() if "teacher" in record}
    for arm in ONCE:
        if record := found.get((arm, 0)):
            rows.append(f"| `{arm}`{' (matched)' if arm in chosen else ''} | {record['updates']} | "
                        f"{100 * record['validation']:.1f} | {100 * record['test']['fused']:.1f} |")
    return "\n".join(rows)


def draw() -> None:
    """Validation accuracy by images seen, the mean over seeds, for each experiment with curves."""
    from curves import curves  # beside this file

    found = records()
    for name, experiment in EXPERIMENTS.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for arm in experiment.arms:
            runs = [record["curve"] for (other, _), record in found.items() if other == arm and "curve" in record]
            if runs:
                lines[arm] = [(points[0][0], 100 * statistics.fmean(point[1] for point in points))
                              for points in zip(*runs, strict=False)]
        if lines:
            PICTURES.mkdir(parents=True, exist_ok=True)
            (PICTURES / f"claims-{name}.svg").write_text(curves(experiment.title, lines, "images seen",
                                                                "validation accuracy, %"), encoding="utf-8")


def write(path: Path, text: str) -> None:
    """Puts the tables between the markers of a Markdown file."""
    begin, end = "<!-- claims: begin -->", "<!-- claims: end -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    if not found or end not in rest:
        raise ValueError(f"{path} lacks the lines {begin} and {end}; put them where the tables belong")
    path.write_text(f"{before}{begin}\n\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("prepare", help="link the images used")
    verb.add_argument("cifar", type=Path)
    verb.add_argument("work", type=Path)
    verb = verbs.add_parser("run", help="run what has no record yet")
    verb.add_argument("work", type=Path)
    verb.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; all when none is given")
    verb.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    verb.add_argument("--jobs", type=int, default=2, help="runs side by side (default: %(default)s)")
    verb.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long")
    verb = verbs.add_parser("one", help="one run; what `run` starts")
    verb.add_argument("work", type=Path)
    verb.add_argument("arm", choices=[*ARMS, "agreement"])
    verb.add_argument("seed", type=int)
    verb = verbs.add_parser("table", help="tables and verdicts from the records")
    verb.add_argument("--write", type=Path, help="Markdown file with the markers; the pictures are drawn too")
    options = parser.parse_args()
    if options.verb == "prepare":
        prepare(options.cifar, options.work)
    elif options.verb == "run":
        if unknown := set(options.experiments) - set(EXPERIMENTS):
            parser.error(f"there is no experiment {min(unknown)}; there is {', '.join(EXPERIMENTS)}")
        return min(1, run(options.work, options.experiments or list(EXPERIMENTS), options.seeds, options.jobs,
                          options.minutes))
    elif options.verb == "one":
        one(options.work, options.arm, options.seed)
    elif options.write:
        draw()
        write(options.write, table())
    else:
        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
