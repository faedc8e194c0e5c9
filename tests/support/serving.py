"""The server, in this process or in one of its own, and what is asked of it.

A test that imports this is skipped if the packages of `deit[serve]` are missing."""

import asyncio
import io
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from deit.evaluate.calibration import Calibration, HeadCalibration
from deit.predict.predictor import Predictor

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from starlette.testclient import TestClient  # noqa: E402

from deit.serve.app import create_app  # noqa: E402
from deit.serve.limits import Service  # noqa: E402

RAW = {"Content-Type": "application/octet-stream"}
TEXT = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


def calibrated(folder):
    """The folder, with a calibration that leaves some answers unsure."""
    heads = {
        name: HeadCalibration(temperature=2.0, threshold=0.3, nll=(1.0, 0.9), answered=0.5)
        for name in ("fused", "class", "distillation", "softmax")
    }
    Calibration(error_rate=0.05, images=400, data="x", heads=heads).save(folder)
    return folder


def picture(seed, kind="PNG", size=(20, 24)):
    """Few large areas of strong colours: no two images have nearly the same answer."""
    areas = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(areas).resize(size[::-1], Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@contextmanager
def client(folder, head="fused", **limits):
    predictor = Predictor(folder, head=head)
    with TestClient(create_app(predictor, Service(**limits), "m"), "http://localhost") as found:
        found.predictor, found.batcher = predictor, found.app.state.routes.batcher
        found.batcher.start()
        yield found


def ask(web, body, headers=RAW, path="/v1/classify", **options):
    return web.post(path, content=body, headers=headers, **options)


def assert_labels(found, expected):
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in expected], abs=1e-6)


def assert_refused(answer, status, *parts):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    sentence = answer.json()["error"]
    assert "\n" not in sentence
    assert sentence
    assert [part for part in parts if part not in sentence] == [], sentence


def metric(web, name):
    [value] = re.findall(rf"^{re.escape(name)} (\S+)$", web.get("/metrics").text, re.MULTILINE) or ["0"]
    return float(value)


class Gate:
    """The model waits at it, and it notes the batches."""

    def __init__(self, predictor):
        self.open, self.batches, self.answers = threading.Event(), [], predictor.answers
        self.reached = threading.Event()
        predictor.answers = self

    def __call__(self, sources, pixels, top_k):
        self.batches.append(len(pixels))
        self.reached.set()
        assert self.open.wait(20)
        return self.answers(sources, pixels, top_k)


async def concurrently(app, bodies, query=lambda i: {}, path="/v1/classify"):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=60) as web:
        return await asyncio.gather(
            *(web.post(path, content=body, headers=RAW, params=query(i)) for i, body in enumerate(bodies))
        )


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to that")


async def raw(app, chunks, headers=(), wait=0.0, path="/v1/classify"):
    """The application called with a body in pieces; after them, and `wait` seconds, the client goes."""
    sent, pieces = [], list(chunks)

    async def receive():
        if pieces:
            piece = pieces.pop(0)
            if isinstance(piece, float):
                await asyncio.sleep(piece)
                return await receive()
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
        await asyncio.sleep(wait)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"image/png"), *headers],
        "client": ("x", 1),
        "server": ("x", 1),
    }
    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent)
    return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=body)


def png_of(width, height):
    """A header that promises so many pixels."""
    data = bytearray(picture(0))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@contextmanager
def server(folder, *options, **environment):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "deit",
            "serve",
            str(folder),
            "--port",
            "0",
            "--device",
            "cpu",
            "--engine",
            "torch",
            *options,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line, line + (process.stderr.read() if process.poll() is not None else "")
        yield process, line.split(" at ")[1].strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
