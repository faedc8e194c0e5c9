"""Builds HTML and SVG as text. Whatever is not `Html` is escaped when it becomes part of an element.

A text in both languages (`Said`) becomes the English one, and its Chinese stands in an attribute of the same element.

Names of classes and files come from strangers. They may hold markup, quotes, control characters, halves of surrogate
pairs (from file names that are not UTF-8) and marks that turn the direction of writing.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from string import Formatter

from PIL import Image

from deit.words import Said, Text, in_chinese
from deit.words.chinese import CHINESE

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
    """The value as markup. A text in both languages gets an element of its own."""
    if isinstance(value, Said):
        return element("span", value)
    return value if isinstance(value, Html) else Html(html.escape(clean(value)))


def joined(parts: Iterable[object], between: Text = "") -> Html:
    return Html(escaped(between).join(map(escaped, parts)))


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. Attributes that are None are left out; `class_` is class, `aria_label` is aria-label."""
    given = "".join(
        _attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None
    )
    if len(children) == 1 and isinstance(children[0], Said):
        given += _chinese("data-zh", children[0])
        children = (children[0].english,)
    return Html(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{joined(children)}</{name}>")


def _attribute(name: str, value: object) -> str:
    if isinstance(value, Said):
        return f' {name}="{escaped(value.english)}"{_chinese(f"data-zh-{name}", value)}'
    return f' {name}="{escaped(value)}"'


def _chinese(name: str, text: Said) -> str:
    return "" if text.chinese == text.english else f' {name}="{escaped(text.chinese)}"'


def phrase(template: str, /, **values: object) -> Html:
    """Fills in a template and its Chinese, as `said` does, with values of which some are markup. Those must stand in
    the same order in both languages."""
    ours, parts = _apart(template, values)
    theirs, same = _apart(CHINESE[template], in_chinese(values))
    assert same == parts, f"the markup has another order in the Chinese of: {template}"
    texts = [Said(*pair) if any(pair) else "" for pair in zip(ours, theirs, strict=True)]
    return joined([texts[0], *(each for pair in zip(parts, texts[1:], strict=True) for each in pair)])


def _apart(template: str, values: Mapping[str, object]) -> tuple[list[str], list[Html]]:
    """The texts before, between and behind the values that are markup, and those values."""
    texts, parts = [""], []
    for text, name, form, _ in Formatter().parse(template):
        texts[-1] += text
        value = "" if name is None else values[name]
        if isinstance(value, Html):
            parts.append(value)
            texts.append("")
        else:
            texts[-1] += format(value, form or "")
    return texts, parts


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
    return element("bdi", name if isinstance(name, Said) else shortened(name, longest))


def english(text: object) -> Html:
    """A text that is English in the Chinese page too, because it comes from elsewhere."""
    return element("span", text, lang="en")


# ------------------------------------------------------------------------------------------------------ parts of a page


@dataclass(frozen=True)
class Section:
    key: str
    title: Text
    body: Html

    @property
    def html(self) -> Html:
        return element("section", element("h2", self.title, id=self.key), self.body, aria_labelledby=self.key)


def beside(*parts: Html) -> Html:
    return element("div", *parts, class_="beside")


def sentence(text: Text) -> Html:
    return element("p", text)


def told(text: Text) -> Html:
    """A sentence of the terminal, which begins with a small letter there and has no full stop."""
    english = f"{str(text)[0].upper()}{str(text)[1:]}."
    return sentence(Said(english, f"{text.chinese}。")) if isinstance(text, Said) else element("p", english, lang="en")


def folded(summary: Text, body: Html) -> Html:
    return element("details", element("summary", summary), body)


def facts(facts: Iterable[tuple[Text, object]]) -> Html:
    return element(
        "dl", *(element("div", element("dt", name), element("dd", value)) for name, value in facts), class_="facts"
    )


def scrolled(label: Text, body: Html) -> Html:
    """A part that may be wider than the page. It scrolls on its own, with the keyboard too."""
    return element("div", body, class_="scroll", tabindex=0, role="group", aria_label=label)


def table(title: Text, columns: Sequence[Text], rows: Iterable[Sequence[object]], *, hidden: bool = False) -> Html:
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
    cell = cell.english if isinstance(cell, Said) else cell
    return not isinstance(cell, str) or (cell[:1].isdigit() if not isinstance(cell, Html) else cell[-1:].isdigit())


def _cell(value: object) -> Html | Said:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return Html("-")
    if isinstance(value, float):
        return escaped(f"{value:.3f}")
    if isinstance(value, Said):
        return value
    return escaped(f"{value:,}" if isinstance(value, int) else value)


def data_uri(picture: Image.Image, *, crisp: bool = False) -> str:
    """A picture in RGB or grey as a data: URI: as PNG if `crisp`, which keeps every pixel exact, else as JPEG."""
    buffer = io.BytesIO()
    if crisp:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=82)
    return f"data:image/{'png' if crisp else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pictured(picture: Image.Image, alt: Text, *, crisp: bool = False) -> Html:
    """A picture as part of the page. If it is `crisp` and the browser enlarges it, its pixels show as squares."""
    return element(
        "img",
        src=data_uri(picture, crisp=crisp),
        alt=alt,
        width=picture.width,
        height=picture.height,
        class_="pixels" if crisp else None,
    )


def date(text: str) -> Text:
    try:
        when = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return text[:40]
    return Said(f"{when.day} {when:%B %Y, %H:%M} UTC", f"{when.year} 年 {when.month} 月 {when.day} 日 {when:%H:%M} UTC")
