"""What a classifier looked at: maps over its patches, for the class and the distillation token side by side.

B images, N tokens (prefix and patches), H heads, C classes, R x S grid of P patches, M ways to hide patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from deit.choices import Method
from deit.model.network import DeiTForImageClassification, DeiTForImageClassificationWithTeacher, head_probabilities
from deit.model.outputs import ModelOutput

Token = Literal["class", "distillation"]
Target = int | Tensor | None
"""The class to explain: one for all images, or (B,) integers. None: what each head decides itself."""

METHODS: tuple[Method, ...] = get_args(Method)
_BATCH = 32
_STEPS = 32
"""Number of steps from a whole image to an empty one; fewer where the grid has fewer patches."""


# ---------------------------------------------------------------------------------------------------------------- maps


def explain(model: nn.Module, pixels: Tensor, method: Method, target: Target = None) -> dict[Token, Tensor]:
    """How much each patch counts for each token that has a head of its own: maps (B, R, S), 0 or more.

    Only within a map do values compare. In evaluation mode, which is restored; gradients of parameters are neither
    needed nor left.

    Args:
        model: `DeiTForImageClassification` or `DeiTForImageClassificationWithTeacher`, of two classes or more.
        pixels: (B, channels, height, width), normalised, of the model's size.
        method:
            `rollout`: the token's row of the product over blocks of (A + I) / 2, A the mean of the heads' attention
            (Abnar & Zuidema 2020, arXiv 2005.00928). Sums to at most 1; the same for every target.
            `relevance`: the token's row of the product over blocks of I + Ā, Ā the mean over heads of the positive
            part of attention times its gradient, of the logit of `target` in the token's head (Chefer, Gur & Wolf
            2021, arXiv 2103.15679, equations 5 and 6).
            `attention`: the mean of the heads' attention from the token in the last block. The same for every target.
        target: what `relevance` explains.

    Raises `ValueError` for another model, method or target.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
    config = checked(model).config
    maps: dict[Token, Tensor] = {}
    with evaluating(model), torch.inference_mode(False), torch.set_grad_enabled(method == "relevance"):
        # The image needs a gradient so that the attention has one also where every parameter is frozen.
        pixels = pixels.detach().clone().requires_grad_(pixels.is_floating_point() and method == "relevance")
        out = model(pixels, output_attentions=True, output_hidden_states=False, return_dict=True)
        logits = _logits(out)
        targets = _targets(logits, target)
        heads = [attention.detach().float() for attention in out.attentions]  # a block's: (B, H, N, N)
        for place, (token, scores) in enumerate(logits.items()):
            row = torch.eye(heads[0].shape[-1], device=pixels.device)[place].expand(len(pixels), 1, -1)  # (B, 1, N)
            match method:
                case "rollout":  # the rows of A sum to 1, and so do those of (A + I) / 2
                    for attention in reversed(heads):
                        row = (row @ attention.mean(1) + row) / 2
                case "relevance":
                    chosen = _of(targets[token], scores).sum()
                    slopes = torch.autograd.grad(chosen, out.attentions, retain_graph=True)
                    for attention, slope in zip(reversed(heads), reversed(slopes), strict=True):
                        row = row + row @ (attention * slope.float()).clamp(min=0).mean(1)
                case "attention":
                    row = row @ heads[-1].mean(1)
            maps[token] = row[:, 0, config.num_prefix_tokens :].unflatten(1, config.grid)
    return maps


@torch.no_grad()
def occlusion(model: nn.Module, pixels: Tensor, target: Target = None) -> dict[Token, Tensor]:
    """How much the probability of `target` by each token's head drops when a grey square hides one patch: (B, R, S),
    -1 to 1.

    What `explain` infers from inside, measured from outside (Zeiler & Fergus 2014, arXiv 1311.2901), at the price of
    a forward pass for each patch. Grey is the normalised mean, 0. Arguments and errors as for `explain`.
    """
    config = checked(model).config
    with evaluating(model):
        whole, targets = decided(model, pixels, target)
        alone = torch.eye(config.num_patches, dtype=torch.bool, device=pixels.device)
        seen = ~alone.unsqueeze(1).expand(-1, len(pixels), -1)  # (P, B, P)
        after = _probabilities(model, pixels, seen, targets)
    return {
        token: (_of(targets[token], whole[token]) - without).T.unflatten(1, config.grid)
        for token, without in after.items()
    }


# ----------------------------------------------------------------------------------------------------- judging a map


class Faithfulness(NamedTuple):
    """Whether the patches that a map ranks first are those that the answer rests on (Petsiuk et al. 2018, RISE, arXiv
    1806.07421): the mean probability of the target over all fractions of patches, by the trapezoid rule, each (B,).
    """

    deletion: Tensor
    """While the first are turned grey: the lower, the better."""
    insertion: Tensor
    """While the first are uncovered in a grey image: the higher, the better."""


@torch.no_grad()
def deletion_insertion(
    model: nn.Module, pixels: Tensor, maps: Mapping[Token, Tensor], target: Target = None
) -> dict[Token, Faithfulness]:
    """Deletion and insertion of each token's map (B, R, S), in 32 steps at most; patches of equal value go in the order
    of reading. Probabilities are by the token's own head. Other arguments and errors as for `explain`."""
    shape = (len(pixels), *checked(model).config.grid)
    with evaluating(model):
        _, targets = decided(model, pixels, target)
        for token, values in maps.items():
            if token not in targets or values.shape != shape:
                raise ValueError(
                    f"a map for the {token} token is {tuple(values.shape)}, expected {shape} for the "
                    f"{' and '.join(targets)} token; explain and occlusion make them"
                )
        orders = {token: values.flatten(1).argsort(descending=True, stable=True) for token, values in maps.items()}
        return {token: _areas(model, pixels, order, {token: targets[token]})[token] for token, order in orders.items()}


@torch.no_grad()
def random_order(
    model: nn.Module, pixels: Tensor, target: Target = None, *, orders: int = 5, seed: int = 0
) -> dict[Token, Faithfulness]:
    """What a map without meaning scores: the mean of `deletion_insertion` over some random orders of the patches."""
    patches = checked(model).config.num_patches
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model):
        _, targets = decided(model, pixels, target)
        found = [
            _areas(model, pixels, torch.rand(len(pixels), patches, generator=generator).argsort(-1), targets)
            for _ in range(orders)
        ]
    return {
        token: Faithfulness(
            *(torch.stack(areas).mean(0) for areas in zip(*(each[token] for each in found), strict=True))
        )
        for token in targets
    }


def _areas(
    model: nn.Module, pixels: Tensor, order: Tensor, targets: Mapping[Token, Tensor]
) -> dict[Token, Faithfulness]:
    """For one order of patches, (B, P) with the first to go in front."""
    patches = order.shape[1]
    counts = torch.linspace(0, patches, min(patches, _STEPS) + 1).round()
    turned = order.argsort(-1).cpu() < counts.view(-1, 1, 1)  # (M, B, P): whose turn has come
    areas = {}
    for token, answers in _probabilities(model, pixels, torch.cat([~turned, turned]), targets).items():
        removed, revealed = (torch.trapezoid(curve.T, counts.to(curve) / patches) for curve in answers.chunk(2))
        areas[token] = Faithfulness(removed, revealed)
    return areas


def _probabilities(
    model: nn.Module, pixels: Tensor, seen: Tensor, targets: Mapping[Token, Tensor]
) -> dict[Token, Tensor]:
    """Probabilities (M, B) of `targets` by each token's head, with every patch grey that is not in `seen` (M, B, P)."""
    config: Any = model.config
    (rows, columns), (height, width) = config.grid, config.patch_hw
    flat = seen.to(pixels.device).flatten(0, 1).unflatten(1, (rows, columns))  # (M * B, R, S)
    owners = torch.arange(len(pixels), device=pixels.device).repeat(len(seen))
    found: dict[Token, list[Tensor]] = {token: [] for token in targets}
    for some, owner in zip(flat.split(_BATCH), owners.split(_BATCH), strict=True):
        shown = torch.zeros_like(pixels[owner])  # also what lies beyond the last whole patch, where nobody looks
        area = (..., slice(rows * height), slice(columns * width))
        shown[area] = pixels[owner][area] * some.repeat_interleave(height, 1).repeat_interleave(width, 2).unsqueeze(1)
        by_head = head_probabilities(
            model(shown, output_attentions=False, output_hidden_states=False, return_dict=True)
        )
        for token, target in targets.items():
            found[token].append(_of(target[owner], by_head[token]))
    return {token: torch.cat(parts).unflatten(0, seen.shape[:2]) for token, parts in found.items()}


# ----------------------------------------------------------------------------------------------------- models, targets


def checked(model: nn.Module) -> Any:
    """The model. Raises `ValueError` where it can't be explained."""
    if not isinstance(model, DeiTForImageClassification | DeiTForImageClassificationWithTeacher):
        raise ValueError(
            f"a {type(model).__name__} can't be explained: the maps are of attention, and of a decision "
            "between classes; give a DeiT or ViT classifier"
        )
    if (model.config.num_labels or 0) < 2:
        raise ValueError(
            f"the model has {model.config.num_labels} outputs, and explained are decisions between "
            "classes, 2 or more; give a DeiT or ViT classifier"
        )
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every part is in its own again."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _logits(out: ModelOutput) -> dict[Token, Tensor]:
    """By token, in their order, those of its own head, (B, C)."""
    if "cls_logits" in out:
        return {"class": out["cls_logits"], "distillation": out["distillation_logits"]}
    return {"class": out["logits"]}


def _targets(logits: Mapping[Token, Tensor], target: Target) -> dict[Token, Tensor]:
    """By token the class to explain, (B,)."""
    if target is None:
        return {token: scores.argmax(-1) for token, scores in logits.items()}
    count, classes = logits["class"].shape
    chosen = torch.as_tensor(target, device=logits["class"].device)
    if (
        chosen.dtype not in (torch.int64, torch.int32)
        or chosen.shape not in ((), (count,))
        or bool(((chosen < 0) | (chosen >= classes)).any())
    ):
        raise ValueError(
            f"target must be an integer from 0 to {classes - 1}, or one for each of {count} images, found "
            f"{target}; give the number of a class in config.id2label"
        )
    return dict.fromkeys(logits, chosen.long().expand(count))


def decided(model: nn.Module, pixels: Tensor, target: Target) -> tuple[dict[Token, Tensor], dict[Token, Tensor]]:
    """By token, its head's probabilities for the whole image, (B, C), and the target, (B,)."""
    logits = _logits(model(pixels, output_attentions=False, output_hidden_states=False, return_dict=True))
    return {token: scores.float().softmax(-1) for token, scores in logits.items()}, _targets(logits, target)


def _of(target: Tensor, scores: Tensor) -> Tensor:
    """(B,) those of the target (B,) among (B, C)."""
    return scores.gather(1, target.unsqueeze(1)).squeeze(1)
