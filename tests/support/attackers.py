"""Clients that mean harm: each call is one attack on a server, and returns what came of it."""

import asyncio
import functools
import random
import socket
import struct
from collections.abc import Awaitable, Callable

from support.bombs import blank, deep, grown, scans

from bench.fortress import damaged

WRONG_HEADS = (
    b"nonsense\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
    b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 17_000 + b"\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
    b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
    b"DELETE /v1/classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
)


def head(size: int) -> bytes:
    return (
        "POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        f"Connection: close\r\nContent-Length: {size}\r\n\r\n"
    ).encode()


class Attacker:
    """An endless choice among attacks on the server at a port. The same seed makes the same choices."""

    def __init__(self, port: int, image: bytes, seed: int):
        self.port, self.image, self.draw = port, image, random.Random(seed)
        self.kinds: dict[str, Callable[[], Awaitable[str]]] = {
            "bombs": self.bomb,
            "broken images": self.broken,
            "slow bodies": self.slow_body,
            "slow heads": self.slow_head,
            "wrong heads": self.wrong_head,
            "closed connections": self.closed,
        }

    async def attack(self) -> tuple[str, str]:
        """The kind of an attack, and the status of the answer, or `closed`."""
        kind = self.draw.choice([*self.kinds])
        return kind, await self.kinds[kind]()

    async def bomb(self) -> str:
        return await self._whole(self.draw.choice(BOMBS)())

    async def broken(self) -> str:
        return await self._whole(damaged(self.image, self.draw))

    async def wrong_head(self) -> str:
        reader, writer = await self._connected()
        return await self._answer(reader, writer, self.draw.choice(WRONG_HEADS))

    async def slow_body(self) -> str:
        """A byte every half second, of a body that would take hours."""
        reader, writer = await self._connected()
        return await self._slowly(reader, writer, head(10_000))

    async def slow_head(self) -> str:
        reader, writer = await self._connected()
        return await self._slowly(reader, writer, b"POST /v1/classify HTTP/1.1\r\nX: ")

    async def closed(self) -> str:
        """A connection that ends, in one of two ways, before its request is whole or before its answer is there."""
        _, writer = await self._connected()
        request = head(len(self.image)) + self.image
        writer.write(request[: self.draw.choice((0, 10, 200, len(request) // 2, len(request)))])
        await asyncio.sleep(self.draw.choice((0, 0.01, 0.5)))
        if self.draw.random() < 0.5:
            linger = struct.pack("ii", 1, 0)  # a reset instead of an orderly end
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        return "closed"

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def _whole(self, body: bytes) -> str:
        reader, writer = await self._connected()
        return await self._answer(reader, writer, head(len(body)) + body)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> str:
        try:
            writer.write(request)
            return _status(await asyncio.wait_for(reader.read(), 90))
        except ConnectionError:
            return "closed"
        finally:
            writer.close()

    async def _slowly(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes) -> str:
        rest = asyncio.ensure_future(reader.read())
        try:
            writer.write(first)
            while not rest.done():
                writer.write(b"x")
                await asyncio.wait([rest], timeout=0.5)
            return _status(rest.result())
        except ConnectionError:
            return "closed"
        finally:
            rest.cancel()
            writer.close()


def _status(answer: bytes) -> str:
    return answer.split(b" ", 2)[1].decode() if answer else "closed"


BOMBS: tuple[Callable[[], bytes], ...] = tuple(
    functools.cache(make)
    for make in (
        lambda: scans(9000),
        lambda: grown("markers", 20_000_000),
        lambda: grown("chunks", 20_000_000),
        lambda: grown("blocks", 20_000_000),
        lambda: blank((1, 50_000_000)),
        lambda: deep(7071),
    )
)
