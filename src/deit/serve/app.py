"""The application: the routes and their answers.

Everything that a stranger sends stays in memory, within limits. Each request ends with an answer or with one sentence,
`{"error": …}`: under a 4xx status, 501 if the model can't be explained, 503 if there is no room, and 504 if the time is
up.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import io
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import prometheus_client as prometheus
from fastapi import Depends, FastAPI, Request, Response
from fastapi.security import HTTPBearer
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

from deit import host
from deit.explain.explanation import Explanation, explained_model
from deit.explain.picture import figure, fitted, overlay
from deit.image.confined import FORMATS
from deit.image.decode import ImageError
from deit.predict.predictor import Predictor
from deit.report.markup import data_uri
from deit.serve.batcher import Batcher, Full, ModelFailed
from deit.serve.described import (
    ANYWHERE,
    EXPLAIN,
    NOT_EXPLAINED,
    SAID,
    Answers,
    Explained,
    Failure,
    ModelCard,
    Status,
    api_page,
    classify_described,
)
from deit.serve.limits import Service
from deit.serve.outermost import GONE, Json, Metrics, Outermost
from deit.serve.question import (
    EXPLANATION,
    Bodies,
    Question,
    explanation_asked,
    labels_asked,
    read_request,
    refuse,
    wants_picture,
)

_Read = TypeVar("_Read")

_SIDE = 224  # smallest longer side of a picture in an answer, in pixels

_log = logging.getLogger("deit.serve")

_HERE = Path(__file__).parent
_PAGES = {
    "/": (_HERE / "page.html", "text/html"),
    **{
        f"/{path.name}": (path, {".js": "text/javascript", ".css": "text/css"}[path.suffix])
        for path in (
            _HERE / "page.js",
            _HERE / "page.css",
            _HERE.parent / "web/shown.js",
            _HERE.parent / "web/words.js",
            _HERE.parent / "web/shown.css",
        )
    },
}


# ---- the application ---------------------------------------------------------------------------------------------


class _Served:
    """A model that is served."""

    def __init__(self, predictor: Predictor, service: Service, computed: Callable[[int], object]):
        self.predictor = predictor
        self.batcher = Batcher(
            predictor,
            max_batch=service.max_batch,
            max_wait=service.max_wait_ms / 1000,
            queue_size=service.queue,
            max_pixels=service.max_pixels,
            seconds=service.decode_seconds,
            computed=computed,
        )
        self.unexplained = _unexplained(predictor)
        self.requests = 0
        """Number of requests under way that came to this model, also of those whose bodies still arrive."""

    def start(self) -> None:
        """Computes a first image, which takes longest and fails if the model can't be used, and starts processes."""
        height, width = self.predictor.config.image_hw
        self.predictor([Image.new("RGB", (width, height))])
        self.batcher.start()

    def close(self, seconds: float) -> None:
        """Ends threads and processes when no request needs them any more, or after `seconds`."""
        until = time.monotonic() + seconds
        while self.requests and time.monotonic() < until:
            time.sleep(0.01)
        self.batcher.close(max(0.0, until - time.monotonic()))


class Routes:
    """The answers of each route."""

    def __init__(self, predictor: Predictor, service: Service, name: str):
        self.service, self.name = service, name
        self.served = _Served(predictor, service, self._computed)
        self.metrics = Metrics(service, lambda: self.batcher.waiting)
        self.bodies = Bodies(service.max_bytes, service.timeout)
        self.keys = _digests(service.keys)
        # A thread parses bodies, because 20 MiB would keep all other requests waiting. It is only one thread, so that
        # one client's bodies don't take all cores.
        self.parser = ThreadPoolExecutor(1, thread_name_prefix="deit-parse")
        self.ending = False
        self._renewing = threading.Lock()
        self._taking = threading.Lock()  # for a moment: a request takes the model, or another model takes its place

    @property
    def batcher(self) -> Batcher:
        """What makes the batches of the model that is served now."""
        return self.served.batcher

    @contextmanager
    def _taken(self) -> Iterator[_Served]:
        """The model that is served now. It is not closed before the block ends."""
        with self._taking:
            served = self.served
            served.requests += 1
        try:
            yield served
        finally:
            with self._taking:
                served.requests -= 1

    def _computed(self, images: int) -> None:
        self.metrics.batches.observe(images)

    def renew(self, load: Callable[[], Predictor], keys: Callable[[], tuple[str, ...]]) -> None:
        """Serves another model, and takes other keys. What can't be used is told in the log, and the old stays.

        Requests under way are answered by the model that they came to.
        """
        with self._renewing:
            try:
                self.keys = _digests(keys())
            except (OSError, ValueError) as error:
                _log.error("the keys stay as they were: %s", error)
            try:
                new = _Served(load(), self.service, self._computed)
            except Exception as error:
                _log.error("the model stays as it was: %s", error)
                return
            try:
                new.start()
            except Exception as error:
                new.batcher.close(0)
                _log.error("the model stays as it was: %s", error)
                return
            with self._taking:
                old, self.served = self.served, new
            _log.warning("the model was loaded again from %s", self.name)
            old.close(2 * self.service.timeout)  # a body may take one timeout to arrive, and its answer another

    @asynccontextmanager
    async def life(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        self.ending = True
        self.parser.shutdown(wait=False)
        await asyncio.to_thread(self.batcher.close, self.service.timeout)

    def _check_key(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        found = _digest(given.strip(" \t").encode("latin-1"))  # the bytes as they came
        matches = [hmac.compare_digest(found, key) for key in self.keys]  # all, so that the time doesn't tell which one
        if self.keys and not (scheme.lower() == "bearer" and any(matches)):
            refuse(401, "this needs a key; send it as Authorization: Bearer KEY", **{"WWW-Authenticate": "Bearer"})

    def _check_private(self, request: Request) -> None:
        if self.service.private:
            self._check_key(request)

    @asynccontextmanager
    async def _asked(
        self, request: Request, question: Question, read: Callable[[Mapping[str, Any]], _Read]
    ) -> AsyncIterator[tuple[list[bytes], _Read]]:
        """Reads the images of a request, and its fields with `read`. The body keeps its room until the block ends."""
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            refuse(415, "the body is compressed; send it as it is")

        def parsed(body: bytes) -> tuple[list[bytes], _Read]:
            query = request.query_params.multi_items()
            images, fields = read_request(body, request.headers.get("content-type", ""), query, question)
            return images, read(fields)

        with self.bodies.room() as body:
            await self.bodies.read(request, body)
            try:
                yield await asyncio.get_running_loop().run_in_executor(self.parser, parsed, bytes(body))
            except Full as error:
                refuse(503, str(error), **{"Retry-After": str(error.seconds)})

    async def classify(self, request: Request) -> Response:
        """Labels for one image or many, sent as raw bytes, as files in a form, or as base64 in JSON."""
        self._check_key(request)
        question = Question(("top_k",), '{"images": ["<base64>", ...], "top_k": 3}', self.service.max_batch)
        with self._taken() as served:
            async with self._asked(request, question, labels_asked) as (images, top_k):
                futures = served.batcher.submit(images, min(top_k, len(served.predictor.labels)))
                del images
                await self._done(request, futures)
        results: list[dict[str, Any]] = []
        for future in futures:
            try:
                results.append(self._result(future).to_dict())
            except ImageError as error:
                results.append({"error": str(error)})
        errors = [result["error"] for result in results if "error" in result]
        self.metrics.images.labels("unreadable").inc(len(errors))
        self.metrics.images.labels("labelled").inc(len(results) - len(errors))
        if len(errors) == len(results):
            refuse(422, errors[0])
        return Json({"model": self.name, "results": results})

    async def explain(self, request: Request) -> Response:
        """Maps of what the answer to one image rests on, one for each token, as numbers, in words and as pictures. With
        Accept: image/png, one figure."""
        self._check_key(request)
        with self._taken() as served:
            if served.unexplained:
                refuse(501, served.unexplained)
            asked = partial(explanation_asked, labels=served.predictor.labels)
            async with self._asked(request, EXPLANATION, asked) as ([image], why):
                future = served.batcher.explain(image, why)
                del image
                await self._done(request, [future])
        try:
            found = self._result(future)
        except ImageError as error:
            self.metrics.images.labels("unreadable").inc()
            refuse(422, str(error))
        self.metrics.images.labels("explained").inc()
        if wants_picture(request.headers.get("accept", "")):
            return Response(await asyncio.to_thread(_figure, found, self.name), media_type="image/png")
        return Json(await asyncio.to_thread(_explained, found, self.name))

    async def _done(self, request: Request, futures: list[Future[Any]]) -> None:
        """Waits until all futures are done. Cancels them if the time is up or the client has gone."""
        awaited = [asyncio.wrap_future(future) for future in futures]
        for each in awaited:  # looks at every error, because asyncio reports the ones that nobody has looked at
            each.add_done_callback(lambda each: each.cancelled() or each.exception())
        answers = asyncio.ensure_future(asyncio.wait(awaited))
        gone = asyncio.ensure_future(request.receive())  # after the body, the only message is that the client has gone
        try:
            await asyncio.wait([answers, gone], timeout=self.service.timeout, return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                if gone.done():
                    raise ClientDisconnect
                refuse(504, f"no answer within {self.service.timeout:g} s; try again, or send fewer images")
        finally:
            for future in futures:
                future.cancel()  # takes out images that are not being computed yet
            answers.cancel()
            gone.cancel()

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except ModelFailed as error:
            refuse(503, str(error), **{"Retry-After": "1"})

    async def model(self, request: Request) -> Response:
        """The model that is served, and the limits."""
        self._check_private(request)
        predictor, limits = self.served.predictor, self.service
        calibration, head = predictor.calibration, predictor.head
        return Json(
            {
                "model": self.name,
                "labels": predictor.labels,
                "scoring": predictor.config.scoring,
                "head": head,
                "image_size": list(predictor.config.image_hw),
                "calibration": None
                if calibration is None
                else {
                    "error_rate": calibration.error_rate,
                    "images": calibration.images,
                    "temperature": calibration.heads[head].temperature,
                    "threshold": calibration.heads[head].threshold,
                },
                "limits": {"images": limits.max_batch, "bytes": limits.max_bytes, "pixels": limits.max_pixels},
                "formats": list(dict.fromkeys(FORMATS.values())),
                "key": bool(self.keys),
                "explain": not self.served.unexplained,
            }
        )

    def _check_device(self) -> None:
        if self.batcher.lost:
            refuse(503, self.batcher.lost)

    async def healthz(self) -> Response:
        """200 while the process lives; 503 if it has to be started again, because its GPU failed."""
        self._check_device()
        return Json({"status": "ok"})

    async def readyz(self) -> Response:
        """200 while requests are answered; 503 if the model's thread has ended, if the GPU failed, and while the server
        shuts down."""
        self._check_device()
        if self.ending or not self.batcher.alive:
            refuse(503, "the server is shutting down; ask another one", **{"Retry-After": "1"})
        return Json({"status": "ready"})

    async def metrics_text(self, request: Request) -> Response:
        """Metrics in Prometheus' text format."""
        self._check_private(request)
        return Response(prometheus.generate_latest(self.metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)


def _digests(keys: Iterable[str]) -> list[bytes]:
    return [_digest(key.encode()) for key in keys]


def _digest(key: bytes) -> bytes:
    """A key in a form that takes the same time to compare, whatever its length."""
    return hashlib.sha256(key).digest()


def _unexplained(predictor: Predictor) -> str:
    """The reason why the model can't be explained; empty if it can."""
    try:
        explained_model(predictor)
    except ValueError as error:
        return str(error)
    return ""


def _explained(found: Explanation, model: str) -> dict[str, Any]:
    """An explanation as JSON types, with pictures of what the model saw and of each map over it.

    The pictures are enlarged if what the model saw is small.
    """
    seen = fitted(found.seen, max(_SIDE, *found.seen.size))
    known = found.to_dict()
    return {
        "model": model,
        "image_size": known["image_size"],
        "seen": data_uri(seen),
        "answers": known["answers"],
        "maps": [{**each.to_dict(), "overlay": data_uri(overlay(seen, each.values))} for each in found.maps],
    }


def _figure(found: Explanation, model: str) -> bytes:
    file = io.BytesIO()
    figure(replace(found, model=model)).save(file, "PNG")
    return file.getvalue()


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=GONE)


async def _refused(_: Request, error: HTTPException) -> Response:
    sentence = {
        404: "there is nothing here; see /api for all addresses, or try the page at /",
        405: "this method is not for this address; see /api for all addresses",
    }
    return Json({"error": sentence.get(error.status_code, str(error.detail))}, error.status_code, error.headers)


def create_app(predictor: Predictor, service: Service, name: str) -> FastAPI:
    """Returns the application. `name` is the model's name in answers; `app.state.routes.batcher` makes the batches."""
    routes = Routes(predictor, service, name)
    app = FastAPI(
        title="deit",
        version=host.VERSION,
        description="Labels for images, and what they rest on.",
        docs_url=None,
        redoc_url=None,
        lifespan=routes.life,
        responses=_failures(ANYWHERE),
        exception_handlers={HTTPException: _refused, ClientDisconnect: _gone},
    )
    app.state.routes = routes
    app.add_middleware(Outermost, metrics=routes.metrics, hosts=service.hosts)
    key = [Depends(HTTPBearer(scheme_name="key", auto_error=False))] if service.keys else []  # only for the description
    app.post(
        "/v1/classify",
        response_model=Answers,
        responses=_failures(SAID),
        openapi_extra=classify_described(service.max_batch),
        dependencies=key,
    )(routes.classify)
    picture: dict[int | str, Any] = {200: {"content": {"image/png": {}}}}
    app.post(
        "/v1/explain",
        response_model=Explained,
        responses=picture | _failures(NOT_EXPLAINED),
        openapi_extra=EXPLAIN,
        dependencies=key,
    )(routes.explain)
    needed = _failures({401: SAID[401]}) if service.private else {}
    private = key if service.private else []
    app.get("/model", response_model=ModelCard, responses=needed, dependencies=private)(routes.model)
    app.get("/healthz", response_model=Status, responses={503: {"model": Failure}})(routes.healthz)
    app.get("/readyz", response_model=Status, responses={503: {"model": Failure}})(routes.readyz)
    app.get("/metrics", response_class=PlainTextResponse, responses=needed, dependencies=private)(routes.metrics_text)
    for path, (file, kind) in _PAGES.items():
        app.get(path, include_in_schema=False)(_sends(file.read_bytes(), kind))
    app.get("/api", include_in_schema=False)(_sends(api_page(app.openapi()).encode(), "text/html"))
    return app


def _failures(said: Mapping[int, str]) -> dict[int | str, Any]:
    return {status: {"model": Failure, "description": text} for status, text in said.items()}


def _sends(content: bytes, kind: str) -> Callable[[], Any]:
    async def send() -> Response:
        return Response(content, media_type=kind)

    return send
