"""The structure itself: who imports whom, what start-up costs, and that the README's commands exist."""

import ast
import re
import resource
import subprocess
import sys

import pytest
from support.checks import run_python
from support.pages import PAGES, ROOT, commands

from deit.cli.arguments import parser

SOURCE = ROOT / "src" / "deit"

FRAMEWORKS = {
    "torch",
    "transformers",
    "timm",
    "keras",
    "tensorflow",
    "jax",
    "sklearn",
    "scipy",
    "huggingface_hub",
    "openvino",
    "nncf",
    "onnx",
    "onnxruntime",
}
LIGHT = [
    "deit",
    "deit.cli.command",
    "deit.completion",
    "deit.config",
    "deit.doctor",
    "deit.evaluate.scores",
    "deit.export.convert",
    "deit.export.engines",
    "deit.files",
    "deit.host",
    "deit.image.processor",
    "deit.locks",
    "deit.model.loss_rules",
    "deit.model.outputs",
    "deit.recipe",
    "deit.recipes",
    "deit.report.drawing",
    "deit.report.markup",
    "deit.train.records",
    "deit.weights.hub",
]
"""Modules that load no framework before it is needed, and whose imports don't either."""

FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path):
    """Dotted name of the module in a file."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path):
    """Modules that a file imports anywhere in it, also for type checkers alone: of this package by their full names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def test_no_circles():
    arrows = {
        name: {other for other in imports(path) if other in MODULES and other != name} for name, path in MODULES.items()
    }
    while leaves := [name for name, others in arrows.items() if not others & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert not arrows, f"these modules import each other in a circle, or import such: {', '.join(sorted(arrows))}"


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_no_framework(name):
    loaded = run_python(f"import sys, {name}; print(*sys.modules)").split()
    assert not {name.split(".")[0] for name in loaded} & FRAMEWORKS


ROOMS = sorted(name for name, path in MODULES.items() if path.name == "__init__.py" and name.count(".") == 1)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_offer_what_they_show_to_type_checkers(room):
    if room in ("deit.model_keras", "deit.recipe", "deit.recipes", "deit.serve", "deit.words"):  # not lazy, or an extra
        return
    shown = {
        alias.name
        for node in ast.walk(ast.parse(MODULES[room].read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith(f"{room}.")
        for alias in node.names
    }
    offered = run_python(f"import {room} as room; print(*dir(room)); [getattr(room, name) for name in dir(room)]")
    assert shown == set(offered.split())
    # The module of a room would take the place of a name that it offers.
    assert not {name.rpartition(".")[2] for name in MODULES if name.startswith(f"{room}.")} & shown


def test_torchvision_and_pickle_stay_out():
    for path in FILES:
        names = {name.split(".")[0] for name in imports(path)}
        assert "torchvision" not in names
        if path.stem != "hub":  # which names pickle's error
            assert "pickle" not in names


def best_of(count, *command):
    """Seconds of the processor, which other work on the machine doesn't lengthen."""
    times = []
    for _ in range(count):
        started = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime)
    return min(times)


def test_start_up_is_quick():
    """Beyond what the interpreter itself takes: 0.15 s for the import, 0.4 s for the help."""
    bare = best_of(5, sys.executable, "-c", "pass")
    assert best_of(5, sys.executable, "-c", "import deit, deit.config; deit.DeiTConfig") - bare < 0.15
    assert best_of(5, sys.executable, "-m", "deit", "--help") < 0.4


def test_import_loads_no_framework():
    loaded = run_python("import sys, deit; deit.DeiTConfig, deit.VARIANTS; print(*sys.modules)").split()
    assert not {name.split(".")[0] for name in loaded} & (FRAMEWORKS | {"numpy", "PIL"})


def test_every_public_name_resolves():
    assert (
        run_python(
            "import deit; print(all(getattr(deit, name) is not None for name in deit.__all__), "
            "set(deit.__all__) <= set(dir(deit)))"
        )
        == "True True"
    )
    shown = run_python("import deit\ntry: deit.nothing\nexcept AttributeError as error: print(error)")
    assert "no attribute 'nothing'" in shown


@pytest.mark.parametrize("page", PAGES)
def test_documented_commands_parse(page):
    text = (ROOT / page).read_text()
    for command in commands(text):
        parser().parse_args(command)  # or it ends with a message
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets


def test_test_files_have_names_of_their_own():
    """pytest collects files of the same name as one module."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
