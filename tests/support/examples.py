"""The examples, run in this process as `python examples/NAME.py` runs them, from another folder."""

import importlib
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


class Examples:
    def __init__(self, monkeypatch, folder):
        self.patch, self.folder = monkeypatch, folder
        monkeypatch.syspath_prepend(EXAMPLES)

    def run(self, name, *arguments):
        """Raises `SystemExit` if the example ends so."""
        self.patch.chdir(self.folder)
        self.patch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    def load(self, name):
        """The module."""
        return importlib.import_module(name)
