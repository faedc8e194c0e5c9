"""What was written before the package had rooms still opens: runs, stored labels, models and exports."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.before import BEFORE, difference

from deit.cli import main


@pytest.fixture
def before(tmp_path, monkeypatch):
    shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    return tmp_path / "before"


def answers(capsys, *command):
    assert main(["predict", *command, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("model", ["student/model", "torch"])
def test_models_and_exports_answer_as_they_did(before, capsys, model):
    files = sorted(str(path.relative_to(before)) for path in before.glob("data/val/*/*.png"))
    found = answers(capsys, model, *files)
    assert difference(found) < 1e-5
    stored = [json.loads(line) for line in (before / "answers.jsonl").read_text().splitlines()]
    assert [answer["sure"] for answer in found] == [answer["sure"] for answer in stored]


@pytest.mark.parametrize(
    ("recipe", "out", "more"),
    [
        ("recipes.py:student", "stopped", ["--set", "compute.save_minutes=0", "--resume"]),
        ("student/recipe.json", "again", []),
    ],
)
def test_runs_go_on_and_repeat_with_stored_labels(before, recipe, out, more):
    """From the checkpoint, and from the stored recipe: both learn from the stored labels of the teacher."""
    labels = [] if recipe.endswith(".json") else ["--set", "objective.cache=labels"]
    assert main(["train", recipe, "--data", "data", "--out", out, *labels, *more]) == 0
    found, expected = (load_file(before / run / "model" / "model.safetensors") for run in (out, "student"))
    assert found.keys() == expected.keys()
    # Equal to the bit where they were written. Elsewhere AdamW turns the rounding of a tiny gradient into a whole step,
    # so most values are compared, not the largest difference.
    differences = torch.cat([(found[name] - expected[name]).abs().flatten() for name in expected])
    assert differences.quantile(0.9) < 1e-4


def test_a_finished_run_is_reported(before):
    assert main(["report", "student"]) == 0
    assert "0.1.0" in (before / "student" / "report.html").read_text()
