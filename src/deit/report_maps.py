"""The documented name of `deit.report.maps`."""

from deit.report.maps import Maps, explained

__all__ = ["Maps", "explained"]
