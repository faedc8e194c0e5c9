"""The `deit` command: each verb parses, calls one function and prints."""

from typing import TYPE_CHECKING

from deit.lazy import offer

if TYPE_CHECKING:
    from deit.cli.command import main as main

__getattr__, __dir__ = offer(__name__, {"deit.cli.command": ("main",)})
