"""Exports a classifier as a page that labels images in the browser: the page's files, and their check in Node.

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
"""Version of onnxruntime-web in the pages."""
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Hash of that package, as `npm view onnxruntime-web@VERSION dist.integrity` prints it."""
TOLERANCE = 1e-6
"""Largest allowed difference between a pixel value of the page and of the Python preprocessing."""

_NAME = f"onnxruntime-web-{VERSION}.tgz"
_PAGE = (
    "index.html",
    "shown.css",
    "page.css",
    "shown.js",
    "words.js",
    "page.js",
    "worker.js",
    "picture.js",
    "pixels.js",
    "answer.js",
    "onnxruntime-LICENSE",
)  # with the licence of onnxruntime, because its package holds no licence file
# .mjs becomes .js, because some servers don't serve .mjs as a script, and browsers refuse a script served otherwise.
_RUNTIME = {
    "ort.wasm.bundle.min.js": "package/dist/ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.wasm": "package/dist/ort-wasm-simd-threaded.wasm",
}


class Page:
    """The files of a page, except the model's.

    Raises `FileNotFoundError` if Node is missing, or if onnxruntime-web is not cached and can't be fetched. Raises
    `CheckpointError` if npm gives another package than expected.
    """

    def __init__(self) -> None:
        self.node = shutil.which("node")
        if self.node is None:
            raise FileNotFoundError(
                "the program node is missing, and it has to check the page; install Node.js 20 or newer, or take "
                "another format"
            )
        with tarfile.open(fileobj=io.BytesIO(_package())) as package:
            self._files = {name: _member(package, member) for name, member in _RUNTIME.items()}
        here = resources.files("deit") / "web"
        self._files |= {name: (here / name).read_bytes() for name in _PAGE}
        self._check = (here / "check.mjs").read_bytes()

    def write(self, folder: Path) -> None:
        """Writes the files into a folder, to which the export adds `model.onnx`, `config.json`,
        `preprocessor_config.json` and `export.json`."""
        for name, content in self._files.items():
            (folder / name).write_bytes(content)

    def running(self, folder: Path, description: Mapping[str, Any]) -> NodeEngine:
        """Starts the page's scripts in Node."""
        return NodeEngine(folder, description, str(self.node), self._check)


def _member(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(name)
    assert file is not None, f"{_NAME} is verified, and holds {name}"
    return file.read()


def _package() -> bytes:
    """The verified tarball of onnxruntime-web, from the cache or from npm with npm's own settings."""
    cached = files.cache_folder("packages") / _NAME
    if cached.is_file() and _integrity(content := cached.read_bytes()) == INTEGRITY:
        return content
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"onnxruntime-web {VERSION} is not in {cached.parent}, and the program npm, which fetches it, is missing; "
            f"install Node.js with npm, or put {_NAME} there"
        )
    # Without the option, npm would retry for more than a minute if there is no network.
    command = [npm, "pack", "--loglevel=error", "--ignore-scripts", "--fetch-retries=0", f"onnxruntime-web@{VERSION}"]
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            command, cwd=scratch, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        fetched = Path(scratch) / _NAME
        if not fetched.is_file():
            said = " ".join((done.stderr or done.stdout).replace("npm error", "").split())
            reason = said[:200] or f"it ended with status {done.returncode}"
            raise FileNotFoundError(
                f"npm could not fetch onnxruntime-web {VERSION} ({reason}); connect to the internet, check `npm config "
                f"get registry`, or put {_NAME} into {cached.parent}"
            )
        content = fetched.read_bytes()
    if (found := _integrity(content)) != INTEGRITY:
        raise files.CheckpointError(
            f"npm gave an onnxruntime-web {VERSION} with the hash {found}, expected {INTEGRITY}; check `npm config get "
            "registry`, and ask the owner of that registry why the package differs"
        )
    with files.replacing(cached) as temporary:
        temporary.write_bytes(content)
    return content


def _integrity(content: bytes) -> str:
    """The hash of a package, as npm writes it."""
    return "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()


def refuse_undone(processor: DeiTImageProcessor) -> None:
    """Raises `ValueError` for the first option that the page's preprocessing can't do."""
    advice = "correct preprocessor_config.json, or take another format"
    if processor.do_resize and processor.resample == Image.Resampling.NEAREST:
        raise ValueError(f"resample is nearest, expected a filter that the page has, such as bicubic; {advice}")
    if processor.do_convert_rgb is False:
        raise ValueError(
            f"do_convert_rgb is False, expected True or none, because a browser gives every image in RGB; {advice}"
        )
    if processor.data_format != "channels_first":
        raise ValueError(f"data_format is {processor.data_format}, expected channels_first; {advice}")


class NodeEngine(Engine):
    """Runs the model and the preprocessing of a page's folder in Node, with the folder's own scripts.

    Leaving its `with` block ends Node.
    """

    name = "onnxruntime-web"

    def __init__(self, folder: Path, description: Mapping[str, Any], node: str, check: bytes):
        super().__init__(folder, description, precision="float32")
        self._opened = ExitStack()
        code = Path(self._opened.enter_context(tempfile.TemporaryDirectory()))
        for path in folder.glob("*.js"):
            shutil.copy(path, code)
        (code / "package.json").write_text('{"type": "module"}')  # without it, Node takes .js for CommonJS
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
        """Prepares a picture with the page's preprocessing; returns (C, H, W) in float32."""
        [found] = self._ask({"picture": (picture.height, picture.width)}, picture.convert("RGBA").tobytes())
        return found

    def check_pixels(self, pictures: Iterable[Image.Image], processor: DeiTImageProcessor) -> dict[str, Any]:
        """Compares the page's preprocessing with that of `processor`: `images` and the largest `difference`.

        Raises `ValueError` if a value differs by more than `TOLERANCE`.
        """
        images, largest = 0, 0.0
        for picture in pictures:
            [expected] = processor([picture]).pixel_values
            found = self.pixel_values(picture)
            images += 1
            difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else math.inf
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"web was not kept: for a picture of {picture.width}x{picture.height}, its script makes pixels "
                    f"that differ by {difference:.2g} from the Python processor's, expected at most {TOLERANCE:g}; the "
                    "script computes as Pillow 13 does: install pillow>=13, or please report this"
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
                f"web was not kept: {self.name} {VERSION} failed in Node ({said}); install Node.js 20 or newer, or "
                "take another format and please report this"
            )
        return [
            np.frombuffer(bytearray(stdout.read(4 * math.prod(dims))), np.float32).reshape(dims)
            for dims in answer["outputs"]
        ]
