"""A classifier as a page that labels images in the browser: what stands around the model, and a check of it in Node.

The page's own files are in `web/`. Its runtime, onnxruntime-web, is fetched from npm at the first export and kept.
B images, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deit import files
from deit.export.engines import Engine
from deit.image.processor import DeiTImageProcessor

VERSION = "1.30.0"
"""The version of onnxruntime-web that pages get."""
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Hash of that package, as `npm view onnxruntime-web@VERSION dist.integrity` says."""
TOLERANCE = 1e-6
"""Largest difference of a pixel value from the Python preprocessing's that the page's may have."""

_NAME = f"onnxruntime-web-{VERSION}.tgz"
_PAGE = (
    "index.html",
    "shown.css",
    "page.css",
    "shown.js",
    "page.js",
    "worker.js",
    "picture.js",
    "pixels.js",
    "answer.js",
    "onnxruntime-LICENSE",
)  # its package holds no licence file
# Some servers don't know .mjs for a script, and browsers refuse a script that is served as anything else.
_RUNTIME = {
    "ort.wasm.bundle.min.js": "package/dist/ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.wasm": "package/dist/ort-wasm-simd-threaded.wasm",
}


class Page:
    """The files of a page but the model's.

    Raises `FileNotFoundError` where Node is missing, or where onnxruntime-web is neither cached nor to be had;
    `CheckpointError` where npm gives something else for it.
    """

    def __init__(self) -> None:
        self.node = shutil.which("node")
        if self.node is None:
            raise FileNotFoundError(
                "the program node is missing, and a page is checked in it; install Node.js 20 or "
                "newer, or take another format"
            )
        with tarfile.open(fileobj=io.BytesIO(_package())) as package:
            self._files = {name: _member(package, member) for name, member in _RUNTIME.items()}
        here = resources.files("deit") / "web"
        self._files |= {name: (here / name).read_bytes() for name in _PAGE}
        self._check = (here / "check.mjs").read_bytes()

    def write(self, folder: Path) -> None:
        """Into a folder that holds the rest: `model.onnx`, `config.json`, `preprocessor_config.json`, `export.json`."""
        for name, content in self._files.items():
            (folder / name).write_bytes(content)

    def running(self, folder: Path, description: Mapping[str, Any]) -> NodeEngine:
        return NodeEngine(folder, description, str(self.node), self._check)


def _member(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(name)
    assert file is not None, f"{_NAME} is verified, and holds {name}"
    return file.read()


def _package() -> bytes:
    """The verified tarball of onnxruntime-web, from the cache or from npm, by npm's own settings."""
    cached = files.cache_folder("packages") / _NAME
    if cached.is_file() and _integrity(content := cached.read_bytes()) == INTEGRITY:
        return content
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"onnxruntime-web {VERSION} is not in {cached.parent}, and the program npm, which "
            f"fetches it, is missing; install Node.js with npm, or put {_NAME} there"
        )
    # Without network npm would try again for more than a minute.
    command = [npm, "pack", "--loglevel=error", "--ignore-scripts", "--fetch-retries=0", f"onnxruntime-web@{VERSION}"]
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            command, cwd=scratch, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        fetched = Path(scratch) / _NAME
        if not fetched.is_file():
            said = " ".join((done.stderr or done.stdout).replace("npm error", "").split())
            reason = said[:200] or f"it ended with {done.returncode}"
            raise FileNotFoundError(
                f"npm did not give onnxruntime-web {VERSION} ({reason}); connect to the internet, "
                f"see `npm config get registry`, or put {_NAME} into {cached.parent}"
            )
        content = fetched.read_bytes()
    if (found := _integrity(content)) != INTEGRITY:
        raise files.CheckpointError(
            f"npm gave an onnxruntime-web {VERSION} of {found}, expected {INTEGRITY}; see "
            "`npm config get registry`, and ask who changes packages there"
        )
    with files.replacing(cached) as temporary:
        temporary.write_bytes(content)
    return content


def _integrity(content: bytes) -> str:
    """As npm writes it."""
    return "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()


def refuse_undone(processor: DeiTImageProcessor) -> None:
    """Raises `ValueError` for the first option that the page's preprocessing doesn't do."""
    advice = "correct preprocessor_config.json, or take another format"
    if processor.do_resize and processor.resample == Image.Resampling.NEAREST:
        raise ValueError(f"resample is nearest, expected a filter that the page has, such as bicubic; {advice}")
    if processor.do_convert_rgb is False:
        raise ValueError(
            f"do_convert_rgb is False, expected True or none, as a browser gives every image in RGB; {advice}"
        )
    if processor.data_format != "channels_first":
        raise ValueError(f"data_format is {processor.data_format}, expected channels_first; {advice}")


class NodeEngine(Engine):
    """The model and the preprocessing of a page's folder, run in Node by the folder's own scripts. To be closed, as a
    context."""

    name = "onnxruntime-web"

    def __init__(self, folder: Path, description: Mapping[str, Any], node: str, check: bytes):
        super().__init__(folder, description, precision="float32")
        self._opened = ExitStack()
        code = Path(self._opened.enter_context(tempfile.TemporaryDirectory()))
        for path in folder.glob("*.js"):
            shutil.copy(path, code)
        (code / "package.json").write_text('{"type": "module"}')  # else Node takes .js for its older kind of script
        (code / "check.mjs").write_bytes(check)
        self._said = code / "stderr"
        with open(self._said, "wb") as said:
            self._process = subprocess.Popen(
                [node, str(code / "check.mjs"), str(folder), str(code)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
            )

    def __enter__(self) -> NodeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._opened.close()

    def _run(self, pixels: np.ndarray) -> list[np.ndarray]:
        return self._ask({"pixels": pixels.shape}, pixels.tobytes())

    def pixel_values(self, picture: Image.Image) -> np.ndarray:
        """(C, H, W) float32 of a picture, by the page's preprocessing."""
        [found] = self._ask({"picture": (picture.height, picture.width)}, picture.convert("RGBA").tobytes())
        return found

    def check_pixels(self, pictures: Iterable[Image.Image], processor: DeiTImageProcessor) -> dict[str, Any]:
        """How far the page's preprocessing is from that of `processor`: `images` and the largest `difference`.

        Raises `ValueError` beyond `TOLERANCE`.
        """
        images, largest = 0, 0.0
        for picture in pictures:
            [expected] = processor([picture]).pixel_values
            found = self.pixel_values(picture)
            images += 1
            difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else math.inf
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"web was not kept: of a picture of {picture.width}x{picture.height} its script makes "
                    f"pixels that differ by {difference:.2g} from this processor's, where {TOLERANCE:g} "
                    "are allowed; it computes as Pillow 13 does: install pillow>=13, or please report it"
                )
            largest = max(largest, difference)
        return {"images": images, "difference": largest}

    def _ask(self, request: Mapping[str, Any], content: bytes) -> list[np.ndarray]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n" + content)
            stdin.flush()
            answer = json.loads(stdout.readline() or "{}")
        except OSError:
            answer = {}
        if "outputs" not in answer:
            said = answer.get("error") or self._said.read_text(errors="replace") or "it ended early"
            said = " ".join(said.split())[:200]
            raise ValueError(
                f"web was not kept: {self.name} {VERSION} failed in Node ({said}); install Node.js 20 or "
                "newer, or please report it, and take another format"
            )
        return [
            np.frombuffer(bytearray(stdout.read(4 * math.prod(dims))), np.float32).reshape(dims)
            for dims in answer["outputs"]
        ]
