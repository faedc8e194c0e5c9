"""Settings of the command line: `--set FIELD=VALUE` changes one field of a recipe."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from deit.config import DeiTConfig
from deit.plain import check, from_plain, known, to_plain
from deit.recipe import learning, views
from deit.recipe.learning import Duration, epochs, steps
from deit.recipe.whole import Recipe

_CALLS: dict[str, Any] = {
    name: value
    for part in (views, learning)
    for name, value in vars(part).items()
    if is_dataclass(value) and not name.startswith("_") and value is not Duration
} | {"epochs": epochs, "steps": steps}
"""What a setting may call."""


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """A copy with changed fields. Each setting is written `a.b=value`, with the value as in a recipe's Python.

    Examples: `optim.lr=1e-3`, `schedule.total=epochs(30)`, `augment.mix=None`, `optim=LAMB(lr=5e-3, per_images=2048)`,
    `objective.teacher=timm:regnety_160`. All settings are applied before the whole recipe is checked.
    """
    values = recipe.to_dict()
    if isinstance(recipe.model, DeiTConfig):
        values["model"].setdefault("merge", 0)  # which is not written if it is 0
    for setting in settings:
        path, equals, text = setting.partition("=")
        check(bool(equals), f"--set {setting}: expected FIELD=VALUE, e.g. optim.lr=1e-3")
        *owners, last = path.strip().split(".")
        place: Any = values
        for depth, name in enumerate([*owners, last]):
            check(
                isinstance(place, dict),
                f"--set {setting}: {'.'.join(owners[:depth])} is {place!r} and has no "
                f"field {name!r}; set it as a whole first, e.g. augment.erase=Erase()",
            )
            kind = f": {place['kind_of']}" if depth and "kind_of" in place else ""
            known(name, place.keys() - {"kind_of"}, f"--set {setting}{kind}")
            place = place[name] if depth < len(owners) else place
        place[last] = to_plain(_parse(text.strip(), setting))
    return Recipe.from_dict(values)


def _parse(text: str, setting: str) -> Any:
    """A literal, or a call of one of `_CALLS`; anything else is the text itself."""
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        return text
    if isinstance(node, ast.Call):
        return _called(node, setting)
    try:
        return {"true": True, "false": False, "none": None}.get(text.lower(), ast.literal_eval(node))
    except (ValueError, TypeError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _called(node: ast.Call, setting: str) -> Any:
    """The result of a call of one of `_CALLS`. Its arguments are checked like those of a `recipe.json`."""
    name, where = ast.unparse(node.func), f"--set {setting}"
    known(name, _CALLS, where)
    arguments = [_parse(ast.unparse(value), setting) for value in node.args]
    named = {str(keyword.arg): _parse(ast.unparse(keyword.value), setting) for keyword in node.keywords}
    if not is_dataclass(_CALLS[name]):
        check(len(arguments) == 1 and not named, f"{where}: expected {name}(NUMBER), e.g. {name}(30)")
        return from_plain({"amount": arguments[0], "unit": name}, Duration, f"{where}: {name}")
    own = [f"{f.name}=..." for f in fields(_CALLS[name])]
    check(not arguments, f"{where}: {name} takes its arguments by name: {name}({', '.join(own)})")
    return from_plain({key: to_plain(value) for key, value in named.items()}, _CALLS[name], f"{where}: {name}")
