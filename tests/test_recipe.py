"""Recipes as records."""

import inspect
import json
from dataclasses import FrozenInstanceError, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

import deit.recipes
from deit.config import DeiTConfig
from deit.recipe import AdamW, Cosine, Data, Distilled, Recipe, Supervised, epochs, steps

GOLDEN = Path(__file__).parent / "golden" / "recipes.json"


def shipped():
    """Every recipe in deit.recipes, by name."""
    modules = [import_module(f"deit.recipes.{found.name}") for found in iter_modules(deit.recipes.__path__)]
    functions = [function for module in modules for name, function in inspect.getmembers(module, inspect.isfunction)
                 if function.__module__ == module.__name__ and not name.startswith("_")]
    return {function.__name__: function() for function in functions}


def test_the_numbers_of_every_recipe_are_as_recorded():
    """A changed experiment shows as a changed number: after a deliberate change, write the file anew with
    `python tests/test_recipe.py`."""
    found = {name: recipe.to_dict() for name, recipe in shipped().items()}
    assert json.loads(json.dumps(found)) == json.loads(GOLDEN.read_text())


def test_a_recipe_is_named_as_its_function():
    assert {name: recipe.name for name, recipe in shipped().items()} == {name: name for name in shipped()}


@pytest.mark.parametrize(("duration", "expected"), [(epochs(5), 500), (epochs(0.5), 50), (steps(7), 7)])
def test_durations(duration, expected):
    assert duration.in_steps(100) == expected


def test_refusals():
    with pytest.raises(ValueError, match="can't be negative"):
        epochs(-1)
    with pytest.raises(ValueError, match="must be positive"):
        AdamW(lr=0.0, per_images=512)
    plain = Recipe(name="plain", model=DeiTConfig(distillation_token=False), data=Data(batch=8),
                   objective=Supervised(), optim=AdamW(lr=1e-3, per_images=512), schedule=Cosine(total=epochs(1)))
    with pytest.raises(ValueError, match="distillation needs a model with a distillation token"):
        replace(plain, objective=Distilled(teacher="x"))
    with pytest.raises(ValueError, match="ema must be at least 0 and below 1, found 1"):
        replace(plain, ema=1.0)
    with pytest.raises(FrozenInstanceError):
        plain.seed = 1


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    recorded = {name: recipe.to_dict() for name, recipe in shipped().items()}
    GOLDEN.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")
