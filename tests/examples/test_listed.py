"""The page about the examples, and what each of them says about itself."""

import re

import pytest
from support.examples import EXAMPLES

IN_PROCESS = (
    "custom_recipe",
    "distill_any_teacher",
    "image_classification",
    "image_pretraining",
    "own_loop",
    "serve_client",
)
"""Examples that need no package of another group, and no process of their own."""


def test_the_page_names_every_file():
    named = set(re.findall(r"[\w]+\.(?:py|ipynb)", (EXAMPLES / "README.md").read_text()))
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert there <= named
    assert named - there == {"FILE.py", "NAME.py", "run_image_classification.py", "run_mim.py"}


@pytest.mark.parametrize("name", IN_PROCESS)
def test_help(name, examples, capsys):
    with pytest.raises(SystemExit) as caught:
        examples.run(name, "--help")
    assert caught.value.code == 0
    said = capsys.readouterr().out
    text = (EXAMPLES / f"{name}.py").read_text()
    options = set(re.findall(r"(?<=\s)--[a-z_-]+", text.split('"""')[1]))
    assert options
    assert [option for option in options if option not in said and option != "--remove_unused_columns"] == []
