"""Connections: how many there may be, how long each part of a request may take, and what is said before a request is
understood."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from deit.serve.limits import MAX_HEAD, Service

HEADERS = [
    (name.lower().encode(), value.encode())
    for name, value in {
        "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self' blob: data:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }.items()
]
"""What every answer carries."""

_PIECES, _LEAST = 1000, 64
"""A chunked body may have this many chunks of any size. More must have this many bytes each on average, because each
one takes tens of microseconds of the thread that all connections share."""


def _whole_answer(status: int, phrase: str, sentence: str, *headers: tuple[bytes, bytes]) -> tuple[h11.Response, bytes]:
    body = json.dumps({"error": sentence}).encode()
    length = str(len(body)).encode()
    named = [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close"), *headers]
    return h11.Response(status_code=status, headers=[*named, *HEADERS], reason=phrase.encode()), body


class Door:
    """Counts connections, in all and for each address.

    Args:
        most: number of connections in all. A quarter of them may come from one address.
    """

    def __init__(self, most: int):
        self.most, self.each = most, max(1, most // 4)
        self._of: Counter[str] = Counter()
        self._inside = 0

    def enter(self, address: str) -> bool:
        """Takes a place if there is one."""
        if self._inside >= self.most or self._of[address] >= self.each:
            return False
        self._inside += 1
        self._of[address] += 1
        return True

    def leave(self, address: str) -> None:
        self._inside -= 1
        self._of[address] -= 1
        if not self._of[address]:
            del self._of[address]


def _sender(transport: Any) -> str:
    """The address to count a connection under. In IPv6, it is a network of 64 bits, because anyone has a whole one."""
    peer = transport.get_extra_info("peername")
    try:
        address = ipaddress.ip_address(peer[0].partition("%")[0])
    except (TypeError, IndexError, ValueError):  # no address, as of a connection that is over already
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or ipaddress.ip_address(int(address) >> 64 << 64)
    return str(address)


class _Parser(h11.Connection):
    """Refuses a body of very many very small chunks, and HTTP of another major version than 1."""

    pieces = size = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            if not event.http_version.startswith(b"1."):
                raise h11.RemoteProtocolError("another version of HTTP")
            self.pieces = self.size = 0
        elif isinstance(event, h11.Data):
            self.pieces += 1
            self.size += len(event.data)
            if self.pieces > _PIECES + self.size / _LEAST:
                raise h11.RemoteProtocolError("the chunks are too small")
        return event


class _Transport:
    """A transport whose `close` takes bounded time, and after which the peer can still read the answer.

    If a request is not here as a whole, its sender may go on sending. A plain close would answer that with a reset, at
    which the sender loses the answer that it has not read yet. So only our side ends at first. What comes then is
    thrown away, until the sender ends too, the time is up, or `most` bytes came.
    """

    def __init__(self, transport: Any, connection: Any, seconds: float, most: int):
        self._transport, self._connection, self._seconds, self._most = transport, connection, seconds, most
        self._late: asyncio.TimerHandle | None = None
        self.draining = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._late is not None or self._transport.is_closing()

    def close(self) -> None:
        if self._late is not None:
            return
        self._late = self._connection.loop.call_later(self._seconds, self._transport.abort)
        if self._connection.conn.their_state is h11.SEND_BODY and not self._transport.is_closing():
            self.draining = True
            self._transport.resume_reading()
            self._transport.write_eof()
        else:
            self._transport.close()

    def drain(self, size: int) -> None:
        self._most -= size
        if self._most < 0:
            self._transport.abort()

    def lost(self) -> None:
        if self._late is not None:
            self._late.cancel()


def connections(service: Service) -> type[H11Protocol]:
    """Returns a class of connections within the limits of `service`.

    uvicorn alone has no limit of connections that answers in JSON and counts addresses, and it times only connections
    that are idle after an answer.
    """
    door = Door(service.connections)

    class Connection(H11Protocol):
        late: asyncio.TimerHandle | None = None  # ends a head that takes too long
        overdue: asyncio.TimerHandle | None = None  # ends a request and its answer
        sender: str | None = None  # None: no place was taken

        def __init__(self, *given: Any, **named: Any):
            super().__init__(*given, **named)
            self.conn = _Parser(h11.SERVER, MAX_HEAD)

        def connection_made(self, transport: Any) -> None:
            sender = _sender(transport)
            wrapped: Any = _Transport(transport, self, service.timeout, 3 * service.max_bytes)
            if door.enter(sender):
                self.sender = sender
                super().connection_made(wrapped)
                self._time()
            else:
                self.transport = wrapped
                self._say(
                    503,
                    "Service Unavailable",
                    "too many connections are open already; try again in 1 s",
                    (b"retry-after", b"1"),
                )

        def data_received(self, data: bytes) -> None:
            if self.transport.draining:  # type: ignore[attr-defined]
                self.transport.drain(len(data))  # type: ignore[attr-defined]
            elif not self.transport.is_closing():
                super().data_received(data)
                self._time()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.transport.lost()  # type: ignore[attr-defined]
            for timer in (self.late, self.overdue):
                if timer:
                    timer.cancel()
            if self.sender is not None:
                door.leave(self.sender)

        def on_response_complete(self) -> None:
            if self.overdue:
                self.overdue.cancel()
                self.overdue = None
            if self.conn.their_state is h11.SEND_BODY:  # nobody reads the rest of the request
                self.transport.close()
            super().on_response_complete()
            self._time()

        def shutdown(self) -> None:
            if self.transport.draining:  # type: ignore[attr-defined]  # answered; only the rest of its request may still come
                self.transport.abort()
            else:
                super().shutdown()

        def send_400_response(self, msg: str) -> None:
            if self.cycle is not None:
                self.cycle.disconnected = True  # a request that became invalid gets no second answer
                self.cycle.message_event.set()
            self._say(400, "Bad Request", "this is not valid HTTP; let your HTTP library write it")

        def _say(self, status: int, phrase: str, sentence: str, *headers: tuple[bytes, bytes]) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                response, body = _whole_answer(status, phrase, sentence, *headers)
                for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _time(self) -> None:
            waits = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
            if waits and not self.late and not self.timeout_keep_alive_task:
                self.late = self.loop.call_later(service.timeout, self.transport.close)
            elif not waits and self.late:
                self.late.cancel()
                self.late = None
            if self.cycle and not self.cycle.response_complete and not self.overdue:
                # The application times the body and the answer. This is for a client that doesn't take its answer.
                self.overdue = self.loop.call_later(3 * service.timeout + 5, self.transport.abort)

    return Connection
