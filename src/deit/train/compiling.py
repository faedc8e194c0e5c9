"""Compiling a model for training: few graphs for any number of images, and a word if PyTorch gives up.

Blocks are alike, so one graph serves all of them. There are five: in training those of the first block, which is never
dropped, of the last one, which computes only what is read, and of the others; in evaluation those of the last block and
of the others. The number of images is a variable in evaluation, whose last batch is smaller. In training it is fixed,
because code for one size is faster, and becomes a variable if another size follows, as it does when memory runs out.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from deit.machine import Processes

_LONG = 2000
"""Number of steps from which on compilation pays. It took 15 s on an H100, and a step 69 ms instead of some 92."""
_GRAPHS = 16
"""The most graphs of a block. PyTorch's own limit is 8."""
_LOG = logging.getLogger("torch._dynamo.convert_frame")
"""The logger that tells of the limit of graphs."""


def wanted(setting: bool | None, model: nn.Module, us: Processes, steps: int) -> bool:
    """Whether to compile for a run of so many steps.

    If the recipe leaves it open, a DeiT or ViT is compiled on CUDA if this machine can do it and the run is long.
    """
    if setting is not None:
        return setting
    return us.device.type == "cuda" and hasattr(model, "backbone") and steps >= _LONG and _possible()


def _possible() -> bool:
    """Whether Triton is installed, and a C compiler, which it needs."""
    compilers = (os.environ.get("CC") or "cc", "gcc", "clang")
    return find_spec("triton") is not None and any(map(shutil.which, compilers))


def compile_parts(model: nn.Module, **options: Any) -> None:
    """Compiles each block, or the whole model if it has none. `options` are those of `torch.compile`."""
    for part in getattr(getattr(model, "backbone", None), "blocks", [model]):
        part.forward = _any_number(torch.compile(part.forward, **options))  # hooks around it stay as they are


def _any_number(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, *rest: Any) -> Any:
        if not torch.is_grad_enabled():
            torch._dynamo.maybe_mark_dynamic(x, 0)  # (B, ...)
        return compiled(x, *rest)

    return call


@contextmanager
def graphs(say: Callable[[str], object]) -> Iterator[None]:
    """Allows as many graphs as a run needs. Says it if PyTorch compiles no further graph of a part of the model all the
    same, which then goes on without compilation."""
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name before 2.7
    handler = _Limit(say)
    _LOG.addHandler(handler)
    try:
        with config.patch({limit: _GRAPHS}):
            yield
    finally:
        _LOG.removeHandler(handler)


class _Limit(logging.Handler):
    def __init__(self, say: Callable[[str], object]):
        super().__init__(logging.WARNING)
        self.say, self.said = say, False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.said and "_limit" in record.getMessage():
            self.said = True
            self.say(
                "torch.compile has met its limit of graphs, so some steps now go on without compilation, which is "
                "slower; the result is the same. Resume with compute.compile=False if it stays slow"
            )
