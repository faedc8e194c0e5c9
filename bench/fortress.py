"""Attacks on everything: damaged files, kills, full disks, clocks that jump, hostile requests, and all of them at once.

    python -m bench.fortress [--count 10000] [--minutes 10] [--kind images kills ...] [--write]     # make fortress
    python -m bench.fortress --kind images --only 4711                                             # one file again

Damaged files are made here. File number N of a kind is always the same. It is a fault if the code that reads it raises
anything but `ValueError` and `OSError`, if it takes longer than `PATIENCE`, or if it ends the process. Other attacks
are tests of the suite, which say how often they attacked (`record_property`). `--write` puts the rows of what was run
into the tables of docs/security.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import os
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
from xml.etree import ElementTree

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

ATTACKS = {
    "folders": (
        "Folders, weights, programs and recipes of a stranger who wants code to run",
        ("tests/predict", "tests/weights", "tests/train", "-k", "hostile"),
    ),
    "runtimes": ("Exports of a stranger, in their runtimes", ("tests/runtimes/test_hostile_exports.py",)),
    "kills": (
        "`kill -9` at random moments; the work goes on to the same bits",
        (
            "tests/processes/test_killed.py::test_killed_at_any_moment",
            "tests/processes/test_parallel.py::test_killed_again_and_again",
        ),
    ),
    "disks": ("Full disks, at any command and at any file", ("tests/processes/test_full_disk.py",)),
    "memory": (
        "Too little memory for the work",
        ("tests/processes/test_killed.py::test_a_limit_of_memory_is_a_sentence",),
    ),
    "signals": ("SIGTERM and Ctrl-C, at any command", ("tests/processes/test_signals.py",)),
    "clocks": (
        "Clocks that jump by decades",
        (
            "tests/test_locks.py::test_clocks_that_jump",
            "tests/runtimes/test_engines.py::test_a_model_is_exported_once_and_again_where_it_changed",
        ),
    ),
    "locks": ("Two processes that write the same, and owners of locks that die", ("tests/test_locks.py",)),
    "connections": (
        "Bombs and hostile HTTP, one by one",
        (
            "tests/serve/test_serve_attacks.py",
            "tests/serve/test_serve_connections.py",
            "tests/serve/test_serve_process.py",
        ),
    ),
    "mutated": ("Mutated requests", ("tests/serve/test_serve_strangers.py::test_mutated_requests",)),
    "described": (
        "Requests made from the server's own description, right and wrong ones",
        ("tests/serve/test_serve_described.py",),
    ),
    "load": (
        "Attacks of six clients on a server while 58 others ask without pause",
        ("tests/serve/test_serve_load.py::test_load_with_a_tenth_hostile",),
    ),
}
"""What is attacked, and the tests that do it."""


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


def run_tests(kind: str, minutes: float) -> dict[str, Any]:
    """The counts of an attack that is made by tests."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.xml"
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *ATTACKS[kind][1], f"--junitxml={record}", "-o", "junit_family=xunit1"],
            cwd=PAGE.parents[1],
            env={**os.environ, "FORTRESS_MINUTES": str(minutes)},
            stdout=sys.stderr,
            check=False,
        )
        seconds = time.perf_counter() - began
        cases = [*ElementTree.parse(record).getroot().iter("testcase")] if record.exists() else []
    left_out = [case for case in cases if case.find("skipped") is not None]
    faults = {
        case.attrib["name"]: str(bad.attrib.get("message", ""))[:300]
        for case in cases
        for bad in (case.find("failure"), case.find("error"))
        if bad is not None
    }
    if done.returncode not in (0, 1):
        faults["pytest"] = f"ended with status {done.returncode}"
    said = [_properties(case, "said") for case in cases]
    return {
        "kind": kind,
        "times": sum(int((_properties(case, "attacks") or ["1"])[0]) for case in cases if case not in left_out),
        "faults": faults,
        "left out": len(left_out),
        "seconds": seconds,
        "said": "; ".join(one for each in said for one in each),
    }


def _properties(case: ElementTree.Element, name: str) -> list[str]:
    return [each.attrib["value"] for each in case.iter("property") if each.attrib["name"] == name]


FILES = ("| damaged | files | refused in one sentence | read | faults | slowest |", "|---|---|---|---|---|---|")
TESTS = ("| attack | times | faults | left out | seconds | seen |", "|---|---|---|---|---|---|")


def about(kind: str) -> str:
    """What is damaged or attacked."""
    return ATTACKS[kind][0] if kind in ATTACKS else (KINDS[kind].__doc__ or "").rstrip(".")


def line(row: dict[str, Any]) -> str:
    """A line of a table."""
    faults = len(row["faults"])
    if row["kind"] in ATTACKS:
        counts = f"{row['times']:,} | {faults} | {row['left out']} | {row['seconds']:.0f} | {row['said']}"
    else:
        counts = f"{row['files']:,} | {row['refused']:,} | {row['files'] - row['refused'] - faults:,}"
        counts += f" | {faults} | {1000 * row['slowest']:.0f} ms"
    return f"| {about(row['kind'])} | {counts} |"


def merged(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with the rows in its tables. A row of what was not run stays."""
    new = {about(row["kind"]): line(row) for row in rows}
    for name, heads, kinds in (("files", FILES, KINDS), ("attacks", TESTS, ATTACKS)):
        marked = re.compile(rf"(<!-- make fortress: {name} -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)
        [found] = marked.finditer(page)
        old = {each.split(" | ")[0].removeprefix("| "): each for each in found[2].splitlines()[len(heads) :]}
        lines = [*heads, *(each for kind in kinds if (each := (old | new).get(about(kind))))]
        page = page[: found.start(2)] + "\n".join(lines) + page[found.end(2) :]
    return page


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fortress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = (*KINDS, *ATTACKS)
    parser.add_argument("--count", type=int, default=10_000, help="damaged files of each kind (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="of load (default: %(default)s)")
    parser.add_argument("--kind", nargs="+", choices=kinds, default=kinds, help="these kinds alone")
    parser.add_argument("--only", type=int, help="the number of a single file")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/security.md")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        kind, first, last = options.work
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        attempt(kind, int(first), int(last))
        return 0
    numbers = (0, options.count) if options.only is None else (options.only, options.only + 1)
    rows = []
    for kind in options.kind:
        row = run_tests(kind, options.minutes) if kind in ATTACKS else run(kind, *numbers)
        rows.append(row)
        for number, fault in row["faults"].items():
            print(f"{kind} {number}: {fault}", file=sys.stderr)
        print(line(row), flush=True)
        if options.write:
            PAGE.write_text(merged(PAGE.read_text(encoding="utf-8"), [row]), encoding="utf-8")
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
