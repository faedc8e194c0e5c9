"""A model's answer to one image with the maps of each token, as `deit explain` shows them.

B images, C classes, R x S grid of patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from deit.choices import Method
from deit.config import DeiTConfig
from deit.data.folders import near, nfc
from deit.explain.maps import (
    METHODS,
    Faithfulness,
    Token,
    checked,
    decided,
    deletion_insertion,
    evaluating,
    explain,
    occlusion,
    random_order,
)
from deit.image.processor import DeiTImageProcessor
from deit.machine import full_float32
from deit.model.load import refuse_not_finite
from deit.predict.predictor import Predictor
from deit.terminal import shown


class Score(NamedTuple):
    """Deletion and insertion (see `Faithfulness`) of one map, or their means over random orders."""

    deletion: float
    insertion: float


@dataclass(frozen=True)
class TokenAnswer:
    """One head's answer to the image."""

    token: Token
    label: str
    """The class that the head decides for."""
    probability: float
    """The probability of `label`."""
    target: str
    """The class that is explained; `label` unless another one was asked for."""
    target_probability: float
    """The probability of `target`."""
    chance: Score | None = None
    """Score of random orders, which a map should beat; None if maps are not scored."""

    def to_dict(self) -> dict[str, Any]:
        return _flat(vars(self), "chance")


@dataclass(frozen=True, eq=False)
class Map:
    """One token's map by one method, over the patches of one image."""

    token: Token
    method: Method | Literal["occlusion"]
    values: np.ndarray
    """(R, S). Values are 0 or more, except for occlusion, where a patch that speaks against the target is below 0."""
    score: Score | None = None

    @property
    def strongest(self) -> str:
        """The place of the largest value in words, for readers who don't see the map: one of nine, like `in the upper
        left`, or `nowhere more than elsewhere` if all values are equal."""
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
    """The fields with the score replaced by its two numbers, or left out if it is None."""
    rest = {key: value for key, value in fields.items() if key != score}
    return rest if fields[score] is None else {**rest, **fields[score]._asdict()}


@dataclass(frozen=True, eq=False)
class Explanation:
    """Every head's answer to one image, and the maps of each token."""

    model: str
    image: str
    seen: Image.Image
    """The part of the image that the model saw, as it saw it (`seen_by`)."""
    answers: tuple[TokenAnswer, ...]
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
        """The maps of one token."""
        return [each for each in self.maps if each.token == token]

    def __str__(self) -> str:
        """The answers, and a table of the maps' scores if they are scored."""
        lines = [
            f"{answer.token} token: {shown(answer.label)} {answer.probability:.3f}"
            + (
                f"; explained: {shown(answer.target)} {answer.target_probability:.3f}"
                if answer.target != answer.label
                else ""
            )
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
    """Returns the predictor's PyTorch model, on its device.

    Raises `ValueError` for an exported model, and for a model that can't be explained.
    """
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
    """Explains a trained model's answer to one image file, and scores the maps.

    The image is prepared as the model's files say.

    Args:
        name_or_folder: a model, as for `load_model`.
        methods: methods of `explain`. Occlusion is always added.
        target: the name of the class to explain; None explains each head's own decision.

    Raises `ImageError` for a file that can't be read, and `FileNotFoundError` or `ValueError` for a model, a method or
    a target that can't be explained.
    """
    predictor = Predictor(name_or_folder, device=device)
    model = explained_model(predictor)
    number = None if target is None else class_number(target, predictor.labels)
    pixels = torch.from_numpy(predictor.prepared(image)).unsqueeze(0).to(predictor.device)
    found = explain_pixels(model, predictor.processor, pixels, methods=methods, target=number)
    hidden = occlusion(model, pixels, number)
    maps = [*found.maps, *(Map(token, "occlusion", values[0].cpu().numpy()) for token, values in hidden.items())]
    scored = []
    for each in maps:
        values = {each.token: torch.from_numpy(each.values).unsqueeze(0).to(predictor.device)}
        scored.append(replace(each, score=_score(deletion_insertion(model, pixels, values, number)[each.token])))
    chance = random_order(model, pixels, number)
    answers = (replace(answer, chance=_score(chance[answer.token])) for answer in found.answers)
    return replace(found, model=str(name_or_folder), image=str(image), answers=tuple(answers), maps=tuple(scored))


def _score(areas: Faithfulness) -> Score:
    """The score of a batch of one image."""
    return Score(float(areas.deletion), float(areas.insertion))


@full_float32()
def explain_pixels(
    model: nn.Module,
    processor: DeiTImageProcessor,
    pixels: Tensor,
    *,
    methods: Sequence[Method],
    target: int | None = None,
) -> Explanation:
    """Explains a model's answer to one image that its `processor` has prepared.

    The maps are not scored, and the names of the model and the image are empty.

    Args:
        pixels: (1, channels, height, width), on the model's device.
        methods, target: as for `explain`.

    Raises `ValueError` as `explain` does, and if an answer or a map is not finite.
    """
    config = checked(model).config
    labels = list(config.id2label.values())
    with torch.no_grad(), evaluating(model):
        probabilities, targets = decided(model, pixels, target)
    maps = [
        Map(token, method, values[0].cpu().numpy())
        for method in methods
        for token, values in explain(model, pixels, method, target).items()
    ]
    refuse_not_finite([*probabilities.values(), *(each.values for each in maps)])
    answers = []
    for token, [scores] in probabilities.items():
        best, chosen = int(scores.argmax()), int(targets[token])
        answers.append(TokenAnswer(token, labels[best], float(scores[best]), labels[chosen], float(scores[chosen])))
    return Explanation("", "", seen_by(config, pixels, processor)[0], tuple(answers), tuple(maps))


def class_number(name: str, labels: Sequence[str]) -> int:
    """The number of the class called `name`.

    Raises `ValueError` for a name that no class or more than one class of the model has.
    """
    known, wanted = list(map(nfc, labels)), nfc(name)
    if wanted not in known:
        raise ValueError(f"the model knows no class {name!r}; {near(name, labels)}; give one of its labels")
    if known.count(wanted) > 1:
        raise ValueError(
            f"the model calls {known.count(wanted)} of its classes {name!r}, so the name doesn't say which one to "
            "explain; make the names in id2label of the model's config.json differ"
        )
    return known.index(wanted)


def seen_by(config: DeiTConfig, pixels: Tensor, processor: DeiTImageProcessor) -> list[Image.Image]:
    """Turns `pixels` (B, channels, height, width) back into pictures of what the model saw.

    Rescaling and normalisation are undone. Pixels beyond the last whole patch are left out, so a map covers the whole
    picture.
    """
    (rows, columns), (height, width) = config.grid, config.patch_hw
    shown = pixels[:, :, : rows * height, : columns * width].permute(0, 2, 3, 1).float().cpu().numpy()
    whole = processor.normalisation.undo(shown)
    # Of more than three channels the first three are shown as red, green and blue. Of fewer the first is shown as grey.
    return [Image.fromarray(each[..., :3] if each.shape[-1] >= 3 else each[..., 0]).convert("RGB") for each in whole]
