"""Reads a request: its images, which are held in memory within limits, and the fields beside them.

Anything else is refused with one sentence.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from fastapi import Request
from starlette.exceptions import HTTPException

from deit.explain.explanation import class_number
from deit.explain.maps import METHODS
from deit.serve.batcher import Why

_HELD = 16
"""Number of bodies of the largest size that may be in memory at once. More are answered 503."""
_DISCARDED = 3
"""A body that is too large is read to its end, up to this many times the limit, because otherwise its sender would not
read the answer."""
_PARTS = 8  # of a form, beyond its images
_CONTENT_TYPE = 1000  # characters
_VALUES = 100_000
"""Most values in JSON. There is one for each image, and 20 MB of nothing but brackets would become 500 MB."""
_DIGITS = 1000  # of a number
TOP_K = 5
METHOD = "relevance"  # scores best of those that look inside the model, see docs/explain.md
_LONGEST, _MANY = 200, 1000  # longest unknown label (in characters) and most labels for which similar ones are searched

_DISPOSITION = re.compile(rb"^content-disposition:(.*)$", re.IGNORECASE | re.MULTILINE)
_FILE = re.compile(rb";\s*filename\*?=", re.IGNORECASE)
_FIELD = re.compile(rb';\s*name="?([a-z_]+)"?\s*(?:;|$)', re.IGNORECASE)


def refuse(status: int, sentence: str, **headers: str) -> NoReturn:
    raise HTTPException(status, sentence, headers)


class Bodies:
    """Reads bodies into memory, and counts how much all of them take.

    Args:
        limit: largest body, in bytes.
        timeout: seconds for a body to arrive.
    """

    def __init__(self, limit: int, timeout: float):
        self.limit, self.timeout, self.held = limit, timeout, 0

    @contextmanager
    def room(self) -> Iterator[bytearray]:
        """A place for a body. Its bytes count until the block ends."""
        body = bytearray()
        try:
            yield body
        finally:
            self.held -= len(body)

    async def read(self, request: Request, body: bytearray) -> None:
        try:
            async with asyncio.timeout(self.timeout):
                await self._read(request, body)
        except TimeoutError:
            refuse(
                408,
                f"the body did not arrive within {self.timeout:g} s; send it faster, or a smaller image",
                Connection="close",
            )

    async def _read(self, request: Request, body: bytearray) -> None:
        too_large = f"the body has more than the {self.limit} bytes allowed; send a smaller image, or fewer"
        declared = request.headers.get("content-length", "0")
        if not (declared.isascii() and declared.isdigit()):
            refuse(400, "Content-Length is not a number; let your HTTP library set it")
        if len(declared) > 15 or int(declared) > _DISCARDED * self.limit:
            refuse(413, too_large, Connection="close")
        count = 0
        async for chunk in request.stream():
            count += len(chunk)
            if count > _DISCARDED * self.limit:
                break
            if count <= self.limit:
                if self.held + len(chunk) > _HELD * self.limit:
                    refuse(503, "too many bodies are being read already; try again in 1 s", **{"Retry-After": "1"})
                self.held += len(chunk)
                body += chunk
        if count > self.limit:
            refuse(413, too_large, Connection="close")


_BOUNDARY = re.compile(r';[ \t]*boundary="?([^";]{1,70}?)"?[ \t]*(?:;|$)', re.IGNORECASE)


def _content_type(text: str) -> tuple[str, str | None]:
    """The type of a Content-Type in lower case, and the boundary that it gives."""
    if len(text) > _CONTENT_TYPE:
        refuse(400, f"Content-Type has more than {_CONTENT_TYPE} characters; let your HTTP library set it")
    boundary = _BOUNDARY.search(text)
    return text.partition(";")[0].strip().lower() or "none", boundary and boundary[1]


@dataclass(frozen=True)
class Question:
    """A kind of request: what its body may hold."""

    fields: tuple[str, ...]
    """Names of the fields beside the images."""
    example: str
    """A body in JSON, for error messages."""
    most: int
    """Largest number of images."""

    def too_many(self) -> NoReturn:
        refuse(
            413,
            f"a request may hold at most {self.most} image{'s' * (self.most > 1)} here; send the others in another "
            "request",
        )


def read_request(
    body: bytes, content_type: str, query: Iterable[tuple[str, str]], question: Question
) -> tuple[list[bytes], dict[str, Any]]:
    """Returns the images of a body, and the unchecked fields of the body and the query. Refuses anything else."""
    kind, boundary = _content_type(content_type)
    fields: dict[str, Any] = {}
    for name, value in query:
        if name not in question.fields:
            refuse(400, f"the query holds {name[:80]!r}, which is not {' or '.join(question.fields)}; leave it out")
        _put(fields, name, value)
    if kind == "application/json":
        images = _from_json(body, fields, question)
    elif kind == "multipart/form-data":
        images = _from_form(body, boundary, fields, question)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        images = [body]
    else:
        refuse(
            415,
            "expected Content-Type image/*, application/octet-stream, multipart/form-data or "
            f"application/json, found {kind[:80]!r}; send one of them",
        )
    if not images:
        refuse(400, "the request holds no image; send at least one")
    for image in images:
        if not image:
            refuse(422, "an image is empty (0 bytes); send the bytes of a file")
    return images, fields


def _put(fields: dict[str, Any], name: str, value: Any) -> None:
    if name in fields:  # one of them would say nothing
        refuse(400, f"{name} is given twice; give it once")
    fields[name] = value


def _from_json(body: bytes, fields: dict[str, Any], question: Question) -> list[bytes]:
    expected = f"expected {question.example}"

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    if body.count(b"[") + body.count(b"{") + body.count(b",") > _VALUES:
        refuse(400, f"the body is not valid JSON for images, because it has more than {_VALUES} values; {expected}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is there twice")
        return found

    try:
        found = json.loads(body, parse_constant=constant, object_pairs_hook=once)
    except (ValueError, RecursionError):
        refuse(400, f"the body is not valid JSON; {expected}")
    if not isinstance(found, dict) or not set(found) <= {"images", *question.fields}:
        refuse(400, f"the body is other JSON than expected; {expected}")
    texts = found.pop("images", None)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        refuse(400, f"images is not a list of texts; {expected}")
    if len(texts) > question.most:
        question.too_many()
    for name, value in found.items():
        _put(fields, name, value)
    try:
        return list(map(_from_base64, texts))
    except (binascii.Error, ValueError):
        refuse(400, "an image is not valid base64; encode the bytes of the file")


_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


def _from_base64(text: str) -> bytes:
    """Bytes from base64 as any program writes it: in one line or many, with + and / or - and _, padded or not, bare or
    as a data: URL. Raises `ValueError`."""
    text = text.lstrip()
    if prefix := _DATA_URL.match(text):
        text = text[prefix.end() :]
    text = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _from_form(body: bytes, boundary: str | None, fields: dict[str, Any], question: Question) -> list[bytes]:
    """Reads a form (RFC 7578). File names are ignored."""
    damaged = "the multipart body is damaged or cut short; let your HTTP library make it"
    if boundary is None or not boundary.isascii():
        refuse(400, "multipart/form-data has no boundary; let your HTTP library set Content-Type")
    # The number of splits is limited, so a body of nothing but boundaries costs no more than any other.
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode(), question.most + _PARTS + 1)
    images: list[bytes] = []
    for part in parts:
        if part.startswith(b"--"):
            return images
        head, separator, content = part.partition(b"\r\n\r\n")
        if not separator or len(head) > 8192:
            refuse(400, damaged)
        disposition = b"".join(_DISPOSITION.findall(head))
        field = _FIELD.search(disposition)
        if _FILE.search(disposition):
            images.append(content)
            if len(images) > question.most:
                question.too_many()
        elif field and (name := field[1].decode().lower()) in question.fields:
            _put(fields, name, content.decode("utf-8", "replace"))
        else:
            refuse(
                400, f"a field of the form is neither a file nor {' or '.join(question.fields)}; send images as files"
            )
    refuse(400, damaged)


EXPLANATION = Question(("method", "target"), '{"images": ["<base64>"], "method": "relevance", "target": "cat"}', 1)


def labels_asked(fields: Mapping[str, Any]) -> int:
    asked = fields.get("top_k", TOP_K)
    if isinstance(asked, str) and asked.isascii() and asked.isdigit() and len(asked) <= _DIGITS:
        asked = int(asked)
    if isinstance(asked, float) and asked.is_integer():  # JSON has one kind of numbers
        asked = int(asked)
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
        refuse(400, "top_k is not a whole number of at least 1; give one, or leave it out")
    return asked


def explanation_asked(fields: Mapping[str, Any], labels: list[str]) -> Why:
    method, target = fields.get("method", METHOD), fields.get("target")
    if method not in METHODS:
        refuse(400, f"method is not one of {', '.join(METHODS)}; give one of them, or leave it out")
    if target is None:
        return Why(method, None)
    # The search for similar labels takes at most a third of a second. It is left out for more labels or a longer name.
    if not isinstance(target, str) or (target not in labels and (len(target) > _LONGEST or len(labels) > _MANY)):
        refuse(400, "target is not one of the model's labels; give one that /model lists, or leave it out")
    try:
        return Why(method, class_number(target, labels))
    except ValueError as error:
        refuse(400, str(error))


def wants_picture(accept: str) -> bool:
    """Whether an Accept header names PNG and not JSON."""
    kinds = [kind.partition(";")[0].strip().lower() for kind in accept.split(",")]
    return "image/png" in kinds and "application/json" not in kinds
