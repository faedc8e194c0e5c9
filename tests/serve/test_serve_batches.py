"""Many clients at once: images are joined to batches, and each wait ends."""

import asyncio
import time

import pytest
import torch
from support.models import trained_folder
from support.serving import (
    RAW,
    Gate,
    ask,
    assert_labels,
    assert_refused,
    client,
    concurrently,
    httpx,
    metric,
    picture,
    raw,
    until,
)

from deit.predict.predictor import Predictor


def test_a_hundred_clients_get_their_own_answers_from_few_batches(folder):
    images = [picture(seed) for seed in range(100)]
    with client(folder, max_batch=16, queue=128, max_wait_ms=50) as web:
        expected = web.predictor(images)
        assert len({tuple(round(each["score"], 4) for each in row) for row in expected}) == 100
        answers = asyncio.run(concurrently(web.app, images))
        for answer, labels in zip(answers, expected, strict=True):
            assert_labels(answer.json()["results"][0]["labels"], labels)
        batches = metric(web, "deit_batch_images_count")
        assert metric(web, "deit_batch_images_sum") == 100
        assert batches < 50
        assert metric(web, "deit_queue_images") == 0


def test_each_of_a_batch_gets_as_many_labels_as_it_asked_for(folder):
    with client(folder, max_wait_ms=300) as web:
        answers = asyncio.run(concurrently(web.app, [picture(0)] * 5, lambda i: {"top_k": i + 1}))
        assert [len(answer.json()["results"][0]["labels"]) for answer in answers] == [1, 2, 3, 4, 5]
        assert metric(web, "deit_batch_images_count") == 1


def test_a_lone_image_waits_for_others_no_longer_than_it_should(folder):
    with client(folder, max_wait_ms=300) as web:
        began = time.monotonic()
        assert ask(web, picture(0)).status_code == 200
        assert 0.3 < time.monotonic() - began < 3


def test_a_full_queue_is_503_and_says_when_to_come_again(folder):
    async def run():
        gate = Gate(web.predictor)
        first = asyncio.create_task(concurrently(web.app, [picture(0)]))
        await until(gate.reached.is_set)
        waiting = asyncio.create_task(concurrently(web.app, [picture(i) for i in range(4)]))
        await until(lambda: web.batcher.waiting == 4)
        [refused] = await concurrently(web.app, [picture(9)])
        gate.open.set()
        return refused, await first + await waiting

    with client(folder, max_batch=2, queue=4) as web:
        refused, served = asyncio.run(run())
        assert_refused(refused, 503, "too many images wait already; try again in 1 s")
        assert refused.headers["retry-after"] == "1"
        assert [answer.status_code for answer in served] == [200] * 5
        assert metric(web, 'deit_requests_total{route="/v1/classify",status="503"}') == 1


def test_late_answers_are_504_and_never_computed(folder):
    async def run():
        gate = Gate(web.predictor)
        late = await concurrently(web.app, [picture(i) for i in range(3)])
        gate.open.set()
        await until(lambda: web.batcher.waiting == 0)
        return late, gate.batches

    with client(folder, max_batch=1, queue=8, timeout=0.3) as web:
        late, batches = asyncio.run(run())
        for answer in late:
            assert_refused(answer, 504, "no answer within 0.3 s")
        assert batches == [1]  # it was being computed when time was up
        assert ask(web, picture(0)).status_code == 200


def test_images_of_clients_that_have_gone_are_not_computed(folder):
    async def run():
        gate = Gate(web.predictor)
        first = asyncio.create_task(concurrently(web.app, [picture(0)]))
        await until(gate.reached.is_set)
        gone = [asyncio.create_task(raw(web.app, [picture(i)], wait=0.05)) for i in range(6)]
        stays = asyncio.create_task(concurrently(web.app, [picture(7)]))
        assert [(await each).status_code for each in gone] == [499] * 6
        gate.open.set()
        return await first + await stays, gate.batches

    with client(folder, max_batch=4) as web:
        served, batches = asyncio.run(run())
        assert [answer.status_code for answer in served] == [200, 200]
        assert sum(batches) == 2
        assert metric(web, 'deit_requests_total{route="/v1/classify",status="499"}') == 6
        assert web.batcher.waiting == 0


def test_a_request_whose_body_still_arrives_keeps_its_model(folder, tmp_path):
    """Another model takes the place of the one that it came to, between two pieces of its body."""
    image, other = picture(3), Predictor(trained_folder(tmp_path / "other", seed=5))

    async def run(path):
        routes, arrived = web.app.state.routes, asyncio.Event()
        old = routes.served

        async def slowly():
            yield image[:100]
            await arrived.wait()
            yield image[100:]

        transport = httpx.ASGITransport(web.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as asking:
            asked = asyncio.create_task(asking.post(path, content=slowly(), headers=RAW))
            await until(lambda: old.requests == 1)
            renewed = asyncio.create_task(asyncio.to_thread(routes.renew, lambda: other, tuple))
            await until(lambda: routes.served is not old)
            await asyncio.sleep(0.5)  # long enough for the old one to end, if nothing kept it
            assert old.batcher.alive
            arrived.set()
            answer = await asked
            await asyncio.wait_for(renewed, 20)
        assert not old.batcher.alive
        return answer

    with client(folder, timeout=20) as web:
        answer = asyncio.run(run("/v1/classify"))
        assert answer.status_code == 200, answer.text
        assert_labels(answer.json()["results"][0]["labels"], web.predictor([image])[0])
        assert_labels(ask(web, image).json()["results"][0]["labels"], other([image])[0])
        assert asyncio.run(run("/v1/explain")).status_code == 200


def test_a_model_that_fails_is_503_and_goes_on(folder):
    with client(folder) as web:
        answers = web.predictor.answers
        web.predictor.answers = lambda *_: 1 / 0
        assert_refused(ask(web, picture(0)), 503, "the model failed (ZeroDivisionError); try again")
        web.predictor.answers = answers
        assert ask(web, picture(0)).status_code == 200
        assert web.get("/readyz").status_code == 200


LOST = RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later")


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/explain"])
def test_a_gpu_that_failed_is_said_where_supervisors_look(path, folder, monkeypatch):
    """Every later call of CUDA would fail, so no request may come here any more."""

    def fails(*_, **__):
        raise LOST

    said = "the GPU failed (CUDA error: device-side assert triggered); the server has to be started again"
    with client(folder) as web:
        for address in ("/healthz", "/readyz"):
            assert web.get(address).status_code == 200
        web.predictor.answers = fails
        monkeypatch.setattr("deit.serve.batcher.explain_pixels", fails)
        for address in ("/healthz", "/readyz"):
            assert_refused(ask(web, picture(0), path=path), 503, said)
            assert_refused(web.get(address), 503, said)


def test_lack_of_memory_is_no_failed_gpu(folder):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with client(folder) as web:
        web.predictor.answers = fails
        assert_refused(ask(web, picture(0)), 503, "the model failed (OutOfMemoryError); try again")
        assert web.get("/readyz").status_code == 200
