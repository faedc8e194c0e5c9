"""Labels for any number of image files.

Paths are looked up as images are needed, and each row is written as soon as it is known. A results file grows in parts,
so work that was stopped continues after its last whole part.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Literal, Self

from deit import files, host, locks
from deit.choices import Head, Runtime
from deit.data.folders import native, passed_over, walk_images
from deit.export.engines import sha256
from deit.image.packs import find, is_pack, open_pack
from deit.predict.predictor import Predictor
from deit.terminal import cell, shown

PART = 2048
"""Number of images in a part. Work that is stopped loses at most this many."""
MANY = 256
"""Number of images from which `auto` takes OpenVINO. Preparing it takes some seconds the first time."""
Form = Literal["text", "json", "csv"]


def predict_files(
    model: str,
    inputs: Sequence[str],
    to: Path | Form = "text",
    *,
    head: Head = "fused",
    top_k: int = 3,
    batch: int = 32,
    shard: tuple[int, int] = (1, 1),
    device: str = "auto",
    engine: Runtime | None = "auto",
) -> int:
    """Labels image files as `deit predict` does, and returns how many of them could not be read.

    Messages and progress go to standard error. `-` among the inputs stands for a list of paths on standard input.

    Args:
        model, head, device: as for `Predictor`.
        inputs: as for `find_images`.
        to: a `.jsonl`, `.csv` or `.parquet` file, which grows in parts (see `Results`), or the form of the rows on
            standard output.
        top_k: number of labels for each image.
        batch: number of images computed at once.
        shard: (i, N) takes every N-th image, beginning with the i-th; i is from 1 to N.
        engine: as for `Predictor`, but `auto` takes OpenVINO only for a list on standard input or for `MANY` images or
            more.
    """
    passed: Counter[str] = Counter()
    paths = share(find_images(inputs, sys.stdin, passed), shard)
    if engine == "auto" and "-" not in inputs:  # counting a list would wait for its end, and it may come slowly
        many, paths = peek(paths, MANY)
        engine = "auto" if many else None
    predictor = Predictor(model, head=head, device=device, engine=engine)
    if predictor.calibration is not None:
        print(
            f"calibrated on {predictor.calibration.images} images; at most {predictor.calibration.error_rate:.3g} of "
            "images like these get a label that is sure and wrong",
            file=sys.stderr,
        )
    tally = Tally(sys.stderr, predictor.engine)

    def rows_of(paths: Iterable[str]) -> Iterator[dict[str, Any]]:
        return tally.counted(answer.to_dict() for answer in predictor.stream(paths, top_k=top_k, batch=batch))

    before = done = 0
    if isinstance(to, Path):
        job = Job(model, identity(model), head, predictor.engine, top_k, tuple(inputs), shard)
        with Results(to, job) as results:
            left = results.remaining(paths)
            if results.done:
                print(f"continuing after {results.done} images", file=sys.stderr)
            for _ in results.write(rows_of(left)):
                pass
        before, done = results.unreadable, results.done
    else:
        _print(rows_of(paths), to, top_k)
    tally.finish()
    if not tally.images and not done and shard == (1, 1):
        print("deit predict: found no image; give image files, or a folder that holds some", file=sys.stderr)
    if passed:
        print(f"deit predict: {shown(passed_over(passed))}", file=sys.stderr)
    return tally.unreadable + before


def _print(rows: Iterable[dict[str, Any]], form: Form, top_k: int) -> None:
    if form == "csv":
        for line in csv_lines(map(_shown_row, rows) if sys.stdout.isatty() else rows, top_k):
            print(line, end="", flush=True)
    else:
        for row in rows:
            if form == "json":
                print(json.dumps(row), flush=True)
            elif "error" not in row:
                print(_line(row), flush=True)


def _shown_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose text can't speak to a terminal."""
    texts: dict[str, Any] = {key: shown(row[key]) for key in ("image", "error") if key in row}
    return {**row, **texts, "labels": [{**found, "label": shown(found["label"])} for found in row["labels"]]}


def _line(row: dict[str, Any]) -> str:
    labels = ", ".join(f"{shown(found['label'])} {found['score']:.3f}" for found in row["labels"])
    return f"{shown(row['image'])}: " + (f"I don't know ({labels})" if row.get("sure") is False else labels)


@dataclass(frozen=True)
class Job:
    """Everything that decides the rows of a results file. Stopped work continues only if all of it is the same."""

    model: str
    files: str
    """`identity` of the model."""
    head: str
    engine: str
    top_k: int
    inputs: tuple[str, ...]
    shard: tuple[int, int] = (1, 1)
    """(i, N) takes every N-th image, beginning with the i-th; i is from 1 to N."""


def identity(model: str) -> str:
    """One digest of the files in a model's folder, its calibration included and hidden ones not.

    It is empty for the name of a model on the hub, whose files are not compared.
    """
    if not os.path.isdir(model):
        return ""
    held = {
        path.name: sha256(path)
        for path in sorted(Path(model).iterdir())
        if path.is_file() and not path.name.startswith(".")
    }
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def find_images(
    inputs: Iterable[str], listed: IO[str] | None = None, passed: Counter[str] | None = None
) -> Iterator[str]:
    """Yields the paths of images in a fixed order.

    A pack gives its images, and a file gives itself. A folder gives the image files in it and in its folders, sorted by
    name. A pattern gives what it matches, and `-` gives the lines of `listed`. `passed` counts the other files in
    folders by suffix.

    Raises `FileNotFoundError` for a pattern that matches nothing.
    """
    passed = Counter() if passed is None else passed
    for given in inputs:
        if given == "-":
            yield from _paths(listed or ())
        elif is_pack(given):
            yield from open_pack(given).walked()
        elif os.path.isdir(given):
            yield from walk_images(given, passed)
        elif os.path.isfile(given) or not glob.has_magic(given):
            yield given  # a missing file is a row like any other unreadable one
        else:
            matches = sorted(glob.glob(given, recursive=True))
            if not matches:
                raise FileNotFoundError(f"{given} matches no file; check the pattern")
            for match in matches:
                yield from walk_images(match, passed) if os.path.isdir(match) else [match]


def _paths(lines: Iterable[str]) -> Iterator[str]:
    """The paths of a list, as any system writes it: with a byte order mark, carriage returns and backslashes, or
    without."""
    for number, line in enumerate(lines):
        if number == 0:
            if line.startswith(("\udcff\udcfe", "\udcfe\udcff", "ÿþ", "þÿ")):
                raise ValueError("the list on standard input is in UTF-16, expected UTF-8; write it again")
            line = line.removeprefix("\ufeff").removeprefix("ï»¿")  # the second is UTF-8 in a console of Windows
        path = line.rstrip("\n")
        if path.endswith("\r") and not os.path.lexists(path):
            path = path[:-1]
        if path.strip():
            yield native(path)


def share(paths: Iterable[str], shard: tuple[int, int]) -> Iterator[str]:
    """Yields every N-th path, beginning with the i-th; `shard` is (i, N)."""
    return islice(paths, shard[0] - 1, None, shard[1])


def peek(paths: Iterable[str], count: int) -> tuple[bool, Iterator[str]]:
    """Returns whether there are at least `count` paths, and an iterator over all of them."""
    iterator = iter(paths)
    first = list(islice(iterator, count))
    return len(first) == count, chain(first, iterator)


def claim(folder: Path, job: Mapping[str, Any]) -> None:
    """Writes what decides the rows of a folder of parts into its `job.json`, if there is none yet.

    Raises `ValueError` if the folder belongs to other work.
    """
    described = json.loads(json.dumps(job))
    if (begun := folder / "job.json").exists():
        if (other := files.read_json(begun)) != described:
            differing = [key for key in {**described, **other} if described.get(key) != other.get(key)]
            raise ValueError(
                f"{folder} holds parts of other work ({', '.join(differing)} differ); finish that work with its own "
                "command, or remove the folder to start over"
            )
    elif found := sorted(folder.glob("*.jsonl")):
        raise ValueError(
            f"{folder} holds {found[0].name} but no job.json that says whose rows these are; remove the folder to "
            "start over"
        )
    else:
        files.write_json(begun, described)


Stamp = list[int] | None
"""Size of a file in bytes and its time of change in microseconds, as finely as file systems agree on it, or the size
and the CRC-32 of an image in a pack; None if there is no such file."""


def stamp(path: str) -> Stamp:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        try:
            entry = find(path)
        except (OSError, ValueError):
            return None
        return None if entry is None else [entry.length, entry.crc]
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns // 1000]


def stamped(paths: Iterable[str], stamps: deque[Stamp]) -> Iterator[str]:
    """Yields the paths, and appends the stamp of each to `stamps` before its image is read."""
    for path in paths:
        stamps.append(stamp(path))
        yield path


def write_part(
    part: Path, rows: Iterable[dict[str, Any]], stamps: deque[Stamp]
) -> Generator[dict[str, Any], None, None]:
    """Writes each row as it passes through. The part is there after the last one, and before it, `PART.images.json`
    with the `stamps` of its images and the checksum of its rows."""
    digest, taken = hashlib.sha256(), list[Stamp]()
    files.sweep(part.parent, part.name, _beside(part).name)
    with files.replacing(part) as temporary:
        with temporary.open("wb") as file:
            for row in rows:
                line = json.dumps(row).encode() + b"\n"
                digest.update(line)
                file.write(line)
                taken.append(stamps.popleft() if stamps else stamp(row["image"]))
                yield row
        files.write_json(_beside(part), {"rows": digest.hexdigest(), "images": taken})


def read_part(part: Path, images: Sequence[str]) -> list[dict[str, Any]] | None:
    """The rows of a part that answers these images; None if it is missing or not whole.

    Raises `ValueError` if it answers other images, or if one of them has changed since.
    """
    try:
        content, beside = part.read_bytes(), files.read_json(_beside(part))
    except (FileNotFoundError, files.CheckpointError):
        return None
    if hashlib.sha256(content).hexdigest() != beside.get("rows"):
        return None
    rows = [json.loads(line) for line in content.splitlines()]
    if [row["image"] for row in rows] != list(images):
        raise changed(part)
    for image, then in zip(images, beside["images"], strict=True):
        if stamp(image) != then:
            raise changed(part, image)
    return rows


def changed(part: Path, image: str = "") -> ValueError:
    found = f"; {image} has another size or time" if image else ""
    return ValueError(f"the images have changed since {part} was written{found}; remove {part.parent} to start over")


def _beside(part: Path) -> Path:
    return part.with_suffix(".images.json")


def _read_rows(part: Path) -> Iterator[dict[str, Any]]:
    with part.open(encoding="utf-8") as rows:
        yield from map(json.loads, rows)


class Results:
    """A `.jsonl`, `.csv` or `.parquet` file of rows. Its rows gather part by part in `FILE.parts/` beside it.

    Used as a context, it keeps other processes from writing the file.

    Raises `ValueError` for another suffix or for parts of other work, `FileExistsError` if the file exists already, and
    `locks.InUse` if another process is writing it.
    """

    def __init__(self, path: Path, job: Job):
        if path.suffix not in _WRITERS:
            raise ValueError(f"expected a {', '.join(_WRITERS)} file for the results, found {path}; rename it")
        self._refuse_existing(path, job.shard)
        if path.suffix == ".parquet":
            _pyarrow()
        self.path, self.job, self.folder = path, job, path.with_name(path.name + ".parts")
        self.parts: list[Path] = []
        self.done = self.unreadable = 0
        """Number of images whose rows were written before, and how many of these could not be read."""
        self.stamps: deque[Stamp] = deque()
        self.held = ExitStack()

    @staticmethod
    def _refuse_existing(path: Path, shard: tuple[int, int]) -> None:
        if path.exists():
            other = ", or give each shard a file of its own" if shard[1] > 1 else ""
            raise FileExistsError(f"{path} exists already; remove it to predict again{other}")

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(locks.held(self.path, lock=locks.beside(self.path)))
            self._refuse_existing(self.path, self.job.shard)  # because another process may just have finished it
            files.sweep(self.path.parent, self.path.name, self.folder.name)
            claim(self.folder, asdict(self.job))
            self.held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()

    def remaining(self, paths: Iterable[str]) -> Iterator[str]:
        """Returns the images that follow the ones already done, and counts those.

        Raises `ValueError` if the images already done differ from those in the parts.
        """
        iterator = iter(paths)
        images: list[str] = []
        while (part := self._next()).exists():
            images = list(islice(iterator, PART))
            done = read_part(part, images)
            if done is None:
                break
            self.done += len(done)
            self.unreadable += sum("error" in row for row in done)
            self.parts.append(part)
            images = []
        self.stamps.clear()
        return stamped(chain(images, iterator), self.stamps)

    def _next(self) -> Path:
        return self.folder / f"{len(self.parts):06}.jsonl"

    def write(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Writes each row as it passes through, and the whole file after the last one."""
        iterator = iter(rows)
        count = PART
        while count == PART:
            count = 0
            with closing(write_part(part := self._next(), islice(iterator, PART), self.stamps)) as written:
                for row in written:
                    count += 1
                    yield row
            self.parts.append(part)
        with files.replacing(self.path) as temporary:
            _WRITERS[self.path.suffix](temporary, self._rows(), self.job.top_k)
        files.remove_folder(self.folder)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for part in self.parts:
            yield from _read_rows(part)


def csv_lines(rows: Iterable[dict[str, Any]], top_k: int) -> Iterator[str]:
    """Yields a header and a line for each row: image, label_1, score_1, …, sure, error.

    Texts are written as `terminal.cell` says, so that no spreadsheet computes them.
    """
    names = ["image", *(f"{what}_{i}" for i in range(1, top_k + 1) for what in ("label", "score")), "sure", "error"]
    yield ",".join(names) + "\n"
    for row in rows:
        best = {f"{key}_{i}": value for i, each in enumerate(row["labels"], 1) for key, value in each.items()}
        values: dict[str, Any] = {
            "image": row["image"],
            **best,
            **{key: row[key] for key in ("sure", "error") if key in row},
        }
        yield ",".join(_quoted(values.get(name, "")) for name in names) + "\n"


def _quoted(value: Any) -> str:
    """A cell of a CSV file. Python's own writer leaves a carriage return unquoted, which readers take for a new row."""
    text = cell(value) if isinstance(value, str) else str(value)
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\r\n') else text


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]], top_k: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_csv(path: Path, rows: Iterable[dict[str, Any]], top_k: int) -> None:
    # File names need not be UTF-8. With this handler their bytes come out as they are on the disk.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.writelines(csv_lines(rows, top_k))


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]], top_k: int) -> None:
    arrow = _pyarrow()
    schema = arrow.schema(
        [
            ("image", arrow.string()),
            ("labels", arrow.list_(arrow.string())),
            ("scores", arrow.list_(arrow.float64())),
            ("sure", arrow.bool_()),
            ("error", arrow.string()),
        ]
    )
    import pyarrow.parquet

    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        iterator = iter(rows)
        while chunk := list(islice(iterator, PART)):
            writer.write_batch(
                arrow.RecordBatch.from_pylist(
                    [
                        {
                            "image": _utf8(row["image"]),
                            "labels": [each["label"] for each in row["labels"]],
                            "scores": [each["score"] for each in row["labels"]],
                            "sure": row.get("sure"),
                            "error": _utf8(row.get("error")),
                        }
                        for row in chunk
                    ],
                    schema=schema,
                )
            )


def _utf8(text: str | None) -> str | None:
    """The text with a replacement character for each byte that is not UTF-8, because Parquet holds only UTF-8."""
    return text and text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise host.missing(".parquet files need pyarrow", "parquet") from None
    return pyarrow


_WRITERS = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}


class Tally:
    """Counts rows and names each image that can't be read. On a terminal it also shows the progress and the speed."""

    def __init__(self, stream: Any, engine: str):
        self.stream, self.engine, self.images, self.unreadable = stream, engine, 0, 0
        self.began = self.shown = time.monotonic()

    def counted(self, rows: Any) -> Any:
        for row in rows:
            self.images += 1
            if "error" in row:
                self.unreadable += 1
                print(f"deit predict: {shown(row['error'])}", file=self.stream)
            if self.stream.isatty() and time.monotonic() - self.shown > 1:
                self.shown = time.monotonic()
                print(f"\r{self._text()}", end="", file=self.stream, flush=True)
            yield row

    def finish(self) -> None:
        if self.images > 1:
            print(("\r" if self.stream.isatty() else "") + self._text(), file=self.stream)

    def _text(self) -> str:
        rate = self.images / max(time.monotonic() - self.began, 1e-9)
        return f"{self.images} images, {self.unreadable} unreadable, {rate:.0f} images/s ({self.engine})"


def parse_shard(text: str) -> tuple[int, int]:
    """Turns `2/8` into (2, 8). Raises `ValueError` if the text is no shard."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"expected a shard i/N with i from 1 to N, found {text!r}; write it like 2/8")
    return int(index), int(count)
