"""What a forward pass returns in both frameworks, with the names and the access of `transformers`' outputs.

B images, N tokens (prefix and patches), D width, H heads, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any


@dataclass(kw_only=True)
class ModelOutput:
    """Fields by attribute (`out.logits`), key (`out["logits"]`), index and slice (`out[0]`), or `to_tuple()`.

    A field that is None is absent from keys, indices and tuples.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def keys(self) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        value = getattr(self, name, None)
        return default if value is None else value

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(f"{key!r} is not in this output, which has {', '.join(self.keys())}")
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass(kw_only=True)
class BaseModelOutputWithPooling(ModelOutput):
    last_hidden_state: Any = None
    """(B, N, D), after the final LayerNorm."""
    pooler_output: Any = None
    """(B, pooler width); None without a pooling layer."""
    hidden_states: tuple[Any, ...] | None = None
    """The embeddings and the output of each block, before the final LayerNorm: each (B, N, D)."""
    attentions: tuple[Any, ...] | None = None
    """Attention weights of each block, after the softmax: each (B, H, N, N)."""


@dataclass(kw_only=True)
class MaskedImageModelingOutput(ModelOutput):
    loss: Any = None
    """Mean absolute difference on the masked pixels; None without a mask."""
    reconstruction: Any = None
    """(B, channels, rows * patch height, columns * patch width)."""
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass(kw_only=True)
class ImageClassifierOutput(ModelOutput):
    loss: Any = None
    logits: Any = None
    """(B, C), of the class head."""
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass(kw_only=True)
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
