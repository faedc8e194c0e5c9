"""The life of a server: from the socket to the end of the last answer."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import uvicorn

from deit import signals
from deit.predict.predictor import Predictor
from deit.serve.app import Routes, create_app
from deit.serve.connection import connections
from deit.serve.limits import Service


def _server(routes: Routes, renew: Callable[[], None]) -> type[uvicorn.Server]:
    """Returns a class of servers that end when no answer can come any more, and that call `renew` at SIGHUP."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if hasattr(signal, "SIGHUP"):
                loop = asyncio.get_running_loop()
                loop.add_signal_handler(
                    signal.SIGHUP, lambda: threading.Thread(target=renew, name="deit-renew", daemon=True).start()
                )

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or bool(routes.batcher.lost)

    return Server


_OTHER_FILES = 200
"""Descriptors beside those of connections: of the model, of processes and of what is being read."""


def _make_room(connections: int) -> None:
    """Makes sure that so many connections can be open, because a server without descriptors can't even refuse one."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise OSError(
                f"{connections} connections need {needed} file descriptors, found a limit of {hard}; raise it "
                "(ulimit -n, LimitNOFILE)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has the address, but does not listen yet, so that nobody can connect."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as bound:
        if sys.platform != "win32":  # where it would let two servers have one port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _told_if_taken(host, port):
            bound.bind((host, port))
        yield bound


@contextmanager
def _told_if_taken(host: str, port: int) -> Iterator[None]:
    """Raises `OSError` with the next move if the block fails."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the server can't listen at {host}, port {port} ({error.strerror or error}); choose another --port or "
            "--host"
        ) from None


def serve(
    load: Callable[[], Predictor],
    service: Service,
    name: str,
    *,
    host: str,
    port: int,
    keys: Callable[[], tuple[str, ...]] = tuple,
    listening: Callable[[Predictor, str], object],
) -> None:
    """Serves until SIGTERM or Ctrl-C. Then it takes no more connections, answers the requests that came, and returns.
    While the model still loads, both raise `signals.Interrupted`.

    At SIGHUP, it loads the model and the keys again. If the GPU fails, it ends as at SIGTERM and raises, because only a
    new process can use the GPU again.

    Args:
        load: loads the model.
        service, name: as for `create_app`.
        host, port: the address; port 0 takes any free port.
        keys: reads the keys again.
        listening: called with the model and the address once connections are taken.

    Raises `OSError` if the address can't be used, and `RuntimeError` after the GPU failed.
    """
    _make_room(service.connections)
    with _bound(host, port) as listener:  # loading can take a minute, and a taken port is told before
        with signals.ending():  # without a handler, the first process of a container gets no SIGTERM
            predictor = load()
            app = create_app(predictor, replace(service, hosts=(*service.hosts, host)), name)
            routes: Routes = app.state.routes
            routes.served.start()
        with _told_if_taken(host, port):  # two servers that load at once may both have the address
            listener.listen(2048)
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        logging.getLogger("uvicorn").setLevel(logging.ERROR)  # lower levels report every client's mistake
        server = _server(routes, lambda: routes.renew(load, keys))(
            uvicorn.Config(
                app,
                http=connections(service),
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
        listening(predictor, f"http://{shown}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])
        if routes.batcher.lost:
            raise RuntimeError(routes.batcher.lost)
