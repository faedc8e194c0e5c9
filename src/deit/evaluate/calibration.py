"""Calibrated probabilities, and when a model should not answer. NumPy only. N images, C classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deit import files
from deit.evaluate.scores import LEAST
from deit.words import Said, said

FILE = "calibration.json"
LIMITS = (0.05, 20.0)
"""The least and the greatest temperature that are tried."""
_AT_LIMIT = 1.001
"""Largest ratio of a temperature to a limit that counts as the limit itself."""


@dataclass(frozen=True, kw_only=True)
class HeadCalibration:
    """The calibration of one head, from N labelled images that the model was not trained on."""

    temperature: float
    """Divisor of the logits (Guo et al. 2017, "On calibration of modern neural networks", section 4.2)."""
    threshold: float
    """Least probability, after the temperature, of a likely label. For all but `error_rate` of new images, the true
    label is among the likely ones (split conformal prediction, Vovk et al. 2005; the score is 1 - probability of the
    true class)."""
    nll: tuple[float, float]
    """Mean negative log likelihood of the true class, before and after the temperature."""
    answered: float
    """Share of the N images for which exactly one label reaches the threshold."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The calibration of a model. The content of `calibration.json`."""

    error_rate: float
    """Largest share of new images, if they are like these, that get a single sure label which is wrong."""
    images: int
    """Number of images, N."""
    data: str
    """Fingerprint of the images."""
    heads: Mapping[str, HeadCalibration]

    @classmethod
    def of_model(cls, name_or_folder: str | Path) -> Calibration | None:
        """Reads what `deit calibrate` stored beside a model's files; None if there is nothing."""
        path = Path(name_or_folder) / FILE
        if not path.is_file():
            return None
        values = files.read_json(path)
        try:
            heads = {
                name: HeadCalibration(**{**head, "nll": tuple(head["nll"])})
                for name, head in values.pop("heads").items()
            }
            found = cls(**values, heads=heads)
            valid = (
                heads
                and all(1e-6 < head.temperature < 1e6 and 0 <= head.threshold <= 1 for head in heads.values())
                and 0 < found.error_rate < 1
                and isinstance(found.images, int)
            )
        except (TypeError, KeyError, AttributeError, ValueError):
            valid = False
        if not valid:
            raise ValueError(f"{path} is not a calibration that `deit calibrate` wrote; remove it and calibrate again")
        return found

    def save(self, folder: Path) -> Path:
        files.write_json(folder / FILE, asdict(self))
        return folder / FILE

    def temperature(self, head: str) -> float:
        return self._of(head).temperature

    def sure(self, probabilities: np.ndarray, head: str) -> list[bool]:
        """Whether exactly one label is likely enough, for each row of probabilities (N, C) after the temperature."""
        return ((probabilities >= self._of(head).threshold).sum(1) == 1).tolist()

    def alarms(self) -> list[Said]:
        """A warning for each head whose temperature is at a limit, with the next move."""
        low, high = LIMITS
        found = []
        for name, head in self.heads.items():
            if head.temperature <= low * _AT_LIMIT:
                found.append(
                    said(
                        "warning: the temperature of the head {head} is the least that is tried ({low:g}), because it "
                        "is right on almost all of the {images:,} images, so they can't tell how sure it may be. "
                        "Calibrate with more or harder images",
                        head=name,
                        low=low,
                        images=self.images,
                    )
                )
            elif head.temperature * _AT_LIMIT >= high:
                found.append(
                    said(
                        "warning: the temperature of the head {head} is the greatest that is tried ({high:g}), because "
                        "its probabilities tell next to nothing about the labels of the {images:,} images. Check "
                        "labels and preprocessing with deit eval",
                        head=name,
                        high=high,
                        images=self.images,
                    )
                )
        return found

    def _of(self, head: str) -> HeadCalibration:
        if head not in self.heads:
            raise ValueError(f"the calibration has no head {head!r}; choose one of {', '.join(self.heads)}")
        return self.heads[head]


def fit(probabilities_at: Any, labels: np.ndarray, error_rate: float) -> HeadCalibration:
    """Finds the temperature and the threshold of a head.

    Args:
        probabilities_at: function from a temperature to probabilities (N, C).
        labels: (N,) the true classes.
        error_rate: above 0 and below 1. It needs at least 1 / error_rate - 1 images, because otherwise no answer could
            be sure.
    """
    count = len(labels)
    if not 0.0 < error_rate < 1.0:
        raise ValueError(f"error_rate must be above 0 and below 1, found {error_rate}")
    rank = math.ceil((count + 1) * (1 - error_rate))
    if rank > count:
        raise ValueError(
            f"{count} images are too few for an error rate of {error_rate:g}; give at least "
            f"{math.ceil(1 / error_rate) - 1} images, or a higher rate"
        )

    def of_true(temperature: float) -> np.ndarray:
        return probabilities_at(temperature)[np.arange(count), labels].astype(np.float64)

    def nll(temperature: float) -> float:
        return float(-np.log(np.maximum(of_true(temperature), LEAST)).mean())

    temperature = math.exp(_lowest(lambda logarithm: nll(math.exp(logarithm)), *map(math.log, LIMITS)))
    threshold = float(np.sort(of_true(temperature))[::-1][rank - 1])
    answered = float(((probabilities_at(temperature) >= threshold).sum(1) == 1).mean())
    return HeadCalibration(
        temperature=temperature, threshold=threshold, nll=(nll(1.0), nll(temperature)), answered=answered
    )


def _lowest(function: Any, low: float, high: float, tolerance: float = 1e-4) -> float:
    """The place of a function's only minimum, found by golden-section search."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2
