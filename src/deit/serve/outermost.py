"""What surrounds the application: every request is counted, looked at before anything else reads it, and answered with
the same headers."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import prometheus_client as prometheus
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deit.serve.connection import HEADERS
from deit.serve.limits import MAX_HEAD, Service

GONE = 499  # for the metrics only, because the client that would read it has gone

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ALL = ("0.0.0.0", "::")

_log = logging.getLogger("deit.serve")


class Json(Response):
    """JSON in ASCII, because any text can be encoded in it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")


class Metrics:
    """What `/metrics` tells."""

    def __init__(self, service: Service, waiting: Callable[[], int]):
        self.registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter(
            "deit_requests",
            "Requests by route and status (499: the client has gone).",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = prometheus.Histogram(
            "deit_request_seconds",
            "Seconds from a request's head to its whole answer, for /v1/*.",
            ["route"],
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )
        sizes = [2**i for i in range(16) if 2**i < service.max_batch] + [service.max_batch]
        self.batches = prometheus.Histogram(
            "deit_batch_images", "Images computed together.", registry=self.registry, buckets=sizes
        )
        self.images = prometheus.Counter(
            "deit_images", "Images of answered requests.", ["result"], registry=self.registry
        )
        prometheus.Gauge(
            "deit_queue_images", "Images decoding or waiting for the model.", registry=self.registry
        ).set_function(waiting)


class Outermost:
    """Refuses a request by its head, adds headers to every answer, answers whatever fails, and counts all of it.

    HEAD is answered as GET, without the body. If an answer begins before its request is here as a whole, the connection
    ends after it, because nobody would read the rest.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, hosts: tuple[str, ...]):
        self.app, self.metrics = app, metrics
        self.hosts = {name.lower().rstrip(".") for name in (*_LOOPBACK, *hosts)}  # as `_name_in` gives them
        self.any_address = any(name in _ALL for name in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        headers = scope["headers"]
        given = dict(headers)
        whole = given.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in given
        bodiless = scope["method"] == "HEAD"
        if bodiless:
            scope = {**scope, "method": "GET"}

        async def receiving() -> Message:
            nonlocal whole
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                whole = True
            return message

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                kept = [pair for pair in message.get("headers", []) if whole or pair[0].lower() != b"connection"]
                message = {**message, "headers": [*kept, *([] if whole else [(b"connection", b"close")]), *HEADERS]}
            elif bodiless:
                message = {**message, "body": b""}
            await send(message)

        try:
            if refused := self._refused(scope, given):
                await refused(scope, receiving, sending)
            else:
                await self.app(scope, receiving, sending)
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            if not status:
                await Json({"error": "the server is shutting down; ask another one"}, 503)(scope, receiving, sending)
        except Exception:
            _log.exception("a request failed")
            if not status:
                sentence = "the server failed at this request; its log says why"
                await Json({"error": sentence}, 500)(scope, receiving, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status or GONE).inc()
            if route.startswith("/v1/"):
                self.metrics.seconds.labels(route).observe(time.monotonic() - began)

    def _refused(self, scope: Scope, headers: dict[bytes, bytes]) -> Json | None:
        """The answer to a request that is not looked at further."""
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > MAX_HEAD:
            return _closing(431, f"the head of the request has more than {MAX_HEAD} bytes; send fewer headers")
        if b"transfer-encoding" in headers and b"content-length" in headers:  # two programs may read two bodies
            return _closing(400, "the request has both Content-Length and Transfer-Encoding; send one of them")
        host = headers.get(b"host", b"").decode("latin-1")
        if host and not self._is_ours(_name_in(host)):
            return _closing(
                421,
                f"expected a Host that this server is called by, found {host[:100]!r}; ask for its address, or start "
                "it with --allowed-host NAME",
            )
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a page at this address may ask. A stranger's page can make its own name lead here, but not an
        address."""
        return host in self.hosts or (self.any_address and _is_address(host))


def _closing(status: int, sentence: str) -> Json:
    return Json({"error": sentence}, status, {"Connection": "close"})


def _name_in(host: str) -> str:
    """The name in a Host header, without the port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
