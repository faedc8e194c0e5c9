"""Recipes of your own: a file of functions that return one, for the command line and for Python.

    deit train examples/custom_recipe.py:small --data photos --out runs/small
    deit train examples/custom_recipe.py:small_soft --data photos --out runs/soft \\
        --set objective.teacher=runs/small/model
    python examples/custom_recipe.py --data photos --out runs/compared

A recipe is the complete description of an experiment, so a changed copy is a second experiment. The last command trains
two that differ in one field, and tests whether the difference between them may be chance.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from deit.config import VARIANTS
from deit.data import read_data
from deit.evaluate import examine_split
from deit.recipe import (
    AdamW,
    Augment,
    Cosine,
    Data,
    Distilled,
    Erase,
    Mix,
    Recipe,
    ResizedCrop,
    Supervised,
    epochs,
    override,
)
from deit.train import train


def small() -> Recipe:
    """A quarter of a DeiT-Ti, from scratch, on images of 64 pixels."""
    return Recipe(
        name="small",
        model=VARIANTS["deit-tiny-patch16-224"].replace(
            image_size=64, patch_size=8, num_hidden_layers=6, drop_path_rate=0.1, num_labels=2
        ),
        data=Data(batch=64),
        augment=Augment(crop=ResizedCrop(scale=(0.3, 1.0)), flip=0.5, erase=Erase(), mix=Mix(mixup=0.2, cutmix=1.0)),
        objective=Supervised(smoothing=0.1),
        optim=AdamW(lr=1e-3, per_images=64, weight_decay=0.05, clip=1.0),
        schedule=Cosine(total=epochs(30), warmup=epochs(2)),
        ema=0.99,
        patience=0.5,
    )


def small_soft() -> Recipe:
    """The same, taught by a teacher's probabilities; name it with `--set objective.teacher=RUN/model`."""
    recipe = small()
    return replace(
        recipe,
        name="small_soft",
        model=recipe.model.replace(distillation_token=True),
        objective=Distilled(kind="soft", temperature=3.0, smoothing=0.1),
    )


parser = argparse.ArgumentParser(description="Trains a recipe with and without mixed images, and compares the models.")
parser.add_argument("--data", required=True, help="folder or list of labelled images")
parser.add_argument("--out", required=True, help="folder for the two runs")
parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field in both recipes")


def main():
    options = parser.parse_args()
    recipes = {
        name: override(small(), [*options.set, *more])
        for name, more in (("mixed", []), ("plain", ["augment.mix=None"]))
    }
    splits = read_data(options.data, holdout=recipes["mixed"].data.holdout, seed=recipes["mixed"].seed)
    models = {name: train(recipe, *splits, Path(options.out) / name).model for name, recipe in recipes.items()}
    found = examine_split(models["mixed"], splits[1], options.data, "val", other=models["plain"]).comparison
    print(
        f"mixed {found.first.value:.3f}, plain {found.second.value:.3f}: p = {found.p_value:.3f} on {found.images} "
        "validation images"
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(str(error))
