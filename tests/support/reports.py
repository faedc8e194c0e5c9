"""Reports read as a browser reads them, and made-up runs and evaluations to write them from."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from rich.console import Console
from support.runs import small_recipe

from deit.evaluate.models import Evaluation, Examined
from deit.evaluate.scores import Report
from deit.recipe import Compute, Cosine, Data, steps
from deit.train.records import About

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


class ChinesePage(Page):
    """The page as its script shows it in a Chinese browser. `english` holds the texts and attributes that are still
    English by their looks: three Latin words in a row that are no name, no code and not marked as English."""

    KEPT = ("bdi", "code", "pre", "script", "style")

    def __init__(self, text):
        self.english, self.replaced = [], None
        super().__init__(text)

    def handle_starttag(self, tag, attributes):
        assert self.replaced is None, f"<{tag}> is in an element whose text is replaced"
        given = dict(attributes)
        assert all(name[8:] in given for name in given if name.startswith("data-zh-")), given
        shown = {name: given.get(f"data-zh-{name}", value) for name, value in given.items()}
        super().handle_starttag(tag, shown.items())
        for name in ("alt", "aria-label"):
            self._noted(shown.get(name, ""))
        if "data-zh" in given:
            super().handle_data(given["data-zh"])
            self._noted(given["data-zh"])
            self.replaced = len(self.stack)

    def handle_data(self, data):
        if self.replaced is None:
            super().handle_data(data)
            self._noted(data)

    def handle_endtag(self, tag):
        if self.replaced == len(self.stack):
            self.replaced = None
        super().handle_endtag(tag)

    def _noted(self, text):
        if not any(tag in self.KEPT or attributes.get("lang") == "en" for tag, attributes, _ in self.stack[1:]):
            words = re.sub("\u2068[^\u2069]*\u2069", "", text)
            self.english += re.findall(r"[A-Za-z][a-z']+(?:[ ,]+[A-Za-z][a-z']+){2,}", words)


def checked(text, unfinished=False):
    """Asserts what holds for every report; its parsed page. That of an unfinished run loads itself again."""
    text.encode()
    page = Page(text)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][1]["content"]
    for kind, file in (("style", "report.css"), ("script", "report.js")):
        [entry] = page.all(kind)
        assert entry[2] == resources.files("deit.report").joinpath(file).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(entry[2].encode()).digest()).decode()
        assert re.findall(f"{kind}-src ([^;]*)", policy) == [f"'sha256-{digest}'"]
    assert not ChinesePage(text).english
    assert not page.all("link")
    for tag, attributes, _ in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/"), attributes
        # A source may be followed by who reads; nothing is fetched by that.
        assert attributes.get("href", "#").startswith(("#", "https://arxiv.org/abs/")), attributes
    assert not re.search(r"url\(|@import", page.all("style")[0][2])
    assert [entry[1]["http-equiv"] for entry in page.all("meta") if "http-equiv" in entry[1]] == [
        "Content-Security-Policy",
        *(["refresh"] if unfinished else []),
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
    made = small_recipe(name="mine", data=Data(batch=4), schedule=Cosine(total=steps(200)), compute=Compute())
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
