"""What the configs share: sizes, labels by number, and reading a file that may hold anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, NoReturn

from deit import files
from deit.choices import Scoring

Pair = int | tuple[int, int]
"""One number for both sides, or height and width."""
NOT_WRITTEN = ("extra",)
"""Fields that are no keys of a `config.json`; what they hold are such keys."""
MAX_LABELS = 1_000_000
"""Largest number of labels. A small file could ask for more than the memory holds otherwise."""


def built_from_file(build: Callable[..., Any], path: Path, **overrides: Any) -> Any:
    """A config of a file, which may hold anything."""
    values = files.read_json(path)
    try:
        return build(values, **overrides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:  # a value of the wrong type
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} holds a value of the wrong type ({reason:.200}); fetch or write it again") from None


def check_count(name: str, value: Any, most: int = 2**31 - 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, found {value!r:.80}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, found {value:.3g}")


def pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def pair_or_int(name: str, value: Any) -> Pair:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int) and v > 0 for v in value):
        return value[0], value[1]
    raise ValueError(f"{name} must be a positive number of pixels or a pair (height, width), found {value!r}")


def scoring_of(problem_type: str | None, outputs: int) -> Scoring:
    if problem_type == "regression":
        return "none"
    return "sigmoid" if problem_type == "multi_label_classification" or outputs == 1 else "softmax"


def labels_in_order(names: Mapping[Any, Any]) -> dict[int, str]:
    """Labels by their numbers, 0 to the last. The order of a file says nothing: keys sorted as text are 0, 1, 10, 2."""
    if not isinstance(names, Mapping):
        raise ValueError(f"id2label must be a dictionary from numbers to names, found {names!r}")
    if list(names) == list(range(len(names))):  # as most are
        return {i: _label(i, label) for i, label in names.items()}
    numbers = [label_number(i) for i in names]
    if sorted(numbers) != list(range(len(numbers))):
        raise ValueError(
            f"id2label must number its {len(numbers)} labels 0 to {len(numbers) - 1}, "
            f"found {few(sorted(numbers))}; number the classes without gaps"
        )
    by_number = dict(zip(numbers, names.values(), strict=True))
    return {i: _label(i, by_number[i]) for i in range(len(numbers))}


def _label(number: int, name: Any) -> str:
    if isinstance(name, bool) or not isinstance(name, str | int | float):
        raise ValueError(f"id2label names class {number} {name!r:.80}, expected text")
    return str(name)


def label_number(number: Any, where: str = "id2label", what: str = "key") -> int:
    try:
        return int(number)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where} has the {what} {number!r:.80}, expected the number of a class") from None


class Labels(dict[Any, Any]):
    """The labels of a config. They do not change, because the names and the numbers would contradict each other."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise FrozenInstanceError(
            "a config does not change its labels; use config.replace(id2label=...), and give the changed copy to the "
            "model when it is built or loaded"
        )

    __setitem__ = __delitem__ = __ior__ = pop = popitem = setdefault = update = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def unnamed(count: int) -> dict[int, str]:
    return {i: f"LABEL_{i}" for i in range(count)}


def few(items: Any, most: int = 5) -> str:
    items = list(items)
    return ", ".join(map(repr, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")
