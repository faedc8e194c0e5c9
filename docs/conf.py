"""The site: `make docs` makes it of these pages, with Sphinx and MyST-Parser."""

import os
import re
from pathlib import Path
from typing import Any

from sphinx.ext.napoleon import GoogleDocstring

from deit.host import VERSION

project = "deit"
author = "The deit contributors"
release = VERSION
html_title = f"deit {VERSION}"
html_theme = "furo"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]  # formulas, as on GitHub
myst_heading_anchors = 4  # headings get the anchors that GitHub gives them
default_role = "literal"  # docstrings write code between single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
suppress_warnings = ["misc.highlighting_failure"]  # examples of JSON are cut short with an ellipsis
linkcheck_ignore = [r"http://(127\.0\.0\.1|localhost)"]

DOCS = Path(__file__).resolve().parent
SHOWN = {
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
    "bench/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
}
"""Pages outside of this folder, and the page here that includes each."""


def lead_to_pages(folder: Path, page: str, source: list[str]) -> None:
    """Changes the links of a text in `folder`, which `page` shows, so that they lead to pages of the site. On GitHub,
    they lead to files."""

    def changed(found: re.Match[str]) -> str:
        place = (folder / found[0]).resolve()
        if not place.is_file() or not place.is_relative_to(DOCS.parent):
            return found[0]
        place = DOCS / SHOWN.get(place.relative_to(DOCS.parent).as_posix(), place)
        return os.path.relpath(place, (DOCS / page).parent)

    source[0] = re.sub(r"(?<=\]\()[\w./-]+", changed, source[0])


def name_language(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Marks pages in Chinese as such, so that browsers choose fonts for it and screen readers a voice."""
    if page.startswith("zh/"):
        context["language"] = "zh-CN"


def read_sections(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Reads the sections of a docstring, such as `Args:`. In those of fields, a colon has no such meaning."""
    if what not in ("attribute", "property"):
        lines[:] = GoogleDocstring(lines, what=what).lines()


def setup(app: Any) -> None:
    app.connect("source-read", lambda app, page, source: lead_to_pages((DOCS / page).parent, page, source))
    app.connect("include-read", lambda app, path, page, source: lead_to_pages((DOCS / path).parent, page, source))
    app.connect("autodoc-process-docstring", read_sections)
    app.connect("html-page-context", name_language)
