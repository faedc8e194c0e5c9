"""Labels in a folder of parts, which any number of machines fill together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from deit import locks
from deit.choices import Head
from deit.predict import bulk
from deit.predict.predictor import Predictor


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images that one machine answers together. A part can be pickled and sent to another process."""

    images: tuple[str, ...]
    file: Path
    """The file for their rows, `FOLDER/000000.jsonl` and so on. It is there if the part is done."""
    head: Head
    top_k: int

    def answer(self, predictor: Predictor, *, batch: int = 32) -> int:
        """Writes the rows that `deit predict --json` gives for these images, all of them or none.

        If another process is answering the same part, it waits for that one, and answers only if that one has not.

        Returns how many of the images could not be read. Raises `ValueError` if the predictor has another head, or if
        the part is done and its images have changed since.
        """
        if predictor.head != self.head:
            raise ValueError(
                f"these parts are for the head {self.head}, found a predictor with {predictor.head}; give both the "
                "same head"
            )
        with locks.held(self.file, lock=locks.beside(self.file), wait=True):
            rows: Iterable[dict[str, Any]] | None = bulk.read_part(self.file, self.images)
            if rows is None:
                stamps: deque[bulk.Stamp] = deque()
                stream = predictor.stream(bulk.stamped(self.images, stamps), top_k=self.top_k, batch=batch)
                rows = bulk.write_part(self.file, (answer.to_dict() for answer in stream), stamps)
            return sum("error" in row for row in rows)


def missing_parts(
    images: Iterable[str],
    folder: str | Path,
    *,
    model: str,
    head: Head = "fused",
    top_k: int = 3,
    size: int = bulk.PART,
) -> Iterator[Part]:
    """Yields the parts of a job that have no file in `folder` yet, so a job that was stopped goes on after a new start.

    The files, one after the other by name, hold what `deit predict --json` writes for the same images.

    Args:
        images: the paths of all images of the job, in a fixed order (`find_images`).
        folder: where the parts are written. All machines must reach it, the images and the model under the same paths.
        model: a trained folder or a hub name. It is compared with the one that the job began with.
        head, top_k: which head decides, and the number of labels for each image.
        size: number of images in a part. Work that is stopped loses at most this many for each worker.

    Raises `ValueError` if `folder` holds parts of another job, or if the images have changed.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, found {size}")
    folder = Path(folder).absolute()
    with locks.held(folder, wait=True):  # two machines may begin at once
        bulk.claim(folder, {"model": model, "files": bulk.identity(model), "head": head, "top_k": top_k, "size": size})
    return _missing(iter(images), folder, head, top_k, size)


def _missing(images: Iterator[str], folder: Path, head: Head, top_k: int, size: int) -> Iterator[Part]:
    known: set[Path] = set()
    while chunk := tuple(islice(images, size)):
        part = Part(images=chunk, file=folder / f"{len(known):06}.jsonl", head=head, top_k=top_k)
        known.add(part.file)
        if bulk.read_part(part.file, chunk) is None:
            yield part
    if more := sorted(set(folder.glob("*.jsonl")) - known):
        raise bulk.changed(more[0])
