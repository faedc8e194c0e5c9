"""File names and labels of a stranger forge no row, speak to no terminal and run in no spreadsheet."""

import csv
import io
import json
import re

import pytest
from PIL import Image
from support import hostile
from support.models import trained_folder

from deit.cli import main
from deit.files import write_json
from deit.predict.bulk import csv_lines
from deit.report.markup import clean, element
from deit.terminal import cell, shown

ROW = "a\nphotos/b.png: cat 1.000"
TITLE = "\x1b]0;owned\x07"
LINK = "\x1b]8;;http://example.com\x1b\\click\x1b]8;;\x1b\\"
TURNED = "gpj.\u202eexe"
OTHERS = "tab\tcr\rbell\x07c1\x9b31mline\u2028end"
FORMULA = "=cmd|' /C calc'!A0"
IMAGE = "<img src=x onerror=alert(1)>"
LABELS = (ROW, TITLE, LINK, TURNED, OTHERS, FORMULA, "<script>alert(1)</script>", IMAGE, "[red]x[/red]")
SPEAKING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]")
"""What a terminal must not see; a line ends as it should."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model of hostile labels, and pictures with hostile names."""
    monkeypatch.chdir(tmp_path)
    trained_folder("model", labels=LABELS)
    for i, label in enumerate(LABELS):
        picture = Image.new("RGB", (16, 16), (20 * i, 99, 50))
        folders = [tmp_path / "photos", *([tmp_path / "data" / "val" / label] if "/" not in label else [])]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{label.replace('/', '|')}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202egpj", "\\u202egpj"),
        ("\u2028", "\\u2028"),
        ("Blüte 花 🌼 \udcff", "Blüte 花 🌼 \udcff"),
    ],
)
def test_what_would_speak_is_shown_as_python_writes_it(text, expected):
    assert shown(text) == expected


def test_text_of_predict_has_one_line_for_each_image(place, capsys):
    assert main(["predict", "model", "photos", "--top-k", "9"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(LABELS)
    assert not SPEAKING.search(out + err)
    assert f"{shown(ROW)} 0." in out


def test_json_of_predict_is_exact_and_silent(place, capsys):
    assert main(["predict", "model", "photos", "--top-k", "9", "--json"]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines()]
    assert sorted(row["image"] for row in rows) == sorted(f"photos/{label.replace('/', '|')}.png" for label in LABELS)
    assert all({found["label"] for found in row["labels"]} == set(LABELS) for row in rows)
    assert not SPEAKING.search(out)


def test_csv_of_predict_is_quoted_and_runs_in_no_spreadsheet(place, capsys):
    """One apostrophe less gives the exact text."""
    assert main(["predict", "model", "photos", "--top-k", "9", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out, newline="")))
    assert len(rows) == len(LABELS)
    for row in rows:
        cells = [row[f"label_{i}"] for i in range(1, len(LABELS) + 1)]
        assert {text.removeprefix("'") for text in cells} == set(LABELS)
        assert f"'{FORMULA}" in cells
    assert main(["predict", "model", "photos", "--top-k", "9", "--csv", "rows.csv"]) == 0
    with (place / "rows.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows


def test_csv_on_a_terminal_does_not_speak_to_it(place, capsys, monkeypatch):
    monkeypatch.setattr("deit.predict.bulk.sys.stdout.isatty", lambda: True)
    assert main(["predict", "model", "photos", "--top-k", "9", "--csv"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 + len(LABELS)
    assert not SPEAKING.search(out)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1.png", "@x", "\tx", "\rx", "\nx", "'x", "＝1"])  # noqa: RUF001
def test_cells_that_would_be_computed_are_text(text):
    row = {"image": text, "labels": [{"label": text, "score": -0.5}], "error": text}
    [_, *lines] = csv_lines([row], 1)
    assert next(csv.reader(io.StringIO("".join(lines), newline=""))) == [f"'{text}", f"'{text}", "-0.5", "", f"'{text}"]


def test_other_cells_are_as_they_are():
    assert [cell(text) for text in ("a=1", "", " =1", "花")] == ["a=1", "", " =1", "花"]


def test_unreadable_files_are_named_in_one_line(place, capsys):
    (place / f"photos/{ROW.replace('/', '|')}{LINK.replace('/', '|')}.png").write_bytes(b"no image")
    (place / "photos/x.\x1b[31m").write_text("")
    assert main(["predict", "model", "photos"]) == 1
    err = capsys.readouterr().err
    assert not SPEAKING.search(err)
    assert "\nphotos" not in err
    assert "\\x1b]8;;http:" in err


def test_tables_of_eval_show_names_as_they_are(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["eval", "model", "--data", "data"]) == 0
    out, err = capsys.readouterr()
    assert not SPEAKING.search(out + err)
    assert shown(TURNED) in out
    assert main(["explain", "model", "photos/[red]x[|red].png", "--out", "map.png"]) == 0
    assert not SPEAKING.search(capsys.readouterr().out)


@pytest.mark.parametrize("name", [TITLE, ROW, TURNED])
def test_errors_and_warnings_do_not_speak(name, place, capsys):
    assert "\x1b" not in hostile.refused(["predict", f"nowhere/x/{name}", "photos"], capsys)
    write_json(place / "model" / "preprocessor_config.json", {"image_processor_type": name * 9999})
    said = hostile.refused(["predict", "model", "photos"], capsys)
    assert not SPEAKING.search(said)
    assert len(said) < 5000


def test_report_pages_show_names_as_text(place, capsys):
    assert main(["eval", "model", "--data", "data", "--report", "page.html"]) == 0
    page = (place / "page.html").read_text(encoding="utf-8")
    assert IMAGE not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert str(element("td", "<b>&\"'", title='"><script>')) == (
        '<td title="&quot;&gt;&lt;script&gt;">&lt;b&gt;&amp;&quot;&#x27;</td>'
    )
    assert clean(TURNED) == "gpj.\ufffdexe"
