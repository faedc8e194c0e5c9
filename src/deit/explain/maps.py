"""Maps over a classifier's patches that show what its answer rests on, for the class token and the distillation token.

B images, N tokens (prefix and patches), H heads, C classes, R x S grid of P patches, M ways to hide patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from deit.choices import Method
from deit.model.heads import head_scores
from deit.model.merging import gathered, shared
from deit.model.network import DeiTForImageClassification, DeiTForImageClassificationWithTeacher
from deit.model.outputs import ModelOutput

Token = Literal["class", "distillation"]
Target = int | Tensor | None
"""The class to explain: one for all images, or integers (B,). None explains each head's own decision."""

METHODS: tuple[Method, ...] = get_args(Method)
_BATCH = 32
_STEPS = 32
"""Number of steps from a whole image to an empty one. A grid with fewer patches takes a step for each patch."""


# ---------------------------------------------------------------------------------------------------------------- maps


def explain(model: nn.Module, pixels: Tensor, method: Method, target: Target = None) -> dict[Token, Tensor]:
    """Returns a map for each token that has a head of its own: how much each patch counts, (B, R, S), 0 or more.

    Values can be compared within a map, but not between maps. The model runs in evaluation mode and gets its own mode
    back. Gradients of its parameters are neither needed nor changed. If blocks merge patches (`config.merge`), what a
    token has goes back to its patches in equal parts.

    Args:
        model: `DeiTForImageClassification` or `DeiTForImageClassificationWithTeacher`, with at least two classes.
        pixels: (B, channels, height, width), normalised, of the model's size.
        method:
            `rollout`: the token's row of the product over blocks of (A + I) / 2, where A is the mean of the heads'
            attention (Abnar & Zuidema 2020, arXiv 2005.00928). It sums to at most 1 and is the same for every target.
            `relevance`: the token's row of the product over blocks of I + Ā. Ā is the mean over heads of the positive
            part of attention times its gradient, for the logit of `target` in the token's head (Chefer, Gur & Wolf
            2021, arXiv 2103.15679, equations 5 and 6).
            `attention`: the mean of the heads' attention from the token in the last block. It is the same for every
            target.
        target: the class that `relevance` explains.

    Raises `ValueError` for another model, method or target.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
    config = checked(model).config
    maps: dict[Token, Tensor] = {}
    with evaluating(model), torch.inference_mode(False), torch.set_grad_enabled(method == "relevance"):
        # The image needs a gradient, because otherwise the attention has none if every parameter is frozen.
        pixels = pixels.detach().clone().requires_grad_(pixels.is_floating_point() and method == "relevance")
        out = model(pixels, output_attentions=True, output_hidden_states=False, return_dict=True)
        logits = _logits(out)
        targets = _targets(logits, target)
        heads = [attention.detach().float() for attention in out.attentions]  # a block's: (B, H, N, N)
        held = [None] * len(heads) if out.token_of_patch is None else out.token_of_patch[:-1]  # a block's: (B, P)
        for place, (token, scores) in enumerate(logits.items()):
            row = torch.eye(heads[0].shape[-1], device=pixels.device)[place].expand(len(pixels), -1)  # (B, prefix + P)
            match method:
                case "rollout":  # the rows of A sum to 1, and so do the rows of (A + I) / 2
                    for attention, of_patch in zip(reversed(heads), reversed(held), strict=True):
                        row = (_through(row, attention.mean(1), of_patch) + row) / 2
                case "relevance":
                    chosen = _of(targets[token], scores).sum()
                    slopes = torch.autograd.grad(chosen, out.attentions, retain_graph=True)
                    for attention, slope, of_patch in zip(
                        reversed(heads), reversed(slopes), reversed(held), strict=True
                    ):
                        row = row + _through(row, (attention * slope.float()).clamp(min=0).mean(1), of_patch)
                case "attention":
                    row = _through(row, heads[-1].mean(1), held[-1])
            maps[token] = row[:, config.num_prefix_tokens :].unflatten(1, config.grid)
    return maps


def _through(row: Tensor, weights: Tensor, token_of_patch: Tensor | None) -> Tensor:
    """A row over prefix and patches (B, prefix + P) times a block's weights (B, N, N), which are over its tokens."""
    if token_of_patch is None:
        return (row.unsqueeze(1) @ weights).squeeze(1)
    prefix, tokens = row.shape[1] - token_of_patch.shape[1], weights.shape[-1]
    row = gathered(row, token_of_patch, prefix, tokens)
    return shared((row.unsqueeze(1) @ weights).squeeze(1), token_of_patch, prefix)


@torch.no_grad()
def occlusion(model: nn.Module, pixels: Tensor, target: Target = None) -> dict[Token, Tensor]:
    """Returns a map for each token's head: how much its probability of `target` drops if a grey square hides a patch.

    Maps are (B, R, S), with values from -1 to 1. This measures from outside what `explain` infers from inside (Zeiler &
    Fergus 2014, arXiv 1311.2901), and costs a forward pass for each patch. Grey is 0, the normalised mean. Arguments
    and errors are as for `explain`.
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
    """Two scores of a map, which judge whether the answer rests on the patches that the map ranks first.

    Each is the mean probability of the target over all fractions of patches, by the trapezoid rule, (B,) (Petsiuk et
    al. 2018, RISE, arXiv 1806.07421).
    """

    deletion: Tensor
    """The mean while the patches turn grey, the first one first. Lower is better."""
    insertion: Tensor
    """The mean while the patches are uncovered in a grey image, the first one first. Higher is better."""


@torch.no_grad()
def deletion_insertion(
    model: nn.Module, pixels: Tensor, maps: Mapping[Token, Tensor], target: Target = None
) -> dict[Token, Faithfulness]:
    """Returns deletion and insertion of each token's map (B, R, S), by the probabilities of the token's own head.

    Patches change in at most 32 steps. Patches of equal value go row by row, from left to right. Other arguments and
    errors are as for `explain`.
    """
    shape = (len(pixels), *checked(model).config.grid)
    with evaluating(model):
        _, targets = decided(model, pixels, target)
        for token, values in maps.items():
            if token not in targets or values.shape != shape:
                raise ValueError(
                    f"a map for the {token} token is {tuple(values.shape)}, expected {shape} for the "
                    f"{' and '.join(targets)} token; take maps that explain or occlusion made for these images"
                )
        orders = {token: values.flatten(1).argsort(descending=True, stable=True) for token, values in maps.items()}
        return {token: _areas(model, pixels, order, {token: targets[token]})[token] for token, order in orders.items()}


@torch.no_grad()
def random_order(
    model: nn.Module, pixels: Tensor, target: Target = None, *, orders: int = 5, seed: int = 0
) -> dict[Token, Faithfulness]:
    """Returns the scores of a map without meaning: the mean over `orders` random orders of the patches."""
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
    """Scores one order of patches (B, P), the first to change in front."""
    patches = order.shape[1]
    counts = torch.linspace(0, patches, min(patches, _STEPS) + 1).round()
    turned = order.argsort(-1).cpu() < counts.view(-1, 1, 1)  # (M, B, P): patches that have changed
    areas = {}
    for token, answers in _probabilities(model, pixels, torch.cat([~turned, turned]), targets).items():
        removed, revealed = (torch.trapezoid(curve.T, counts.to(curve) / patches) for curve in answers.chunk(2))
        areas[token] = Faithfulness(removed, revealed)
    return areas


def _probabilities(
    model: nn.Module, pixels: Tensor, seen: Tensor, targets: Mapping[Token, Tensor]
) -> dict[Token, Tensor]:
    """The probabilities (M, B) that each token's head gives to `targets` if all patches outside `seen` (M, B, P) are
    grey."""
    config: Any = model.config
    (rows, columns), (height, width) = config.grid, config.patch_hw
    flat = seen.to(pixels.device).flatten(0, 1).unflatten(1, (rows, columns))  # (M * B, R, S)
    owners = torch.arange(len(pixels), device=pixels.device).repeat(len(seen))
    found: dict[Token, list[Tensor]] = {token: [] for token in targets}
    for some, owner in zip(flat.split(_BATCH), owners.split(_BATCH), strict=True):
        shown = torch.zeros_like(pixels[owner])  # grey beyond the last whole patch too, which no model sees
        area = (..., slice(rows * height), slice(columns * width))
        shown[area] = pixels[owner][area] * some.repeat_interleave(height, 1).repeat_interleave(width, 2).unsqueeze(1)
        output = model(shown, output_attentions=False, output_hidden_states=False, return_dict=True)
        by_head = head_scores(output, checked(model).config.scoring)
        for token, target in targets.items():
            found[token].append(_of(target[owner], by_head[token]))
    return {token: torch.cat(parts).unflatten(0, seen.shape[:2]) for token, parts in found.items()}


# ----------------------------------------------------------------------------------------------------- models, targets


def checked(model: nn.Module) -> Any:
    """Returns the model. Raises `ValueError` if it can't be explained."""
    if not isinstance(model, DeiTForImageClassification | DeiTForImageClassificationWithTeacher):
        raise ValueError(
            f"a {type(model).__name__} can't be explained, because the maps show attention, and a decision between "
            "classes; give a DeiT or ViT classifier, such as the student of a fit (RUN/student/model)"
        )
    if (model.config.num_labels or 0) < 2:
        raise ValueError(
            f"the model has {model.config.num_labels} outputs, expected 2 or more, because the maps explain a decision "
            "between classes; give a DeiT or ViT classifier"
        )
    if model.config.scoring == "none":
        raise ValueError(
            "the model is a regression, and the maps explain how likely a class is; give a DeiT or ViT classifier"
        )
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode, and gives every part its own mode back afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _logits(out: ModelOutput) -> dict[Token, Tensor]:
    """The logits (B, C) of each token's own head, in the order of the tokens."""
    if "cls_logits" in out:
        return {"class": out["cls_logits"], "distillation": out["distillation_logits"]}
    return {"class": out["logits"]}


def _targets(logits: Mapping[Token, Tensor], target: Target) -> dict[Token, Tensor]:
    """The class to explain, (B,), for each token."""
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
    """For each token, its head's probabilities for the whole image (B, C), and the target (B,).

    They are the head's scores in `head_scores`, so labels that don't exclude each other have a probability each.
    """
    output = model(pixels, output_attentions=False, output_hidden_states=False, return_dict=True)
    logits, scores = _logits(output), head_scores(output, checked(model).config.scoring)
    return {token: scores[token] for token in logits}, _targets(logits, target)


def _of(target: Tensor, scores: Tensor) -> Tensor:
    """The scores (B,) of the target (B,) among `scores` (B, C)."""
    return scores.gather(1, target.unsqueeze(1)).squeeze(1)
