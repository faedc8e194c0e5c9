"""Checks an export: images with the PyTorch model's answers, which the file has to give too, and its accuracy.

B images, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from deit.choices import Scoring
from deit.data.batches import Batch, EvaluationBatches
from deit.data.folders import SPLITS, Split, has_split, matched, read_examples
from deit.evaluate.scores import Accuracy
from deit.export.engines import Engine
from deit.export.subject import Subject
from deit.image.decode import ImageError, load_image

LOSS = 0.005
"""Largest allowed loss of accuracy by int8 and by merging, together."""

_CHECKED = {"random": 16, "real": 64}
"""Number of images in the check."""
_SIZES = (1, 3)
"""Batch sizes that the check uses in turn."""
_CALIBRATED = 300
"""Maximum number of int8 calibration images."""
_JUDGED_BATCH = 16
_ROUNDING, _ROUNDINGS = 1e-6, 32
"""Largest relative change of a pixel that counts as rounding, and the number of random ones that are tried."""
_TIE = 1e-4
"""Largest difference of two probabilities that count as on the same side of 0.5, because only rounding parts them."""


class TooInaccurate(ValueError):
    """An export that costs more accuracy than `LOSS`."""


def accurate_enough(after: Accuracy, before: Accuracy) -> bool:
    """Whether no more than `LOSS` is lost, on the same images."""
    return before.correct - after.correct <= LOSS * before.total


class Examples:
    """Labelled images: some to calibrate the ranges of int8, the others to judge the accuracy.

    Raises `ValueError` for images that don't fit the model, and for a single image.
    """

    def __init__(self, data: str | Path, subject: Subject):
        self.data, self.processor = data, subject.processor
        present = {split for split in SPLITS if has_split(data, split)}
        split = "train" if present == {"train"} else None
        examples, found = read_examples(data, split)
        whole = matched(examples, subject.classes)
        if "train" in present and split is None:
            self.judged, calibration = whole, matched(read_examples(data, "train")[0], subject.classes)
            self.source = f"{data}, {found}"
        else:
            calibration, self.judged = (whole.take(range(first, len(whole), 2)) for first in (0, 1))
            self.source = f"{data}, every other image" + (f" of {found}" if found else "")
        if not len(self.judged):
            raise ValueError(f"{data} has a single image, expected at least two; give some hundreds")
        self.calibration = _spread(calibration, _CALIBRATED)

    def pixels(self, split: Split) -> list[np.ndarray]:
        """The pixels (1, C, H, W) of each image that can be read."""
        return [
            batch.pixels.numpy()
            for batch in EvaluationBatches(split, self.processor, 1, keep=False)
            if batch.labels[0] >= 0
        ]

    def batches(self) -> EvaluationBatches:
        """Batches of the images that judge. They can be iterated any number of times."""
        return EvaluationBatches(self.judged, self.processor, _JUDGED_BATCH)


def _spread(split: Split, count: int) -> Split:
    """At most `count` images of a split, evenly spread over it."""
    return split.take(np.unique(np.linspace(0, len(split) - 1, count).round().astype(int)).tolist())


def _pictures(count: int) -> list[Image.Image]:
    """Pictures of random colours, coarse enough to survive the resize, in several shapes."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        rows, columns, height, width = (int(n) for n in random.integers((2, 2, 48, 48), (17, 17, 321, 321)))
        colours = random.integers(0, 256, (rows, columns, 3)).astype(np.uint8)
        found.append(Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC))
    return found


@dataclass(frozen=True)
class Agreement:
    """How far an engine's answers agree with the PyTorch model's."""

    images: int
    labels: float
    """Share of the images to which every output gives the same class as the PyTorch model, or the same labels at 0.5;
    1 for a regression."""
    difference: float
    """Largest difference of a probability. For a regression it is the largest difference of an output, divided by the
    image's largest output if that is above 1."""
    undecided: int
    """Number of images for which rounding decides which patches are merged. The answer is compared with the one that
    the PyTorch model gives after such a rounding."""


class Checked:
    """Images with the PyTorch model's answers, which a runtime must give too."""

    def __init__(self, subject: Subject, examples: Examples | None):
        if examples is None:
            self.source = "random pictures"
            pixels = list(subject.processor(_pictures(_CHECKED["random"])).pixel_values)
        else:
            self.source = examples.source
            pixels = [one[0] for one in examples.pixels(_spread(examples.judged, _CHECKED["real"]))]
            if not pixels:
                raise ValueError(
                    f"none of the images in {examples.source} can be read to check the export; give others"
                )
        self.images = len(pixels)
        self.batches: list[np.ndarray] = []
        while pixels:
            size = _SIZES[len(self.batches) % len(_SIZES)]
            self.batches.append(np.stack(pixels[:size]))
            pixels = pixels[size:]
        self.subject, self.scoring = subject, subject.scoring
        self.expected = [_scores(subject(batch), self.scoring) for batch in self.batches]
        self._files = () if examples is None else _spread(examples.judged, _CHECKED["random"]).files

    def pictures(self) -> Iterator[Image.Image]:
        """Yields random pictures, each also enlarged so that the resize shrinks it, and then some real ones, if any."""
        for picture in _pictures(_CHECKED["random"]):
            yield from (picture, picture.resize((3 * picture.width, 4 * picture.height)))
        for path in self._files:
            with suppress(ImageError):
                yield load_image(path)

    def agreement(self, engine: Engine, tolerance: float | None = None) -> Agreement:
        """Compares an engine's answers with the model's. Raises `ValueError` for outputs of another shape.

        With a `tolerance`, an answer that is farther from the model's is compared with what the model answers if the
        pixels are rounded otherwise, in case the model merges patches.
        """
        alike, difference, undecided = 0, 0.0, 0
        for batch, exact in zip(self.batches, self.expected, strict=True):
            found, expected = _scores(engine(batch), self.scoring), exact
            if tolerance is not None and self.subject.merge:
                expected, otherwise = self._settled(batch, exact, found, tolerance)
                undecided += otherwise
            same = np.ones(len(batch), bool)
            for name, reference in expected.items():
                if found[name].shape != reference.shape:
                    raise ValueError(
                        f"{engine.name} answers {len(batch)} images with {name} of {found[name].shape}, "
                        f"expected {reference.shape}; nothing was kept"
                    )
                apart = np.abs(found[name] - reference).max(-1)
                if self.scoring == "softmax":
                    same &= found[name].argmax(-1) == reference.argmax(-1)
                elif self.scoring == "sigmoid":
                    same &= ((found[name] > 0.5) == (reference > 0.5)).all(-1) | (apart <= _TIE)
                else:  # a regression has no labels, and its outputs have any size
                    apart = apart / np.maximum(1.0, np.abs(reference).max(-1))
                difference = float(np.maximum(difference, apart.max()))  # unlike max, np.maximum keeps NaN
            alike += int(same.sum())
        return Agreement(self.images, alike / self.images, difference, undecided)

    def _settled(
        self, batch: np.ndarray, exact: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], tolerance: float
    ) -> tuple[dict[str, np.ndarray], int]:
        """The model's scores, for some images after a rounding that leads to the scores `found`; and the number of
        these images. A merge is a choice, and two choices can be so close that each runtime makes its own."""
        settled, otherwise = {name: values.copy() for name, values in exact.items()}, 0
        random = np.random.default_rng(0)
        for image, pixels in enumerate(batch):

            def apart(scores: Mapping[str, np.ndarray], image: int = image) -> float:
                if any(found[name].shape[1:] != values.shape[1:] for name, values in scores.items()):
                    return 0.0  # which is refused elsewhere
                return max(float(np.abs(found[name][image] - values[0]).max()) for name, values in scores.items())

            if apart({name: values[image : image + 1] for name, values in exact.items()}) <= tolerance:
                continue
            for _ in range(_ROUNDINGS):
                noise = random.uniform(-_ROUNDING, _ROUNDING, pixels.shape).astype(np.float32)
                rounded = _scores(self.subject((pixels * (1 + noise))[None]), self.scoring)
                if apart(rounded) <= tolerance:
                    otherwise += 1
                    for name, values in rounded.items():
                        settled[name][image] = values[0]
                    break
        return settled, otherwise


def _scores(logits: Mapping[str, np.ndarray], scoring: Scoring) -> dict[str, np.ndarray]:
    """Scores (B, K) in float64, by the name of the output."""
    found = {}
    for name, values in logits.items():
        values = values.astype(np.float64)
        if scoring == "softmax":
            powers = np.exp(values - values.max(-1, keepdims=True))
            values = powers / powers.sum(-1, keepdims=True)
        elif scoring == "sigmoid":
            values = 1 / (1 + np.exp(-values))
        found[name] = values
    return found


def accuracy_of(answer: Callable[[np.ndarray], Mapping[str, np.ndarray]], batches: Iterable[Batch]) -> Accuracy:
    """The accuracy of the fused heads on labelled batches."""
    correct = total = 0
    for batch in batches:
        known = batch.labels.numpy() >= 0
        correct += int((answer(batch.pixels.numpy())["logits"].argmax(-1) == batch.labels.numpy())[known].sum())
        total += int(known.sum())
    return Accuracy(correct, total)
