"""What a forward pass returns in both frameworks, with the names and the access of `transformers`' outputs.

B images, N tokens (prefix and patches; fewer after each block with `config.merge`), D width, H heads, C classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn, Self


@dataclass(init=False, eq=False)
class ModelOutput(OrderedDict[str, Any]):
    """Fields by attribute (`out.logits`), key (`out["logits"]`), index and slice (`out[0]`), or `to_tuple()`.

    It is a dictionary, in the order of its fields. A field that is None is absent from keys, indices and tuples. It
    is built from keywords, or from one dictionary or one sequence of pairs, as libraries build dictionaries again.
    """

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **named: Any) -> None:
        super().__init__()
        given = {**dict(values), **named}
        for field in fields(self):
            value = given.pop(field.name, None)
            object.__setattr__(self, field.name, value)
            if value is not None:
                super().__setitem__(field.name, value)
        if given:
            known = ", ".join(field.name for field in fields(self))
            raise TypeError(f"{type(self).__name__} has no field {', '.join(map(repr, given))}; it has {known}")

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return self.to_tuple()[key]

    def __missing__(self, key: str) -> NoReturn:
        raise KeyError(f"{key!r} is not in this output, which has {', '.join(self)}")

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        changed = type(self)({**self, name: value})  # in the order of the fields, whatever was set first
        super().clear()
        for field in fields(self):
            object.__setattr__(self, field.name, getattr(changed, field.name))
            if field.name in changed:
                super().__setitem__(field.name, changed[field.name])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def copy(self) -> Self:
        return type(self)(self)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} keeps its fields; make a dictionary of it first: dict(output)")

    __delitem__ = pop = popitem = setdefault = update = clear = move_to_end = _refuse


@dataclass(init=False, eq=False)
class BaseModelOutputWithPooling(ModelOutput):
    last_hidden_state: Any = None
    """(B, N, D), after the final LayerNorm."""
    pooler_output: Any = None
    """(B, pooler width); None without a pooling layer."""
    hidden_states: tuple[Any, ...] | None = None
    """The embeddings and the output of each block, before the final LayerNorm: each (B, N, D)."""
    attentions: tuple[Any, ...] | None = None
    """Attention weights of each block, after the softmax: each (B, H, N, N)."""
    token_of_patch: tuple[Any, ...] | None = None
    """Number of the token that holds each patch, in the embeddings and in the output of each block: each (B, patches).
    None without merging."""


@dataclass(init=False, eq=False)
class MaskedImageModelingOutput(ModelOutput):
    loss: Any = None
    """Mean absolute difference on the masked pixels; None without a mask."""
    reconstruction: Any = None
    """(B, channels, rows * patch height, columns * patch width)."""
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass(init=False, eq=False)
class ImageClassifierOutput(ModelOutput):
    loss: Any = None
    logits: Any = None
    """(B, C), of the class head."""
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    token_of_patch: tuple[Any, ...] | None = None
    """As for the backbone, with hidden states, attentions or a trace alone."""


@dataclass(init=False, eq=False)
class DeiTForImageClassificationWithTeacherOutput(ModelOutput):
    loss: Any = None
    logits: Any = None
    """(B, C), the mean of both heads' logits."""
    cls_logits: Any = None
    """(B, C), of the class token's head."""
    distillation_logits: Any = None
    """(B, C), of the distillation token's head."""
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    token_of_patch: tuple[Any, ...] | None = None
    """As for the backbone, with hidden states, attentions or a trace alone."""
