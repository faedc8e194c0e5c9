"""Builds the model that a recipe trains: freshly initialised, or with the weights of another run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deit import files, weights
from deit.config import ConvNetConfig, DeiTConfig, TimmConfig
from deit.data.batches import processor_for
from deit.data.folders import nfc
from deit.model.convnet import ConvNet
from deit.model.network import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    PreTrained,
)
from deit.model.timm_classifier import TimmClassifier, find_start
from deit.recipe import Distilled, LoRA, MaskedImage, Recipe
from deit.train import tuning
from deit.train.guidance import GuidedStudent
from deit.train.teacher import find_teacher
from deit.weights import hub

_SAME = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "num_channels",
    "qkv_bias",
    "position_on_class_token",
)
"""Fields that must be the same in a model and in the weights that it starts from."""
_HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.")


def build_model(recipe: Recipe, classes: Sequence[str]) -> nn.Module:
    """Builds a model of the class that the recipe's objective trains, with the data's labels, on the CPU.

    Fresh values depend on `recipe.seed` alone. With `recipe.start`, every tensor that the start has is taken from it.
    Positions are resized to the recipe's grid (bicubic), and the patch projection to its patches. A distillation token
    is added or left out. Heads are kept if the start's labels are the data's, in the same order, and fresh otherwise.
    All of the model can be trained, whatever `recipe.tuning` is: see `tuning.tune`.

    Raises `ValueError` if the start has another architecture, or no distillation token and `recipe.tuning` would keep a
    fresh one, and `FileNotFoundError` and `CheckpointError` as
    `from_pretrained` does.
    """
    config = recipe.model.replace(id2label=dict(enumerate(classes)))
    torch.manual_seed(recipe.seed)
    if isinstance(config, ConvNetConfig):
        return ConvNet(config)
    if isinstance(config, TimmConfig):
        found = TimmClassifier(config.replace(pretrained_cfg=processor_for(recipe).to_timm()))
        if recipe.start:
            with _starting(recipe.start):
                found.start_from(recipe.start)
        return found
    model: PreTrained
    if isinstance(recipe.objective, MaskedImage):
        model = DeiTForMaskedImageModeling(config.replace(encoder_stride=config.patch_size))
    elif isinstance(recipe.objective, Distilled) and recipe.objective.token == "distillation":
        distilled = GuidedStudent if recipe.objective.guidance else DeiTForImageClassificationWithTeacher
        model = distilled(config)
    else:
        model = DeiTForImageClassification(config)
    if recipe.start:
        with _starting(recipe.start):
            checkpoint = hub.read_checkpoint(recipe.start)
        _start_from(model, checkpoint, classes)
        token = weights.BASE + "distillation_token"
        if recipe.tuning is not None and model.config.distillation_token and token not in checkpoint.tensors:
            raise ValueError(
                f"start {checkpoint.file} has no distillation token, and tuning={type(recipe.tuning).__name__} would "
                "keep a random one; set tuning=None, or model.distillation_token=False with objective.token=class"
            )
    return model


def find_sources(recipe: Recipe) -> None:
    """Raises `FileNotFoundError` if the weights that a recipe starts from, or its teacher, are not there.

    Raises `ImportError` if it has adapters and `peft` is missing. Long work begins with it. What comes from the hub is
    fetched.
    """
    if isinstance(recipe.tuning, LoRA):
        tuning.find_peft()
    if recipe.start:
        with _starting(recipe.start):
            if isinstance(recipe.model, TimmConfig):
                find_start(recipe.start, recipe.model)
            else:
                hub.find_weights(recipe.start)
    find_teacher(recipe)


@contextmanager
def _starting(start: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the recipe starts from {start}: {error}; set it with --set start=FOLDER, or train from scratch with "
            "--set start=none"
        ) from None


@torch.no_grad()
def _start_from(model: PreTrained, found: hub.Checkpoint, classes: Sequence[str]) -> None:
    ours, theirs = model.config, found.config
    for name in (*_SAME, "layer_scale_init_value"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if name == "layer_scale_init_value":  # its value matters only to a fresh model
            mine, other = mine is not None, other is not None
        if mine != other:
            raise ValueError(
                f"start {found.file} has {name}={getattr(theirs, name)}, the recipe's model has "
                f"{getattr(ours, name)}; set model.{name}, or choose another start"
            )
    same_labels = list(map(nfc, (theirs.id2label or {}).values())) == list(map(nfc, classes))
    missing = []
    for name, tensor in model._tensors().items():
        given = found.tensors.get(name)
        if name == weights.BASE + "position" and given is not None:
            tensor.copy_(_positions(given, theirs, ours, tensor))
        elif name == weights.BASE + "patch.weight" and given is not None and given.shape != tensor.shape:
            tensor.copy_(torch.from_numpy(weights.resize_kernel(given.float().numpy(), ours.patch_hw)))
        elif given is not None and given.shape == tensor.shape and (same_labels or not name.startswith(_HEADS)):
            tensor.copy_(given)
        elif not name.startswith((*_HEADS, "decoder.", "deit.mask_token", "deit.distillation_token")):
            missing.append(name)
    if missing:
        raise files.CheckpointError(
            f"start {found.file} lacks {missing[0]}, which the recipe's model needs, so it is incomplete or "
            "another model's; choose another start"
        )


def _positions(given: Tensor, theirs: DeiTConfig, ours: DeiTConfig, fresh: Tensor) -> Tensor:
    """(1, prefix + patches, D): the start's positions, resized to our grid. That of a token it lacks stays fresh."""
    resized = torch.from_numpy(weights.resize_positions(given.float().numpy(), theirs, ours))
    prefix, grid = resized.tensor_split([theirs.num_prefix_positions], dim=1)
    front = fresh[:, : ours.num_prefix_positions].clone()
    shared = min(ours.num_prefix_positions, theirs.num_prefix_positions)
    front[:, :shared] = prefix[:, :shared]
    return torch.cat([front, grid], dim=1)
