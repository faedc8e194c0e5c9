"""Scripts that let a shell complete `deit`'s commands. `shtab` makes them from the parser."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deit import host
from deit.choices import Shell
from deit.recipes import shipped

_FILES = ("IMAGE", "INPUT", "MODEL", "FILE", "OTHER", "DATA")
"""Meta-variables of arguments that are files or folders, although they may be something else too."""
_DEVICES = ("auto", "cpu", "cuda")


def script(parser: argparse.ArgumentParser, shell: Shell) -> str:
    """The script for a shell. Marks the parser's arguments with what completes them.

    Raises `ImportError` if shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise host.missing("deit completion needs shtab", "completion") from None
    recipes = _names_or_files("recipes", list(shipped()))
    devices = shtab.cmd(f"printf '%s\\n' {shlex.join(_DEVICES)}")
    for action in _actions(parser):
        if action.dest in ("recipe", "name"):
            action.complete = recipes  # type: ignore[attr-defined]
        elif action.metavar == "DEVICE":
            action.complete = devices  # type: ignore[attr-defined]
        elif action.type is Path or action.metavar in _FILES or action.dest in ("source", "teacher"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


def _names_or_files(what: str, names: list[str]) -> dict[str, Any]:
    """What `shtab` needs to complete one of these names, or a file."""
    function, words = f"_deit_{what}_or_file", shlex.join(names)
    return {
        "bash": function,
        "zsh": function,
        "fish": f"{words} (__fish_complete_path (commandline -ct))",
        "preamble": {
            "bash": f'{function}() {{\n  compgen -W {shlex.quote(words)} -- "$1"\n  compgen -f -- "$1"\n}}',
            "zsh": f"{function}() {{\n  _alternative '{what}:{what}:({words})' 'files:file:_files'\n}}",
        },
    }


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _actions(each)
