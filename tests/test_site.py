"""The pages as a site: each page has its place, the reference its names, and the site builds without a warning."""

import re
import subprocess
import sys

import pytest
import torch
from support.models import trained_folder
from support.pages import ROOT, blocks

import deit
from deit import DeiTImageProcessor, load_model

DOCS = ROOT / "docs"


def test_every_page_is_in_a_table_of_contents_once():
    for folder, more in ((DOCS, ["zh/index"]), (DOCS / "zh", [])):
        text = (folder / "index.md").read_text()
        tables = re.findall(r"^```\{toctree\}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        named = [line for table in tables for line in table.splitlines() if line and not line.startswith(":")]
        assert sorted(named) == sorted([*more, *(page.stem for page in folder.glob("*.md") if page.stem != "index")])


def figures(text):
    """The numbers in the rows of a page's tables, without links and code."""
    rows = re.findall(r"^\|.*", re.sub(r"\]\([^)]*\)|`[^`\n]*`", "", text), re.MULTILINE)
    return [re.findall(r"\d(?:[\d.,]*\d)?", row) for row in rows]


@pytest.mark.parametrize("page", sorted(page.name for page in (DOCS / "zh").glob("*.md") if page.stem != "index"))
def test_a_page_in_chinese_says_the_same(page):
    """The same blocks, formulas, figures of tables and headings of each depth as in English; and each names the
    other."""
    english, chinese = ((DOCS / part / page).read_text() for part in ("", "zh"))
    for pattern in (r"```.*?```", r"\$\$.*?\$\$", r"(?m)^#+ "):
        assert re.findall(pattern, chinese, re.DOTALL) == re.findall(pattern, english, re.DOTALL)
    assert figures(chinese) == figures(english)
    assert f"](zh/{page})" in english.split("##")[0]
    assert f"](../{page})" in chinese.split("##")[0]


def test_the_reference_has_every_public_name():
    described = set(re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)", (DOCS / "api.md").read_text(), re.MULTILINE))
    missing = {f"deit.{name}" for name in deit.__all__ if name != "__version__"} - described
    assert not missing


def test_the_python_of_the_questions_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained_folder(tmp_path / "facebook/deit-tiny-patch16-224", "plain")
    [block] = blocks((DOCS / "faq.md").read_text(), "python")
    exec(block, {})
    assert capsys.readouterr().out.startswith("DeiTImageProcessor(")
    assert DeiTImageProcessor.from_pretrained("deit-tiny-paper") == DeiTImageProcessor.paper(224)
    before, after = (load_model(name)._tensors() for name in ("facebook/deit-tiny-patch16-224", "deit-tiny-paper"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("furo", "myst_parser", "sphinx"):
        pytest.importorskip(package)
    [command] = re.findall(r"^docs: .*\n\t\$\(BIN\)/python (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    command = command.replace("docs/_build/html", str(tmp_path)).split()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for path in DOCS.glob("*.md"):
        assert (tmp_path / f"{path.stem}.html").is_file()
    assert 'href="contributing.html"' in (tmp_path / "design.html").read_text()
    assert 'id="deit.Predictor.stream"' in (tmp_path / "api.html").read_text()
