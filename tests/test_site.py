"""The pages as a site: each page has its place, the reference its names, and the site builds without a warning."""

import re
import subprocess
import sys

import pytest
import torch
from support.models import trained_folder
from support.pages import ROOT, blocks, links

import deit
from deit import DeiTImageProcessor, load_model

DOCS = ROOT / "docs"


def listed(index):
    """The pages in the tables of contents of a page. An entry is PAGE, or TITLE <PAGE>."""
    tables = re.findall(r"^```\{toctree\}\n(.*?)^```$", index.read_text(), re.DOTALL | re.MULTILINE)
    entries = [line for table in tables for line in table.splitlines() if line and not line.startswith(":")]
    return [re.sub(r"^.* <(.*)>$", r"\1", entry) for entry in entries]


@pytest.mark.parametrize(("folder", "more"), [(DOCS, ["zh/index"]), (DOCS / "zh", [])], ids=["english", "chinese"])
def test_every_page_is_in_a_table_of_contents_once(folder, more):
    pages = [page.stem for page in folder.glob("*.md") if page.stem != "index"]
    assert sorted(listed(folder / "index.md")) == sorted([*more, *pages])


def test_the_chinese_index_leads_to_every_page():
    """To the English page, if there is none in Chinese. For a page that only includes a file, it leads to that file."""
    chinese = listed(DOCS / "zh" / "index.md")
    wanted = {DOCS / "index.md", *(DOCS / "zh" / f"{name}.md" for name in chinese)}
    for name in {*listed(DOCS / "index.md")} - {*chinese, "zh/index"}:
        page = DOCS / f"{name}.md"
        included = re.fullmatch(r"```\{include\} (\S+)\n```\n", page.read_text())
        wanted.add((DOCS / included[1]).resolve() if included else page)
    targets = [*(f"{name}.md" for name in chinese), *links((DOCS / "zh" / "index.md").read_text())]
    assert {(DOCS / "zh" / target).resolve() for target in targets} == wanted


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
    for path in (*DOCS.glob("*.md"), *DOCS.glob("zh/*.md")):
        html = (tmp_path / path.relative_to(DOCS)).with_suffix(".html").read_text()
        assert re.search(r'<html [^>]*lang="([\w-]+)"', html)[1] == ("zh-CN" if path.parent.name == "zh" else "en")
    for page in ("distillation.html", "zh/distillation.html"):
        assert r'<span class="math notranslate nohighlight">\(\psi\)</span>' in (tmp_path / page).read_text()
    assert 'href="contributing.html"' in (tmp_path / "design.html").read_text()
    assert 'id="deit.Predictor.stream"' in (tmp_path / "api.html").read_text()
