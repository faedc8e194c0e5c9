"""Turns frozen dataclasses into JSON types and back, guided by their type hints.

Both `recipe.json` and `--set` go through here, so both refuse the same mistakes and name the field.
"""

from __future__ import annotations

import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal

from deit.config import ConvNetConfig, DeiTConfig, TimmConfig

_OF_TIMM = ("architecture", "image_size", "num_channels", "model_args")
"""The fields of `TimmConfig` that a recipe sets. The others come from the data."""
_OF_THE_DATA = ("num_labels", "id2label", "label2id")
"""The fields of a model that a recipe does not set."""
WHOLE = "recipe"
"""The path of the outermost dataclass, which messages leave out."""
hints_of: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)
"""The type hints of a dataclass. Kept, because to evaluate them takes longer than to check a whole recipe."""


def check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def within(owner: object, low: float, high: float, *names: str) -> None:
    """Checks that each field is from `low` to `high`, both included."""
    for name in names:
        value = getattr(owner, name)
        check(low <= value <= high, f"{name} must be from {low} to {high}, found {value}")


def known(name: str, names: Iterable[str], where: str) -> None:
    """Raises `ValueError` if `name` is not among `names`. The message suggests the nearest of them."""
    names = sorted(names)
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        raise ValueError(
            f"{where}: there is no {name!r}; "
            + (f"did you mean {close[0]!r}?" if close else f"there is {', '.join(names)}")
        )


def to_plain(value: Any, hint: Any = None) -> Any:
    """A dataclass as JSON types.

    Without a `hint`, every dataclass names its class under `kind_of`. With one, a dataclass does so only if the hint
    allows several classes.
    """
    if isinstance(value, TimmConfig):
        return {"model_type": value.model_type, **{name: getattr(value, name) for name in _OF_TIMM}}
    if isinstance(value, DeiTConfig | ConvNetConfig):
        return {key: found for key, found in value.to_dict().items() if key not in _OF_THE_DATA}
    if is_dataclass(value):
        hints = hints_of(type(value))
        written = {f.name: to_plain(getattr(value, f.name), hints[f.name]) for f in fields(value)}
        return written if hint is not None and len(_classes(hint)) < 2 else {**written, "kind_of": type(value).__name__}
    return list(value) if isinstance(value, tuple) else value


def _classes(hint: Any) -> list[type]:
    """The dataclasses among a hint's alternatives."""
    return [
        part
        for part in (typing.get_args(hint) if _is_union(hint) else (hint,))
        if isinstance(part, type) and is_dataclass(part)
    ]


def _written(kind: type) -> str:
    """How a person writes an object of this class."""
    return str(getattr(kind, "WRITTEN", kind.__name__))


def _is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def from_plain(value: Any, hint: Any, path: str) -> Any:
    """The inverse of `to_plain`: `value` as the type `hint`.

    Raises `ValueError` if `value` doesn't fit. The message names the field by its `path`.
    """
    if _is_union(hint):
        if value is None and type(None) in typing.get_args(hint):
            return None
        if DeiTConfig in typing.get_args(hint) and isinstance(value, Mapping):
            if value.get("model_type") == TimmConfig.model_type:
                return _timm_config(value, path)
            kind = ConvNetConfig if value.get("model_type") == ConvNetConfig.model_type else DeiTConfig
            return _config(value, kind, path)
        if isinstance(value, Mapping) and (classes := {cls.__name__: cls for cls in _classes(hint)}):
            name = value.get("kind_of", next(iter(classes)) if len(classes) == 1 else None)
            check(
                isinstance(name, str) and name in classes,
                f"{path}: expected kind_of to be one of {', '.join(classes)}, found {name!r}",
            )
            return from_plain(value, classes[str(name)], path)
        plain = [part for part in typing.get_args(hint) if part is not type(None) and not is_dataclass(part)]
        check(len(plain) == 1, f"{path}: expected {' or '.join(map(_written, _classes(hint)))}, found {value!r}")
        return from_plain(value, plain[0], path)
    if is_dataclass(hint):
        expected = _written(hint)  # type: ignore[arg-type]
        given = value.get("kind_of", hint.__name__) if isinstance(value, Mapping) else repr(value)  # type: ignore[union-attr]
        check(given == hint.__name__, f"{path}: expected {expected}, found {given}")  # type: ignore[union-attr]
        hints = hints_of(hint)
        for name in value.keys() - {"kind_of"}:
            known(name, (f.name for f in fields(hint)), path)
        missing = [
            f.name
            for f in fields(hint)
            if f.name not in value and f.default is MISSING and f.default_factory is MISSING
        ]
        check(not missing, f"{path}: {' and '.join(missing)} must be given")
        arguments = {
            name: from_plain(found, hints[name], f"{path}.{name}".removeprefix(f"{WHOLE}."))
            for name, found in value.items()
            if name != "kind_of"
        }
        try:
            return hint(**arguments)  # type: ignore[operator]
        except ValueError as error:
            raise ValueError(str(error) if path == WHOLE else f"{path}: {error}") from None
    return _plain(value, hint, path)


def _config(value: Mapping[str, Any], kind: type[DeiTConfig] | type[ConvNetConfig], path: str) -> Any:
    """A model's config. Fields that this package does not know are refused, because in a recipe they are mistakes."""
    for name in _OF_THE_DATA:
        check(name not in value, f"{path}: {name} comes from the data, so a recipe does not set it; leave it out")
    try:
        config = kind.from_dict({**value, "id2label": {0: "LABEL_0", 1: "LABEL_1"}})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    check(not config.extra, f"{path}: there is no field {', '.join(map(repr, config.extra))}")
    return config


def _timm_config(value: Mapping[str, Any], path: str) -> TimmConfig:
    for name in value:
        known(name, ("model_type", *_OF_TIMM), path)
    try:
        return TimmConfig(**{name: found for name, found in value.items() if name != "model_type"})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _plain(value: Any, hint: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        check(
            value in typing.get_args(hint),
            f"{path}: expected {' or '.join(map(str, typing.get_args(hint)))}, found {value!r}",
        )
        return value
    if origin is tuple:
        parts = typing.get_args(hint)
        check(
            isinstance(value, list | tuple) and (parts[-1] is Ellipsis or len(value) == len(parts)),
            f"{path}: expected {'numbers' if parts[-1] is Ellipsis else f'{len(parts)} numbers'}, found {value!r}",
        )
        return tuple(_plain(entry, parts[0], path) for entry in value)
    right = isinstance(value, int | float) if hint is float else isinstance(value, hint)
    check(right and (hint is bool or not isinstance(value, bool)), f"{path}: expected {hint.__name__}, found {value!r}")
    check(hint is not float or math.isfinite(value), f"{path}: expected a finite number, found {value!r}")
    return float(value) if hint is float else value
