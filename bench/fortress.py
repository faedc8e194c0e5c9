"""Thousands of damaged files through the code that reads them: each has to give an answer or one sentence.

    python -m bench.fortress [--count 10000] [--kind images ...] [--write]     # make fortress
    python -m bench.fortress --kind images --only 4711                         # one of them again

File number N of a kind is always the same. A file is a fault if it raises anything but `ValueError` and `OSError`, if
it takes longer than `PATIENCE`, or if it ends the process. `--write` puts the table into docs/security.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "security.md"
PATIENCE = 5.0
"""Seconds that a file may take."""
MEMORY = 8 * 2**30
"""Bytes of addresses that the process may take."""
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -1e308, "", "0", "cat", "../../etc/passwd", "\x1b[2J",
    [], [0], [[]], {}, {"a": {}}, [1e9] * 3, "x" * 10_000,
)  # fmt: skip

Attempt = Callable[[bytes, Path], object]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bytes with up to eight faults: flipped, overwritten, cut out, repeated or moved."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        at, size = draw.randrange(len(found) or 1), min(draw.choice((1, 1, 2, 4, 16, 256)), len(found))
        part = bytes(found[at : at + size])
        match draw.randrange(6):
            case 0 if found:
                found[at] ^= 1 << draw.randrange(8)
            case 1:
                found[at : at + size] = draw.randbytes(size)
            case 2:
                found[at : at + size] = draw.choice((b"\x00", b"\xff", b"\x7f")) * size
            case 3:
                del found[at : at + size]
            case 4:
                found[at:at] = part * draw.randint(1, 50)
            case 5:
                found = found[: draw.randrange(len(found) or 1)] if draw.random() < 0.2 else found
    return bytes(found)


def changed(content: bytes, draw: random.Random) -> bytes:
    """JSON with up to three values of another kind; one in ten is damaged as text."""
    if draw.random() < 0.1:
        return damaged(content, draw)
    values = json.loads(content)
    for _ in range(draw.randint(1, 3)):
        places = [*_places(values)]
        owner, key = draw.choice(places)
        if draw.random() < 0.15:
            del owner[key]
        else:
            owner[key] = copy.deepcopy(draw.choice(VALUES))  # one that is there twice could come to hold itself
    return json.dumps(values).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in list(keys) for place in ((value, key), *_places(value[key]))]


# ---------------------------------------------------------------------------------------------------------------- kinds


def images() -> tuple[list[bytes], Attempt, Callable[[bytes, random.Random], bytes]]:
    """Small JPEG, PNG, GIF, WebP, TIFF and BMP files."""
    import numpy as np
    from PIL import Image

    from deit.image.decode import load_image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    sources = []
    kinds: list[tuple[str, dict[str, Any]]] = [(kind, {}) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")]
    for kind, options in (("JPEG", {"progressive": True}), *kinds):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        sources.append(file.getvalue())

    def read(content: bytes, folder: Path) -> object:
        (folder / "image").write_bytes(content)
        return load_image(folder / "image")

    return sources, read, damaged


def _model(folder: Path) -> Any:
    import torch

    from deit.config import DeiTConfig
    from deit.image.processor import DeiTImageProcessor
    from deit.model.network import DeiTForImageClassification

    torch.manual_seed(0)
    config = DeiTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=16, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    model = DeiTForImageClassification(config)
    model.save_pretrained(folder)
    DeiTImageProcessor.paper(16).save_pretrained(folder)
    return model


def _of_folder(name: str) -> Attempt:
    """Reads a whole folder of a classifier after one of its files has been replaced."""
    from deit.model.load import load_classifier

    def read(content: bytes, folder: Path) -> object:
        if not (folder / "config.json").exists():
            _model(folder)
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        try:
            return load_classifier(folder)
        finally:
            (folder / name).write_bytes(kept)

    return read


def _file(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        _model(Path(folder))
        return (Path(folder) / name).read_bytes()


def safetensors() -> tuple[list[bytes], Attempt, Callable[[bytes, random.Random], bytes]]:
    """The weights of a model folder."""
    return [_file("model.safetensors")], _of_folder("model.safetensors"), damaged


def pickles() -> tuple[list[bytes], Attempt, Callable[[bytes, random.Random], bytes]]:
    """Weights as `torch.save` writes them."""
    import torch

    from deit.weights.hub import read_tensors

    with tempfile.TemporaryDirectory() as folder:
        file = io.BytesIO()
        torch.save(_model(Path(folder)).state_dict(), file)

    def read(content: bytes, folder: Path) -> object:
        (folder / "weights.pth").write_bytes(content)
        return read_tensors(folder / "weights.pth")

    return [file.getvalue()], read, damaged


def configs() -> tuple[list[bytes], Attempt, Callable[[bytes, random.Random], bytes]]:
    """The `config.json` of a model folder."""
    return [_file("config.json")], _of_folder("config.json"), changed


def preprocessing() -> tuple[list[bytes], Attempt, Callable[[bytes, random.Random], bytes]]:
    """The `preprocessor_config.json` of a model folder, which then prepares an image."""
    from PIL import Image

    load = _of_folder("preprocessor_config.json")

    def read(content: bytes, folder: Path) -> object:
        classifier: Any = load(content, folder)
        return classifier.processor([Image.new("RGB", (20, 30))])

    return [_file("preprocessor_config.json")], read, changed


def recipes() -> tuple[list[bytes], Attempt, Callable[[bytes, random.Random], bytes]]:
    """Every shipped recipe as a `recipe.json`."""
    from deit.recipes import find, shipped

    def read(content: bytes, folder: Path) -> object:
        (folder / "recipe.json").write_bytes(content)
        return find(str(folder / "recipe.json"))

    return [json.dumps(make().to_dict()).encode() for make in shipped().values()], read, changed


@functools.cache
def _export() -> dict[str, bytes]:
    """The files of an export to `torch`."""
    from deit.export.write import export

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        _model(Path(folder) / "model")
        export(Path(folder) / "model", "torch", Path(folder) / "export")
        return {path.name: path.read_bytes() for path in (Path(folder) / "export").iterdir()}


def exports() -> tuple[list[bytes], Attempt, Callable[[bytes, random.Random], bytes]]:
    """The `export.json` of an export."""
    from deit.export.engines import load_engine

    def read(content: bytes, folder: Path) -> object:
        for name, kept in (_export() | {"export.json": content}).items():
            (folder / name).write_bytes(kept)
        return load_engine(folder)

    return [_export()["export.json"]], read, changed


def programs() -> tuple[list[bytes], Attempt, Callable[[bytes, random.Random], bytes]]:
    """The `model.pt2` of an export, which then computes an image, past the checksum that would refuse it."""
    import numpy as np

    from deit.export.engines import TorchEngine

    description = json.loads(_export()["export.json"])

    def read(content: bytes, folder: Path) -> object:
        (folder / "model.pt2").write_bytes(content)
        return TorchEngine(folder, description)(np.zeros((1, 3, 16, 16), np.float32))

    return [_export()["model.pt2"]], read, damaged


KINDS = {
    function.__name__: function
    for function in (images, safetensors, pickles, configs, preprocessing, recipes, exports, programs)
}


# -------------------------------------------------------------------------------------------------------------- running


class _Late(BaseException):
    """A file took longer than `PATIENCE`."""


def _ring(*_: object) -> None:
    raise _Late


def attempt(kind: str, first: int, last: int) -> None:
    """Reads the files of a kind with these numbers, and prints a line of JSON for each number before and after it."""
    warnings.simplefilter("ignore")
    sources, read, change = KINDS[kind]()
    signal.signal(signal.SIGALRM, _ring)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            draw = random.Random(f"{kind} {number}")
            content = change(sources[number % len(sources)], draw)
            print(number, flush=True)
            began, fault, refused = time.perf_counter(), "", False
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
            try:
                read(content, Path(folder))
            except (ValueError, OSError):
                refused = True
            except _Late:
                fault = f"took longer than {PATIENCE:.0f} s"
            except BaseException as error:
                fault = f"{type(error).__name__}: {str(error)[:300]}"
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(json.dumps([number, refused, fault, time.perf_counter() - began]), flush=True)


def run(kind: str, first: int, last: int) -> dict[str, Any]:
    """The counts of a kind. If a file ends the process, another goes on behind it."""
    found: dict[str, Any] = {"kind": kind, "files": last - first, "refused": 0, "slowest": 0.0, "faults": {}}
    while first < last:
        begun = first
        with subprocess.Popen(
            [sys.executable, "-m", "bench.fortress", "--work", kind, str(first), str(last)],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout
            for line in process.stdout:
                answer = json.loads(line)
                if isinstance(answer, int):
                    begun = answer
                    continue
                number, refused, fault, seconds = answer
                found["refused"] += refused
                found["slowest"] = max(found["slowest"], seconds)
                if fault:
                    found["faults"][number] = fault
                first = number + 1
        if process.returncode:
            found["faults"][begun] = f"ended the process with status {process.returncode}"
            first = begun + 1
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| damaged | files | refused in one sentence | read | faults | slowest |", "|---|---|---|---|---|---|"]
    for row in rows:
        about = (KINDS[row["kind"]].__doc__ or "").rstrip(".")
        counts = f"{row['files']:,} | {row['refused']:,} | {row['files'] - row['refused'] - len(row['faults']):,}"
        lines.append(f"| {about} | {counts} | {len(row['faults'])} | {1000 * row['slowest']:.0f} ms |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fortress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="files of each kind (default: %(default)s)")
    parser.add_argument("--kind", nargs="+", choices=tuple(KINDS), default=tuple(KINDS), help="these kinds alone")
    parser.add_argument("--only", type=int, help="the number of a single file")
    parser.add_argument("--write", action="store_true", help="put the table into docs/security.md")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        kind, first, last = options.work
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        attempt(kind, int(first), int(last))
        return 0
    numbers = (0, options.count) if options.only is None else (options.only, options.only + 1)
    rows = [run(kind, *numbers) for kind in options.kind]
    for row in rows:
        for number, fault in row["faults"].items():
            print(f"{row['kind']} {number}: {fault}", file=sys.stderr)
    print(table(rows))
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        marked = r"(<!-- make fortress -->\n).*?(\n<!-- end -->)"
        PAGE.write_text(re.sub(marked, rf"\g<1>{table(rows)}\g<2>", page, flags=re.DOTALL), encoding="utf-8")
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
