"""The main job from end to end, offline: real digits in a folder, a teacher, a distilled student, predictions."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from deit import files, locks
from deit.data.folders import fingerprint, read_data, read_split, write_digits
from deit.fit.plan import Plan, Step
from deit.fit.work import carry_out
from deit.predict.predictor import Predictor
from deit.recipes.digits import digits, digits_teacher
from deit.terminal import shown

_OURS = ("data", "teacher", "student", "model", "state.json", "result.json", "report.html", "plan.json")


@dataclass(frozen=True)
class Result:
    """Accuracies (0 to 1) on the 360 test images, the `seconds` of the whole job, and the student `model`'s folder."""

    teacher: float
    class_head: float
    distillation_head: float
    fused: float
    seconds: float
    model: str


def quickstart(out: Path, *, seed: int = 0, console: Console) -> Result:
    """Writes `out/data` and fits a teacher and a student to it, with what `deit fit` writes in `out`; prints a table
    and the next commands on `console`.

    An earlier quickstart in `out` is replaced. Raises `FileExistsError` if `out` holds anything else.
    """
    with locks.held(out, lock=locks.beside(out.absolute())):
        return _quickstart(out, seed, console)


def _quickstart(out: Path, seed: int, console: Console) -> Result:
    started = time.perf_counter()
    _make_room(out)
    sizes = write_digits(out / "data", seed=seed)
    console.print(
        f"Wrote {sum(sizes.values())} digits to {out / 'data'}: "
        + ", ".join(f"{split}/ {count}" for split, count in sizes.items())
        + "; each holds a folder for every class",
        markup=False,
    )
    train, val = read_data(out / "data", holdout=0.0, seed=seed)
    test = read_split(out / "data", "test", train.classes)
    plan = Plan(
        data=str(out / "data"),
        fingerprint=fingerprint(train),
        minutes=None,
        steps=(
            Step(name="teacher", why="a ConvNet from scratch", recipe=replace(digits_teacher(), seed=seed)),
            Step(
                name="student",
                why="a DeiT from scratch, which learns from the digits and from the teacher's decisions",
                recipe=replace(digits(teacher=out / "teacher" / "model"), seed=seed),
            ),
            Step(name="judge"),
        ),
    )
    plan.write(out)
    onward = "but the same command begins anew"
    fitted = carry_out(plan, (train, val), test, out, device="auto", console=console, onward=onward)

    student = fitted["student"]
    examples = test.files[::72]
    found = Predictor(student.folder)(examples, top_k=1)
    seconds = time.perf_counter() - started
    for path, labels in zip(examples, found, strict=True):
        console.print(shown(f"{path}: {labels[0]['label']} ({labels[0]['score']:.2f})"), markup=False, soft_wrap=True)
    steps = [
        ["deit", "predict", student.folder, examples[0]],
        ["deit", "convert", student.folder, "--to", "timm", "--out", out / "timm"],
        ["less", out / "student" / "metrics.jsonl"],
    ]
    console.print(
        f"\n{seconds:.0f} seconds. Next:",
        *(f"  {shlex.join(map(str, step))}" for step in steps),
        sep="\n",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return Result(
        teacher=fitted["teacher"].accuracy.value,
        class_head=student.heads["class"].value,
        distillation_head=student.heads["distillation"].value,
        fused=student.heads["fused"].value,
        seconds=round(seconds, 1),
        model=str(student.folder),
    )


def _make_room(out: Path) -> None:
    """Removes an earlier quickstart, known by its marker.

    Digits that another seed left there would mix training and test images.
    """
    marker = out / "quickstart.txt"
    if out.exists() and any(out.iterdir()):
        if not marker.exists():
            raise FileExistsError(
                f"expected {out} to be empty or an earlier quickstart, found other files; give --out a new folder"
            )
        for name in _OURS:
            if (out / name).exists():
                files.remove(out / name)
    files.write_text(marker, "Written by `deit quickstart`, which replaces the files and folders beside this file.\n")
