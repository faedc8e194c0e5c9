"""The pages in Chinese say what the English ones say: the same commands, output, formulas, code, numbers and links."""

import os
import re
from collections import Counter

import pytest
from support.pages import ROOT, anchors, blocks, links

TWINS = {"README.md": "README.zh-CN.md"} | {
    f"docs/{page.name}": f"docs/zh/{page.name}" for page in sorted((ROOT / "docs" / "zh").glob("*.md"))
}
"""The Chinese page of each English one that has one."""
PAIRS = [pair for pair in TWINS.items() if pair[0] != "docs/index.md"]
PLACEHOLDERS = {"类别": "CLASS", "文件夹": "FOLDER"}
BLOCK = re.compile(r"^```.*?^```$|^\$\$$.*?^\$\$$", re.DOTALL | re.MULTILINE)


def numbers(text):
    """The numbers of a text and how often each is there, because sentences have another order in another language. The
    digits of names such as float32 are no number."""
    return Counter(re.findall(r"(?<![A-Za-z\d.,])\d+(?:[.,]\d+)*", text))


def block(text):
    """A block, and the numbers in it. Comments are translated, and only code has any."""
    return re.sub(r" *#.*", "", text) if text.startswith(("```sh\n", "```python\n")) else text, numbers(text)


def section(text):
    """What a part of a page has in every language."""
    spans = {" ".join(code.split()) for code in re.findall(r"`[^`]+`", text)}
    for chinese, english in PLACEHOLDERS.items():
        spans = {code.replace(chinese, english) for code in spans}
    words = re.sub(r"\]\([^)]*\)|`[^`]+`|\$[^$]+\$", "", text)
    return {
        "code": spans,
        "symbols": Counter(re.findall(r"\$[^$]+\$", text)),
        "rows": [numbers(row) for row in re.findall(r"^\|.*", words, re.MULTILINE)],
        "numbers": numbers(words),
        "other sites": Counter(re.findall(r"\]\((https?:[^)]+)\)", text)),
    }


def sections(text):
    """The parts of a page: the signs before the heading, the heading, and what `section` finds below it."""
    _, *parts = re.split(r"^(#+) (.*)$", BLOCK.sub("", text), flags=re.MULTILINE)
    return [(parts[i], parts[i + 1], section(parts[i + 2])) for i in range(0, len(parts), 3)]


def places(page):
    """The file and the number of the heading that each link leads to, and how many do; -1 is the file as a whole."""
    found = []
    for target in links((ROOT / page).read_text()):
        name, _, anchor = target.partition("#")
        file = os.path.relpath((ROOT / page).parent / name, ROOT) if name else page
        found.append((file, anchors((ROOT / file).read_text()).index(anchor) if anchor else -1))
    return Counter(found)


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_a_page_says_the_same_in_chinese(english, chinese):
    ours, theirs = ((ROOT / page).read_text() for page in (english, chinese))
    assert [block(text) for text in BLOCK.findall(theirs)] == [block(text) for text in BLOCK.findall(ours)]
    ours, theirs = sections(ours), sections(theirs)
    assert [depth for depth, *_ in theirs] == [depth for depth, *_ in ours]
    for (_, heading, wanted), (_, name, found) in zip(ours, theirs, strict=True):
        assert found == wanted, f"{name} in {chinese} differs from {heading} in {english}"


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_links_lead_to_the_same_places_in_chinese(english, chinese):
    """To the Chinese page, if there is one."""
    wanted, found = places(english), places(chinese)
    if english != "README.md":
        assert wanted.pop((chinese, -1)) == 1
        assert found.pop((english, -1)) == 1
    assert found == Counter({(TWINS.get(file, file), heading): count for (file, heading), count in wanted.items()})


def test_the_chinese_index_begins_with_the_same_commands():
    """The rest of the two indexes differs: the Chinese one also leads to the pages that are in English alone."""
    ours, theirs = ((ROOT / page).read_text() for page in ("docs/index.md", TWINS["docs/index.md"]))
    assert [block(f"```sh\n{code}```") for code in blocks(theirs, "sh")] == [
        block(f"```sh\n{code}```") for code in blocks(ours, "sh")
    ]
