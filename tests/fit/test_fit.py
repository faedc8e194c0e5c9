"""From a folder of images to the recommended model: the plan, its steps, its time, the choice."""

import io
import json
import math
import os
import re
import shlex
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from support.checks import raises_saying
from support.models import small, trained_folder
from support.reports import checked
from support.runs import assert_same_end, finish, kill, photos, small_recipe
from support.runs import start as begin

from deit import Predictor
from deit.cli import main
from deit.data.folders import Split, fingerprint, read_data, read_split
from deit.evaluate.calibration import Calibration, HeadCalibration
from deit.evaluate.models import examine_files
from deit.fit import plan as planning
from deit.fit import work
from deit.fit.judging import recommend
from deit.fit.plan import Plan, Step
from deit.fit.work import carry_out, fit
from deit.machine import Processes
from deit.recipe import Augment, Compute, Cosine, Distilled, LinearProbe, epochs, steps
from deit.recipes.photos import student, teacher_from_scratch
from deit.report import document
from deit.train import budget, objectives, stepping
from deit.train.loop import Stopped

pytest.importorskip("sklearn")
QUIET = Console(quiet=True)
CLASSES = tuple("abcdefghij")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 12), ("val", 8), ("test", 6)):
        photos(root, split=split, count=count)
    return root


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def small_plan(out, data, start, *, minutes=None, shares=(0.1, 0.4, 0.1, 0.35, 0.05), **options):
    """A plan of small recipes with the steps that `make_plan` gives."""
    studying = small_recipe(
        Distilled(kind="soft", teacher=str(out / "teacher" / "model"), cache=str(out / "labels")),
        name="student",
        schedule=Cosine(total=epochs(4)),
        augment=Augment(flip=0.5),
    )
    config = small(distillation_token=False, num_labels=None)
    probe = small_recipe(
        LinearProbe(strengths=(0.01, 0.1), folds=2),
        name="frozen",
        model=config,
        optim=None,
        schedule=None,
        start=str(start),
    )
    teaching = small_recipe(
        name="teacher", model=config, schedule=Cosine(total=epochs(3)), start=str(out / "frozen" / "model")
    )
    recipes = {"frozen": probe, "teacher": teaching, "student": studying}
    names = ("frozen", "teacher", "labels", "student", "judge")
    return Plan(
        data=str(data),
        fingerprint=fingerprint(read_data(data, holdout=0.1, seed=0)[0]),
        minutes=minutes,
        steps=tuple(
            Step(name=name, share=share, why=f"the {name}", recipe=recipes.get(name))
            for name, share in zip(names, shares, strict=True)
        ),
        **options,
    )


def carried(plan, out, data, console=QUIET):
    splits = read_data(data, holdout=0.1, seed=0)
    return carry_out(plan, splits, read_split(data, "test", splits[0].classes), out, device="cpu", console=console)


@pytest.fixture
def start(tmp_path):
    return trained_folder(tmp_path / "start", labels="uvwx", distilled=False)


def test_the_whole_road(data, tmp_path, start, own_cache, monkeypatch):
    out = tmp_path / "run"
    plan = small_plan(out, data, start)
    plan.write(out)
    stored, teach = [], work.teach
    monkeypatch.setattr(
        work, "teach", lambda *given, epochs, **more: [stored.append(epochs), teach(*given, epochs=epochs, **more)]
    )
    fitted = carried(plan, out, data)
    # What it says of each model is what an evaluation of its own finds.
    for name in ("frozen", "teacher", "student"):
        found = examine_files(out / name / "model", data, split="test", device="cpu", console=QUIET)
        assert fitted[name].heads == {head: found.main.report.accuracy(head) for head in found.main.report.heads}
        val = examine_files(out / name / "model", data, split="val", device="cpu", console=QUIET)
        assert fitted.to_dict()["models"][name]["val_accuracy"] == val.main.report.accuracy().value
    assert list(fitted["student"].heads) == ["fused", "class", "distillation", "softmax"]
    other = examine_files(
        out / "frozen" / "model", data, split="test", other=out / "student" / "model", device="cpu", console=QUIET
    )
    assert fitted.pairs["frozen", "student"] == other.comparison
    # The recommended model is the best on the validation images, calibrated.
    scores = {each.name: each.validation.main.report.accuracy().value for each in fitted.candidates}
    assert scores[fitted.recommended] == max(scores.values())
    assert fitted.model == out / "model"
    photo = next((data / "test").rglob("*.png"))
    folders = (out / "model", fitted[fitted.recommended].folder)
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert ours == theirs
    assert Calibration.of_model(out / "model").images == 24
    assert Predictor(out / "model")([photo])[0][0]["label"] in "abc"
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(fitted.to_dict()))
    page = (out / "report.html").read_text()
    assert "The models that were compared" in page
    assert f"{fitted[fitted.recommended].accuracy.value:.3f}" in page
    # Each step is an ordinary recipe, and the student used stored labels of the better of baseline and teacher.
    recipe = json.loads((out / "student" / "recipe.json").read_text())["objective"]
    validation = {name: scores[name] for name in ("teacher", "frozen")}
    assert recipe["teacher"] == str(out / max(validation, key=validation.get) / "model")
    assert recipe["cache"] == str(out / "labels")
    # Epochs: some batches to time them, and then as many as the student takes.
    assert stored == [4 / (36 / 8), 16 / (36 / 8), 4.0]
    assert not (out / "labels").exists()


def test_the_page_while_it_goes_on(data, tmp_path, start, own_cache, monkeypatch):
    """Each step is on it when it begins; at the end it is the report."""
    out, pages, write = tmp_path / "run", [], document.write

    def noted(file, *given, **options):
        path = write(file, *given, **options)
        if Path(file) == out / "report.html":
            pages.append(Path(file).read_text())
        return path

    monkeypatch.setattr(document, "write", noted)
    carried(small_plan(out, data, start), out, data)
    *during, last = [checked(text, unfinished=text is not pages[-1]) for text in pages]
    assert {page.all("h2")[0][2] for page in during} == {"This fit is not finished"}
    states = [tuple(row[1] for row in page.table("Steps")[1:]) for page in during]
    seen = list(dict.fromkeys(tuple(re.sub("done in .*", "done", state) for state in row) for row in states))
    names = ("frozen", "teacher", "labels", "student", "judge")
    assert seen == [
        tuple("done" if place < now else "now" if place == now else "to come" for place in range(5)) for now in range(5)
    ]
    assert [row[0] for row in during[-1].table("Steps")[1:]] == list(names)
    scores = json.loads((out / "state.json").read_text())["scores"]
    assert [row[2] for row in during[-1].table("Steps")[1:] if row[2]] == [f"{value:.3f}" for value in scores.values()]
    assert last.all("h2")[0][2] == "The models that were compared"
    assert not (out / "teacher" / "report.html").exists()


def test_a_temperature_at_its_limit_and_the_judges_are_told(data, tmp_path, start, own_cache, monkeypatch):
    """In the terminal and on the page, also that validation images chose the model and judge it."""
    plan, out, said = small_plan(tmp_path / "run", data, start), tmp_path / "run", tmp_path / "said"
    head = HeadCalibration(temperature=0.05, threshold=0.5, nll=(1.0, 0.5), answered=0.5)
    found = Calibration(error_rate=0.05, images=24, data="", heads={"class": head})
    monkeypatch.setattr(work, "calibrate_split", lambda *_, **__: found)
    plan = replace(plan, steps=tuple(step for step in plan.steps if step.name in ("frozen", "judge")))
    with open(said, "w") as file:
        splits = read_data(data, holdout=0.1, seed=0)
        carry_out(plan, splits, None, out, device="cpu", console=Console(file=file, width=1000))
    page, lines = (out / "report.html").read_text(), said.read_text().splitlines()
    for words in ("is the least that is tried (0.05)", "if these validation images chose the model"):
        [line] = [line for line in lines if words in line]
        assert line.startswith("warning: ")
        assert words in page


def test_a_handful_of_photos(tmp_path, start, own_cache, monkeypatch):
    """Five photos of three classes, in batches of eight: folds without a class, batches of more than an epoch, a
    warm-up of no step, an average of three steps."""
    root = photos(photos(tmp_path / "data", count=2), split="val", count=8)
    (root / "train" / "c" / "1.png").unlink()
    out = tmp_path / "run"
    plan = small_plan(out, root, start)
    parts = {"schedule": Cosine(total=epochs(5), warmup=epochs(0.5)), "ema": 0.99, "evaluate": steps(2)}
    recipes = {name: replace(plan.recipe(name), **parts) for name in ("teacher", "student")}
    plan = replace(plan, steps=tuple(replace(s, recipe=recipes.get(s.name, s.recipe)) for s in plan.steps))
    stored, teach = [], work.teach
    monkeypatch.setattr(
        work, "teach", lambda *given, epochs, **more: [stored.append(epochs), teach(*given, epochs=epochs, **more)]
    )
    splits = read_data(root, holdout=0.1, seed=0)
    fitted = carry_out(plan, splits, None, out, device="cpu", console=QUIET)
    assert [each.name for each in fitted.candidates] == ["frozen", "teacher", "student"]
    assert stored == [3 * 8 / 5, 3 * 8 / 5]  # as many epochs as the student takes, which are less than 16 batches
    for name in recipes:
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 3]  # 5 epochs of 5 photos are 3.125 steps of 8
        # The rates of the steps 1 and 2, counted from 0: a cosine from 1e-3 to 1e-5 over three steps.
        falling = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * step / 3)) / 2 for step in (1, 2)]
        assert [row["lr"] for row in rows] == pytest.approx(falling)
        tensors = load_file(next((out / name / "checkpoints").iterdir()))
        assert tensors["ema.updates"] == 3
    probe = examine_files(out / "frozen" / "model", root, split="val", device="cpu", console=QUIET)
    assert fitted["frozen"].heads == {head: probe.main.report.accuracy(head) for head in probe.main.report.heads}


def test_the_same_call_goes_on(data, tmp_path, start, own_cache, monkeypatch):
    out = tmp_path / "run"
    plan = small_plan(out, data, start)
    plan.write(out)
    trained = []
    train = work.train

    def stopped(recipe, *given, **options):
        trained.append(recipe.name)
        if recipe.name == "student" and trained.count("student") == 1:
            raise KeyboardInterrupt
        return train(recipe, *given, **options)

    monkeypatch.setattr(work, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(data, out, console=QUIET, device="cpu")
    assert not (out / "model").exists()
    again = fit(data, out, console=QUIET, device="cpu")
    assert trained == ["frozen", "teacher", "student", "student"]
    said = Console(file=io.StringIO(), width=1000)
    once_more = fit(data, out, console=said, device="cpu")  # only judges again
    lines = [" ".join(line.split()) for line in said.file.getvalue().splitlines()]
    assert {"1. frozen done the frozen", "4. student done the student", "5. judge the judge"} <= set(lines)
    assert trained == ["frozen", "teacher", "student", "student"]
    first, second = again.to_dict(), once_more.to_dict()
    for each in (*first["models"].values(), *second["models"].values()):
        del each["images_per_second"]
    assert (first["models"], first["pairs"]) == (second["models"], second["pairs"])


@pytest.mark.parametrize("minutes", [0.25])
def test_the_time_is_kept(data, tmp_path, start, own_cache, minutes):
    out = tmp_path / "run"
    plan = small_plan(out, data, start, minutes=minutes)
    long = {name: replace(plan.recipe(name), schedule=Cosine(total=epochs(10_000))) for name in ("teacher", "student")}
    plan = replace(plan, steps=tuple(replace(step, recipe=long.get(step.name, step.recipe)) for step in plan.steps))
    plan.write(out)
    began = time.perf_counter()
    fitted = carried(plan, out, data)
    assert time.perf_counter() - began <= 1.1 * 60 * minutes
    assert fitted.seconds >= 0.4 * 60 * minutes  # it used what it was given


def test_what_does_not_fit_into_the_time_is_left_out(data, tmp_path, start, own_cache, capsys):
    out = tmp_path / "run"
    plan = small_plan(out, data, start, minutes=1.0, shares=(0.1, 1e-9, 1e-9, 1e-9, 1.0))
    plan.write(out)
    fitted = carried(plan, out, data, Console(stderr=True, width=1000))
    said = capsys.readouterr().err
    assert "teacher: left out, because a step takes about" in said
    assert [each.name for each in fitted.candidates] == ["frozen"]
    assert str(fitted.reason) == "the frozen baseline is the only model"


def test_a_baseline_that_took_all_of_the_time_is_judged(data, tmp_path, start, own_cache, monkeypatch, capsys):
    """Then no second is left for the labels, and they are left out like the steps that train."""
    out = tmp_path / "run"
    plan = small_plan(out, data, start, minutes=1.0)
    plan.write(out)
    monkeypatch.setattr(work, "_left", lambda *_: -5.0)
    fitted = carried(plan, out, data, Console(stderr=True, width=1000))
    said = capsys.readouterr().err
    assert "labels: left out, because no time is left" in said
    for name in ("teacher", "student"):
        assert re.search(rf"{name}: left out, because .* not even one step fits into the 0 s that are left", said)
    assert [each.name for each in fitted.candidates] == ["frozen"]
    assert not (out / "labels").exists()


def test_without_any_teacher_the_student_is_left_out(data, tmp_path, start, capsys):
    out = tmp_path / "run"
    plan = small_plan(out, data, start, minutes=1.0, shares=(0.1, 1e-9, 0.3, 0.3, 0.3))
    teaching = replace(plan.steps[1], recipe=replace(plan.recipe("teacher"), start=""))
    plan = replace(plan, steps=(teaching, *plan.steps[2:]))
    plan.write(out)
    with raises_saying(ValueError, "no step of the plan fits into its time; give more --time"):
        carried(plan, out, data, Console(stderr=True, width=1000))
    said = capsys.readouterr().err
    for name in ("labels", "student"):
        assert f"{name}: left out, because the model that was to teach the student was left out" in said


@pytest.mark.parametrize(("free", "epochs_stored"), [(20_000, 13), (None, 40), (10**9, 40), (10, 16 / 4.5)])
def test_labels_leave_half_of_the_disk_free(data, tmp_path, start, monkeypatch, free, epochs_stored):
    """An epoch takes 1000 bytes, and 16 batches of 8 are stored already: of 36 images, that are 3.6 epochs."""
    asked = []

    def taught(recipe, split, folder, *, epochs, **_):
        asked.append(epochs)
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "labels-00000.safetensors").write_bytes(bytes(round(1000 * epochs)))

    monkeypatch.setattr(work, "teach", taught)
    monkeypatch.setattr(work.files, "free_bytes", lambda _: free)
    plan = small_plan(tmp_path / "run", data, start)
    studying = replace(plan.recipe("student"), schedule=Cosine(total=epochs(40)))
    plan = replace(plan, steps=(*plan.steps[:3], replace(plan.steps[3], recipe=studying), plan.steps[4]))
    splits, state = read_data(data, holdout=0.1, seed=0), work._State(scores={"teacher": 1.0})
    work._Work(plan, splits, tmp_path / "run", "cpu", QUIET, state).store_labels(math.inf)
    assert asked == [4 / 4.5, 16 / 4.5, epochs_stored]
    assert state.epochs == epochs_stored


# ------------------------------------------------------------------------------------------------------------ the plan


def test_a_plan_is_read_as_it_was_written(data, tmp_path, start):
    plan = small_plan(tmp_path / "run", data, start, minutes=7.5, prefer="speed")
    plan.write(tmp_path / "run")
    assert Plan.read(tmp_path / "run") == plan
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "plan.json",
        "frozen.json",
        "teacher.json",
        "student.json",
    }


def edited(out, change):
    values = json.loads((out / "plan.json").read_text())
    change(values)
    (out / "plan.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.update(version=9), "version must be 1"),
        (lambda plan: plan["steps"].pop(), "with judge at the end"),
        (lambda plan: plan["steps"].reverse(), "in this order"),
        (lambda plan: plan["steps"].pop(3), "labels are stored for a student"),
        (lambda plan: plan["steps"][0].update(recipe="../frozen.json"), "must be a file beside the plan"),
        (lambda plan: plan["steps"][0].pop("recipe"), "the step frozen lacks its recipe"),
        (lambda plan: plan["steps"][0].update(share="much"), "share of frozen must be a number"),
        (lambda plan: plan["steps"][2].update(share=-0.1), "share of labels can't be negative, found -0.1"),
        (lambda plan: plan.update(minutes="long"), "minutes must be a number"),
        (lambda plan: plan.update(minutes=-1), "minutes must be positive"),
        (lambda plan: plan.update(prefer="size"), "prefer one of accuracy, speed"),
        (lambda plan: plan.update(surprise=1), "surprise"),
        (lambda plan: plan.pop("steps"), "'steps' is missing"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(data, tmp_path, start, change, words):
    out = tmp_path / "run"
    small_plan(out, data, start).write(out)
    edited(out, change)
    with raises_saying(ValueError, str(out / "plan.json"), words):
        Plan.read(out)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("teacher", lambda recipe: recipe["optim"].update(lrr=1), "teacher.json: optim: there is no 'lrr'"),
        ("frozen", lambda recipe: recipe.update(start=""), "frozen.json: recipe frozen: a linear probe needs"),
        (
            "student",
            lambda recipe: recipe.update(objective={"kind_of": "Supervised"}),
            "labels are stored for a student that learns from a teacher, and the objective of this one is Supervised",
        ),
    ],
)
def test_an_edited_recipe_that_makes_no_sense_is_refused(data, tmp_path, start, name, change, words):
    out = tmp_path / "run"
    small_plan(out, data, start).write(out)
    recipe = json.loads((out / f"{name}.json").read_text())
    change(recipe)
    (out / f"{name}.json").write_text(json.dumps(recipe))
    with raises_saying(ValueError, str(out / "plan.json"), words):
        Plan.read(out)


def test_test_images_of_an_unknown_class_are_refused_at_once(tmp_path):
    """And not after half an hour, when the models are judged."""
    root = photos(photos(tmp_path / "data"), split="test", classes="abz")
    with raises_saying(ValueError, "knows no class 'z'", "it knows 'a', 'b', 'c'", "rename the class"):
        fit(root, tmp_path / "run", console=QUIET, device="cpu")
    assert not (tmp_path / "run").exists()


def test_an_edited_plan_is_carried_out(data, tmp_path, start, own_cache):
    """Without baseline and labels, and with a recipe that was changed."""
    out = tmp_path / "run"
    small_plan(out, data, start).write(out)
    edited(out, lambda plan: plan.update(steps=[plan["steps"][number] for number in (1, 4)]))
    recipe = json.loads((out / "teacher.json").read_text())
    recipe.update(start="", schedule={**recipe["schedule"], "total": {"amount": 3, "unit": "steps"}})
    (out / "teacher.json").write_text(json.dumps(recipe))
    fitted = fit(data, out, console=QUIET, device="cpu")
    assert [each.name for each in fitted.candidates] == ["teacher"]
    assert json.loads((out / "teacher" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3


def test_recipes_that_hold_out_other_images(data, tmp_path, start):
    plan = small_plan(tmp_path / "run", data, start)
    changed = replace(plan.steps[1], recipe=replace(plan.steps[1].recipe, seed=1))
    with raises_saying(ValueError, "differ in seed or data.holdout"):
        replace(plan, steps=(plan.steps[0], changed, *plan.steps[2:]))


FIVE = ["frozen", "teacher", "labels", "student", "judge"]


@pytest.mark.parametrize(
    ("reached", "names", "teacher", "student"),
    [
        ((), ["teacher", "labels", "student", "judge"], "teacher_from_scratch", "student"),
        (("installed",), FIVE, "teacher", "student"),
        (
            ("timm/tf_efficientnet_lite0.in1k",),
            FIVE,
            "teacher",
            "student",
        ),
        (
            ("installed", "facebook/deit-tiny-distilled-patch16-224"),
            FIVE,
            "teacher",
            "finetune_distilled",
        ),
    ],
)
def test_the_plan_takes_the_best_that_can_be_reached(data, tmp_path, monkeypatch, reached, names, teacher, student):
    monkeypatch.setattr(planning, "_reachable", lambda recipe: recipe.start in reached)
    monkeypatch.setattr(planning, "_rate", lambda *_: 2.0)
    splits = read_data(data, holdout=0.1, seed=5)
    plan = planning.make_plan(data, splits, tmp_path / "run", minutes=2.5, seed=5, device="cpu")
    assert [step.name for step in plan.steps] == names
    assert (plan.recipe("teacher").name, plan.recipe("student").name) == (teacher, student)
    assert {step.recipe.seed for step in plan.steps if step.recipe} == {5}
    if "frozen" in names:
        probe = plan.recipe("frozen")
        assert probe.start == reached[0]
        assert plan.recipe("teacher").start == str(tmp_path / "run" / "frozen" / "model")
        assert probe.objective.images == 30  # 2 images/s for a tenth of 2.5 minutes, but ten for each class


@pytest.mark.parametrize(
    ("images", "reached", "teaches", "studies"),
    [
        (3000, ("installed",), (epochs(6), epochs(0.5)), (epochs(200), epochs(5))),
        (100, ("installed",), (steps(300), steps(25)), (steps(2500), steps(62))),
        (100, (), (steps(2500), steps(83)), (steps(2500), steps(62))),
        (3000, (), (epochs(60), epochs(2)), (epochs(200), epochs(5))),
        (100, ("facebook/deit-tiny-distilled-patch16-224",), (steps(2500), steps(83)), (steps(300), steps(20))),
    ],
)
def test_a_few_images_get_enough_steps(images, reached, teaches, studies, tmp_path, monkeypatch):
    split = Split(tuple(tmp_path / f"{i}.png" for i in range(images)), tuple(i % 10 for i in range(images)), CLASSES)
    monkeypatch.setattr(planning, "fingerprint", lambda split: "")
    monkeypatch.setattr(planning, "_reachable", lambda recipe: recipe.start in reached)
    monkeypatch.setattr(planning, "_rate", lambda *_: 100.0)
    plan = planning.make_plan(tmp_path, (split, split), tmp_path / "run", device="cpu")
    lengths = [
        (schedule.total, schedule.warmup)
        for name in ("teacher", "student")
        for schedule in [plan.recipe(name).schedule]
    ]
    assert lengths == [teaches, studies]


def test_a_plan_without_scikit_learn_has_no_baseline(data, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "_reachable", lambda recipe: recipe.start == "installed")
    monkeypatch.setattr(planning, "find_spec", lambda name: None)
    plan = planning.make_plan(data, read_data(data, holdout=0.1, seed=0), tmp_path / "run", device="cpu")
    assert [step.name for step in plan.steps] == FIVE[1:]
    assert plan.recipe("teacher").start == "installed"
    assert 'scikit-learn: pip install "deit[fit]"' in plan.steps[0].why


def test_the_plan_for_people(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planning, "_reachable", lambda recipe: False)
    assert main(["fit", str(data), "--out", str(tmp_path / "run"), "--time", "10m", "--plan", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "36 to train, 24 to validate, 18 to test; 3 classes, 12 training images each" in said
    assert "1. teacher    4 min  the built-in ConvNet, trained from scratch" in said
    assert "3. student    3 min  a small DeiT from scratch" in said
    assert "the recommended one is calibrated" in said
    assert not (tmp_path / "run" / "teacher").exists()
    assert main(["fit", str(data), "--out", str(tmp_path / "run"), "--time", "20m"]) == 1
    assert "holds a plan with minutes=10.0, found minutes=20.0; edit" in capsys.readouterr().err
    assert main(["fit", str(data), "--out", str(tmp_path / "short"), "--time", "60s", "--plan", "--device", "cpu"]) == 0
    assert re.search(r"1\. teacher +\d\d s  the built-in ConvNet", capsys.readouterr().out)


def test_without_test_images_the_plan_tells_the_way_to_some(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planning, "_reachable", lambda recipe: False)
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "my photos", count=12)
    assert main(["fit", "my photos", "--plan", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "my photos has no test images. The validation images choose the model" in said
    split, again = (shlex.split(command) for command in re.findall(r"`deit ([^`]*)`", said))
    assert main(split) == 0
    assert main([*again, "--out", "another", "--plan", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "30 to train, 3 to validate, 3 to test" in said
    assert "no test images" not in said


def test_other_folders_and_other_images_are_refused(data, tmp_path, start):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with raises_saying(FileExistsError, "to be empty or to hold a plan"):
        fit(data, tmp_path / "mine", console=QUIET)
    out = tmp_path / "run"
    changed = photos(photos(tmp_path / "changed"), split="val")
    plan = small_plan(out, changed, start)
    plan.write(out)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(changed / "train" / "a" / "new.png")
    with raises_saying(ValueError, "are not those that", "restore them"):
        fit(changed, out, console=QUIET, device="cpu")


def test_a_folder_among_the_images_is_refused(data, tmp_path):
    for out in (data / "run", data / "train" / "run", data):
        with raises_saying(ValueError, f"--out {out} lies in the folder of the images", "outside of it"):
            fit(data, out, console=QUIET)
    assert not (data / "run").exists()


def test_the_same_plan_from_elsewhere(data, tmp_path, start, own_cache, monkeypatch):
    """Relative and absolute names of the images, and another working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "_reachable", lambda recipe: False)
    relative = Path(os.path.relpath(data, tmp_path))
    assert fit(relative, "run", console=QUIET, device="cpu", only_plan=True) is None
    plan = Plan.read(tmp_path / "run")
    assert Path(plan.data) == tmp_path / relative
    assert plan.recipe("student").objective.teacher == str(tmp_path / "run" / "teacher" / "model")
    monkeypatch.chdir("/")
    assert fit(data, tmp_path / "run", console=QUIET, device="cpu", only_plan=True) is None
    with raises_saying(ValueError, f"holds a plan for {plan.data}, found {tmp_path / 'x'}", "choose another --out"):
        fit(tmp_path / "x", tmp_path / "run", console=QUIET)


def test_labels_that_were_stopped_count(data, tmp_path, start, own_cache, monkeypatch):
    out = tmp_path / "run"
    small_plan(out, data, start, minutes=2.0).write(out)
    calls = []
    teach = work.teach

    def stopped(*given, **options):
        calls.append(1)
        if len(calls) == 2:
            time.sleep(2)
            raise KeyboardInterrupt
        return teach(*given, **options)

    monkeypatch.setattr(work, "teach", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(data, out, console=QUIET, device="cpu")
    state = json.loads((out / "state.json").read_text())
    assert state["begun"] > 2
    fitted = fit(data, out, console=QUIET, device="cpu")
    after = json.loads((out / "state.json").read_text())["seconds"]
    assert after["labels"] > state["begun"]
    assert fitted.seconds > sum(after.values()) - 1e-6


def test_a_stop_says_how_a_fit_goes_on(data, tmp_path, start, own_cache, monkeypatch):
    """`deit fit` has no --resume."""
    out, said = tmp_path / "run", io.StringIO()
    plan = small_plan(out, data, start)
    plan.write(out)

    def interrupting(self, numbers):
        if (out / "teacher" / "metrics.jsonl").exists():
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(work.LivePage, "row", interrupting)
    with pytest.raises(Stopped):
        carried(plan, out, data, Console(file=said, width=1000))
    assert "the state is saved, the same command goes on" in said.getvalue()
    assert "--resume" not in said.getvalue()


def test_killed_again_and_again_is_uninterrupted(data, tmp_path, start):
    """SIGKILL in every step, as soon as something of it is there. Weights are equal to the bit, because the plan has no
    time limit, on which the schedules would depend."""
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name in ("whole", "broken"):
        plan = small_plan(tmp_path / name, data, start)
        plan = replace(
            plan,
            steps=tuple(
                replace(step, recipe=step.recipe and replace(step.recipe, compute=Compute(save_minutes=0, workers=0)))
                for step in plan.steps
            ),
        )
        plan.write(tmp_path / name)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(begin("fit", data, "--out", whole, "--device", "cpu", **environment))
    signs = ("frozen/recipe.json", "teacher/checkpoints/*", "labels/cache.json", "student/checkpoints/*", "model")
    for sign in signs:
        process = begin("fit", data, "--out", broken, "--device", "cpu", **environment)
        while process.poll() is None and not list(broken.glob(sign)):
            time.sleep(0.001)
        kill(process, broken)
    finish(begin("fit", data, "--out", broken, "--device", "cpu", **environment))
    for name in ("teacher", "student"):
        assert_same_end(broken / name, whole / name)
    found, expected = (json.loads((out / "result.json").read_text()) for out in (broken, whole))
    for name, each in expected["models"].items():
        assert found["models"][name]["heads"] == each["heads"]


class _Numbers(list[int]):
    keeps = False


class _Costs:
    """An objective and a clock: a step takes `step` seconds, an evaluation of all images `judging`."""

    cycle = teacher = None
    passes = 1

    def __init__(self, monkeypatch, step, judging):
        self.now, self.step, self.judging = 0.0, step, judging
        monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(budget, "Ahead", lambda *_: self)
        monkeypatch.setattr(stepping, "fit", lambda *_: None)
        monkeypatch.setattr(stepping, "take", self.take)
        monkeypatch.setattr(objectives, "build", lambda recipe, *_: self)

    def __next__(self):
        return None

    fetch = close = lambda self: None

    def take(self, *_):
        self.now += self.step

    def validation(self, split, us):
        return _Numbers(range(math.ceil(len(split) / 32)))

    def judge(self, model, batches, *_):
        self.now += self.judging * len(list(batches)) / len(self.validation(range(341), None))


@pytest.mark.parametrize(
    ("name", "step", "judging", "before", "total", "evaluations"),
    [
        # The recipe's 94 steps are 60 epochs of 1.56 steps, in 233 s. The student's 312 steps are 200, in 231 s.
        # Planning takes 14 steps or a twentieth of that, and 4 of 11 batches of an evaluation.
        ("teacher", 0.5, 0.1, 60, 94, 60),  # 6 s for 60 evaluations are affordable, so the interval stays
        ("teacher", 0.5, 3.0, 52, 94, 6),
        ("student", 0.5, 0.5, 157, 312, 39),
        ("student", 0.5, 3.0, 52, 312, 6),
        ("student", 2.0, 6.0, 20, 88, 3),
    ],
)
def test_evaluations_of_few_images(name, step, judging, before, total, evaluations, tmp_path, monkeypatch):
    """100 photos to train and 341 to validate. `before` is the number with one after each epoch."""
    few, many = (
        Split(tuple(tmp_path / f"{part}{i}.png" for i in range(count)), tuple(i % 10 for i in range(count)), CLASSES)
        for part, count in (("train", 100), ("val", 341))
    )
    recipe, seconds = (teacher_from_scratch(), 233) if name == "teacher" else (student(), 231)
    us = Processes(torch.device("cpu"))

    def planned(recipe):
        costs = _Costs(monkeypatch, step, judging)
        found = budget.fitted(recipe, few, many, us, seconds, QUIET)
        length = found.schedule.total.in_steps(100 / 64)
        every = 100 / 64 if found.evaluate in (None, epochs(1)) else found.evaluate.amount
        count = sum(1 for n in range(1, length + 1) if n == length or n // every > (n - 1) // every)
        assert costs.now + length * step + count * judging <= seconds
        return length, count

    assert planned(recipe) == (total, evaluations)
    assert evaluations * judging <= 0.1 * seconds
    assert evaluations >= 10 or 10 * judging > 0.1 * seconds
    length, count = planned(replace(recipe, evaluate=epochs(1)))
    assert count == before
    assert length <= total


# ---------------------------------------------------------------------------------------------------------- the choice


class _Made:
    """A candidate whose answers are right or wrong as given, and which gives the true class this probability."""

    def __init__(self, name, right, rate, probability=0.9):
        from deit.evaluate.scores import Report

        wrong = (~np.array(right)).astype(np.int64)
        count = len(wrong)
        report = Report(
            classes=("a", "b"),
            head="class",
            labels=np.zeros(count, np.int64),
            ranks={"class": wrong, "fused": wrong},
            predicted=wrong,
            confidence=np.full(count, 0.9),
            probability=np.full(count, probability),
            squares=np.full(count, 0.8),
        )
        self.name, self.images_per_second = name, rate
        self.validation = type("V", (), {"main": type("M", (), {"report": report})})


def answers(right, of=200):
    return [True] * right + [False] * (of - right)


@pytest.mark.parametrize(
    ("rights", "rates", "prefer", "chosen", "words"),
    [
        ((150, 190, 160), (50, 50, 500), "accuracy", "teacher", "the teacher is right on 190 of 200"),
        ((150, 190, 160), (50, 50, 500), "speed", "teacher", "the frozen baseline on 150 and the student on 160"),
        ((150, 190, 188), (50, 50, 500), "speed", "student", "the fastest of those that are not surely worse"),
        ((150, 190, 188), (50, 50, 500), "accuracy", "teacher", "the difference to the student may be chance"),
    ],
)
def test_the_recommendation(rights, rates, prefer, chosen, words):
    names = ("frozen", "teacher", "student")
    made = [_Made(name, answers(right), rate) for name, right, rate in zip(names, rights, rates, strict=True)]
    best, reason = recommend(made, prefer)
    assert best.name == chosen
    assert words in str(reason)


def test_of_equal_models_the_likelier_is_recommended():
    """Two validation photos tell little of which model is right more often."""
    made = [_Made("frozen", [True, False], 50, 0.3), _Made("teacher", answers(1, 2), 50, 0.7)]
    made.append(_Made("student", answers(1, 2), 500, 0.2))
    best, reason = recommend(made, "accuracy")
    assert best.name == "teacher"
    assert str(reason) == (
        "the teacher is right on 1 of 2 validation images, the frozen baseline on 1 and the student on 1; it gives the "
        "true classes higher probabilities than the frozen baseline and the student; the difference to the frozen "
        "baseline and the student may be chance"
    )
    assert reason.chinese == (
        "2 张验证图像中，教师答对 1 张，冻结基线答对 1 张，学生答对 1 张；它给真实类别的概率比冻结基线和学生更高；"
        "与冻结基线和学生的差距可能只是偶然"
    )
