"""The site: `make docs` makes it of these pages, with Sphinx and MyST-Parser."""

from typing import Any

from deit.host import VERSION

project = "deit"
author = "The deit contributors"
release = VERSION
html_title = f"deit {VERSION}"
html_theme = "furo"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_heading_anchors = 4  # headings get the anchors that GitHub gives them
default_role = "literal"  # docstrings write code between single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
suppress_warnings = ["misc.highlighting_failure"]  # examples of JSON are cut short with an ellipsis
linkcheck_ignore = [r"http://(127\.0\.0\.1|localhost)"]

SHOWN = {"../CONTRIBUTING.md": "contributing.md", "../examples/README.md": "examples.md"}
"""Files outside of this folder, and the page that shows each."""


def lead_to_pages(app: Any, page: str, source: list[str]) -> None:
    """Links to the files in `SHOWN` lead to their pages. On GitHub, they lead to the files."""
    for file, shown in SHOWN.items():
        source[0] = source[0].replace(f"]({file}", f"]({shown}")


def setup(app: Any) -> None:
    app.connect("source-read", lead_to_pages)
