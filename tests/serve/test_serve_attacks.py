"""What costs its sender little and the server much: it is refused soon, and others are served meanwhile."""

import asyncio
import io
import os
import signal
import time

import pytest
from PIL import Image
from support.bombs import blank, deep, grown, scans
from support.serving import TEXT, ask, assert_labels, assert_refused, client, concurrently, picture, raw

from deit.image.confined import SENTENCE, TOO_MUCH, Bounds, answer, check_header
from deit.image.decode import ImageError
from deit.image.processor import DeiTImageProcessor
from deit.serve.connection import Door

COUNTLESS = {
    "scans": (lambda: scans(9000), "more than 100 scans"),
    "markers": (lambda: grown("markers", 20_000_000), "more than 2000 segments"),
    "fill": (lambda: grown("fill", 20_000_000), "more than 2000 segments"),
    "chunks": (lambda: grown("chunks", 20_000_000), "more than 20000 chunks"),
    "data": (lambda: grown("data", 20_000_000), "more than 20000 chunks"),
}


@pytest.mark.parametrize("kind", COUNTLESS)
def test_countless_parts_are_refused_before_they_are_read(kind):
    data, part = COUNTLESS[kind][0](), COUNTLESS[kind][1]
    began = time.process_time()
    with pytest.raises(ImageError, match=f"the image has {part}; save it again with another program"):
        check_header(data, 50_000_000)
    assert time.process_time() - began < 0.5


def test_as_many_parts_as_programs_write_are_no_reason(web):
    """Two hundred parts of a colour profile, ten thousand chunks, and ten scans more than usual."""
    for data in (grown("markers", 800), grown("chunks", 120_000), scans(10, 64)):
        assert ask(web, data).status_code == 200


@pytest.mark.parametrize(("progressive", "part"), [(False, 4), (True, 1)])
def test_the_preview_of_a_camera_is_no_scan(progressive, part):
    """A large photograph with one would wait for the few decoders of large images."""
    preview, photo = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (16, 12)).save(preview, "JPEG")
    exif = Image.Exif().tobytes() + preview.getvalue()
    Image.new("RGB", (400, 300)).save(photo, "JPEG", exif=exif, progressive=progressive)
    assert photo.getvalue().count(b"\xff\xda") >= 2
    assert check_header(photo.getvalue(), 10**6) == 400 * 300 // part


def test_pixels_that_take_too_much_memory_are_refused(web):
    """Each has the pixels that are allowed, in 100 KB. Without a limit, they took 1.0 and 1.3 GB."""
    said = "the image takes more than the 10 s or the 634 MB to decode that are allowed here; shrink it"
    for data in (blank((1, 50_000_000)), deep(7071)):
        assert_refused(ask(web, data), 422, said)
    for data in (blank((7071, 7071), "RGBA"), blank((50_000_000, 1))):
        assert ask(web, data).status_code == 200
    for lane in (web.batcher._quick, web.batcher._large):
        for process in lane.decoders._all:
            with open(f"/proc/{process.pid}/status") as status:
                [peak] = [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
            assert peak * 1024 < 128 * 2**20 + lane.decoders.bounds.memory


def test_an_image_that_takes_too_long_ends_with_its_process(folder):
    """Its decoder is ended by the system and replaced; others don't notice."""
    slow = scans(60, 5000)
    with client(folder) as web:
        decoders = web.batcher._large.decoders
        assert decoders.bounds.seconds == 10
        decoders.bounds = decoders.bounds._replace(seconds=0.4)
        decoders.start(1)
        [before] = decoders._all
        assert_refused(ask(web, slow), 422, "takes more than the 0.4 s or the")
        assert before.exitcode == -signal.SIGPROF
        assert ask(web, picture(0)).status_code == 200
        decoders.bounds = decoders.bounds._replace(seconds=10)
        assert ask(web, blank((5000, 5000))).status_code == 200
        assert web.batcher.waiting == 0


def test_usual_images_do_not_wait_for_large_ones(folder):
    """As many hostile images as the server takes in are being decoded."""
    large = blank((7000, 7000), "RGBA")

    async def run():
        crowd = asyncio.create_task(concurrently(web.app, [large] * 60))
        await asyncio.sleep(1)
        began = time.monotonic()
        [found] = await concurrently(web.app, [picture(1)])
        seconds, late = time.monotonic() - began, crowd.done()
        crowd.cancel()
        return found, seconds, late

    with client(folder, timeout=20) as web:
        found, seconds, late = asyncio.run(run())
        assert_labels(found.json()["results"][0]["labels"], web.predictor([picture(1)])[0])
        assert not late
        assert seconds < 10


def test_closing_does_not_wait_for_what_hangs(folder):
    with client(folder) as web:
        hung = [*web.batcher._quick.decoders._all]
        for process in hung:
            os.kill(process.pid, signal.SIGSTOP)
        answers = web.batcher.submit([picture(0)] * 5, 1)
        began = time.monotonic()
        web.batcher.close(0.5)
        assert time.monotonic() - began < 5
        assert not any(process.is_alive() for process in hung)
        assert not any(answer.done() and answer.exception() is None for answer in answers)


def test_a_decoder_whose_process_was_ended_is_replaced(folder):
    with client(folder) as web:
        for _ in range(3):
            for process in [*web.batcher._quick.decoders._all]:
                process.kill()
            assert ask(web, picture(0)).status_code == 200


def test_an_answer_of_a_decoder(monkeypatch):
    """What is unexpected becomes a sentence, and lack of memory another try."""
    processor, bounds = DeiTImageProcessor(), Bounds(10**6, 10**6, 1, 2**30, (3, 224, 224))
    assert answer(picture(0), processor, bounds._replace(work=9)) == TOO_MUCH
    for error, expected in ((MemoryError(), TOO_MUCH), (ZeroDivisionError(), SENTENCE)):

        def fails(self, *_, error=error):
            raise error

        monkeypatch.setattr(DeiTImageProcessor, "__call__", fails)
        assert answer(picture(0), processor, bounds)[:1] == expected


# ---- requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data; " + "a; " * 10_000,
        "multipart/form-data; " + "x*0*=; " * 4_000,
        'multipart/form-data; boundary="' + '\\"' * 7_000,
        "image/png; " + 'a="' * 10_000,
    ],
    ids=lambda kind: "",
)
def test_a_long_content_type_costs_nothing(web, kind):
    """By the library's parser, it took seconds of the only thread that parses."""
    began = time.process_time()
    answer = ask(web, picture(0), {"Content-Type": kind})
    assert answer.status_code in (400, 431)
    assert_refused(answer, answer.status_code)
    assert ask(web, picture(0), {"Content-Type": kind[:990]}).status_code in (200, 400)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data; boundary*0*=x''%ff",
        "multipart/form-data; boundary*=utf-99''x",
        'multipart/form-data; boundary="',
        "multipart/form-data; boundary=\xfc",
        "multipart/form-data; boundary*=''; boundary*1=x",
    ],
)
def test_parameters_of_a_content_type_never_fail(web, kind):
    assert_refused(ask(web, b"--x--", {"Content-Type": kind.encode("latin-1")}), 400)


def test_boundaries_as_any_program_writes_them(web):
    part = b'Content-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + picture(0)
    for given, boundary in (
        ("boundary=x", b"x"),
        ('Boundary="x y"', b"x y"),
        ("charset=utf-8; boundary=--a'()+_,-./:=? ; x=1", b"--a'()+_,-./:=?"),
    ):
        body = b"--" + boundary + b"\r\n" + part + b"\r\n--" + boundary + b"--\r\n"
        answer = ask(web, body, {"Content-Type": f"multipart/form-data; {given}"})
        assert answer.status_code == 200, answer.text


def test_json_of_countless_values_is_not_read(web):
    began = time.process_time()
    for body in (b'{"images": [' + b"[]," * 6_000_000 + b"[]]}", b"[" * 20_000_000, b'{"a":' * 4_000_000):
        assert_refused(ask(web, body, TEXT), 400, "the body is not valid JSON")
    assert time.process_time() - began < 5


def test_a_failure_of_ours_is_a_sentence_with_the_headers(folder, monkeypatch):
    with client(folder) as web:
        monkeypatch.setattr("deit.serve.app.labels_asked", lambda *_: 1 / 0)
        answer = ask(web, picture(0))
        assert_refused(answer, 500, "the server failed at this request; its log says why")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_hosts(folder):
    """A stranger's page can make its own name lead to this server, and would then read answers meant for its users."""

    def status(web, host):
        return asyncio.run(raw(web.app, [picture(0)], [(b"host", host.encode())], wait=9)).status_code

    with client(folder, hosts=("Models.Example", "192.0.2.7", "other.example.")) as web:
        ours = ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "models.example.", "192.0.2.7:1")
        for host in (*ours, "other.example"):
            assert status(web, host) == 200, host
        for host in ("evil.example", "localhost.evil.example", "192.0.2.8", "[::2]", "0.0.0.0", "x@localhost", "]"):
            assert status(web, host) == 421, host
        answer = web.get("/model", headers={"Host": "evil.example"})
        assert_refused(answer, 421, "expected a Host that this server is called by, found 'evil.example'; ask for")
    with client(folder, hosts=("0.0.0.0",)) as web:
        assert [status(web, host) for host in ("192.0.2.8", "[2001:db8::1]:80", "evil.example")] == [200, 200, 421]


def test_head_is_get_without_the_body(web):
    for path in ("/", "/page.js", "/model", "/healthz", "/metrics", "/api", "/nowhere", "/v1/classify"):
        got, head = web.get(path), web.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        if path != "/metrics":
            assert head.headers == got.headers


def test_a_private_server_tells_nothing_without_a_key(folder):
    with client(folder, keys=("one",), private=True) as web:
        key = {"Authorization": "Bearer one"}
        for path in ("/model", "/metrics"):
            assert_refused(web.get(path), 401, "this needs a key")
            assert web.get(path, headers=key).status_code == 200
        for path in ("/", "/healthz", "/readyz"):
            assert web.get(path).status_code == 200
        responses = web.get("/openapi.json").json()["paths"]["/model"]["get"]["responses"]
        assert "401" in responses


def test_an_answer_before_its_request_says_that_the_connection_ends(folder):
    """Nobody would read the rest."""
    length = (b"content-length", b"1000")

    def connection(chunks, *headers, path="/v1/classify"):
        answer = asyncio.run(raw(web.app, chunks, headers, wait=9, path=path))
        return answer.status_code, answer.headers.get("connection")

    with client(folder, keys=("one",)) as web:
        assert connection([b"x"], length) == (401, "close")
        assert connection([b"x"], (b"transfer-encoding", b"chunked")) == (401, "close")
        assert connection([b"x"], length, path="/healthz") == (405, "close")
        assert connection([b"x"], length, path="/nowhere") == (404, "close")
        assert connection([], path="/nowhere") == (404, None)
        assert connection([picture(0)], (b"authorization", b"Bearer one"), length) == (200, None)


def test_places_at_the_door():
    door = Door(8)
    assert [door.enter("a") for _ in range(3)] == [True, True, False]
    assert [door.enter(name) for name in "bbccddee"] == [True] * 6 + [False] * 2
    door.leave("a")
    assert door.enter("e")
    assert not door.enter("b")
    for name in "abbccdde":
        door.leave(name)
    assert (door._inside, door._of) == (0, {})
