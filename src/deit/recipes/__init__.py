"""Experiments as functions, with one file for each data set or paper and one function for each experiment."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from deit import files
from deit.recipe import Distilled, Recipe, is_code, override


def shipped() -> dict[str, Callable[..., Recipe]]:
    """Every recipe of this package by name, file by file, in the order of the source."""
    return {
        name: function
        for found in pkgutil.iter_modules(__path__)
        for name, function in _recipes_of(importlib.import_module(f"{__name__}.{found.name}")).items()
    }


def summary(function: Callable[..., Recipe]) -> str:
    """The first line of a recipe's docstring; empty if it has none."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def find(name: str) -> Recipe:
    """Finds a recipe by its shipped name, as `FILE.py:FUNCTION`, or in a `recipe.json` or the folder of a run.

    A FUNCTION is called without arguments. A shipped name wins over a folder of the same name.

    Raises `ValueError` if there is no such name or function, if the function returns something else, or if the JSON is
    not a recipe, and `FileNotFoundError` if the file is missing.
    """
    recipes = shipped()
    if name in recipes:
        return recipes[name]()
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _call(Path(file).expanduser(), function)
    if name.endswith(".py"):
        raise ValueError(f"{name} may hold many recipes; name one of its functions, as in {name}:my_recipe")
    if (place := _data(name)) is not None:
        return _read(place)
    close = difflib.get_close_matches(name, recipes, 3)
    raise ValueError(
        f"there is no recipe {name!r}; "
        + (f"did you mean {' or '.join(close)}? " if close else "")
        + "`deit recipes` lists them, and FILE.py:FUNCTION or a recipe.json works too"
    )


def find_to_run(name: str, settings: Sequence[str] = ()) -> Recipe:
    """`find`, with the changes of `override`, for a recipe that will be trained.

    A `recipe.json` may come from anybody, so it runs no code by itself: raises `ValueError` if it names a
    `FILE.py:FUNCTION` as its teacher and `settings` don't name the same.
    """
    recipe = override(find(name), settings)
    if _data(name) is None or not _runs_code(recipe):
        return recipe
    unnamed = find(name).to_dict()
    unnamed["objective"]["teacher"] = ""
    teacher = recipe.objective.teacher  # type: ignore[union-attr]
    if override(Recipe.from_dict(unnamed), settings).objective.teacher != teacher:  # type: ignore[union-attr]
        raise ValueError(
            f"{name} names the Python code {teacher} as its teacher, and training would run it, but a recipe.json runs "
            f"no code by itself; read that file, and if you trust it, add --set objective.teacher={teacher}"
        )
    return recipe


def _runs_code(recipe: Recipe) -> bool:
    """Whether training the recipe calls a teacher that is code."""
    objective = recipe.objective
    return isinstance(objective, Distilled) and is_code(objective.teacher) and not objective.cache


def _data(name: str) -> Path | None:
    """The `recipe.json` that a name leads to; None if it is a shipped recipe or code."""
    place = Path(name).expanduser()
    if name in shipped() or name.endswith(".py") or name.rpartition(":")[0].endswith(".py"):
        return None
    if place.is_dir():
        return place / "recipe.json"
    return place if place.suffix == ".json" else None


def _recipes_of(module: ModuleType) -> dict[str, Callable[..., Recipe]]:
    """The module's own public functions whose declared return type is `Recipe`."""
    return {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and not name.startswith("_")
        and function.__annotations__.get("return") in (Recipe, "Recipe")
    }


def _call(file: Path, name: str) -> Recipe:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; give the path of a Python file, as in {file.name}:{name}")
    spec = importlib.util.spec_from_file_location(f"deit_recipe_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name, None)
        if not inspect.isfunction(function):
            own = ", ".join(_recipes_of(module)) or "none that is declared to return a Recipe"
            raise ValueError(f"there is no function {name!r}; its recipes: {own}")
        recipe = function()
    except Exception as error:
        reason = " ".join(str(error).split())
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{file}: {kind}{reason}") from error
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{file}: {name} must return a Recipe, found {type(recipe).__name__}")
    return recipe


def _read(file: Path) -> Recipe:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; give a recipe.json, or the folder of a run, which holds one")
    try:
        return Recipe.from_dict(files.read_json(file))
    except files.CheckpointError as error:
        raise ValueError(f"{error}; a recipe is what `deit recipes NAME` prints") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
