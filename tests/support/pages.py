"""The pages for people, in Markdown: their commands, their Python, their headings and their links."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "README.zh-CN.md",
    "CONTRIBUTING.md",
    *(str(page.relative_to(ROOT)) for part in ("", "zh") for page in sorted((ROOT / "docs" / part).glob("*.md"))),
)


def commands(text):
    """The arguments of every `deit` command in the shell blocks of a page, also after `torchrun … -m` and `srun`."""
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.match(r"(?:.* -m |srun .*? )?deit (.*)", re.split(" #| > ", line)[0].removesuffix(" &")):
                yield shlex.split(found[1])


def blocks(text, language):
    """The blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def anchors(text):
    """What links to the headings of a page end with, in order, as GitHub makes it."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    names = [re.sub(r"[^\w\- ]", "", line).replace(" ", "-").lower() for line in re.findall(r"^#+ (.+)$", prose, re.M)]
    return [f"{name}-{names[:i].count(name)}" if name in names[:i] else name for i, name in enumerate(names)]


def links(text):
    """The targets of a page's links and pictures in this repository."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"https?:|mailto:", target)]
