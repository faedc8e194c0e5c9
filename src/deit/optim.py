"""Parameter groups, optimizer, learning rate, and the average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from deit.recipe import AdamW, Cosine


def parameter_groups(model: nn.Module, recipe: AdamW) -> list[dict[str, object]]:
    """Two groups, with and without weight decay.

    No decay on vectors (biases, norms, LayerScale), positions, class and mask token, as in the original code; the
    distillation token as the recipe says.
    """
    free = {"position", "cls_token", "mask_token"} | (set() if recipe.decay_distillation_token
                                                      else {"distillation_token"})
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = parameter.ndim <= 1 or name.rpartition(".")[2] in free
            (exempt if is_exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def optimizer(model: nn.Module, recipe: AdamW) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr, betas=recipe.betas,
                             eps=recipe.eps, fused=True)


class EMA:
    """A copy of the model whose parameters follow at `1 - decay` of the way per update; buffers are the model's.

    The first updates follow faster, at `1 / (updates + 1)` of the way: the average forgets where it started.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        step = max(1.0 - self.decay, 1.0 / (self.updates + 1))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), step)
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)


def peak_lr(recipe: AdamW, batch: int) -> float:
    """The recipe's learning rate scaled to the batch (Touvron et al. 2020, section 6: lr x batch / 512)."""
    return recipe.lr * batch / recipe.per_images


def learning_rate(recipe: Cosine, peak: float, step: int, steps_per_epoch: int) -> float:
    """Learning rate of update `step`, counted from 0; after `recipe.total` it stays at the floor."""
    warmup, total = recipe.warmup.in_steps(steps_per_epoch), recipe.total.in_steps(steps_per_epoch)
    if step < warmup:
        return recipe.start + (peak - recipe.start) * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return recipe.floor + (peak - recipe.floor) * (1 + math.cos(math.pi * done)) / 2
