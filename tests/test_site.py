"""The pages as a site: each page has its place, each link leads somewhere, and the site builds without a warning."""

import re
import string
import subprocess
import sys
from pathlib import Path

import pytest

import deit

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "examples/README.md"]
)


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """What GitHub calls the headings of a page: in lower case, without punctuation, with hyphens for spaces."""
    gone = str.maketrans("", "", re.sub("[-_]", "", string.punctuation))
    titles = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return [title.lower().translate(gone).replace(" ", "-") for title in titles]


def test_anchors_are_those_of_github(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("# `from_pretrained`, and why?\n\n```sh\n# no heading\n```\n\n## int8 & it's A-B\n")
    assert anchors("page.md") == ["from_pretrained-and-why", "int8--its-a-b"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        place = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place.relative_to(ROOT)), target


def test_every_page_is_in_a_table_of_contents_once():
    tables = re.findall(r"^```\{toctree\}\n(.*?)^```$", (DOCS / "index.md").read_text(), re.DOTALL | re.MULTILINE)
    named = [line for table in tables for line in table.splitlines() if line and not line.startswith(":")]
    assert sorted(named) == sorted(path.stem for path in DOCS.glob("*.md") if path.stem != "index")


def test_the_reference_has_every_public_name():
    described = set(re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)", (DOCS / "api.md").read_text(), re.MULTILINE))
    missing = {f"deit.{name}" for name in deit.__all__ if name != "__version__"} - described
    assert not missing


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
