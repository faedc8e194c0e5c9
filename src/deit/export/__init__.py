"""Writes models for other runtimes, each checked against the model before it appears, and for other projects."""

from typing import TYPE_CHECKING

from deit.lazy import offer

if TYPE_CHECKING:
    from deit.export.engines import Engine as Engine
    from deit.export.engines import load_engine as load_engine
    from deit.export.write import Exported as Exported
    from deit.export.write import export as export

__getattr__, __dir__ = offer(
    __name__,
    {
        "deit.export.engines": ("Engine", "load_engine"),
        "deit.export.write": ("Exported", "export"),
    },
)
