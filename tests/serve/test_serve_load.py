"""Speed and memory of the server under load."""

import asyncio
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.models import build, saved
from support.serving import RAW, picture, server

from deit import VARIANTS

STREAM = """
import sys, time
from deit.predict.predictor import Predictor
predictor = Predictor(sys.argv[1], engine="auto")
image = open(sys.argv[2], "rb").read()
list(predictor.stream([image] * 64))
began, images = time.perf_counter(), 0
while time.perf_counter() - began < 15:
    images += len(list(predictor.stream([image] * 320)))
print(images / (time.perf_counter() - began))
"""


def resident(process):
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024  # MiB


async def load(address, image, clients, seconds, sample):
    """Each client asks again once it is answered: (seconds since the beginning, seconds, status) of every request.

    Over bare connections, for on the same cores a library's client would take a fifth of what is to be measured."""
    done, began = [], time.perf_counter()
    request = (
        f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: {RAW['Content-Type']}\r\n"
        f"Content-Length: {len(image)}\r\n\r\n"
    ).encode() + image

    async def one():
        reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        while (at := time.perf_counter()) - began < seconds:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            await reader.readexactly(int(re.search(r"content-length: (\d+)", head)[1]))
            done.append((at - began, time.perf_counter() - at, int(head.split()[1])))
        writer.close()

    async def sampled():
        while time.perf_counter() - began < seconds:
            sample(time.perf_counter() - began)
            await asyncio.sleep(0.25)

    await asyncio.gather(sampled(), *(one() for _ in range(clients)))
    return done


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_load(tmp_path, capsys):
    """64 clients for a minute on a DeiT-Ti: no error but 503, the speed of full batches, no growing memory."""
    folder = saved(build("with_teacher", VARIANTS["deit-tiny-distilled-patch16-224"]), tmp_path / "m")
    image = picture(0, "JPEG", (256, 256))
    (tmp_path / "image.jpg").write_bytes(image)

    def streamed():
        done = subprocess.run(
            [sys.executable, "-c", STREAM, str(folder), str(tmp_path / "image.jpg")],
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout)

    before, memory = streamed(), []
    with server(folder, "--engine", "auto") as (process, address):
        asyncio.run(load(address, image, 64, 5, lambda _: None))
        done = asyncio.run(load(address, image, 64, 60, lambda at: memory.append((at, resident(process)))))
    after = streamed()
    assert {status for *_, status in done} <= {200, 503}
    good = sorted(seconds for _, seconds, status in done if status == 200)
    rate = len(good) / max(at + seconds for at, seconds, _ in done)
    first, last = (np.mean([size for at, size in memory if low <= at < low + 15]) for low in (0, 45))
    with capsys.disabled():
        print(
            f"\n{rate:.1f} images/s, stream {before:.1f} and {after:.1f}; p50 {good[len(good) // 2]:.2f} s, p99 "
            f"{good[int(0.99 * len(good))]:.2f} s; {len(done) - len(good)} of {len(done)} refused; "
            f"memory {first:.0f} MiB, then {last:.0f}"
        )
    assert rate >= 0.85 * (before + after) / 2
    assert last < 1.05 * first + 10
