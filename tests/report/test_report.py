"""The report as a reader gets it: its numbers against the evaluation's, its markup, and what it survives."""

import base64
import io
import json
import math
import os
import re
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from support.checks import raises_saying
from support.models import build, small
from support.runs import photos

from deit.cli import main
from deit.config import ConvNetConfig
from deit.data.folders import fingerprint, read_data, read_split
from deit.evaluate.models import Evaluation, Examined, examine_files
from deit.evaluate.scores import Report
from deit.explain.explanation import Explanation, Map, TokenAnswer, seen_by
from deit.explain.maps import explain
from deit.explain.picture import overlay
from deit.image.processor import DeiTImageProcessor
from deit.model.convnet import ConvNet
from deit.model.load import load_model
from deit.recipe import AdamW, Compute, Cosine, Data, MaskedImage, Recipe, Supervised, steps
from deit.report import document
from deit.report import maps as report_maps
from deit.report.drawing import Line, curves
from deit.report.markup import Html, data_uri, element, joined, named
from deit.train.loop import train
from deit.train.records import About, Record

QUIET = Console(quiet=True)
HOSTILE = (
    '<script>alert("1")</script>',
    "' onerror='x",
    "\u202eright to left",
    "שלום",
    "🐕‍🦺",
    "a&amp;b",
    "x" * 10_000,
    "half \udc80 of a pair",
    "null \x00 and \x1b",
)
VOID = {"meta", "img"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(os.environ.get("AXE", "node_modules/axe-core/axe.min.js"))


class Page(HTMLParser):
    """The document's elements as (tag, attributes, text), every start with its end."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.elements, self.tables = [], [], {}
        self.text = text
        self.feed(text)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attributes):
        entry = [tag, dict(attributes), ""]
        assert len(entry[1]) == len(attributes), f"an attribute of {tag} stands twice"
        self.elements.append(entry)
        if tag not in VOID:
            self.stack.append(entry)

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> without a start"
        entry = self.stack.pop()
        assert entry[0] == tag, f"<{entry[0]}> is closed by </{tag}>"

    def handle_data(self, data):
        for entry in self.stack:
            entry[2] += data

    def all(self, tag, **attributes):
        return [
            entry
            for entry in self.elements
            if entry[0] == tag and all(entry[1].get(key) == value for key, value in attributes.items())
        ]

    def sees(self, *parts):
        shown = " ".join(self.all("body")[0][2].split())
        for part in parts:
            assert part in shown, part

    def table(self, caption):
        """Its rows as lists of text."""
        for body in re.findall(r"<table.*?</table>", self.text, re.DOTALL):
            if f">{caption}</caption>" in body:
                return [
                    [
                        " ".join(re.sub("<[^>]*>", " ", cell).split())
                        for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)
                    ]
                    for row in re.findall(r"<tr>.*?</tr>", body, re.DOTALL)
                ]
        raise AssertionError(f"no table {caption}")


def checked(text):
    """Asserts what holds for every report; its parsed page."""
    text.encode()
    page = Page(text)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert not page.all("script")
    assert not page.all("link")
    for tag, attributes, _ in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/"), attributes
        # A source may be followed by who reads; nothing is fetched by that.
        assert attributes.get("href", "#").startswith(("#", "https://arxiv.org/abs/")), attributes
    assert not re.search(r"url\(|@import", page.all("style")[0][2])
    assert [entry[1]["http-equiv"] for entry in page.all("meta") if "http-equiv" in entry[1]] == [
        "Content-Security-Policy"
    ]
    for drawn in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        tree = ElementTree.fromstring(drawn)
        if tree.get("aria-hidden") != "true":
            named_by = tree.get("aria-labelledby").split()
            assert all(tree.find(f".//*[@id='{name}']").text for name in named_by)
            assert tree.get("role") == "img"
    identities = [entry[1]["id"] for entry in page.elements if "id" in entry[1]]
    assert len(set(identities)) == len(identities)
    for image in page.all("img"):
        assert image[1]["alt"]
        kind, _, data = image[1]["src"].partition(",")
        assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    levels = [int(entry[0][1]) for entry in page.elements if re.fullmatch("h[1-6]", entry[0])]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(page.all("main")) == len(page.all("header")) == len(page.all("footer")) == 1
    return page


def evaluation(count=60, classes=5, seed=0, files=(), names=None, heads=("fused", "class"), **changes):
    """Made up; harder images are less sure."""
    draw = np.random.default_rng(seed)
    names = tuple(names or (f"class {i}" for i in range(classes)))
    classes = len(names)
    labels = draw.integers(0, classes, count)
    wrong = draw.random(count) < 0.3
    predicted = np.where(wrong, (labels + draw.integers(1, max(classes, 2), count)) % classes, labels)
    confidence = 1 / classes + (1 - 1 / classes) * draw.random(count)
    right = labels == predicted
    probability = np.where(right, confidence, (1 - confidence) * draw.random(count))
    ranks = {head: np.where(right, 0, 1 + draw.integers(0, classes, count)) for head in heads}
    found = Report(
        classes=names,
        head="fused",
        labels=labels,
        ranks=ranks,
        predicted=predicted,
        confidence=confidence,
        probability=probability,
        squares=np.clip(confidence**2, 1 / classes, 1),
        **changes,
    )
    return Evaluation(
        "photos", "test", "f" * 64, Examined("runs/a/model", (224, 224), 0.875, found), files=tuple(files)
    )


ABOUT = About(
    began="2026-01-02T03:04:05+00:00",
    data="photos",
    fingerprint="e" * 64,
    classes=("a", "b"),
    train=(70, 80),
    val=(20, 30),
    device="a CPU, 2 cores",
    processes=1,
    precision="bfloat16",
    versions={"deit": "9.9"},
)


def record(folder, about=ABOUT, rows=None, **recipe):
    """A run's folder as training leaves it, without its model."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Recipe(
        name="mine",
        model=small(num_labels=None, distillation_token=False),
        data=Data(batch=4),
        objective=Supervised(),
        optim=AdamW(lr=1e-3, per_images=8),
        schedule=Cosine(total=steps(200)),
    )
    (folder / "recipe.json").write_text(json.dumps({**made.to_dict(), **recipe}))
    if about:
        (folder / "about.json").write_text(json.dumps(about.to_dict()))
    rows = (
        [
            {
                "step": 50 * i,
                "epoch": i / 2,
                "images": 200 * i,
                "lr": 1e-3 / i,
                "loss": 2 / i,
                "accuracy": 0.2 * i,
                "val_accuracy": (40 if i == 3 else 10 * i) / 50,
                "gradient_norm": 1.0,
                "skipped": 0,
                "bad_images": 0,
                "seconds": 10.5 * i,
                "images_per_second": 123.4,
                "memory": 2**30,
            }
            for i in range(1, 5)
        ]
        if rows is None
        else rows
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


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
        f"{numbers.calibration_error:.4f}",
        f"{numbers.brier:.4f}",
        f"{numbers.nll:.4f}",
        "f" * 64,
        "Judged by 60 test images in photos of 8 classes, at 224 by 224 pixels and crop ratio 0.875",
        "deit eval runs/a/model --data photos --split test",
    )


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
        Image.new(("RGB", "L", "RGBA", "I;16")[i % 4], sizes[i % 4], 7).save(files[-1])
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
    assert "<script" not in text
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
        "200 steps, 2 epochs, on 150 images of 2 classes",
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


DAMAGED = [None, b"", b"{", b"[1]", b"\xff\xfe", b'{"data": 3, "model": [], "objective": null}']


def test_differences_from_the_shipped_recipe(tmp_path):
    from deit.recipes import find

    shipped = find("digits").to_dict()
    same = checked(document.page(Record.read(record(tmp_path / "same", **shipped)), None))
    same.sees("The shipped recipe of this name, unchanged.")
    changed = {**shipped, "seed": 7, "schedule": {**shipped["schedule"], "total": {"amount": 3.0, "unit": "epochs"}}}
    page = checked(document.page(Record.read(record(tmp_path / "changed", **changed)), None))
    assert page.table("Changed from the shipped recipe of this name")[1:] == [
        ["schedule.total", "50 epochs", "3 epochs"],
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


# ------------------------------------------------------------------------------------------------- what answers rest on


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A distilled model, and its evaluation on images of which one is unreadable and one is gone by now."""
    root = tmp_path_factory.mktemp("maps")
    draw = np.random.default_rng(0)
    for i in range(40):
        file = root / "data" / "abcde"[i % 5] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        areas = draw.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(areas).resize((30, 24), Image.Resampling.NEAREST).save(file)
    (root / "data" / "a" / "00.png").write_bytes(b"no image")
    build(
        "with_teacher", small(id2label=dict(enumerate("abcde")), num_labels=None, image_size=(16, 24))
    ).save_pretrained(root / "model")
    DeiTImageProcessor.paper((16, 24)).save_pretrained(root / "model")
    return examine_files(root / "model", root / "data", device="cpu", console=QUIET)


def rows_shown(numbers):
    """Four wrong answers, two doubtful ones, two right ones, each from its end."""
    order = np.argsort(numbers.confidence, kind="stable")
    order = [i for i in order if numbers.read[i]]
    wrong = [i for i in order[::-1] if numbers.labels[i] != numbers.predicted[i]]
    doubtful = [i for i in order if i not in wrong[:12]]
    right = [i for i in order[::-1] if numbers.labels[i] == numbers.predicted[i] and i not in doubtful[:2]]
    return wrong[:4], doubtful[:2], right[:2]


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_maps_are_those_of_explain(judged, ratio):
    if ratio:
        judged = examine_files(judged.main.model, judged.data, crop_ratio=ratio, device="cpu", console=QUIET)
    numbers, model = judged.main.report, load_model(judged.main.model)
    processor = DeiTImageProcessor.from_pretrained(judged.main.model)
    processor = processor.with_crop_ratio(ratio) if ratio else processor
    maps = report_maps.explained(judged)
    groups = rows_shown(numbers)
    assert [len(rows) for rows in groups] == [4, 2, 2]
    assert list(maps.found) == [row for rows in groups for row in rows]
    page = checked(document.page(None, judged, maps=maps))
    expected = []
    for row in maps.found:
        pixels = processor([judged.files[row]], return_tensors="pt").pixel_values
        [seen] = seen_by(model.config, pixels, processor)
        large = seen.resize((144, 96), Image.Resampling.NEAREST)
        expected.append(
            (
                data_uri(large),
                f"True label \u2068{'abcde'[numbers.labels[row]]}\u2069; predicted \u2068"
                f"{'abcde'[numbers.predicted[row]]}\u2069 with probability {numbers.confidence[row]:.2f}",
            )
        )
        out = model(pixels)
        for token, logits in (("class", out.cls_logits), ("distillation", out.distillation_logits)):
            values = explain(model, pixels, "relevance")[token][0].numpy()
            said = "abcde"[int(logits.argmax())]
            expected.append(
                (
                    data_uri(overlay(large, values)),
                    f"Map of the {token} token, which answers \u2068{said}"
                    f"\u2069: strongest {Map(token, 'relevance', values).strongest}",
                )
            )
            page.sees(f"{token} token{said} ({logits.softmax(-1).max():.2f})")
    images = [(image[1]["src"], image[1]["alt"]) for image in page.all("img")]
    gallery = 24 if len(numbers.labels) > 24 else len(numbers.labels)
    assert images[-len(expected) :] == expected
    assert len(images) <= gallery + len(expected)
    [link] = [entry for entry in page.all("a") if entry[1]["href"] == "#maps"]
    assert link[2] == "What answers rest on"
    page.sees("Most wrong", "Most doubtful", "Surest right answers", "the answer of each token\u2019s own head")
    assert len(document.page(None, judged, maps=maps)) - len(document.page(None, judged)) < 300_000


def test_images_without_a_map_are_left_out(judged, tmp_path):
    maps = report_maps.explained(judged)
    first, *others = maps.found
    files = list(judged.files)
    files[first] = tmp_path / "gone.png"
    assert list(report_maps.explained(replace(judged, files=tuple(files))).found) == others
    assert report_maps.explained(replace(judged, files=())) is None
    assert "What answers rest on" not in document.page(None, judged, maps=report_maps.Maps())


def test_models_that_can_not_be_explained_have_no_maps(judged, tmp_path):
    ConvNet(ConvNetConfig(widths=(4,), depth=1, id2label=dict(enumerate("abcde")))).save_pretrained(tmp_path / "c")
    DeiTImageProcessor.paper(16).save_pretrained(tmp_path / "c")
    found = examine_files(tmp_path / "c", judged.data, device="cpu", console=QUIET)
    assert report_maps.explained(found) is None
    file = document.of_evaluation(tmp_path / "page.html", found, device="cpu")
    assert "What answers rest on" not in file.read_text()


def test_maps_that_fail_lose_no_report(judged, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "deit.report.maps.explain_pixels", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of <memory>"))
    )
    page = checked(document.of_evaluation(tmp_path / "page.html", judged, device="cpu").read_text())
    page.sees("What the answers rest on could not be shown: out of <memory>.", "Accuracy of each head")


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


# ---------------------------------------------------------------------------------------------------------- the command


SHORT = """
from deit.config import DeiTConfig
from deit.recipe import *

def short():
    return Recipe(
        name="short", data=Data(batch=8), objective=Supervised(), optim=AdamW(lr=1e-3, per_images=8),
        model=DeiTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=48,
                         image_size=16, patch_size=4, encoder_stride=4, distillation_token=False),
        schedule=Cosine(total=steps(15)), compute=Compute(precision="float32", workers=0), evaluate=steps(5))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data without a folder val, a recipe, and the run of the command."""
    root = tmp_path_factory.mktemp("report")
    photos(photos(root / "data", count=12), split="test", count=6)
    (root / "recipes.py").write_text(SHORT)
    assert (
        main(
            [
                "train",
                f"{root / 'recipes.py'}:short",
                "--data",
                str(root / "data"),
                "--out",
                str(root / "run"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    return root


def test_training_ends_with_a_report(trained, capsys):
    run = trained / "run"
    page = checked((run / document.FILE).read_text())
    training, validation = read_data(trained / "data", holdout=0.1, seed=0)
    about = json.loads((run / "about.json").read_text())
    assert (about["train"], about["val"], about["fingerprint"]) == ([11] * 3, [1] * 3, fingerprint(training))
    assert about["precision"] == "float32"
    page.sees(f"Judged by 3 validation images in {trained / 'data'}", "15 steps", fingerprint(validation))
    assert len(page.all("img")) == 3 + 2 * 3  # and of each of the three what its one token looked at
    page.sees("What answers rest on", "as far as it supports the answer of the model")
    before = (run / document.FILE).read_text()
    (run / document.FILE).unlink()
    assert main(["report", str(run), "--device", "cpu"]) == 0  # finds the held-out images again
    assert capsys.readouterr().out.splitlines()[-1] == str(run / document.FILE)
    undated = [re.sub(r"Written [^.]* by", "", text) for text in (before, (run / document.FILE).read_text())]
    assert undated[0] == undated[1]


def test_a_report_on_other_images(trained):
    assert main(["report", str(trained / "run"), "--data", str(trained / "data"), "--device", "cpu"]) == 0
    page = checked((trained / "run" / document.FILE).read_text())
    page.sees("Judged by 18 test images", f"deit report {trained / 'run'} --data {trained / 'data'}")
    numbers = examine_files(trained / "run" / "model", trained / "data", device="cpu").main.report
    assert page.table("Accuracy of each head")[1][1] == f"{numbers.accuracy().value:.3f}"


def test_eval_writes_one_with_the_record_of_the_run(trained, capsys, tmp_path):
    plain = ["eval", str(trained / "run" / "model"), "--data", str(trained / "data"), "--device", "cpu", "--json"]
    assert main([*plain, "--report", str(tmp_path / "new" / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    page = checked((tmp_path / "new" / "page.html").read_text())
    page.sees("15 steps", f"{found['nll']:.4f}", "Learning rate", "Judged by 18 test images")
    build(
        "classification", small(id2label=dict(enumerate("abc")), num_labels=None, distillation_token=False)
    ).save_pretrained(tmp_path / "model")
    DeiTImageProcessor.paper(16).save_pretrained(tmp_path / "model")
    assert main(["eval", str(tmp_path / "model"), *plain[2:], "--report", str(tmp_path / "alone.html")]) == 0
    alone = checked((tmp_path / "alone.html").read_text())
    assert "Training" not in [heading[2] for heading in alone.all("h2")]


def test_a_report_that_fails_is_a_warning(trained, capsys, monkeypatch):
    monkeypatch.setattr("deit.report.document.write", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left")))
    out = trained / "again"
    assert (
        main(
            [
                "train",
                f"{trained / 'recipes.py'}:short",
                "--data",
                str(trained / "data"),
                "--out",
                str(out),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    shown = capsys.readouterr()
    assert f"{out / 'model'}: accuracy" in shown.out
    assert f"its report is not written (no space left); `deit report {out}`" in shown.err


def test_images_that_are_gone_or_cost_too_much(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "run", tmp_path / "run")
    about = json.loads((tmp_path / "run" / "about.json").read_text())
    (tmp_path / "run" / "about.json").write_text(json.dumps({**about, "data": str(tmp_path / "gone")}))
    assert main(["report", str(tmp_path / "run"), "--device", "cpu"]) == 0
    checked((tmp_path / "run" / document.FILE).read_text()).sees("images were not evaluated", "is not a folder")
    (tmp_path / "run" / "about.json").write_text(json.dumps({**about, "val": [2, 1, 1]}))
    assert main(["report", str(tmp_path / "run"), "--device", "cpu"]) == 0
    checked((tmp_path / "run" / document.FILE).read_text()).sees("are not those of the run any more")
    shutil.copytree(trained / "data" / "train", tmp_path / "bad" / "val")
    for file in (tmp_path / "bad").rglob("*.png"):
        file.write_bytes(b"no image")
    split = replace(read_split(tmp_path / "bad", "val"), files=(file,), labels=(0,))
    checked(document.of_training(tmp_path / "run", split).read_text()).sees("1 found, none can be read")
    monkeypatch.setattr("deit.report.document.examine_split", lambda *_, **__: pytest.fail("evaluated"))
    split = read_split(trained / "data", "train")
    checked(document.of_training(tmp_path / "run", split).read_text()).sees("was not evaluated again")


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no run (neither recipe.json nor metrics.jsonl)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_masked_images_show_their_reconstruction(tmp_path):
    photos(tmp_path / "data", count=4)
    recipe = Recipe(
        name="masked",
        model=small(num_labels=None, distillation_token=False),
        data=Data(batch=4),
        objective=MaskedImage(unit=8),
        optim=AdamW(lr=1e-3, per_images=8),
        schedule=Cosine(total=steps(2)),
        compute=Compute(precision="float32", workers=0),
    )
    splits = read_data(tmp_path / "data", holdout=0.3, seed=0, labelled=False)
    train(recipe, *splits, tmp_path / "run", device="cpu", console=QUIET)
    page = checked(document.of_training(tmp_path / "run", splits[1], device="cpu").read_text())
    page.sees("has no classes to judge", "loss on validation images")
    [image] = page.all("img")
    assert "update-000000002.png" in image[1]["alt"]


def test_resuming_keeps_the_date(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    about = json.loads((tmp_path / "run" / "about.json").read_text())
    (tmp_path / "run" / "about.json").write_text(json.dumps({**about, "began": "2020-01-01T00:00:00+00:00"}))
    assert (
        main(
            [
                "train",
                f"{trained / 'recipes.py'}:short",
                "--data",
                str(trained / "data"),
                "--out",
                str(tmp_path / "run"),
                "--device",
                "cpu",
                "--resume",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "run" / "about.json").read_text())["began"] == "2020-01-01T00:00:00+00:00"
    assert torch.__version__ in (tmp_path / "run" / document.FILE).read_text()


# ------------------------------------------------------------------------------------------------------------ the style


def luminance(colour):
    parts = [value / 255 for value in colour]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1, 2], ids=["light", "dark", "print"])
def test_contrast_of_text_and_of_lines(scheme):
    """WCAG 2.2 AA: 4.5 for text and 3 for lines. An automatic check of the page can't see through SVG."""
    style = resources.files("deit.report").joinpath("report.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 3
    colours = {}
    for name, value in re.findall(r"--([\w]+): ([^;]+);", blocks[scheme]):
        digits = value[1:] if len(value) == 7 else "".join(2 * digit for digit in value[1:])
        colours[name] = tuple(map(int, value.split())) if value[0] != "#" else tuple(bytes.fromhex(digits))
    paper = colours["paper"]
    for text in ("ink", "soft", "link"):
        for ground in ("paper", "tint"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for line in ("s0", "s1", "s2", "s3", "s4", "s5"):
        assert contrast(colours[line], paper) >= 3, line
    deepest = max(float(alpha) for alpha in re.findall(r"var\(--hue\) / ([.\d]+)", style))
    for hue in ("right", "wrong"):
        ground = [deepest * top + (1 - deepest) * below for top, below in zip(colours[hue], paper, strict=True)]
        assert contrast(colours["ink"], ground) >= 4.5, hue


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_in_a_browser(scheme, width, tmp_path, trained, judged):
    """No violation that axe-core knows, no request, no complaint on the console, nothing wider than the page."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not BROWSER:
        pytest.skip("no Chromium is installed")
    if not AXE.is_file():
        pytest.skip(f"axe-core is not at {AXE}: npm install axe-core, or set AXE to its axe.min.js")
    Image.effect_noise((300, 200), 50).save(tmp_path / "noise.png")
    run = Record.read(record(tmp_path / "run", ABOUT))
    hostile = evaluation(names=HOSTILE, files=[tmp_path / "noise.png"] * 60)
    many = evaluation(count=3000, classes=100, heads=("fused", "class", "distillation", "softmax"))
    maps = document.write(tmp_path / "maps.html", None, judged, maps=report_maps.explained(judged))
    pages = [
        trained / "run" / document.FILE,
        maps,
        document.write(tmp_path / "hostile.html", run, hostile),
        document.write(tmp_path / "many.html", None, many),
        document.write(tmp_path / "run.html", run, None),
    ]
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        for file in pages:
            said, asked = [], []
            context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
            page = context.new_page()
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(file.as_uri())
            assert said == []  # a breach of the policy is said there
            assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(255, 255, 255)") == (scheme == "light")
            for pressed in range(1, 4):
                page.keyboard.press("Tab")
                assert page.evaluate("document.activeElement.tagName") == "A", pressed
            context.close()
            context = browser.new_context(
                color_scheme=scheme, viewport={"width": width, "height": 900}, bypass_csp=True
            )
            page = context.new_page()
            page.goto(file.as_uri())
            page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            page.evaluate(AXE.read_text())
            found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
            assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
            context.close()
        browser.close()
