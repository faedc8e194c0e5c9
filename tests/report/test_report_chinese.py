"""The report in Chinese: that nothing is missing, that it says the same numbers, and that a browser shows it."""

import ast
import json
import re
import shutil
import string
import subprocess
from collections import Counter
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
from PIL import Image
from support.browser import BROWSER
from support.pages import ROOT
from support.reports import ABOUT, HOSTILE, ChinesePage, Page, checked, evaluation, record
from support.runs import small_recipe

from deit.evaluate.calibration import Calibration, HeadCalibration
from deit.explain.explanation import Explanation, Map, TokenAnswer
from deit.recipe import Cosine, steps
from deit.report import LivePage, document
from deit.report import maps as report_maps
from deit.report.markup import Html, date, element, joined, named, phrase
from deit.train.records import Record
from deit.words import Said, listed, plural, quoted, said, series
from deit.words.chinese import CHINESE

TEMPLATES = {"said": slice(0, 1), "phrase": slice(0, 1), "series": slice(0, 1), "plural": slice(1, 3)}
"""The functions that take templates, and which of their arguments are some."""


def templates():
    """Every template in the source, from each call."""
    for file in sorted((ROOT / "src" / "deit").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in TEMPLATES:
                for argument in node.args[TEMPLATES[node.func.id]]:
                    if isinstance(argument, ast.Constant):
                        yield argument.value
                    else:
                        assert file.parent.name == "words", f"no literal in {file}, line {argument.lineno}"


def fields(template):
    return sorted({(name, form) for _, name, form, _ in string.Formatter().parse(template) if name is not None})


def test_every_template_has_its_chinese_with_the_same_fields():
    assert set(templates()) == set(CHINESE)
    assert [one for one, other in CHINESE.items() if fields(one) != fields(other)] == []
    words = {one for one in CHINESE if re.search("[A-Za-z]", re.sub("{[^}]*}", "", one))}
    assert {one for one in words if not re.search("[\u4e00-\u9fff]", CHINESE[one])} == {
        "fit",
        "{step:,.0f} of {total:,}",
    }


def test_texts_in_both_languages(monkeypatch):
    monkeypatch.setitem(CHINESE, "{n} of {what}", "{what}的 {n}")
    monkeypatch.setitem(CHINESE, "{n:,} thing", "{n:,} 个<东西>")
    monkeypatch.setitem(CHINESE, "in {where}: {n}", " {where} 里{n}")
    thing = said("{n:,} thing", n=1234)
    assert thing == Said("1,234 thing", "1,234 个<东西>")
    assert said("{n} of {what}", n="{x}", what=thing) == Said("{x} of 1,234 thing", "1,234 个<东西>的 {x}")
    assert series(", ", ["a", thing]) == Said("a, 1,234 thing", "a、1,234 个<东西>")
    assert str(listed(["a"])) == "a"
    assert listed(map(quoted, "abcd")) == Said('"a", "b", "c" and 1 more', "“a”、“b”、“c”等，另有 1 个")
    assert [plural(count, "{count:,} class", "{count:,} classes").english for count in (0, 1, 2000)] == [
        "0 classes",
        "1 class",
        "2,000 classes",
    ]
    escaped = "1,234 个&lt;东西&gt;"
    assert element("p", thing, id="a") == f'<p id="a" data-zh="{escaped}">1,234 thing</p>'
    assert element("img", alt=thing) == f'<img alt="1,234 thing" data-zh-alt="{escaped}">'
    assert element("p", thing, "b") == f'<p><span data-zh="{escaped}">1,234 thing</span>b</p>'
    assert element("p", Said("F1", "F1")) == "<p>F1</p>"
    assert named(thing) == f'<bdi data-zh="{escaped}">1,234 thing</bdi>'
    assert joined(["a", "b"], said(": ")) == 'a<span data-zh="\uff1a">: </span>b'
    assert phrase("in {where}: {n}", where=named("<x>"), n=3) == (
        '<span data-zh=" ">in </span><bdi>&lt;x&gt;</bdi><span data-zh=" 里3">: 3</span>'
    )
    with pytest.raises(AssertionError, match="another order"):
        phrase("{n} of {what}", n=Html("<b>1</b>"), what=Html("<i>2</i>"))
    assert date("2026-01-02T03:04:05+00:00") == Said("2 January 2026, 03:04 UTC", "2026 年 1 月 2 日 03:04 UTC")


def numbers(text):
    """The numbers of a text and how often each is there, without those of dates."""
    text = re.sub(r"\d+ \w+ \d{4}, |\d{4} 年 \d+ 月 \d+ 日 ", "", text)
    return Counter(re.findall(r"[-+]?\d+(?:[.,:]\d+)*(?:e[-+]\d+)?", text))


def mapped(rows):
    answer = TokenAnswer("class", "class 1", 0.5, "class 1", 0.5), TokenAnswer("distillation", "class 2", 0.5, "b", 0.5)
    maps = Map("class", "relevance", np.eye(2)), Map("distillation", "relevance", np.ones((2, 2)))
    return report_maps.Maps({row: Explanation("", "", Image.new("RGB", (8, 8)), answer, maps) for row in range(rows)})


ROW = {"step": 9, "epoch": 0.5, "seconds": 10.0, "waiting": 0.62, "skipped": 2, "bad_images": 3, "loss": 1.0}


def written(kind, folder):
    """A page of each kind; each has what the others lack."""
    images = [folder / f"{i}.png" for i in range(60)]
    for file in images[:50]:
        Image.new("RGB", (8, 8)).save(file)
    found = evaluation(files=images)
    if kind == "a run":
        return document.page(Record.read(record(folder / "run")), None, missing=said("The run has no evaluation yet."))
    if kind == "a damaged run":
        rows = [{**ROW, "loss": None, "accuracy": "high", "lr": 1e-3}, *({"step": i, "lr": 1e-3} for i in range(200))]
        run = record(folder / "run", None, rows, name="digits")
        (run / "recipe.json").write_text("{")
        return document.page(Record.read(run), found)
    if kind == "a run without metrics":
        return document.page(Record.read(record(folder / "run", replace(ABOUT, data=""), [])), None)
    if kind == "masked images":
        run = record(folder / "run", rows=[{**ROW, "val_loss": 0.5}], objective={"kind_of": "MaskedImage"})
        (run / "reconstructions").mkdir()
        shutil.copy(images[0], run / "reconstructions" / "update-000000009.png")
        run = Record.read(run)
        return document.page(run, None, figures=[*document._reconstruction(run), ("a name", Image.new("L", (9, 9)))])
    if kind == "an evaluation":
        names = [f"class {i}" for i in range(12)]
        found = evaluation(names=names, files=images, unreadable=(("a.png", "no image at all"),))
        found.main.report.labels[:] %= 5
        return document.page(Record.read(record(folder / "run", name="digits")), found, maps=mapped(60))
    if kind == "a comparison":
        both = evaluation(heads=("fused", "class", "distillation", "softmax"))
        return document.page(None, replace(both, other=found.main, data=""))
    if kind == "many classes":
        about = replace(ABOUT, classes=tuple(f"class {i}" for i in range(100)), train=(9,) * 100, val=(1,) * 100)
        run = Record.read(record(folder / "run", about, [{**ROW, "val_accuracy": 0.123}]))
        return document.page(run, evaluation(count=500, classes=100))
    if kind == "warnings":
        about = replace(
            ABOUT, classes=(*"abcdef",), train=(900, 70, 3, 4, 0, 1), val=(20, 30, 0, 5, 0, 0), teacher=(50, 55)
        )
        run = Record.read(record(folder / "run", about, [{**ROW, "val_accuracy": 0.5}]))
        found = replace(evaluation(names=["only", *"bc"]), split="val")
        found.main.report.ranks["fused"][:] = 1
        heads = {
            head: HeadCalibration(temperature=temperature, threshold=0.5, nll=(2.0, 1.0), answered=0.9)
            for head, temperature in (("fused", 0.05), ("class", 20.0))
        }
        beware = Calibration(error_rate=0.05, images=100, data="", heads=heads).alarms()
        return document.page(run, found, beware=beware)
    if kind == "failures":
        failed = report_maps.Maps(missing=phrase("What the answers rest on could not be shown: {error}.", error="an"))
        return document.page(None, evaluation(count=5, names=["only"]), maps=failed)
    live = LivePage(what=said("fit") if kind == "a stopped fit" else None)
    rows = [{**ROW, "val_accuracy": 0.5, "val_accuracy_class": 0.4, "val_accuracy_distillation": 0.3}]
    live.begin(record(folder / "run", ABOUT, rows), small_recipe(schedule=Cosine(total=steps(1000))), 0)
    if kind == "a stopped fit":
        live.close(False)
    return (folder / "run" / document.FILE).read_text()


WHOLE = ("p", "h1", "li", "th", "td", "small", "caption")
"""Elements whose texts are said as a whole, although some are put together of several."""
KINDS = (
    "a run",
    "a damaged run",
    "a run without metrics",
    "masked images",
    "an evaluation",
    "a comparison",
    "many classes",
    "warnings",
    "failures",
    "a run that trains",
    "a stopped fit",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_says_the_same_in_chinese(kind, tmp_path):
    text = written(kind, tmp_path)
    page, chinese = checked(text, unfinished=kind in ("a run that trains", "a stopped fit")), ChinesePage(text)
    differ = 0
    for ours, theirs in zip(page.elements, chinese.elements, strict=True):
        assert ours[0] == theirs[0]
        pairs = [(ours[1].get(name, ""), theirs[1].get(name, "")) for name in ("alt", "aria-label")]
        if ours[0] in WHOLE or (ours[0] != "span" and "data-zh" in ours[1]):
            pairs.append((ours[2], theirs[2]))
        for one, other in pairs:
            assert numbers(one) == numbers(other), (one, other)
            differ += one != other
    assert differ > 20
    title = {"a run that trains": "尚未完成的训练", "a stopped fit": "尚未完成的训练"}.get(kind, "报告")
    assert chinese.all("title")[0][2].startswith(title)
    assert all(re.search("[\u4e00-\u9fff]", heading[2]) for heading in chinese.all("h2"))


def test_names_stay_as_they_are(tmp_path):
    page = ChinesePage(document.page(None, evaluation(names=HOSTILE)))
    shown = page.all("body")[0][2]
    assert HOSTILE[0] in shown
    assert "a&amp;b" in shown
    assert not page.all("b")


SCRIPT = """
const [source, languages] = JSON.parse(process.argv[1]);
const shown = languages.map((language) => {
  const given = { "data-zh": "<b>", class: "soft", "data-zh-alt": "other", "data-zh-aria-label": "label" };
  const attributes = Object.entries(given).map(([name, value]) => ({ name, value }));
  const element = { textContent: "English", attributes };
  element.setAttribute = (name, value) => { element[name] = value; };
  const document = { documentElement: { lang: "en" }, querySelectorAll: () => [element] };
  new Function("navigator", "document", source)({ language }, document);
  return [document.documentElement.lang, element.textContent, element.alt, element["aria-label"]];
});
console.log(JSON.stringify(shown));
"""


def test_the_script_follows_the_language_of_the_browser():
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    source = resources.files("deit.report").joinpath("report.js").read_text(encoding="utf-8")
    given = json.dumps([source, ["en-US", "zh-CN", "zh", "de", "zh-Hant-TW"]])
    done = subprocess.run(["node", "-e", SCRIPT, given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    english, chinese = ["en", "English", None, None], ["zh-CN", "<b>", "other", "label"]
    assert json.loads(done.stdout) == [english, chinese, chinese, english, chinese]


@pytest.mark.parametrize("language", ["zh-CN", "en-US"])
def test_a_browser_shows_the_language(language, tmp_path):
    """The policy of the page allows the script, and nothing that a name holds is executed."""
    if not BROWSER:
        pytest.skip("no Chromium is installed")
    run = Record.read(record(tmp_path / "run"))
    found = evaluation(names=HOSTILE, files=[tmp_path / f"{i} <b>.png" for i in range(60)])
    file = document.write(tmp_path / "page.html", run, found, maps=mapped(60))
    options = ["--headless", "--no-sandbox", f"--accept-lang={language}", f"--user-data-dir={tmp_path / 'browser'}"]
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    shown = Page(done.stdout.strip())
    expected = (ChinesePage if language == "zh-CN" else Page)(file.read_text())
    assert shown.all("html")[0][1]["lang"] == ("zh-CN" if language == "zh-CN" else "en")
    for tag in ("title", "main", "header", "footer", "desc"):
        assert [entry[2] for entry in shown.all(tag)] == [entry[2] for entry in expected.all(tag)]
    for name in ("alt", "aria-label"):
        assert [entry[1].get(name) for entry in shown.elements] == [entry[1].get(name) for entry in expected.elements]
