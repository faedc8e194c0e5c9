"""The notebook, against its source and from beginning to end.

`PYTHONPATH=tests python tests/examples/test_notebook.py` runs the source and writes the notebook with its outputs. It
needs the packages of the group `clients`.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
from support.examples import EXAMPLES

SOURCE, NOTEBOOK = EXAMPLES / "image_classification_notebook.py", EXAMPLES / "image_classification.ipynb"
KEPT = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def cells(text):
    """(kind, text) of each cell of a source in the percent format."""
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        mark, _, body = part.partition("\n")
        if mark.strip() == "[markdown]":
            yield "markdown", "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().split("\n"))
        else:
            yield "code", body.strip()


def executed(folder):
    """The notebook made of the source, run in a folder, without what changes from one run to the next."""
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    notebook = jupytext.read(SOURCE)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    notebook.metadata = KEPT
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    return notebook


def test_the_notebook_is_its_source():
    notebook = json.loads(NOTEBOOK.read_text())
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert found == list(cells(SOURCE.read_text()))
    assert all(len(text.strip()) > 1 for _, text in found)


def test_its_outputs_are_whole_and_say_nothing_of_a_machine():
    text = NOTEBOOK.read_text()
    assert len(text) < 300_000
    notebook = json.loads(text)
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    said = re.sub(r'"image/png": "[^"]+"', "", text)
    assert re.findall(r"/home/|/tmp/|/Users/|/root/|site-packages|images/s|GiB|seconds", said) == []
    assert notebook["metadata"] == KEPT
    assert all(cell["metadata"] == {} for cell in notebook["cells"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_from_beginning_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    notebook = executed(tmp_path)
    said = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    scores = dict(re.findall(r"^(class|distillation|fused) +([\d.]+) ", said, re.MULTILINE))
    assert {head: float(score) > 0.9 for head, score in scores.items()} == dict.fromkeys(
        ("class", "distillation", "fused"), True
    )
    assert (tmp_path / "notebook-run/student/report.html").exists()


if __name__ == "__main__":
    import nbformat

    with tempfile.TemporaryDirectory() as place:
        nbformat.write(executed(Path(place)), NOTEBOOK)
