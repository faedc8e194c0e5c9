"""A recipe.json of a stranger runs no code: its teacher is Python only if the command line names the same."""

import json

import pytest
from support import hostile
from support.checks import raises_saying
from support.runs import small_recipe

from deit.cli import main
from deit.data.folders import fingerprint, read_data
from deit.fit.plan import Plan, Step
from deit.recipe import Distilled
from deit.recipes import find, find_to_run

TEACHER = """
import os
import torch

os.makedirs({trace!r}, exist_ok=True)

def make():
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 5))
"""


@pytest.fixture
def given(tmp_path):
    """A run's folder whose recipe names Python, the name, and the folder that appears if it runs."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "teacher.py").write_text(TEACHER.format(trace=str(tmp_path / "ran")))
    name = f"{tmp_path / 'run' / 'teacher.py'}:make"
    recipe = small_recipe(Distilled(teacher=name))
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    return tmp_path / "run", name, tmp_path / "ran"


@pytest.mark.parametrize("place", ["run", "run/recipe.json"])
@pytest.mark.parametrize("settings", [[], ["seed=1"], ["objective.kind=soft"], ["name={name}"]])
def test_python_of_a_recipe_json_is_refused(place, settings, given, tmp_path, capsys):
    folder, name, trace = given
    data = hostile.images(tmp_path / "data")
    named = [part for setting in settings for part in ("--set", setting.format(name=name))]
    command = ["train", str(folder.parent / place), "--data", str(data), "--out", str(tmp_path / "out"), *named]
    said = hostile.refused(command, capsys)
    assert f"names the Python code {name} as its teacher" in said
    assert said.endswith(f"if you trust it, add --set objective.teacher={name}")
    assert not trace.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:teacher .* does not name its 5 outputs")
def test_python_of_a_plan_is_refused(given, tmp_path, capsys):
    """Also if labels are to be stored, for which the teacher is asked."""
    _, name, trace = given
    data = hostile.images(tmp_path / "data")
    objective = Distilled(teacher=name, cache=str(tmp_path / "labels"))
    steps = (Step(name="labels"), Step(name="student", recipe=small_recipe(objective)), Step(name="judge"))
    train = read_data(data, holdout=0.1, seed=0)[0]
    plan = Plan(data=str(data), fingerprint=fingerprint(train), minutes=None, steps=steps)
    plan.write(tmp_path / "fit")
    said = hostile.refused(["fit", str(data), "--out", str(tmp_path / "fit")], capsys)
    assert f"student.json names the Python code {name} as its teacher" in said
    assert "name a model's folder there" in said
    assert not trace.exists()
    words = said.partition("the student alone: deit ")[2].partition(";")[0].split()
    places = {"DATA": str(data), "OTHER": str(tmp_path / "alone")}
    assert main([places.get(word, word) for word in words]) == 0
    assert trace.exists()


@pytest.mark.filterwarnings("ignore:teacher .* does not name its 5 outputs")
def test_python_that_the_command_line_names_runs(given, tmp_path):
    """And the run goes on from the recipe that it wrote itself."""
    folder, name, trace = given
    data, out = hostile.images(tmp_path / "data"), tmp_path / "out"
    rest = ["--data", str(data), "--out", str(out), "--set", f"objective.teacher={name}", "--set", "compute.workers=0"]
    assert main(["train", str(folder), *rest]) == 0
    assert trace.exists()
    assert main(["train", str(out / "recipe.json"), *rest, "--resume"]) == 0


def test_only_what_would_run_is_refused(given):
    folder, name, _ = given
    assert find(str(folder)).objective.teacher == name  # printing it runs nothing
    assert find_to_run(str(folder), ["objective.teacher=timm:resnet18"]).objective.teacher == "timm:resnet18"
    assert find_to_run(str(folder), ["objective.cache=labels"]).objective.cache == "labels"
    assert find_to_run(str(folder), [f"objective.teacher={name}"]).objective.teacher == name
    assert find_to_run(str(folder), [f"objective=Distilled(teacher={name!r})"]).objective.teacher == name
    with raises_saying(ValueError, "names the Python code other.py:make"):
        find_to_run(_named(folder, "other.py:make"), ["objective.kind=hard"])
    assert find_to_run(_named(folder, "timm:x.py:y")).objective.teacher == "timm:x.py:y"


def _named(folder, teacher):
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["objective"]["teacher"] = teacher
    (folder / "other.json").write_text(json.dumps(recipe))
    return str(folder / "other.json")


@pytest.mark.filterwarnings("ignore:teacher .* does not name its 5 outputs")
def test_a_teacher_on_the_command_line_of_teach_runs(given, tmp_path):
    """`--teacher` names it, whatever the recipe says."""
    folder, _, trace = given
    data = hostile.images(tmp_path / "data")
    labels = ["teach", str(data), "--recipe", str(folder), "--epochs", "1", "--set", "compute.workers=0"]
    (tmp_path / "harmless.py").write_text(TEACHER.format(trace=str(tmp_path / "harmless")))
    chosen = ["--teacher", f"{tmp_path / 'harmless.py'}:make", "--out", str(tmp_path / "labels")]
    assert main([*labels, *chosen]) == 0
    assert not trace.exists()
    assert (tmp_path / "harmless").exists()
