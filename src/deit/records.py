"""The documented name of `deit.train.records`."""

from deit.train.records import About, Record

__all__ = ["About", "Record"]
