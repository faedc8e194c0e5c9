"""What a classifier looked at: maps over its patches, for the class and the distillation token side by side.

B images, N tokens (prefix and patches), H heads, C classes, R x S grid of P patches, M ways to hide patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

from deit.config import DeiTConfig
from deit.data.folders import near
from deit.image.processor import DeiTImageProcessor
from deit.model.network import DeiTForImageClassification, DeiTForImageClassificationWithTeacher, head_probabilities
from deit.model.outputs import ModelOutput
from deit.predict.predictor import Predictor

Method = Literal["rollout", "relevance", "attention"]
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
    with _evaluating(model), torch.inference_mode(False), torch.set_grad_enabled(method == "relevance"):
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
    with _evaluating(model):
        whole, targets = _decided(model, pixels, target)
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
    with _evaluating(model):
        _, targets = _decided(model, pixels, target)
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
    with _evaluating(model):
        _, targets = _decided(model, pixels, target)
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
def _evaluating(model: nn.Module) -> Iterator[None]:
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


def _decided(model: nn.Module, pixels: Tensor, target: Target) -> tuple[dict[Token, Tensor], dict[Token, Tensor]]:
    """By token, its head's probabilities for the whole image, (B, C), and the target, (B,)."""
    logits = _logits(model(pixels, output_attentions=False, output_hidden_states=False, return_dict=True))
    return {token: scores.float().softmax(-1) for token, scores in logits.items()}, _targets(logits, target)


def _of(target: Tensor, scores: Tensor) -> Tensor:
    """(B,) those of the target (B,) among (B, C)."""
    return scores.gather(1, target.unsqueeze(1)).squeeze(1)


# ------------------------------------------------------------------------------------------------------------ one file


class Score(NamedTuple):
    """As in `Faithfulness`, of one map, or the mean of random orders."""

    deletion: float
    insertion: float


@dataclass(frozen=True)
class Answer:
    """What one head says about the image."""

    token: Token
    label: str
    """What it decides, with which `probability`."""
    probability: float
    target: str
    """What is explained, and its probability; the decision where nothing else was asked for."""
    target_probability: float
    chance: Score | None = None
    """Score of random orders, which a map should beat; None where maps are not scored."""

    def to_dict(self) -> dict[str, Any]:
        return _flat(vars(self), "chance")


@dataclass(frozen=True, eq=False)
class Map:
    """One token's map by one method, over the patches of one image."""

    token: Token
    method: Method | Literal["occlusion"]
    values: np.ndarray
    """(R, S); 0 or more but for occlusion, where a patch may speak against the target."""
    score: Score | None = None

    @property
    def strongest(self) -> str:
        """Where its largest value is, in words for those who don't see it: of nine places, like `in the upper left`."""
        if self.values.min() == self.values.max():
            return "nowhere more than elsewhere"
        middles = (
            (place + 0.5) / side
            for place, side in zip(
                np.unravel_index(self.values.argmax(), self.values.shape), self.values.shape, strict=True
            )
        )
        row, column = (int(3 * middle) for middle in middles)
        return _PLACES[row][column]

    def to_dict(self) -> dict[str, Any]:
        return _flat({**vars(self), "values": self.values.tolist(), "strongest": self.strongest}, "score")


_PLACES = (
    ("in the upper left", "at the top", "in the upper right"),
    ("on the left", "in the middle", "on the right"),
    ("in the lower left", "at the bottom", "in the lower right"),
)


def _flat(fields: Mapping[str, Any], score: str) -> dict[str, Any]:
    """The score's two numbers in its place, where there is one."""
    rest = {key: value for key, value in fields.items() if key != score}
    return rest if fields[score] is None else {**rest, **fields[score]._asdict()}


@dataclass(frozen=True, eq=False)
class Explanation:
    """Every head's answer to one image, and the maps, token by token."""

    model: str
    image: str
    seen: Image.Image
    """The part of the image that the model saw, as it saw it (`seen_by`)."""
    answers: tuple[Answer, ...]
    maps: tuple[Map, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; the keys are in docs/explain.md."""
        return {
            "model": self.model,
            "image": self.image,
            "image_size": [self.seen.height, self.seen.width],
            "answers": [answer.to_dict() for answer in self.answers],
            "maps": [each.to_dict() for each in self.maps],
        }

    def of(self, token: Token) -> list[Map]:
        """A token's maps."""
        return [each for each in self.maps if each.token == token]

    def __str__(self) -> str:
        """The answers, and a table of how the maps score, where they are scored."""
        lines = [
            f"{answer.token} token: {answer.label} {answer.probability:.3f}"
            + (f"; explained: {answer.target} {answer.target_probability:.3f}" if answer.target != answer.label else "")
            for answer in self.answers
        ]
        rows = [
            (answer.token, name, score)
            for answer in self.answers
            for name, score in [
                *((each.method, each.score) for each in self.of(answer.token)),
                ("random order", answer.chance),
            ]
            if score
        ]
        if rows:
            lines += ["", f"{'token':14}{'map':14}{'deletion':>10}{'insertion':>11}"]
        lines += [f"{token:14}{name:14}{score.deletion:10.3f}{score.insertion:11.3f}" for token, name, score in rows]
        return "\n".join(lines)


def explained_model(predictor: Predictor) -> Any:
    """The model whose inside is looked at, on the predictor's device. Raises `ValueError` where there is none, or none
    that can be explained."""
    if predictor.model is None:
        raise ValueError(
            "this is an exported model, whose inside can't be seen; explain the model that it was made from"
        )
    return checked(predictor.model)


def explain_file(
    name_or_folder: str | Path,
    image: str | Path,
    *,
    methods: Sequence[Method] = METHODS,
    target: str | None = None,
    device: str | torch.device = "cpu",
) -> Explanation:
    """Explains a trained model's answer to one image file, prepared as the model's files say, and scores the maps.

    Args:
        name_or_folder: what `load_model` takes.
        methods: of `explain`. Occlusion always stands beside them.
        target: the name of the class to explain; None: what each head decides itself.

    Raises `ImageError` for a file that can't be read, `FileNotFoundError` or `ValueError` for a model, a method or a
    target that can't be explained.
    """
    predictor = Predictor(name_or_folder, device=device)
    model = explained_model(predictor)
    number = None if target is None else class_number(target, predictor.labels)
    pixels = torch.from_numpy(predictor.prepared(image)).unsqueeze(0).to(device)
    found = explain_pixels(model, predictor.processor, pixels, methods=methods, target=number)
    hidden = occlusion(model, pixels, number)
    maps = [*found.maps, *(Map(token, "occlusion", values[0].cpu().numpy()) for token, values in hidden.items())]
    scored = []
    for each in maps:
        values = {each.token: torch.from_numpy(each.values).unsqueeze(0).to(device)}
        scored.append(replace(each, score=_score(deletion_insertion(model, pixels, values, number)[each.token])))
    chance = random_order(model, pixels, number)
    answers = (replace(answer, chance=_score(chance[answer.token])) for answer in found.answers)
    return replace(found, model=str(name_or_folder), image=str(image), answers=tuple(answers), maps=tuple(scored))


def _score(areas: Faithfulness) -> Score:
    """The score of the only image."""
    return Score(float(areas.deletion), float(areas.insertion))


def explain_pixels(
    model: nn.Module,
    processor: DeiTImageProcessor,
    pixels: Tensor,
    *,
    methods: Sequence[Method],
    target: int | None = None,
) -> Explanation:
    """Explains a model's answer to one image that its `processor` has prepared, without scores and without names.

    Args:
        pixels: (1, channels, height, width), on the model's device.
        methods, target: as for `explain`.

    Raises `ValueError` as `explain` does, and for answers and maps that are not finite.
    """
    config = checked(model).config
    labels = list(config.id2label.values())
    with torch.no_grad(), _evaluating(model):
        probabilities, targets = _decided(model, pixels, target)
    maps = [
        Map(token, method, values[0].cpu().numpy())
        for method in methods
        for token, values in explain(model, pixels, method, target).items()
    ]
    if not (
        all(scores.isfinite().all() for scores in probabilities.values())
        and all(np.isfinite(each.values).all() for each in maps)
    ):
        raise ValueError(
            "the model's answer is not a number, so there is nothing to explain; its weights are damaged "
            "or diverged: take another checkpoint"
        )
    answers = []
    for token, [scores] in probabilities.items():
        best, chosen = int(scores.argmax()), int(targets[token])
        answers.append(Answer(token, labels[best], float(scores[best]), labels[chosen], float(scores[chosen])))
    return Explanation("", "", seen_by(config, pixels, processor)[0], tuple(answers), tuple(maps))


def class_number(name: str, labels: Sequence[str]) -> int:
    """Number of the class called `name`.

    Raises `ValueError` for a name that the model doesn't know, or that several classes have.
    """
    if name not in labels:
        raise ValueError(f"the model knows no class {name!r}; {near(name, labels)}; give one of its labels")
    if labels.count(name) > 1:
        raise ValueError(
            f"the model calls {labels.count(name)} of its classes {name!r}, so which one is meant is not "
            "known; make the names in id2label of the model's config.json differ"
        )
    return labels.index(name)


def seen_by(config: DeiTConfig, pixels: Tensor, processor: DeiTImageProcessor) -> list[Image.Image]:
    """What a model saw in `pixels` (B, channels, height, width): rescaling and normalisation undone, and without what
    lies beyond the last whole patch, so that a map covers all of it."""
    (rows, columns), (height, width) = config.grid, config.patch_hw
    values = pixels[:, :, : rows * height, : columns * width].permute(0, 2, 3, 1).double().cpu().numpy()
    if processor.do_normalize:
        values = values * np.array(processor.image_std) + np.array(processor.image_mean)
    if processor.do_rescale:
        values = values / processor.rescale_factor
    whole = values.round().clip(0, 255).astype(np.uint8)
    # Beyond red, green and blue there may be more channels; fewer are shown by the first.
    return [Image.fromarray(each[..., :3] if each.shape[-1] >= 3 else each[..., 0]).convert("RGB") for each in whole]


# ------------------------------------------------------------------------------------------------------------- figure

_VIRIDIS = np.array(
    [
        [0x44, 0x01, 0x54],
        [0x48, 0x25, 0x76],
        [0x41, 0x44, 0x87],
        [0x35, 0x60, 0x8D],
        [0x2A, 0x78, 0x8E],
        [0x21, 0x90, 0x8C],
        [0x22, 0xA8, 0x84],
        [0x43, 0xBF, 0x71],
        [0x7A, 0xD1, 0x51],
        [0xBB, 0xDF, 0x27],
        [0xFD, 0xE7, 0x25],
    ]
)
"""Every tenth of viridis (Smith & van der Walt 2015, CC0): even steps of lightness, with any colour vision and in grey.
"""
_TITLES = {
    "rollout": "attention rollout",
    "relevance": "gradient-weighted relevance",
    "attention": "attention of the last block",
    "occlusion": "occlusion, as a check",
}
_PANEL, _GAP, _LINE = 280, 24, 20  # pixels: longer side of a picture, space between cells, height of a line of text
_INK, _PALE = (20, 20, 20), (95, 95, 95)


def colours(values: np.ndarray) -> np.ndarray:
    """(…,) from 0 to 1 as (…, 3) from 0 to 255: viridis."""
    places = np.linspace(0, 1, len(_VIRIDIS))
    return np.stack([np.interp(values, places, channel) for channel in _VIRIDIS.T], axis=-1).round().astype(np.uint8)


def overlay(picture: Image.Image, values: np.ndarray) -> Image.Image:
    """A map (R, S) over the picture that it is of, which becomes grey: yellow is the map's largest value, violet its
    smallest, or 0 where there are values below."""
    low, high = max(float(values.min()), 0.0), float(values.max())
    scaled = np.clip((values - low) / (high - low if high > low else 1.0), 0.0, 1.0)
    # Bicubic goes beyond the values that it goes through.
    smooth = np.asarray(Image.fromarray(scaled.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC))
    grey = ImageOps.grayscale(picture).convert("RGB")
    return Image.blend(grey, Image.fromarray(colours(smooth.clip(0, 1))), 0.7)


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture at a size for looking at: the longer side is at most `side` pixels.

    Where several fit, every pixel becomes a square of them.
    """
    times = side // max(picture.size)
    if times:
        return picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)
    smaller = picture.copy()
    smaller.thumbnail((side, side))
    return smaller


def figure(explanation: Explanation) -> Image.Image:
    """A row for each token: the image as the model saw it, under its head's answer, and each map over it."""
    scale = _PANEL / max(explanation.seen.size)
    width, height = (max(1, round(side * scale)) for side in explanation.seen.size)
    picture = explanation.seen.resize((width, height), Image.Resampling.BICUBIC)
    rows = [(answer, explanation.of(answer.token)) for answer in explanation.answers]
    down, across = height + 4 * _LINE + _GAP, _PANEL + _GAP
    top = _GAP + _LINE + _GAP // 2
    canvas = Image.new("RGB", (_GAP + across * (1 + len(rows[0][1])), top + down * len(rows) + _LINE + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    named = f"{Path(explanation.image).name}, " if explanation.image else ""
    _write(draw, (_GAP, _GAP), f"{named}seen by {explanation.model}", canvas.width - 2 * _GAP)
    for row, (answer, maps) in enumerate(rows):
        y = top + row * down
        said = [f"{answer.label} {answer.probability:.3f}"]
        if answer.target != answer.label:
            said.append(f"explained: {answer.target} {answer.target_probability:.3f}")
        if answer.chance:
            said.append(f"random order: {_told(answer.chance)}")
        cells = [(picture, f"{answer.token} token", said)]
        cells += [
            (
                overlay(picture, each.values),
                _TITLES[each.method],
                [
                    *([_told(each.score)] if each.score else []),
                    f"values {each.values.min():.3g} to {each.values.max():.3g}",
                ],
            )
            for each in maps
        ]
        for column, (image, title, lines) in enumerate(cells):
            x = _GAP + column * across
            _write(draw, (x, y), title, _PANEL, size=16)
            canvas.paste(image, (x, y + _LINE + 4))
            for line, text in enumerate(lines, start=1):
                _write(draw, (x, y + height + line * _LINE + 8), text, _PANEL, size=13, ink=_PALE)
    _legend(canvas, draw, top + down * len(rows), scored=any(answer.chance for answer, _ in rows))
    return canvas


def _told(score: Score) -> str:
    return f"deletion {score.deletion:.3f}, insertion {score.insertion:.3f}"


def _legend(canvas: Image.Image, draw: ImageDraw.ImageDraw, y: int, *, scored: bool) -> None:
    bar = np.broadcast_to(np.linspace(0, 1, _PANEL // 2), (_LINE - 6, _PANEL // 2))
    canvas.paste(Image.fromarray(colours(bar)), (_GAP, y))
    told = "least to most, of each map's own values."
    told += " Deletion: lower is better. Insertion: higher is better." if scored else ""
    _write(draw, (_GAP + _PANEL // 2 + 8, y), told, canvas.width - 2 * _GAP - _PANEL // 2 - 8, size=13, ink=_PALE)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    width: int,
    *,
    size: int = 14,
    ink: tuple[int, int, int] = _INK,
) -> None:
    """In one line, shortened to `width` pixels."""
    font = ImageFont.load_default(size)
    text = " ".join(text.split())
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    draw.text(place, text, ink, font)
