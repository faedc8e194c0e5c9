"""What the losses of both frameworks share: the paper's numbers, and the choice of a loss. Loads no framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from deit.config import DeiTConfig

Distillation = Literal["hard", "soft"]
Normalisation = Literal["images", "elements"]

PAPER_WEIGHT = {"hard": 0.5, "soft": 0.1}
"""The teacher's share of the loss in Touvron et al. 2020: eq. 3 for `hard`, lambda of eq. 2 for `soft`."""
PAPER_TEMPERATURE = 3.0
"""tau of eq. 2."""


def distillation_settings(kind: str, weight: float | None, temperature: float | None) -> tuple[float, float]:
    """The teacher's share of the loss, and the temperature (1 for hard distillation). None takes the paper's."""
    if kind not in PAPER_WEIGHT:
        raise ValueError(f"distillation kind {kind!r} is not known; choose hard or soft")
    weight = PAPER_WEIGHT[kind] if weight is None else weight
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"distillation weight must be from 0 to 1, found {weight}")
    if kind == "hard":
        if temperature is not None:
            raise ValueError("hard distillation has no temperature; leave it out, or choose kind='soft'")
        return weight, 1.0
    return weight, PAPER_TEMPERATURE if temperature is None else temperature


def refuse_merging(config: DeiTConfig) -> None:
    """Raises `ValueError` for a masked-image model that merges tokens."""
    if config.merge:
        raise ValueError(
            f"masked images are painted patch by patch, each from a token of its own, found merge={config.merge} in "
            "the config; set merge=0"
        )


def check_soft_teacher(student: Sequence[int | None], teacher: Sequence[int | None]) -> None:
    if not same_shape(student, teacher):
        raise ValueError(
            f"soft distillation needs teacher logits of shape {tuple(student)}, found {tuple(teacher)}; "
            "pass logits, or choose kind='hard'"
        )


def problem_type(config: DeiTConfig, dtype: object, whole: bool) -> str:
    """`config.problem_type`, or else what `transformers` decides.

    One target means regression. Whole numbers mean one class for each image. Anything else means multi-label. `whole`
    says whether the labels are whole numbers.
    """
    problem = config.problem_type
    if problem is None:
        problem = (
            "regression"
            if config.num_labels == 1
            else "single_label_classification"
            if whole
            else "multi_label_classification"
        )
    if problem == "single_label_classification" and not whole:
        raise ValueError(
            f"single label classification needs whole numbers, found {dtype}; pass indices of classes, or "
            "set config.problem_type"
        )
    return problem


def check_labels(labels: Sequence[int | None], expected: Sequence[int | None], problem: str) -> None:
    if not same_shape(labels, expected):
        raise ValueError(
            f"{problem.replace('_', ' ')} needs labels of shape {tuple(expected)}, found {tuple(labels)}; "
            "set config.problem_type if another problem is meant"
        )


def same_shape(shape: Sequence[int | None], other: Sequence[int | None]) -> bool:
    """Whether two shapes can be the same. None is a size that a graph doesn't know yet."""
    return len(shape) == len(other) and all(a == b or None in (a, b) for a, b in zip(shape, other, strict=True))
