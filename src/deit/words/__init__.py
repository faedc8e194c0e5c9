"""Texts in English and Chinese. A terminal shows the English, and a report shows that of its reader's browser."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deit.words.chinese import CHINESE

_LISTED = 3
"""Largest number of things that a sentence lists."""


@dataclass(frozen=True)
class Said:
    """A text in both languages."""

    english: str
    chinese: str

    def __str__(self) -> str:
        return self.english


Text = str | Said
"""A `str` is the same in both languages: a name, a number, or a message that comes from elsewhere."""


def said(template: str, /, **values: object) -> Said:
    """Fills in a template and its Chinese (`chinese.py`). A value that has both languages is filled in by language."""
    return Said(template.format(**values), CHINESE[template].format(**in_chinese(values)))


def plural(count: int, one: str, many: str, /, **values: object) -> Said:
    """The template `one` if there is one, else `many`. The templates may name the field `count`."""
    return said(one if count == 1 else many, count=count, **values)


def series(between: str, parts: Iterable[Text]) -> Said:
    """Joins texts. `between` is a template without fields, because Chinese has other commas."""
    texts = list(parts)
    return Said(
        between.join(map(str, texts)),
        CHINESE[between].join(each.chinese if isinstance(each, Said) else each for each in texts),
    )


def quoted(name: str) -> Said:
    return said('"{name}"', name=name)


def listed(parts: Iterable[Text]) -> Said:
    """The first of the texts, and how many more there are."""
    texts = list(parts)
    first, more = series(", ", texts[:_LISTED]), len(texts) - _LISTED
    return said("{names} and {more:,} more", names=first, more=more) if more > 0 else first


def in_chinese(values: dict[str, object]) -> dict[str, object]:
    return {name: value.chinese if isinstance(value, Said) else value for name, value in values.items()}
