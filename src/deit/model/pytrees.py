"""Outputs as trees of tensors, which `torch.export`, `torch.compile` and `DistributedDataParallel` take apart.

Importing this module registers the classes of `outputs`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch.utils import _pytree

from deit.model import outputs


def _flatten(output: outputs.ModelOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output)


def _flatten_with_keys(output: outputs.ModelOutput) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(_pytree.MappingKey(name), value) for name, value in output.items()], list(output)


def _unflatten(kind: type[outputs.ModelOutput], values: Iterable[Any], names: Iterable[str]) -> outputs.ModelOutput:
    return kind(zip(names, values, strict=True))


for _kind in (
    outputs.BaseModelOutputWithPooling,
    outputs.MaskedImageModelingOutput,
    outputs.ImageClassifierOutput,
    outputs.DeiTForImageClassificationWithTeacherOutput,
):
    _pytree.register_pytree_node(
        _kind,
        _flatten,
        partial(_unflatten, _kind),
        serialized_type_name=f"{_kind.__module__}.{_kind.__name__}",
        flatten_with_keys_fn=_flatten_with_keys,
    )
