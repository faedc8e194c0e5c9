"""Objectives at one step of a small recipe, as the loop calls them, and their formulas in NumPy."""

from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from support.models import scramble, small
from support.runs import small_recipe

from deit.data.batches import TrainingBatches
from deit.recipe import Augment, Cosine, Data, Distilled, Erase, MaskedImage, Mix, Recipe, ResizedCrop, steps
from deit.train import objectives, stepping
from deit.train.build import build_model

CPU = torch.device("cpu")
QUIET = Console(quiet=True)
CLASSES = ("a", "b", "c")
B, C = 8, 3
MIXED = Augment(crop=ResizedCrop(), flip=0.5, erase=Erase(), mix=Mix(mixup=0.8, cutmix=1.0, mode="element"))
TEACHER = '''
import torch
from torch import nn


def make():
    """What training mode would change: running statistics and dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
                          nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    model[1].running_mean.normal_()
    model[6].weight.data *= 6
    model[6].weight.data -= model[6].weight.data.mean(1, keepdim=True)
    model.classes, model.mean, model.std = ("c", "x", "b", "a"), (0.4, 0.5, 0.6), (0.3, 0.2, 0.1)
    return model
'''


def recipe_for(objective, **changes):
    """Everything random at once, but for masked images, whose views are only cropped."""
    token = isinstance(objective, Distilled) and objective.token == "distillation"
    masked = isinstance(objective, MaskedImage)
    parts = {
        "name": "x",
        "model": small(distillation_token=token, num_labels=None, drop_path_rate=0.5),
        "augment": Augment(crop=ResizedCrop()) if masked else MIXED,
        "data": Data(batch=B, repeats=2),
        "schedule": Cosine(total=steps(6)),
        "evaluate": steps(6),
    }
    return small_recipe(objective, **{**parts, **changes})


@dataclass
class Case:
    """A recipe's parts at one step: what the loop gives its objective."""

    recipe: Recipe
    objective: objectives.Objective
    model: torch.nn.Module
    batches: TrainingBatches
    step: int
    rows: torch.Tensor | None

    @property
    def batch(self):
        return self.batches.mix(next(self.batches.from_step(self.step)))

    def loss(self):
        return self.objective(self.model, self.batch, self.rows)


def case(given, objective, *, step=3, seed=1, **changes):
    """The parts at one step of a scrambled model. `given`: the fixture of that name."""
    recipe = recipe_for(objective, **changes)
    found = objectives.build(recipe, given[0], CPU)
    model = scramble(build_model(recipe, CLASSES), seed).train()
    depth = stepping.depth_draws(recipe, step, found.passes)
    return Case(
        recipe,
        found,
        model,
        TrainingBatches(given[0], recipe, cycle=found.cycle),
        step,
        None if depth is None else depth.flatten(0, 1),
    )


def taught_by(given, **settings):
    """The objective of learning from the teacher of `given`."""
    return Distilled(teacher=given[2], **settings)


def number(tensor):
    return tensor.detach().double().numpy()


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def cross_entropy(x, shares, smoothing=0.0):
    """Mean over images; `shares` (B, C) are distributions."""
    return -(((1 - smoothing) * shares + smoothing / C) * log_softmax(x)).sum(-1).mean()
