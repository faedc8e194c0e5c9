"""Explanations over HTTP: the values, their place between the batches, and what is refused."""

import asyncio
import base64
import io
import json
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import trained_folder
from support.serving import (
    FORM,
    RAW,
    TEXT,
    Gate,
    TestClient,
    ask,
    assert_labels,
    assert_refused,
    client,
    concurrently,
    metric,
    picture,
    png_of,
    raw,
    until,
)

from deit.explain.explanation import explain_pixels
from deit.explain.maps import METHODS, explain
from deit.explain.picture import figure, overlay
from deit.predict.predictor import Predictor
from deit.report.markup import data_uri
from deit.serve.app import create_app
from deit.serve.batcher import Why
from deit.serve.limits import Service

EXPLAIN = "/v1/explain"


def explained(predictor, image, method="relevance", target=None):
    pixels = torch.from_numpy(predictor.prepared(image))[None]
    return explain_pixels(predictor.model, predictor.processor, pixels, methods=[method], target=target)


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [None, "d"])
def test_all_ways_of_sending_give_what_explain_gives(web, method, target):
    image = picture(0, "JPEG", (90, 160))
    number = None if target is None else "abcde".index(target)
    pixels = torch.from_numpy(web.predictor.prepared(image))[None]
    maps, out = explain(web.predictor.model, pixels, method, number), web.predictor.model(pixels)
    fields = {"method": method, **({} if target is None else {"target": target})}
    ask(web, image)  # what the model has answered before changes nothing
    text = base64.b64encode(image).decode()
    for answer in (
        ask(web, image, path=EXPLAIN, params=fields),
        web.post(EXPLAIN, files={"image": ("x", image)}, data=fields),
        web.post(EXPLAIN, files={"image": ("x", image)}, params=fields),
        web.post(EXPLAIN, json={"images": [text], **fields}),
    ):
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert (found["model"], found["image_size"]) == ("m", [16, 16])
        for each, (token, logits) in zip(
            found["answers"], (("class", out.cls_logits), ("distillation", out.distillation_logits)), strict=True
        ):
            scores = logits[0].softmax(-1)
            best = int(scores.argmax())
            own = best if number is None else number
            assert (each["token"], each["label"], each["target"]) == (token, "abcde"[best], "abcde"[own])
            assert (each["probability"], each["target_probability"]) == pytest.approx(
                (scores[best].item(), scores[own].item())
            )
        assert [(each["token"], each["method"]) for each in found["maps"]] == [
            ("class", method),
            ("distillation", method),
        ]
        for each in found["maps"]:
            assert np.array(each["values"]) == pytest.approx(maps[each["token"]][0].numpy(), abs=1e-6)


def test_the_default_is_relevance_of_each_heads_decision(web):
    found, expected = ask(web, picture(1), path=EXPLAIN).json(), explained(web.predictor, picture(1))
    assert found["answers"] == [answer.to_dict() for answer in expected.answers]
    assert found["image_size"] == [16, 16]
    for each, own in zip(found["maps"], expected.maps, strict=True):
        assert (each["method"], each["values"], each["strongest"]) == ("relevance", own.values.tolist(), own.strongest)
        large = expected.seen.resize((224, 224), Image.Resampling.NEAREST)
        assert found["seen"] == data_uri(large)
        assert each["overlay"] == data_uri(overlay(large, own.values))
    described = web.get("/openapi.json").json()
    for name, keys in (("Explained", found), ("TokenMap", found["maps"][0]), ("TokenAnswer", found["answers"][0])):
        assert described["components"]["schemas"][name]["required"] == [*keys]


def test_large_images_are_not_made_smaller(tmp_path):
    with client(trained_folder(tmp_path, image_size=(64, 240), patch_size=16)) as web:
        found = ask(web, picture(0), path=EXPLAIN).json()
        for each in (found["seen"], *(one["overlay"] for one in found["maps"])):
            drawn = Image.open(io.BytesIO(base64.b64decode(each.removeprefix("data:image/jpeg;base64,"))))
            assert drawn.size == (240, 64)
        assert np.shape(found["maps"][0]["values"]) == (4, 15)


def test_who_accepts_png_alone_gets_the_figure(web):
    expected = explained(web.predictor, picture(2), "rollout")
    wanted = {**RAW, "Accept": "image/png"}
    answer = ask(web, picture(2), wanted, EXPLAIN, params={"method": "rollout"})
    assert answer.headers["content-type"] == "image/png"
    named = type(expected)("m", "", expected.seen, expected.answers, expected.maps)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), np.asarray(figure(named)))
    for accept in ("*/*", "application/json, image/png", "image/*", "text/html, image/webp;q=0.9"):
        assert ask(web, picture(2), {**RAW, "Accept": accept}, EXPLAIN).headers["content-type"] == "application/json"
    assert (
        ask(web, picture(2), {**RAW, "Accept": "image/PNG;q=0.9, image/webp"}, EXPLAIN).headers["content-type"]
        == "image/png"
    )
    assert_refused(ask(web, b"x", wanted, EXPLAIN), 422, "is not a JPEG")


def test_a_model_without_distillation_token_has_one_map(tmp_path):
    with client(trained_folder(tmp_path, "plain")) as web:
        found = ask(web, picture(0), path=EXPLAIN).json()
        assert [each["token"] for each in found["maps"]] == [each["token"] for each in found["answers"]] == ["class"]


# ---- between the batches -----------------------------------------------------------------------------------------


class Noted:
    """What the model's thread did, in order, and that it was alone at it."""

    def __init__(self, monkeypatch, gate):
        self.order, answers = [], gate.answers
        gate.answers = lambda *given: self.done(len(given[1]), answers, *given)
        monkeypatch.setattr(
            "deit.serve.batcher.explain_pixels",
            lambda *given, **options: self.done("map", explain_pixels, *given, **options),
        )

    def done(self, what, function, *given, **options):
        assert threading.current_thread().name == "deit-model"
        self.order.append(what)
        return function(*given, **options)


def test_one_explanation_follows_each_batch(folder, monkeypatch):
    async def run():
        first = asyncio.create_task(concurrently(web.app, [picture(0)]))
        await until(gate.reached.is_set)
        asked = [asyncio.create_task(concurrently(web.app, [picture(i) for i in range(4)], path=EXPLAIN))]
        await until(lambda: web.batcher.waiting == 4)
        asked.append(asyncio.create_task(concurrently(web.app, [picture(i) for i in range(6)])))
        await until(lambda: web.batcher.waiting == 10)
        await until(lambda: web.batcher._ready.qsize() == 10)
        gate.open.set()
        return await first, [await each for each in asked]

    with client(folder, max_batch=2, queue=16, max_wait_ms=0) as web:
        expected = web.predictor([picture(i) for i in range(6)])
        gate = Gate(web.predictor)
        noted = Noted(monkeypatch, gate)
        _, (maps, labels) = asyncio.run(run())
        assert noted.order == [1, 2, "map", 2, "map", 2, "map", "map"]
        for i, answer in enumerate(maps):
            assert answer.json()["maps"][0]["values"] == explained(web.predictor, picture(i)).maps[0].values.tolist()
        for answer, own in zip(labels, expected, strict=True):
            assert_labels(answer.json()["results"][0]["labels"], own)
        assert web.batcher.waiting == 0


def test_explanations_take_a_quarter_of_the_queue(folder):
    async def run():
        first = asyncio.create_task(concurrently(web.app, [picture(0)]))
        await until(gate.reached.is_set)
        waiting = asyncio.create_task(concurrently(web.app, [picture(i) for i in range(2)], path=EXPLAIN))
        await until(lambda: web.batcher.waiting == 2)
        [refused] = await concurrently(web.app, [picture(2)], path=EXPLAIN)
        others = asyncio.create_task(concurrently(web.app, [picture(i) for i in range(6)]))
        await until(lambda: web.batcher.waiting == 8)
        [full] = await concurrently(web.app, [picture(3)])
        gate.open.set()
        return refused, full, await first + await waiting + await others

    with client(folder, max_batch=4, queue=8) as web:
        gate = Gate(web.predictor)
        web.batcher._seconds_per_explanation = 3.2
        refused, full, served = asyncio.run(run())
        assert_refused(refused, 503, "too many images wait already; try again in 7 s")
        assert refused.headers["retry-after"] == "7"
        assert_refused(full, 503, "too many images wait already")
        assert [answer.status_code for answer in served] == [200] * 9
        assert metric(web, 'deit_requests_total{route="/v1/explain",status="503"}') == 1
        again = asyncio.run(concurrently(web.app, [picture(i) for i in range(2)], path=EXPLAIN))
        assert [answer.status_code for answer in again] == [200, 200]  # all places are free again
        assert web.batcher._unexplained == 0


def test_nobody_waits_for_it_any_more_so_it_is_not_computed(folder, monkeypatch):
    async def run():
        first = asyncio.create_task(concurrently(web.app, [picture(0)]))
        await until(gate.reached.is_set)
        gone = [asyncio.create_task(raw(web.app, [picture(i)], wait=0.05, path=EXPLAIN)) for i in range(2)]
        assert [(await each).status_code for each in gone] == [499] * 2
        late = await concurrently(web.app, [picture(i) for i in range(2)], path=EXPLAIN)
        gate.open.set()
        await first
        await until(lambda: web.batcher.waiting == 0)
        return late, await concurrently(web.app, [picture(1)], path=EXPLAIN)

    with client(folder, queue=64, timeout=0.6) as web:
        gate = Gate(web.predictor)
        noted = Noted(monkeypatch, gate)
        late, [served] = asyncio.run(run())
        for answer in late:
            assert_refused(answer, 504, "no answer within 0.6 s")
        assert (served.status_code, noted.order) == (200, [1, "map"])
        assert metric(web, 'deit_requests_total{route="/v1/explain",status="499"}') == 2


def test_a_turn_that_was_given_up_goes_to_the_next(folder, monkeypatch):
    """They are given up while they wait for the end of a batch."""
    with client(folder) as web:
        gate = Gate(web.predictor)
        noted = Noted(monkeypatch, gate)
        answers, gone = gate.answers, []

        def answering(*given):
            if noted.order:  # the second batch is computed
                gone.extend(each.cancel() for each in asked[:2])
            return answers(*given)

        gate.answers = answering
        first = web.batcher.submit([picture(0)], 1)
        assert gate.reached.wait(20)
        asked = [web.batcher.explain(picture(i), Why("rollout", None)) for i in range(3)]
        second = web.batcher.submit([picture(1)], 1)
        asyncio.run(until(lambda: web.batcher._ready.qsize() == 4))
        gate.open.set()
        assert len(asked[2].result(20).maps) == 2
        assert (gone, noted.order) == ([True, True], [1, 1, "map"])
        assert first[0].done()
        assert second[0].done()
        asyncio.run(until(lambda: web.batcher.waiting == 0))  # those given up may have been decoded after the third
        assert ask(web, picture(0), path=EXPLAIN).status_code == 200


def test_a_failure_is_503_and_the_next_one_is_answered(folder, monkeypatch):
    with client(folder) as web:
        with monkeypatch.context() as broken:
            broken.setattr("deit.serve.batcher.explain_pixels", lambda *_, **__: 1 / 0)
            answer = ask(web, picture(0), path=EXPLAIN)
            assert_refused(answer, 503, "the model failed (ZeroDivisionError); try again")
            assert answer.headers["retry-after"] == "1"
        assert ask(web, picture(0), path=EXPLAIN).status_code == ask(web, picture(0)).status_code == 200


def test_what_waits_is_answered_before_the_end(folder):
    with client(folder) as web:
        gate = Gate(web.predictor)
        first = web.batcher.submit([picture(0)], 1)
        assert gate.reached.wait(20)
        asked = [web.batcher.explain(picture(i), Why("rollout", None)) for i in range(3)]
        end = threading.Thread(target=web.batcher.close, args=(20,))
        end.start()
        gate.open.set()
        end.join(20)
        assert first[0].result().labels
        assert [len(each.result().maps) for each in asked] == [2, 2, 2]


# ---- what is refused ---------------------------------------------------------------------------------------------

PART = b'--x\r\nContent-Disposition: form-data; name="i"; filename="f"\r\n\r\n' + picture(0) + b"\r\n"


def field(name, value):
    return b'--x\r\nContent-Disposition: form-data; name="' + name + b'"\r\n\r\n' + value + b"\r\n"


def as_json(count=1, **fields):
    return json.dumps({"images": [base64.b64encode(picture(0)).decode()] * count, **fields}).encode()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("body", "headers", "status", "part"),
    [
        (b"no image", RAW, 422, "the image is not a JPEG, PNG, WebP, GIF, TIFF or BMP file; convert it"),
        (b"", RAW, 422, "an image is empty (0 bytes)"),
        (picture(0)[:100], RAW, 422, "the image is damaged or cut short"),
        (png_of(60_000, 60_000), RAW, 422, "the image has more than the 50000000 pixels allowed here; shrink it"),
        (picture(0), {"Content-Type": "text/html"}, 415, "expected Content-Type image/*"),
        (picture(0), {**RAW, "Content-Encoding": "gzip"}, 415, "the body is compressed"),
        (PART + PART + b"--x--", FORM, 413, "at most 1 image here; send the others in another request"),
        (as_json(2), TEXT, 413, "at most 1 image here"),
        (as_json(0), TEXT, 400, "the request holds no image"),
        (as_json(top_k=3), TEXT, 400, 'expected {"images": ["<base64>"], "method": "relevance", "target": "cat"}'),
        (as_json(method="saliency"), TEXT, 400, "method is not one of rollout, relevance, attention; give one of them"),
        (as_json(method=None), TEXT, 400, "method is not one of"),
        (as_json(method=["rollout"]), TEXT, 400, "method is not one of"),
        (
            as_json(target="C"),
            TEXT,
            400,
            "the model knows no class 'C'; it knows 'c', among others; give one of its labels",
        ),
        (as_json(target=""), TEXT, 400, "the model knows no class ''; it knows 'a'"),
        (as_json(target=2), TEXT, 400, "target is not one of the model's labels; give one that /model lists"),
        (as_json(target="c" * 201), TEXT, 400, "target is not one of the model's labels"),
        (as_json(target="\ud800"), TEXT, 400, "the model knows no class '\\ud800'"),
        (field(b"method", b"x") + PART + b"--x--", FORM, 400, "method is not one of"),
        (PART + field(b"target", b"C") + b"--x--", FORM, 400, "it knows 'c'"),
        (PART + field(b"top_k", b"3") + b"--x--", FORM, 400, "neither a file nor method or target"),
        (PART + field(b"target", "é".encode()) + b"--x--", FORM, 400, "knows no class 'é'"),
    ],
    ids=lambda value: "",
)
def test_bad_requests_get_one_sentence(web, body, headers, status, part):
    assert_refused(ask(web, body, headers, EXPLAIN), status, part)


def test_fields_in_the_query(web):
    assert_refused(ask(web, picture(0), path=EXPLAIN, params={"method": "x"}), 400, "method is not one of")
    assert_refused(ask(web, picture(0), path=EXPLAIN, params={"target": "C"}), 400, "it knows 'c'")
    assert_refused(web.get(EXPLAIN), 405, "this method is not for this address")


def test_long_names_cost_no_time(tmp_path):
    """Nor do many labels, all of which are like the one asked for."""
    for count, said in ((1000, "the model knows no class 'lbael nmuber 5"), (20_000, "target is not one of")):
        labels = {i: f"label number {i}, which is as long as those of ImageNet" for i in range(count)}
        labels[7] = "long " * 50
        with client(trained_folder(tmp_path, labels=labels.values())) as web:
            for target, part in (
                ("lbael nmuber 5, wihch is as lnog as thsoe of ImgaeNet", said),
                ("x" * 10**6, "target is not one of the model's labels"),
            ):
                began = time.monotonic()
                assert_refused(ask(web, as_json(target=target), TEXT, EXPLAIN), 400, part)
                assert time.monotonic() - began < 3
            assert ask(web, as_json(target=labels[7]), TEXT, EXPLAIN).json()["answers"][0]["target"] == labels[7]


def test_what_can_not_be_explained_is_501(folder, tmp_path):
    with client(trained_folder(tmp_path, "convnet"), keys=("key",)) as web:
        assert_refused(ask(web, picture(0), path=EXPLAIN), 401, "this needs a key")
        with_key = {**RAW, "Authorization": "Bearer key"}
        assert_refused(ask(web, picture(0), with_key, EXPLAIN), 501, "a ConvNet can't be explained")
        assert ask(web, picture(0), with_key).status_code == 200
        assert web.get("/model").json()["explain"] is False
    with client(folder, keys=("key",)) as web:
        assert_refused(ask(web, picture(0), path=EXPLAIN), 401, "this needs a key")
        assert ask(web, picture(0), with_key, EXPLAIN).status_code == 200
        assert web.get("/model").json()["explain"] is True


def test_an_exported_model_is_501(folder):
    predictor = Predictor(folder)
    predictor.model = None  # as it is for a folder that `deit export` wrote
    with TestClient(create_app(predictor, Service(), "m"), "http://localhost") as web:
        assert_refused(ask(web, picture(0), path=EXPLAIN), 501, "an exported model, whose inside can't be seen")
        assert web.get("/model").json()["explain"] is False


def test_metrics_and_headers(folder):
    with client(folder) as web:
        answer = ask(web, picture(0), path=EXPLAIN)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        ask(web, b"x", path=EXPLAIN)
        assert metric(web, 'deit_request_seconds_count{route="/v1/explain"}') == 2
        assert metric(web, 'deit_images_total{result="explained"}') == 1
        assert metric(web, 'deit_images_total{result="unreadable"}') == 1
        assert metric(web, "deit_queue_images") == 0
