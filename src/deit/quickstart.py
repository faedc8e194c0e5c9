"""The main job from end to end, offline: real digits in a folder, a teacher, a distilled student, predictions."""

from __future__ import annotations

import shlex
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deit import files
from deit.data.batches import EvaluationBatches, processor_for
from deit.data.folders import read_split, write_digits
from deit.evaluate.models import evaluate, examine_split
from deit.evaluate.scores import Accuracy
from deit.model.load import load_model
from deit.predict.predictor import Predictor
from deit.recipes.digits import digits, digits_teacher
from deit.report import document
from deit.terminal import shown
from deit.train.loop import train

_PARTS = ("data", "teacher", "student")


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
    """Writes `out/data`, `out/teacher` and `out/student`; prints a table and the next commands on `console`.

    An earlier quickstart in `out` is replaced. Raises `FileExistsError` if `out` holds anything else.
    """
    with files.held(out, lock=files.lock_beside(out.absolute())):
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
    train_split = read_split(out / "data", "train")
    val_split, test_split = (read_split(out / "data", split, train_split.classes) for split in ("val", "test"))

    taught = train(replace(digits_teacher(), seed=seed), train_split, val_split, out / "teacher", console=console)
    recipe = replace(digits(teacher=taught.model), seed=seed)
    student = train(recipe, train_split, val_split, out / "student", console=console)

    test = EvaluationBatches(test_split, processor_for(recipe), recipe.data.batch)
    teacher = evaluate(load_model(taught.model), test)["fused"]
    judged = examine_split(student.model, test_split, str(out / "data"), "test", console=console)
    heads = {head: judged.main.report.accuracy(head) for head in ("class", "distillation", "fused")}
    page = document.of_evaluation(out / "student" / document.FILE, judged)
    examples = test_split.files[::72]
    found = Predictor(student.model)(examples, top_k=1)
    seconds = time.perf_counter() - started

    console.print(
        _table(
            {
                "ConvNet teacher": teacher,
                "DeiT, class head": heads["class"],
                "DeiT, distillation head": heads["distillation"],
                "DeiT, both heads fused": heads["fused"],
            }
        )
    )
    for path, labels in zip(examples, found, strict=True):
        console.print(shown(f"{path}: {labels[0]['label']} ({labels[0]['score']:.2f})"), markup=False, soft_wrap=True)
    console.print(f"The student, on one page: {page}", markup=False, highlight=False, soft_wrap=True)
    steps = [
        ["deit", "predict", student.model, examples[0]],
        ["deit", "convert", student.model, "--to", "timm", "--out", out / "timm"],
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
        teacher=teacher.value,
        class_head=heads["class"].value,
        distillation_head=heads["distillation"].value,
        fused=heads["fused"].value,
        seconds=round(seconds, 1),
        model=str(student.model),
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
        for name in _PARTS:
            shutil.rmtree(out / name, ignore_errors=True)
    files.write_text(marker, "Written by `deit quickstart`, which replaces the folders beside this file.\n")


def _table(rows: dict[str, Accuracy]) -> Table:
    table = Table("", "accuracy", "95 % interval", "correct")
    for name, accuracy in rows.items():
        low, high = accuracy.interval
        table.add_row(name, f"{accuracy.value:.3f}", f"{low:.3f} to {high:.3f}", f"{accuracy.correct}/{accuracy.total}")
    return table
