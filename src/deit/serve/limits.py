"""The limits of a server, and the keys that open it."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from deit.image import decode

MAX_HEAD = 16 * 2**10
"""Largest head of a request, in bytes."""
MAX_PIXELS = 50_000_000
"""Decoding one image takes at most 10 bytes for each of these pixels."""
_LONGEST = 24 * 60 * 60
"""Largest `timeout`. Some of the system's clocks take no more than weeks."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """The limits of a server."""

    max_batch: int = 32
    """Largest number of images computed together, and of images in a request."""
    max_wait_ms: float = 5.0
    """Milliseconds that an image waits for others to fill its batch."""
    queue: int = 256
    """Largest number of images that are decoding or waiting. A request that doesn't fit is answered 503."""
    max_bytes: int = 20 * 2**20
    """Largest body of a request, in bytes."""
    max_pixels: int = MAX_PIXELS
    """Largest image, in pixels. Pillow's own limit is the highest value."""
    timeout: float = 30.0
    """Seconds for a request's head to arrive, for its body to arrive (408), and for its answer (504)."""
    keys: tuple[str, ...] = ()
    """Keys, each of which opens /v1/*. Without keys, it is open to all."""
    private: bool = False
    """Whether `/model` and `/metrics` need a key too."""
    hosts: tuple[str, ...] = ()
    """Names and addresses under which the server may be asked (`Host`), beyond those of this machine's loopback. If
    0.0.0.0 or :: is one of them, so is every address."""
    connections: int = 1024
    """Largest number of open connections. A quarter of them may come from one address."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "queue", "max_bytes", "max_pixels", "timeout", "connections"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if self.timeout > _LONGEST:
            raise ValueError(f"timeout must be at most {_LONGEST} s, a day, found {self.timeout:g}")
        if self.max_pixels > decode.MAX_PIXELS:
            raise ValueError(
                f"max_pixels must be at most {decode.MAX_PIXELS}, because Pillow refuses larger images, found "
                f"{self.max_pixels}"
            )
        if not 0 <= self.max_wait_ms < 1000 * self.timeout:
            raise ValueError(
                f"max_wait_ms must be at least 0 and below the timeout, {1000 * self.timeout:g} ms, found "
                f"{self.max_wait_ms:g}; an image that waits longer gets no answer"
            )
        if self.queue < self.max_batch:
            raise ValueError(
                f"a queue of {self.queue} images can't fill a batch of {self.max_batch}; give a queue of at least "
                f"{self.max_batch}"
            )
        if self.private and not self.keys:
            raise ValueError("nothing can need a key, because there is none; give a file of keys too")
        for name in self.hosts:
            if not _is_host(name):
                raise ValueError(
                    f"expected the name or the address of a host and nothing else, found {name!r}; leave out http:// "
                    "and the port"
                )

    @property
    def decode_seconds(self) -> float:
        """Most time that an image may take to decode, in seconds of the processor."""
        return self.timeout / 3


def _is_host(name: str) -> bool:
    """Whether a `Host` header can hold this, apart from its port."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return re.fullmatch(r"[^\s/:@\[\]]+", name) is not None
    return True


def read_keys(path: Path) -> tuple[str, ...]:
    """Reads API keys from a file, one on each line.

    Raises `ValueError` if the file has none, or one that can't be sent in a header by every client.
    """
    lines = path.read_bytes().decode("utf-8-sig", "replace").splitlines()
    keys = {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}
    if not keys:
        raise ValueError(f"{path} holds no key; write one on each line")
    for number, key in keys.items():
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"{path}, line {number}: expected a key of printable ASCII characters, because clients send it in a "
                "header, found others; write another key there, and save the file in UTF-8"
            )
    return tuple(keys.values())
