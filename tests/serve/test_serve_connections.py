"""`deit serve` as a process: connections that are held, many connections, hostile HTTP, and another model."""

import json
import re
import signal
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from support.models import trained_folder
from support.serving import RAW, assert_labels, calibrated, picture, server

from deit.predict.predictor import Predictor

httpx = pytest.importorskip("httpx")

POST = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"


def connected(address, **options):
    found = socket.socket()
    for option, value in options.items():
        found.setsockopt(socket.SOL_SOCKET, getattr(socket, option), value)
    found.settimeout(20)
    found.connect(("127.0.0.1", int(address.rpartition(":")[2])))
    return found


def rest(connection):
    """All that comes until the server ends the connection."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:
        found += b"<reset>"
    return found.decode("latin-1")


def assert_whole(text, status):
    """One answer as every answer has to be: JSON, a sentence, the headers."""
    head, _, body = text.partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} "), text
    lines = head.lower().split("\r\n")
    for line in ("content-type: application/json", "x-content-type-options: nosniff", "referrer-policy: no-referrer"):
        assert line in lines
    assert any(line.startswith("content-security-policy: default-src 'none'") for line in lines)
    assert list(json.loads(body)) == ["error"]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n", 405),
        (b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n", 404),
        (POST + b"Content-Length: 1000000\r\n\r\n", 401),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n", 401),
        (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n", 400),
    ],
    ids=lambda value: "",
)
def test_nobody_holds_a_connection_by_a_body_that_is_not_read(shut, head, status):
    """A byte now and then: the answer comes at once, and the connection ends within the time for a body."""
    _, address = shut
    with connected(address) as connection:
        connection.sendall(head)
        began, found = time.monotonic(), []
        reader = threading.Thread(target=lambda: found.append(rest(connection)))
        reader.start()
        ended = None
        while ended is None and time.monotonic() - began < 15:
            try:
                connection.sendall(b"x")
            except OSError:
                ended = time.monotonic() - began
            time.sleep(0.1)
        reader.join(20)
        assert_whole(found[0].removesuffix("<reset>"), status)
        assert "connection: close" in found[0].lower()
        assert ended is not None
        assert ended < 5


@pytest.fixture(scope="module")
def shut(folder, tmp_path_factory):
    """A server with a key, and a second for each part of a request."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("one\n")
    with server(folder, "--timeout", "1", "--api-key-file", str(keys)) as found:
        yield found


def test_the_sender_of_a_large_body_reads_why_it_was_refused(shut):
    """The server goes on reading for a while, because a sender that is cut off doesn't see the answer."""
    _, address = shut
    for _ in range(5):
        answer = httpx.post(f"{address}/v1/classify", content=b"x" * 10_000_000, headers=RAW, timeout=20)
        assert answer.status_code == 401


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        POST.replace(b"1.1", b"0.9") + b"Content-Length: 1000\r\n\r\nx",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"x" * 30_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 300_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 5_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        POST + b"Content-Length: x\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        POST + b"Transfer-Encoding: gzip\r\n\r\n",
        POST + b"Content-Type: " + b"a;" * 15_000 + b"\r\nContent-Length: 1\r\n\r\nx",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n",
    ],
    ids=lambda value: "",
)
def test_hostile_heads_get_a_sentence_with_the_headers(shut, request_):
    _, address = shut
    with connected(address) as connection:
        with suppress(OSError):
            connection.sendall(request_)
        found = rest(connection).removesuffix("<reset>")
        assert_whole(found, found[9:12])
        assert found[9] == "4"


def test_bodies_of_tiny_chunks_are_refused(folder):
    """Each chunk costs the one thread that serves all connections tens of microseconds."""
    with server(folder) as (process, address), connected(address) as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        found, began = [], time.monotonic()
        reader = threading.Thread(target=lambda: found.append(rest(connection)))
        reader.start()
        try:
            for _ in range(100):
                connection.sendall(b"1\r\nx\r\n" * 20_000)
        except OSError:
            pass
        reader.join(20)
        assert time.monotonic() - began < 5
        assert_whole(found[0].removesuffix("<reset>"), 400)
        image = picture(0)
        pieces = [image[i : i + 100] for i in range(0, len(image), 100)]
        answer = httpx.post(f"{address}/v1/classify", content=iter(pieces), headers=RAW)
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_one_address_cannot_take_all_connections(folder):
    with server(folder) as (process, address), ExitStack() as held:
        for _ in range(256):
            held.enter_context(connected(address))
        time.sleep(0.5)
        with connected(address) as connection:
            found = rest(connection)
            assert_whole(found, 503)
            assert "too many connections are open already; try again in 1 s" in found
        held.close()
        time.sleep(0.5)
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) < 100


@pytest.mark.slow
def test_an_answer_that_nobody_takes_ends(folder):
    """Thousands of requests, and not one answer is read."""
    with server(folder, "--timeout", "1") as (process, address), connected(address, SO_RCVBUF=4096) as connection:
        connection.settimeout(2)
        began = time.monotonic()
        try:
            while time.monotonic() - began < 30:
                connection.sendall(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        except TimeoutError:
            pass
        while time.monotonic() - began < 30 and connections_of(process):
            time.sleep(0.2)
        assert time.monotonic() - began < 15
        assert httpx.get(f"{address}/healthz").status_code == 200


def connections_of(process):
    """Number of established connections of a process."""
    inodes = set()
    for each in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            inodes |= set(re.findall(r"socket:\[(\d+)\]", str(each.readlink())))
        except OSError:
            continue
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[3] == "01" and row[9] in inodes for row in rows)


def test_sigterm_ends_a_server_that_decodes_what_takes_long(folder):
    from support.bombs import scans

    slow = scans(90, 7000)
    with server(folder, "--timeout", "3") as (process, address):
        clients = [
            threading.Thread(target=lambda: httpx.post(f"{address}/v1/classify", content=slow, headers=RAW, timeout=30))
            for _ in range(6)
        ]
        for each in clients:
            each.start()
        time.sleep(1)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 12
        for each in clients:
            each.join()


def test_a_folder_that_changes_while_it_is_served(folder, tmp_path):
    """Files may be written over: the model stays until SIGHUP. Then the new one answers, or the old if it is broken."""
    served, keys = trained_folder(tmp_path / "served"), tmp_path / "keys"
    new = calibrated(trained_folder(tmp_path / "new", seed=5))
    keys.write_text("old\n")
    image = picture(3)
    old_labels, new_labels = Predictor(served)([image])[0], Predictor(new)([image])[0]
    assert old_labels[0]["score"] != pytest.approx(new_labels[0]["score"], abs=1e-3)
    with server(served, "--api-key-file", str(keys)) as (process, address):

        def asked(key="old"):
            headers = {**RAW, "Authorization": f"Bearer {key}"}
            answer = httpx.post(f"{address}/v1/classify", content=image, headers=headers, timeout=20)
            return answer.json()["results"][0]["labels"] if answer.status_code == 200 else answer.status_code

        def until(condition):
            began = time.monotonic()
            while not condition():
                assert time.monotonic() - began < 30
                time.sleep(0.1)

        weights = served / "model.safetensors"
        for content in (b"", (new / "model.safetensors").read_bytes()):
            with open(weights, "r+b") as file:  # as cp writes: into the same file
                file.truncate()
                file.write(content)
            assert_labels(asked(), old_labels)
        for each in new.iterdir():
            (served / each.name).write_bytes(each.read_bytes())
        keys.write_text("new\n")
        process.send_signal(signal.SIGHUP)
        until(lambda: asked("new") != 401)
        until(lambda: asked("new")[0]["score"] == pytest.approx(new_labels[0]["score"], abs=1e-5))
        assert_labels(asked("new"), new_labels)
        assert asked("old") == 401
        weights.write_bytes(weights.read_bytes()[:1000])
        keys.write_text("\n")
        process.send_signal(signal.SIGHUP)
        lines = [process.stderr.readline() for _ in range(3)]
        assert "deit.serve: the model was loaded again from" in lines[0]
        assert "deit.serve: the keys stay as they were: " in lines[1]
        assert "holds no key" in lines[1]
        assert "deit.serve: the model stays as it was: " in lines[2]
        assert "model.safetensors is truncated or corrupt" in lines[2]
        assert_labels(asked("new"), new_labels)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
