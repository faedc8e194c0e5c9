"""The report as a reader gets it: its numbers against the evaluation's, its markup, and what it survives."""

import math
import os
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.checks import raises_saying
from support.reports import ABOUT, HOSTILE, checked, evaluation, record
from support.runs import small_recipe

from deit.explain.explanation import Explanation, Map, TokenAnswer
from deit.recipe import Supervised
from deit.recipes import shipped
from deit.report import document
from deit.report import maps as report_maps
from deit.report.drawing import Line, curves
from deit.report.markup import Html, element, joined, named
from deit.train.records import Record


def test_what_is_not_markup_is_escaped():
    assert element("p", "<b>", Html("<b>x</b>"), class_='a"b', aria_label=None) == (
        '<p class="a&quot;b">&lt;b&gt;<b>x</b></p>'
    )
    assert "<" + element("b", "&") == "&lt;<b>&amp;</b>"
    assert element("b", "&") + "<" == "<b>&amp;</b>&lt;"
    assert joined(["<", element("i")], "-") == "&lt;-<i></i>"
    assert element("p", "a\x00\udc80\ufffe\tb") == "<p>a\ufffd\ufffd\ufffd\tb</p>"
    assert named("a" * 50 + "z" * 50, 10) == "<bdi>" + "a" * 6 + "…" + "z" * 3 + "</bdi>"


def test_the_numbers_are_the_evaluations():
    found = evaluation(classes=8, heads=("fused", "class", "distillation", "softmax"))
    numbers = found.main.report
    page = checked(document.page(None, found))
    rows = page.table("Accuracy of each head")[1:]
    assert len(rows) == 4
    for head, *cells in rows:
        low, high = numbers.accuracy(head).interval
        assert cells[:3] == [
            f"{numbers.accuracy(head).value:.3f}",
            f"{low:.3f} to {high:.3f}",
            str(numbers.accuracy(head).correct),
        ]
        assert cells[3] == f"{numbers.accuracy(head, 5).value:.3f}"
        low, high = numbers.balanced(head).interval
        assert cells[5:] == [f"{numbers.balanced(head).value:.3f}", f"{low:.3f} to {high:.3f}"]
    assert page.table("Calibration")[1:] == [
        [f"{each.low:.2f} to {each.high:.2f}", str(each.count), f"{each.confidence:.3f}", f"{each.accuracy:.3f}"]
        for each in numbers.bins
        if each.count
    ]
    assert page.table("Classes")[1:] == [
        [
            each.name,
            str(each.support),
            str(each.predicted),
            f"{each.precision:.3f}",
            f"{each.recall:.3f}",
            f"{each.f1:.3f}",
        ]
        for each in numbers.by_class
    ]
    matrix = page.table("Images by true class (rows) and answer (columns)")
    assert [[int(cell or 0) for cell in row[1:]] for row in matrix[1:]] == numbers.confusion().tolist()
    page.sees(
        f"balanced accuracy{numbers.balanced().value:.3f}",
        "mean of 8 recalls",
        f"{numbers.calibration_error:.4f}",
        f"{numbers.brier:.4f}",
        f"{numbers.nll:.4f}",
        "f" * 64,
        "Judged by 60 test images in photos of 8 classes, at 224 by 224 pixels and crop ratio 0.875",
        "deit eval runs/a/model --data photos --split test",
    )


def test_classes_without_images_are_named():
    names = ("a", "b", "<i>", *"defg")
    found = evaluation(names=names)
    kept = np.isin(found.main.report.labels, [0, 3, 4])
    labels = np.where(kept, found.main.report.labels, -1)
    found = replace(found, main=replace(found.main, report=replace(found.main.report, labels=labels)))
    page = checked(document.page(None, found))
    page.sees('No image shows "\u2068b\u2069", "\u2068<i>\u2069", "\u2068f\u2069" and 1 more.', "mean of 3 recalls")


@pytest.mark.parametrize("weights", ["equal", "balanced"])
def test_what_the_numbers_of_images_make_hard(tmp_path, weights):
    about = replace(ABOUT, classes=("a", "<i>", "c"), train=(400, 30, 3), val=(20, 5, 0))
    rows = [
        {"step": i, "epoch": i / 9, "loss": 1.0, "val_accuracy": 0.5, "val_balanced_accuracy": 0.1 * i} for i in (1, 2)
    ]
    made = small_recipe(Supervised(class_weights=weights)).to_dict()["objective"]
    page = checked(document.page(Record.read(record(tmp_path / "run", about, rows, objective=made)), None))
    page.sees(
        '1 class has fewer than 5 training images, too few to learn from: "\u2068c\u2069" (3).',
        "1 class has no validation image",
        "validation, balanced",
    )
    assert ("--set objective.class_weights=balanced" in page.text) == (weights == "equal")
    assert page.table("Metrics") == [
        ["step", "epoch", "loss", "val accuracy", "val balanced accuracy"],
        ["1", "0.1111", "1", "0.5", "0.1"],
        ["2", "0.2222", "1", "0.5", "0.2"],
    ]


def test_fields_that_a_run_does_not_name_are_those_of_its_time(tmp_path):
    """A run of a version without `class_weights` has not changed it."""
    made = shipped()["digits"]().to_dict()
    del made["objective"]["class_weights"]
    page = checked(document.page(Record.read(record(tmp_path / "run", **made)), None))
    page.sees("The shipped recipe of this name, unchanged.")


def test_many_classes_are_summarised_and_none_is_lost():
    found = evaluation(count=3000, classes=100)
    page = checked(document.page(None, found))
    matrix = page.table("Images by true class (rows) and answer (columns)")
    assert len(matrix) == 31
    assert sum(int((cell or "0").replace(",", "")) for row in matrix[1:] for cell in row[1:]) == 3000
    assert matrix[0][-1] == "71 others"
    assert [row[0] for row in page.table("All classes")[1:]] == list(found.main.report.classes)
    worst = sorted(found.main.report.by_class, key=lambda each: (each.recall, each.f1))[:10]
    assert [row[0] for row in page.table("Worst classes")[1:]] == [each.name for each in worst]


def test_the_most_wrong_and_the_most_doubtful_images(tmp_path):
    sizes = [(20, 20), (400, 300), (1, 900), (33, 65)]
    files = []
    for i in range(60):
        files.append(tmp_path / f"{i}.png")
        mode, colour = (("RGB", 7), ("L", 7), ("RGBA", 7), ("I;16", 30_000))[i % 4]
        Image.new(mode, sizes[i % 4], colour).save(files[-1])
    found = evaluation(files=files)
    numbers = found.main.report
    wrong = [i for i in np.argsort(-numbers.confidence) if numbers.labels[i] != numbers.predicted[i]][:12]
    doubtful = [i for i in np.argsort(numbers.confidence) if i not in wrong][:12]
    page = checked(document.page(None, found))
    shown = page.all("img")
    assert [image[1]["alt"] for image in shown] == [
        f"True label \u2068class {numbers.labels[i]}\u2069; predicted \u2068class {numbers.predicted[i]}\u2069 with "
        f"probability {numbers.confidence[i]:.2f}"
        for i in [*wrong, *doubtful]
    ]
    assert all(int(image[1]["width"]) <= 128 and int(image[1]["height"]) <= 128 for image in shown)
    [os.unlink(files[i]) for i in wrong]
    page = checked(document.page(None, found))
    assert len(page.all("img")) == len(doubtful)
    page.sees("This image can't be read any more.")


def test_names_are_hostile_input(tmp_path):
    safe = [re.sub("[/\x00]", "", name)[:60] for name in HOSTILE]
    files = [tmp_path / f"{safe[i % len(safe)]}{i}.png" for i in range(60)]
    for file in files:
        Image.new("RGB", (8, 8)).save(file)
    found = evaluation(files=files, names=HOSTILE, unreadable=((HOSTILE[0], HOSTILE[1]),))
    found = replace(found, data=HOSTILE[0], main=replace(found.main, model=HOSTILE[6]))
    about = replace(
        ABOUT,
        classes=HOSTILE,
        train=(1,) * len(HOSTILE),
        val=(1,) * len(HOSTILE),
        data=HOSTILE[1],
        device=HOSTILE[0],
        fingerprint=HOSTILE[0],
        versions={HOSTILE[0]: HOSTILE[7]},
    )
    run = Record.read(record(tmp_path / "run <b>", about, name=HOSTILE[0], start=HOSTILE[1], seed=HOSTILE[6]))
    drawn = {
        i: Explanation(
            "",
            "",
            Image.new("RGB", (8, 8)),
            (TokenAnswer("class", name, 0.5, name, 0.5),),
            (Map("class", "relevance", np.eye(2)),),
        )
        for i, name in enumerate(HOSTILE * 7)
    }
    text = document.page(run, found, maps=report_maps.Maps(drawn), figures=[(HOSTILE[0], Image.new("RGB", (9, 9)))])
    page = checked(text)
    page.sees("What answers rest on")
    assert text.count("<script") == 1  # the page's own
    assert "onerror=" not in re.sub(r">[^<]*<|\"[^\"]*\"", "", text)
    assert not re.search("[\x00\x1b\ud800-\udfff]", text)
    assert len(re.findall("x{200,}", text)) == 1  # the command that repeats it, which must be exact
    assert f"<bdi>{HOSTILE[2]}</bdi>" in text
    page.sees(HOSTILE[0], "שלום", "🐕‍🦺")
    document.write(tmp_path / "page.html", run, found)
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE")


def test_what_a_run_says_of_itself(tmp_path):
    run = Record.read(record(tmp_path / "run"))
    page = checked(document.page(run, None))
    page.sees(
        "Trained 2 January 2026, 03:04 UTC",
        "run: the recipe mine, 200 steps, 2 epochs, on 150 images of 2 classes",
        "42 s",
        "a CPU, 2 cores",
        "bfloat16",
        "e" * 64,
        "123",
        f"deit train {tmp_path / 'run' / 'recipe.json'} --data photos --out AGAIN",
        "after step 200. It was chosen by",
        "deit report",
        "No shipped recipe has this name",
    )
    assert page.table("Accuracy of each head")[1:] == [["fused", "0.800", "0.670 to 0.888", "40"]]
    assert page.table("Images of each class")[1:] == [["a", "70", "20"], ["b", "80", "30"]]
    assert page.table("Metrics")[1] == ["50", "0.5", "2", "0.2", "0.2", "0.001"]
    assert ["lr", "0.001"] in page.table("Recipe: optim")
    assert ["total", "200 steps"] in page.table("Recipe: schedule")
    assert {svg[1].get("aria-labelledby") for svg in page.all("svg", role="img")} == {
        f"{key}-title {key}-desc" for key in ("heads", "loss", "accuracy-curve", "rate")
    }


@pytest.mark.parametrize(
    ("changes", "recipe", "expected"),
    [
        ({}, {}, "photos: a, b"),
        ({"data": "/mnt/flowers/"}, {}, "flowers: a, b"),
        ({"data": "/"}, {}, "/: a, b"),
        ({"data": ""}, {}, "run"),
        (
            {"classes": tuple(f"kind {i}" for i in range(12)), "train": (1,) * 12, "val": (1,) * 12},
            {},
            "photos: 12 classes",
        ),
        ({"classes": ("x" * 61,), "train": (1,), "val": (1,)}, {}, "photos: 1 class"),
        ({}, {"objective": {"kind_of": "MaskedImage"}}, "photos"),
        (None, {}, "run"),
    ],
)
def test_a_run_is_titled_with_its_data(tmp_path, changes, recipe, expected):
    about = None if changes is None else replace(ABOUT, **changes)
    run = Record.read(record(tmp_path / "run", about, **recipe))
    for found in (None, evaluation()):
        page = checked(document.page(run, found))
        assert page.all("h1")[0][2] == expected
        assert page.all("title")[0][2] == f"Report: {expected}"
        page.sees("the recipe mine")
    page = checked(document.page(None, evaluation()))
    assert page.all("h1")[0][2] == "runs/a/model"


DAMAGED = [None, b"", b"{", b"[1]", b"\xff\xfe", b'{"data": 3, "model": [], "objective": null}']


def test_differences_from_the_shipped_recipe(tmp_path):
    from deit.recipes import find

    shipped = find("digits").to_dict()
    same = checked(document.page(Record.read(record(tmp_path / "same", **shipped)), None))
    same.sees("The shipped recipe of this name, unchanged.")
    changed = {**shipped, "seed": 7, "schedule": {**shipped["schedule"], "total": {"amount": 3.0, "unit": "epochs"}}}
    page = checked(document.page(Record.read(record(tmp_path / "changed", **changed)), None))
    assert page.table("Changed from the shipped recipe of this name")[1:] == [
        ["schedule.total", "25 epochs", "3 epochs"],
        ["seed", "0", "7"],
    ]


SILENT = {("metrics.jsonl", b""), ("recipe.json", DAMAGED[-1])}
"""An empty list of rows is a run that has just begun, and any object may be a recipe of another version."""


@pytest.mark.parametrize("missing", ["recipe.json", "metrics.jsonl", "about.json"])
@pytest.mark.parametrize("content", DAMAGED)
def test_missing_and_damaged_files_are_said(tmp_path, missing, content):
    folder = record(tmp_path)
    (folder / missing).unlink() if content is None else (folder / missing).write_bytes(content)
    run = Record.read(folder)
    page = checked(document.page(run, None))
    assert len(run.gaps) == (0 if (missing, content) in SILENT else 1)
    for gap in run.gaps:
        page.sees(gap.split(" (")[0])


def test_numbers_that_are_none(tmp_path):
    rows = [
        {"step": 1, "loss": math.nan, "lr": math.inf, "accuracy": None, "val_accuracy": "high", "seconds": None},
        {"step": 2, "epoch": 0, "loss": math.nan, "val_accuracy": math.nan, "skipped": 2},
        {"step": "3"},
        {"no": "step"},
    ]
    run = Record.read(record(tmp_path, rows=rows))
    page = checked(document.page(run, None))
    page.sees(
        "2 of the 4 lines of metrics.jsonl can't be read and are left out",
        "Loss: the metrics hold no number that could be drawn",
        "The run has no evaluation yet",
        "2 steps were skipped",
    )
    assert run.best is None
    third = Record.read(record(tmp_path, rows=[{"step": 1, "loss": 0.5, "val_accuracy": 1 / 3}]))
    only = checked(document.page(third, None))
    assert only.table("Accuracy of each head")[1:] == [["fused", "0.333"]]  # 16.7 of 50 images: some were not read
    with pytest.raises(ValueError, match="nothing to draw"):
        curves("key", "title", [Line("a", [(1, math.nan)], 0)])


def test_few_images_and_one_class():
    for count in (1, 2, 5):
        checked(document.page(None, evaluation(count=count, names=["only"])))
    page = checked(document.page(None, evaluation(count=40, names=["only"])))
    page.sees("No image was taken for another class.")
    apart = evaluation(count=5, classes=50)
    checked(document.page(None, apart)).sees("without images or answers")


def test_two_models_are_compared():
    found = evaluation()
    other = evaluation(seed=0)
    other.main.report.ranks["fused"][:] = 0
    both = replace(found, other=replace(other.main, model="runs/b/model"))
    compared = both.comparison
    page = checked(document.page(None, both))
    assert page.table("Two models on the same images")[1][-1] == str(compared.only_first)
    page.sees(f"Difference {compared.difference:+.4f}", f"p = {compared.p_value:.3g}", "--compare runs/b/model")


def test_a_large_report_is_small_and_quick(tmp_path):
    """1000 classes and 50,000 images, with a long run beside it."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8))
    photo.save(tmp_path / "noise.jpg")
    found = evaluation(
        count=50_000,
        classes=1000,
        files=[tmp_path / "noise.jpg"] * 50_000,
        names=[f"class number {i}, of a kind" for i in range(1000)],
    )
    rows = [
        {
            "step": i,
            "epoch": i / 25,
            "lr": 1e-3,
            "loss": 1 / i,
            "accuracy": 0.5,
            **({"val_accuracy": 0.5} if i % 25 == 0 else {}),
        }
        for i in range(1, 7501)
    ]
    run = Record.read(record(tmp_path / "run", rows=rows))
    began = time.perf_counter()
    text = document.page(run, found)
    assert time.perf_counter() - began < 8
    assert len(text.encode()) < 2_000_000
    assert len(checked(text).all("img")) == 24


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    document.write(tmp_path / "page.html", None, evaluation())
    before = (tmp_path / "page.html").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with raises_saying(OSError, "disk full"):
        document.write(tmp_path / "page.html", None, evaluation(seed=1))
    assert (tmp_path / "page.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
