"""What strangers may send: each request is answered or refused in one sentence."""

import asyncio
import base64
import io
import json
import random
import tempfile

import numpy as np
import pytest
from PIL import Image
from support.serving import (
    FORM,
    RAW,
    SVG,
    TEXT,
    ask,
    assert_labels,
    assert_refused,
    client,
    picture,
    png_of,
    raw,
    until,
)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("body", "headers", "status", "part"),
    [
        (b"no image", RAW, 422, "the image is not a JPEG, PNG, WebP, GIF, TIFF or BMP file; convert it"),
        (b"", RAW, 422, "an image is empty (0 bytes)"),
        (picture(0)[:100], RAW, 422, "the image is damaged or cut short"),
        (picture(0, "JPEG")[:300], RAW, 422, "the image is damaged or cut short"),
        (png_of(60_000, 60_000), RAW, 422, "the image has more than the 50000000 pixels allowed here; shrink it"),
        (png_of(10_000, 10_000), RAW, 422, "the image has more than the 50000000 pixels allowed here"),
        (SVG, {"Content-Type": "image/svg+xml"}, 422, "is not a JPEG"),
        (b"<html><body>", {"Content-Type": "image/png"}, 422, "is not a JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", RAW, 422, "is not a JPEG"),
        (picture(0), {"Content-Type": "text/html"}, 415, "expected Content-Type image/*, application/octet-stream, "),
        (picture(0), {"Content-Type": ""}, 415, "found 'none'"),
        (picture(0), {**RAW, "Content-Encoding": "gzip"}, 415, "the body is compressed"),
        (b"{", TEXT, 400, "the body is not valid JSON"),
        (b"[" * 100_000, TEXT, 400, "the body is not valid JSON"),
        (b"\xff\xfe\x00", TEXT, 400, "the body is not valid JSON"),
        (b"[]", TEXT, 400, "the body is other JSON"),
        (b'{"images": ["QUJD"], "top_k": NaN}', TEXT, 400, "the body is not valid JSON"),
        (b'{"images": ["QUJD"], "top_k": 1e999}', TEXT, 400, "top_k is not a whole number"),
        (b'{"images": ["QUJD"], "top_k": ' + b"9" * 5000 + b"}", TEXT, 400, "the body is not valid JSON"),
        (b'{"images": ["QUJD"], "top_k": true}', TEXT, 400, "top_k is not a whole number"),
        (b'{"images": ["QUJD"], "top_k": -1}', TEXT, 400, "top_k is not a whole number"),
        (b'{"images": ["QUJD"], "top_k": 1.5}', TEXT, 400, "top_k is not a whole number"),
        (b'{"images": ["QUJD"], "top_k": 1, "top_k": 1}', TEXT, 400, "the body is not valid JSON"),
        (b'{"images": ["QUJD"], "model": "x"}', TEXT, 400, "the body is other JSON"),
        (b'{"images": "QUJD"}', TEXT, 400, "images is not a list of texts"),
        (b'{"images": []}', TEXT, 400, "the request holds no image"),
        (b'{"images": ["data:image/png;base64,QUJD"]}', TEXT, 422, "is not a JPEG"),
        (b'{"images": ["data:image/png,QUJD"]}', TEXT, 400, "an image is not valid base64"),
        (b'{"images": ["data:image/png;base64,QUJ!"]}', TEXT, 400, "an image is not valid base64"),
        (b'{"images": ["QUJDR"]}', TEXT, 400, "an image is not valid base64"),
        (b'{"images": ["\\ud800"]}', TEXT, 400, "an image is not valid base64"),
        (json.dumps({"images": ["QUJD"] * 33}).encode(), TEXT, 413, "at most 32 images"),
        (b"--x\r\n\r\nhello", FORM, 400, "neither a file nor top_k"),
        (b"--x\r\nContent-Disposition: form-data; name=a; filename=b\r\n\r\nQ", FORM, 422, "is not a JPEG"),
        (b"--x--\r\n", FORM, 400, "the request holds no image"),
        (b"nothing", FORM, 400, "the multipart body is damaged"),
        (b"--x\r\n" * 100_000, FORM, 400, "the multipart body is damaged"),
        (
            b"--x\r\nContent-Disposition: form-data; filename=b\r\n\r\nQ\r\n" * 33 + b"--x--",
            FORM,
            413,
            "at most 32 images",
        ),
        (b"--x", {"Content-Type": "multipart/form-data"}, 400, "has no boundary"),
    ],
    ids=lambda value: "",
)
def test_bad_requests_get_one_sentence(web, body, headers, status, part):
    if body.endswith(b"QUJD") or (b"filename=b\r\n\r\nQ" in body and status == 422):
        body += b"\r\n--x--"
    assert_refused(ask(web, body, headers), status, part)


def test_strips_and_dots_are_images(web):
    for size in ((1, 1), (1, 100_000), (100_000, 1)):
        file = io.BytesIO()
        Image.new("RGB", size, (200, 30, 90)).save(file, "PNG")
        assert ask(web, file.getvalue()).status_code == 200
    assert ask(web, picture(0), params={"top_k": 10**8}).status_code == 200
    assert_refused(ask(web, picture(0), params={"top_k": "9" * 5000}), 400, "top_k is not a whole number")


def test_a_number_is_the_same_in_each_place(web):
    """As text in the query, and as any number of JSON that is whole."""
    image, huge = picture(0), 10**20
    [[expected], every] = (web.predictor([image], top_k=count)[0] for count in (1, 9))
    for found, text in ((huge, f"{huge}"), (1, "1")):
        for value in (text, f"{text}.0"):
            body = b'{"images": ["%s"], "top_k": %s}' % (base64.b64encode(image), value.encode())
            labels = ask(web, body, TEXT).json()["results"][0]["labels"]
            assert_labels(labels, every if found == huge else [expected])
        assert ask(web, image, params={"top_k": text}).json()["results"][0]["labels"] == labels


def test_what_is_given_twice_or_unknown_is_refused(web):
    """One of the two would say nothing, and neither would a name that is misspelt."""
    twice, body = "top_k is given twice; give it once", json.dumps({"images": ["QUJD"], "top_k": 3}).encode()
    assert_refused(ask(web, picture(0), params=[("top_k", "1"), ("top_k", "1")]), 400, twice)
    assert_refused(ask(web, body, TEXT, params={"top_k": "x"}), 400, twice)
    part = b'--x\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n3\r\n'
    assert_refused(ask(web, part * 2 + b"--x--", FORM), 400, twice)
    assert_refused(
        ask(web, picture(0), params={"topk": "1"}), 400, "the query holds 'topk', which is not top_k; leave it"
    )


def test_wrong_addresses_and_methods(web):
    assert_refused(web.get("/etc/passwd"), 404, "there is nothing here")
    assert_refused(web.get("/%2e%2e/%2e%2e/etc/passwd"), 404, "there is nothing here")
    assert_refused(web.get("/v1/classify"), 405, "this method is not for this address")


def test_bodies_that_lie_about_their_size(folder):
    image = picture(0)
    length = (b"content-length",)
    with client(folder, max_bytes=10_000, timeout=0.5) as web:

        def run(chunks, *headers, **options):
            return asyncio.run(raw(web.app, chunks, headers, **options))

        assert run([image[:50], image[50:]], wait=9).status_code == 200
        assert run([image], (*length, b"3"), wait=9).status_code == 200
        for chunks, headers in [
            ([b"x" * 6000, b"x" * 6000], ()),
            ([b"x" * 20_000], ((*length, b"5"),)),
            ([b"x" * 9000] * 100, ()),
            ([b"x"], ((*length, b"9" * 400),)),
            ([b"x"], ((*length, b"40000"),)),
        ]:
            assert_refused(run(chunks, *headers), 413, "more than the 10000 bytes allowed")
        assert_refused(run([image], (*length, b"-5")), 400, "Content-Length is not a number")
        assert_refused(run([image[:50], 2.0, image[50:]]), 408, "the body did not arrive within 0.5 s")
        assert web.app.state.routes.bodies.held == 0
        assert ask(web, image).status_code == 200


def test_bodies_in_memory_are_bounded(folder):
    """Sixteen bodies of the largest size are being sent: there is no room for another."""

    async def run():
        slow = [asyncio.create_task(raw(web.app, [b"x" * 10_000, 0.6, b""], wait=9)) for _ in range(16)]
        await until(lambda: web.app.state.routes.bodies.held == 160_000)
        refused = await raw(web.app, [picture(0)])
        return refused, [(await each).status_code for each in slow]

    with client(folder, max_bytes=10_000) as web:
        refused, others = asyncio.run(run())
        assert_refused(refused, 503, "too many bodies are being read already")
        assert refused.headers["retry-after"] == "1"
        assert others == [422] * 16
        assert web.app.state.routes.bodies.held == 0


def test_nothing_is_written_to_disk(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a temporary file")

    with client(folder) as web:
        for name in ("TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile", "mkstemp"):
            monkeypatch.setattr(tempfile, name, refuse)
        noise = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)).save(noise, "BMP")
        assert web.post("/v1/classify", files=[("i", ("x", noise.getvalue()))] * 3).status_code == 200


WRONG = {
    "/v1/classify": {"top_k": [1, 5, 0, -1, 10**30, None, "x", [], 2.5]},
    "/v1/explain": {
        "method": ["rollout", "attention", "", None, 3, {}],
        "target": ["a", "E", "", None, 0, ["a"], "\ud800", "x" * 10_000],
    },
}


def mutated(draw, path):
    """A request made wrong in one of many ways: body, headers."""
    kind = draw.choice(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
    data = bytearray(picture(draw.randrange(50), kind, (draw.randint(1, 60), draw.randint(1, 60))))
    way = draw.randrange(4)
    if way == 0:
        for _ in range(draw.randint(1, 12)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif way == 1:
        del data[draw.randrange(len(data)) :]
    elif way == 2:
        at = draw.randrange(len(data))
        data[at : at + draw.randint(0, 40)] = draw.randbytes(draw.randint(0, 40))
    else:
        at = draw.randrange(min(40, len(data)))  # headers, where sizes are
        data[at : at + 4] = draw.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1"])
    body = bytes(data)
    sent = draw.randrange(5)
    if sent == 0:
        text = base64.b64encode(body).decode()
        body = json.dumps(
            {
                "images": [text],
                **{name: draw.choice(values) for name, values in WRONG[path].items() if draw.random() < 0.5},
            }
        ).encode()
        headers = TEXT
    elif sent == 1:
        body = (
            b'--x\r\nContent-Disposition: form-data; name="i"; filename="../\xff\xfe.png"\r\n\r\n'
            + body
            + b"\r\n--x--\r\n"
        )
        headers = FORM
    else:
        headers = {"Content-Type": draw.choice(["image/jpeg", "image/svg+xml", "application/octet-stream"])}
    if sent < 2 and draw.random() < 0.5:
        broken = bytearray(body)
        for _ in range(draw.randint(1, 5)):
            broken[draw.randrange(min(120, len(broken)))] = draw.randrange(256)
        body = bytes(broken)
    if draw.random() < 0.1:
        headers = {"Content-Type": "".join(chr(draw.randrange(32, 127)) for _ in range(draw.randrange(40))) or "x"}
    if draw.random() < 0.05:
        headers = {
            **headers,
            "Content-Type": draw.choice(
                [
                    'multipart/form-data; boundary="',
                    "multipart/form-data; boundary*0*=x''%ff",
                    "application/json; charset=utf-99",
                    "image/",
                    "; ;=;",
                    "multipart/form-data; boundary=" + "y" * 71,
                ]
            ),
        }
    return body, headers


def fuzz(web, count, seed, path):
    draw, statuses = random.Random(seed), []
    good = picture(7)
    expected = web.predictor([good])[0]
    for i in range(count):
        body, headers = mutated(draw, path)
        query = {draw.choice([*WRONG[path]]): draw.choice(["1", "", "x", "\u00b2"])} if draw.random() < 0.1 else None
        answer = ask(web, body, headers, path, params=query)
        statuses.append(answer.status_code)
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, (i, answer.status_code, answer.text)
        if answer.status_code != 200:
            assert_refused(answer, answer.status_code)
        if i % 100 == 99:
            assert_labels(ask(web, good).json()["results"][0]["labels"], expected)
    return set(statuses)


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/explain"])
@pytest.mark.parametrize(("count", "seed"), [(300, 1), pytest.param(5000, 2, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_mutated_requests(folder, count, seed, path, record_property):
    """Each is answered or refused in a sentence, a good one after each hundred; and nothing stays in the queue."""
    with client(folder, max_wait_ms=0) as web:
        assert {200, 400, 415, 422} <= fuzz(web, count, seed, path)
        assert web.batcher.waiting == 0
    record_property("attacks", count)
