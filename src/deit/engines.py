"""The documented name of `deit.export.engines`."""

from deit.export.engines import Engine, load_engine

__all__ = ["Engine", "load_engine"]
