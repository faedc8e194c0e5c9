"""Builds HTML and SVG as text. Whatever is not `Html` is escaped when it becomes part of an element.

Names of classes and files come from strangers. They may hold markup, quotes, control characters, halves of surrogate
pairs (from file names that are not UTF-8) and marks that turn the direction of writing.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from PIL import Image

LONGEST = 160
"""Maximum number of characters of a name that are shown. A longer name loses its middle."""
_VOID = {"img", "meta"}
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
"""Characters that HTML and XML can't hold."""


class Html(str):
    """Finished markup."""

    __slots__ = ()

    def __add__(self, other: str) -> Html:
        return joined((self, other))

    def __radd__(self, other: str) -> Html:
        return joined((other, self))


def clean(text: object) -> str:
    """The text with a replacement character for each character that no document may hold. It is not escaped."""
    return _ILLEGAL.sub("\ufffd", str(text))


def escaped(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(clean(value)))


def joined(parts: Iterable[object], between: str = "") -> Html:
    return Html(between.join(map(escaped, parts)))


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. Attributes that are None are left out; `class_` is class, `aria_label` is aria-label."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{joined(children)}</{name}>")


def shortened(name: object, longest: int = LONGEST) -> str:
    """A name without its middle if it is long, because both ends say the most. It is not escaped."""
    text = clean(name)
    if len(text) <= longest:
        return text
    tail = longest // 3
    return f"{text[: longest - tail - 1]}…{text[-tail:]}"


def isolated(name: object) -> str:
    """A name for plain text, such as an attribute, isolated so that it can't turn the direction of the text around it.
    It is not escaped."""
    return f"\u2068{shortened(name)}\u2069"


def named(name: object, longest: int = LONGEST) -> Html:
    """A name for markup, isolated so that it can't turn the direction of the text around it."""
    return element("bdi", shortened(name, longest))


# ------------------------------------------------------------------------------------------------------ parts of a page


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    body: Html

    @property
    def html(self) -> Html:
        return element("section", element("h2", self.title, id=self.key), self.body, aria_labelledby=self.key)


def beside(*parts: Html) -> Html:
    return element("div", *parts, class_="beside")


def sentence(text: str) -> Html:
    return element("p", text)


def folded(summary: str, body: Html) -> Html:
    return element("details", element("summary", summary), body)


def facts(facts: Iterable[tuple[str, object]]) -> Html:
    return element(
        "dl", *(element("div", element("dt", name), element("dd", value)) for name, value in facts), class_="facts"
    )


def scrolled(label: str, body: Html) -> Html:
    """A part that may be wider than the page. It scrolls on its own, with the keyboard too."""
    return element("div", body, class_="scroll", tabindex=0, role="group", aria_label=label)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, hidden: bool = False) -> Html:
    """A table with numbers on the right, three digits for fractions and a dash for None.

    The first cell of a row is its heading. An empty cell may stand in any column.
    """
    kept = [list(row) for row in rows]
    right = ["n" if all(row[i] == "" or _is_numeric(row[i]) for row in kept) else None for i in range(len(columns))]
    head = element("tr", *(element("th", name, scope="col", class_=right[i]) for i, name in enumerate(columns)))
    body = (
        element(
            "tr",
            *(
                element("td" if i else "th", _cell(cell), scope=None if i else "row", class_=right[i])
                for i, cell in enumerate(row)
            ),
        )
        for row in kept
    )
    return scrolled(
        title,
        element(
            "table",
            element("caption", title, class_="hidden" if hidden else None),
            element("thead", head),
            element("tbody", *body),
        ),
    )


def _is_numeric(cell: object) -> bool:
    """Whether a cell holds a number or an interval."""
    return not isinstance(cell, str) or (cell[:1].isdigit() if not isinstance(cell, Html) else cell[-1:].isdigit())


def _cell(value: object) -> Html:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return Html("-")
    if isinstance(value, float):
        return escaped(f"{value:.3f}")
    return escaped(f"{value:,}" if isinstance(value, int) else value)


def data_uri(picture: Image.Image, *, crisp: bool = False) -> str:
    """A picture in RGB or grey as a data: URI: as PNG if `crisp`, which keeps every pixel exact, else as JPEG."""
    buffer = io.BytesIO()
    if crisp:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=82)
    return f"data:image/{'png' if crisp else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pictured(picture: Image.Image, alt: str, *, crisp: bool = False) -> Html:
    """A picture as part of the page. If it is `crisp` and the browser enlarges it, its pixels show as squares."""
    return element(
        "img",
        src=data_uri(picture, crisp=crisp),
        alt=alt,
        width=picture.width,
        height=picture.height,
        class_="pixels" if crisp else None,
    )


def plural(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def date(text: str) -> str:
    try:
        when = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return text[:40]
    return f"{when.day} {when:%B %Y, %H:%M} UTC"
