"""The structure itself: who imports whom, what start-up costs, and that the README's commands exist."""

import ast
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_python

from deit.cli import _parser

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "deit"

ORDER = ["host", "lazy", "files", "config", "outputs", "weights", "hub", "decode", "pixels", "image", "loss_rules", "losses",
         "pretrained", "cpu_training", "model", "export_keras", "pretrained_keras", "losses_keras", "model_keras",
         "convert", "convnet", "load", "engines", "scores", "calibration", "recipe", "recipes", "machine", "build",
         "policies", "mixing", "augment", "folders", "bulk", "data", "quantise", "export_web", "export", "predict",
         "pipelines", "calibrate", "evaluate", "tables", "explain", "records", "markup", "drawing", "report_evaluation",
         "report_maps", "report_run", "report", "serve", "teacher", "teach", "objectives", "optim", "checkpoint",
         "progress", "runs", "train", "quickstart", "cli", "__main__"]
"""A module imports only what stands before it."""

FRAMEWORKS = {"torch", "transformers", "timm", "keras", "tensorflow", "jax", "sklearn", "scipy",
              "huggingface_hub", "openvino", "nncf", "onnx", "onnxruntime"}
LIGHT = {"__init__", "files", "config", "outputs", "weights", "hub", "decode", "pixels", "image", "convert",
         "engines", "loss_rules", "recipe", "recipes", "records", "markup", "drawing", "cli"}
"""Modules that load no framework before it is needed."""


def name_of(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[0]


def imports(path, top_level_only):
    """Dotted names that a file imports, outside `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    nodes = list(tree.body) if top_level_only else [
        node for top in tree.body if not (isinstance(top, ast.If) and "TYPE_CHECKING" in ast.unparse(top.test))
        for node in ast.walk(top)]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    here = name_of(path)
    if here == "__init__":
        return
    assert here in ORDER, f"{here} has no place in ORDER yet"
    for name in imports(path, top_level_only=False):
        if name.startswith("deit."):
            there = name.split(".")[1]
            if there in ORDER and there != here:
                assert ORDER.index(there) < ORDER.index(here), f"{here} imports {there}"


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path) in LIGHT], ids=lambda path: path.stem)
def test_light_modules_load_no_framework(path):
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & FRAMEWORKS


def test_torchvision_and_pickle_stay_out():
    for path in FILES:
        names = {name.split(".")[0] for name in imports(path, top_level_only=False)}
        assert "torchvision" not in names
        if path.stem != "hub":  # which names pickle's error
            assert "pickle" not in names


def best_of(count, *command):
    times = []
    for _ in range(count):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
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
    assert run_python("import deit; print(all(getattr(deit, name) is not None for name in deit.__all__), "
                      "set(deit.__all__) <= set(dir(deit)))") == "True True"
    shown = run_python("import deit\ntry: deit.nothing\nexcept AttributeError as error: print(error)")
    assert "no attribute 'nothing'" in shown


def commands(text):
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("deit "):
                yield shlex.split(line.split(" #")[0])[1:]


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", *(
    str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md")))])
def test_documented_commands_parse(page):
    text = (ROOT / page).read_text()
    for command in commands(text):
        assert callable(_parser().parse_args(command).run)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets


def test_the_readmes_show_the_same_commands():
    english, chinese = ((ROOT / page).read_text() for page in ("README.md", "README.zh-CN.md"))
    blocks = [re.findall(r"```(?:sh|python)\n(.*?)```", text, re.DOTALL) for text in (english, chinese)]
    assert [re.sub(r" *#.*", "", block) for block in blocks[0]] == [re.sub(r" *#.*", "", block) for block in blocks[1]]
