"""The pages' sentences in Chinese: none is missing, none is left over, and each keeps its fields."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

import deit
from deit.explain.explanation import Map
from deit.words.chinese import CHINESE

HERE = Path(deit.__file__).parent
SCRIPTS = [HERE / "serve/page.js", *(HERE / "web" / f"{name}.js" for name in ("page", "shown", "worker", "picture"))]
HTML = [HERE / "serve/page.html", HERE / "web/index.html"]
LITERAL = re.compile(r'"(?:[^"\\\n]|\\.)*"')
TEMPLATE = re.compile(r"`[^`]*`")


def code(path):
    """A script without its comments, with its joined literals made one."""
    text = re.sub(r"(?m)(^\s*|\s\s)//.*$", "", path.read_text(encoding="utf-8"))
    return re.sub(r'"\s*\+\s*"', "", text)


def catalogue():
    text = code(HERE / "web/words.js")
    found = text[text.index("{") : text.index("\n};")]
    entries = re.findall(rf"({LITERAL.pattern}):\s*({LITERAL.pattern}),", found)
    assert 2 * len(entries) == len(LITERAL.findall(found))
    return {json.loads(key): json.loads(value) for key, value in entries}


class _Texts(HTMLParser):
    """What a page says by itself."""

    def __init__(self, page):
        super().__init__()
        self.found, self.quiet = set(), 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.quiet += (bool(self.quiet) and tag not in ("img", "input")) or given.get("id") == "unstarted"
        self.quiet += tag == "noscript"
        self.found |= {given[name] for name in ("alt", "aria-label") if given.get(name)}

    def handle_endtag(self, tag):
        self.quiet -= bool(self.quiet)

    def handle_data(self, data):
        if not self.quiet and re.search("[A-Za-z]", data):
            self.found.add(" ".join(data.split()))


def said():
    """Every sentence that the scripts and the pages may show."""
    found = set()
    for path in SCRIPTS:
        text = code(path)
        literals = {json.loads(each) for each in LITERAL.findall(text)}
        found |= {each for each in literals if re.match(r"[A-Z{].* ", each) and not each.endswith(" ")}
        found |= {json.loads(each) for each in re.findall(rf"\bsaid\(({LITERAL.pattern})", text)}
        assert [each for each in TEMPLATE.findall(text) if re.search(r"[A-Za-z]{2} [a-z]{2}", each)] == []
    return found.union(*(_Texts(path.read_text(encoding="utf-8")).found for path in HTML))


PLACES = {"in the upper left", "at the top", "in the upper right", "on the left", "in the middle", "on the right"}
PLACES |= {"in the lower left", "at the bottom", "in the lower right", "nowhere more than elsewhere"}


def test_every_sentence_is_there_in_chinese():
    chinese = catalogue()
    assert set(chinese) == said() | PLACES
    for english, text in chinese.items():
        fields = [sorted(re.findall(r"\{\w+\}", each)) for each in (english, text)]
        assert fields[0] == fields[1], english


def test_a_place_has_the_same_name_on_the_page_and_in_a_report():
    chinese = catalogue()
    assert {place: chinese[place] for place in PLACES} == {place: CHINESE[place] for place in PLACES}


def test_the_places_are_those_of_the_maps():
    values = [np.eye(1, 9, place).reshape(3, 3) for place in range(9)] + [np.ones((3, 3))]
    assert {Map("class", "relevance", each).strongest for each in values} == PLACES
