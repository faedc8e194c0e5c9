"""`deit serve` as a process: connections that stall or lie, and the signal to end."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.serving import RAW, picture, server

httpx = pytest.importorskip("httpx")


def spoken(address, *pieces):
    """Bytes over a socket, and all that comes back until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=20) as connection:
        for piece in pieces:
            connection.sendall(piece)
        found = b""
        while chunk := connection.recv(65536):
            found += chunk
        return found.decode()


def test_slow_heads_end_the_connection(folder):
    """Byte by byte, or none at all, from the beginning or after an answer; others are served meanwhile, and after an
    answer a connection may be idle for longer than a head may take."""
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
    with server(folder, "--timeout", "1") as (_, address), httpx.Client() as web:

        def drip(first):
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=20) as connection:
                if first:
                    connection.sendall(head + b"\r\n")
                    assert b"200 OK" in connection.recv(65536)
                began = time.monotonic()
                while time.monotonic() - began < 10:
                    try:
                        connection.sendall(head[:1] if time.monotonic() - began < 0.1 else b"X")
                        connection.settimeout(0.2)
                        if not connection.recv(1):
                            break
                    except TimeoutError:
                        continue
                    except OSError:
                        break
                seconds.append(time.monotonic() - began)

        seconds = []
        slow = [threading.Thread(target=drip, args=(first,)) for first in (True, False)]
        for each in slow:
            each.start()
        for _ in range(2):
            assert web.get(f"{address}/healthz").status_code == 200
            time.sleep(1.5)
        for each in slow:
            each.join()
        began = time.monotonic()
        assert spoken(address) == ""
        assert [0.9 < each < 4 for each in (*seconds, time.monotonic() - began)] == [True] * 3


def test_the_process_refuses_liars_and_finishes_what_came_at_sigterm(folder):
    image = picture(0)
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    with server(folder, "--max-wait-ms", "800", "--timeout", "1", "--max-bytes", "10KiB") as (process, address):
        closing = head + b"Connection: close\r\n"
        slow = threading.Thread(target=lambda: found.append(spoken(address, head + b"Content-Length: 99\r\n\r\nabc")))
        found = []
        slow.start()
        shorter = spoken(address, closing + f"Content-Length: {len(image) - 60}\r\n\r\n".encode(), image)
        assert shorter.startswith("HTTP/1.1 422")
        size = f"{len(image):x}\r\n".encode()
        chunked = spoken(address, closing + b"Transfer-Encoding: chunked\r\n\r\n" + size, image, b"\r\n0\r\n\r\n")
        assert chunked.startswith("HTTP/1.1 200")
        assert spoken(address, closing + b"Content-Length: 999999999\r\n\r\n").startswith("HTTP/1.1 413")
        over = spoken(address, closing + b"Content-Length: 20000\r\n\r\n", b"x" * 20000)
        assert "more than the 10240 bytes allowed" in over
        assert spoken(address, b"nonsense\r\n\r\n").startswith("HTTP/1.1 400")
        slow.join()
        assert found[0].startswith("HTTP/1.1 408")
        assert '"the body did not arrive within 1 s' in found[0]

        answers = []
        clients = [
            threading.Thread(
                target=lambda seed=seed: answers.append(
                    httpx.post(f"{address}/v1/classify", content=picture(seed), headers=RAW, timeout=20)
                )
            )
            for seed in range(3)
        ]
        for each in clients:
            each.start()
        while "deit_queue_images 3.0" not in httpx.get(f"{address}/metrics").text:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)  # while they wait for others to be computed with
        for each in clients:
            each.join()
        assert process.wait(20) == 0
        assert [answer.status_code for answer in answers] == [200] * 3
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/healthz")
        assert process.stderr.read() == ""


FAILING = """
import sys
from deit.cli import main
from deit.predict.predictor import Predictor

def fails(*_):
    raise RuntimeError("CUDA error: device-side assert triggered")

answers, calls = Predictor.answers, []
Predictor.answers = lambda *given: answers(*given) if not calls and not calls.append(1) else fails()
sys.exit(main(sys.argv[1:]))
"""


def test_a_server_whose_gpu_failed_ends_so_that_its_supervisor_starts_it_again(folder):
    """It answers what came and ends by itself with status 1. The first answer is the one before the address is said."""
    command = ["serve", str(folder), "--port", "0", "--device", "cpu", "--engine", "torch"]
    with subprocess.Popen(
        [sys.executable, "-c", FAILING, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        address = process.stdout.readline().split(" at ")[1].strip()
        answer = httpx.post(f"{address}/v1/classify", content=picture(0), headers=RAW, timeout=20)
        assert answer.status_code == 503
        assert process.wait(20) == 1
        assert process.stderr.read().splitlines()[-1] == (
            "deit serve: the GPU failed (CUDA error: device-side assert triggered); the server has to be started again"
        )


def listening(pid: int) -> list[str]:
    """The addresses at which a process listens."""
    own = {os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]


LOADING = """
import signal, sys, time
from deit.cli import main
from deit.predict.predictor import Predictor

def loads(*_, **__):
    print("loading", flush=True)
    time.sleep(100)

signal.signal(signal.SIGTERM, signal.SIG_IGN)
Predictor.__init__ = loads
sys.exit(main(sys.argv[1:]))
"""


SECOND = """
import socket, sys
from deit.cli import main
from deit.predict.predictor import Predictor

first, honest = socket.socket(), Predictor.__init__

def loads(*given, **options):
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    first.bind(("127.0.0.1", int(sys.argv[-1])))
    first.listen()
    honest(*given, **options)

Predictor.__init__ = loads
sys.exit(main(sys.argv[1:]))
"""


def test_sigterm_ends_a_server_whose_model_still_loads(folder):
    """Also the first process of a container, for which the system ignores every signal that has no handler."""
    with subprocess.Popen(
        [sys.executable, "-c", LOADING, "serve", str(folder), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "loading\n"
        if Path("/proc/net/tcp").exists():  # a balancer that only connects would take the server for ready
            assert listening(process.pid) == []
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(10) == 143
        finally:
            process.kill()
        assert process.stderr.read() == "interrupted\n"


def test_of_two_servers_that_load_at_once_one_is_told_that_the_address_is_taken(folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", SECOND, "serve", str(folder), "--engine", "torch", "--port", port]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert f"the server can't listen at 127.0.0.1, port {port} (" in done.stderr


def test_an_address_that_is_taken_is_told_before_the_model_loads(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-c", LOADING, "serve", str(folder), "--port", port]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"the server can't listen at 127.0.0.1, port {port} (" in done.stderr
    assert "choose another --port or --host" in done.stderr
