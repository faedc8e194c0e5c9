"""The life of a server: from the socket to the end of the last answer."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from deit.predict.predictor import Predictor
from deit.serve.app import create_app
from deit.serve.batcher import Batcher
from deit.serve.limits import Service


def _prompt(seconds: float) -> type[H11Protocol]:
    """Returns a class of connections that close if the head of a request takes longer than `seconds`.

    uvicorn alone would wait for ever, because it times only connections that are idle after an answer.
    """

    class Connection(H11Protocol):
        late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._time()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._time()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.late:
                self.late.cancel()

        def _time(self) -> None:
            incomplete = self.conn.their_state is h11.IDLE
            if incomplete and not self.late:
                self.late = self.loop.call_later(seconds, self.transport.close)
            elif not incomplete and self.late:
                self.late.cancel()
                self.late = None

    return Connection


def _server(batcher: Batcher) -> type[uvicorn.Server]:
    """Returns a class of servers that end when no answer can come any more."""

    class Server(uvicorn.Server):
        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or bool(batcher.lost)

    return Server


def serve(
    predictor: Predictor, service: Service, name: str, *, host: str, port: int, listening: Callable[[str], object]
) -> None:
    """Serves until SIGTERM or Ctrl-C. Then it takes no more connections, answers the requests that came, and returns.

    If the GPU fails, it ends in the same way and raises, because only a new process can use the GPU again.

    Args:
        predictor, service, name: as for `create_app`.
        host, port: the address; port 0 takes any free port.
        listening: called with the address once connections are taken.

    Raises `OSError` if the address can't be used, and `RuntimeError` after the GPU failed.
    """
    height, width = predictor.config.image_hw
    predictor(
        [Image.new("RGB", (width, height))]
    )  # the first call takes longest, and fails if the model lacks the head
    with socket.create_server(
        (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
    ) as listener:
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        logging.getLogger("uvicorn").setLevel(logging.ERROR)  # lower levels report every client's mistake
        app = create_app(predictor, service, name)
        batcher: Batcher = app.state.routes.batcher
        server = _server(batcher)(
            uvicorn.Config(
                app,
                http=_prompt(service.timeout),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(2 * service.timeout) + 1,
            )
        )
        # uvicorn raises the signal again when it has ended. This handler keeps the exit status 0 then.
        signal.signal(signal.SIGTERM, lambda *_: None)
        shown = f"[{host}]" if ":" in host else host
        listening(f"http://{shown}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])
        if batcher.lost:
            raise RuntimeError(batcher.lost)
