"""The API's description: its requests and answers, for /openapi.json and for the page /api."""

from __future__ import annotations

import html
from typing import Any, Literal

from pydantic import BaseModel

from deit.choices import Scoring
from deit.explain.maps import METHODS
from deit.serve.question import METHOD, TOP_K


class Label(BaseModel):
    """What the score is depends on the model: see scoring of GET /model."""

    label: str
    score: float


class Result(BaseModel):
    """Labels, best first. If one of many images can't be read, error says why."""

    labels: list[Label] | None = None
    sure: bool | None = None
    error: str | None = None


class Answers(BaseModel):
    model: str
    results: list[Result]


class TokenAnswer(BaseModel):
    """The label that a token's own head decides for, and the target explained. Probabilities are not calibrated."""

    token: str
    label: str
    probability: float
    target: str
    target_probability: float


class TokenMap(BaseModel):
    """How much each patch counts for a token, in rows from the top left, as numbers, in words and as a picture."""

    token: str
    method: str
    values: list[list[float]]
    strongest: str
    overlay: str


class Explained(BaseModel):
    """Pictures are data: URIs. image_size is the height and width of what the model saw, which the maps cover."""

    model: str
    image_size: list[int]
    seen: str
    answers: list[TokenAnswer]
    maps: list[TokenMap]


class Failure(BaseModel):
    error: str


class Status(BaseModel):
    status: Literal["ok", "ready"]


class CalibrationCard(BaseModel):
    error_rate: float
    images: int
    temperature: float
    threshold: float


class Limits(BaseModel):
    images: int
    bytes: int
    pixels: int


class ModelCard(BaseModel):
    """scoring says what the score of a label is. With softmax, it is a probability, and those of all labels sum to 1.
    With sigmoid, each label has a probability of its own. With none, it is the output of a regression."""

    model: str
    labels: list[str]
    scoring: Scoring
    head: str
    image_size: list[int]
    calibration: CalibrationCard | None
    limits: Limits
    formats: list[str]
    key: bool
    explain: bool


SAID = {
    400: "The request is malformed.",
    401: "An API key is needed.",
    408: "The body came too slowly.",
    413: "The body is too large, or holds too many images.",
    415: "The body has another type, or is compressed.",
    422: "No image can be read.",
    503: "There is no room, or the model failed. Try again after Retry-After seconds.",
    504: "The time is up.",
}
ANYWHERE = {421: "Host names another server.", 431: "The head of the request is too large."}
NOT_EXPLAINED = {**SAID, 501: "The model can't be explained (GET /model says so too)."}


def _described(most: int, fields: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Describes a request in OpenAPI: at most `most` images, and fields, which may be in the body or in the query."""
    images: dict[str, Any] = {"type": "array", "minItems": 1, "maxItems": most}
    image = {"type": "string", "minLength": 1}
    schemas = {
        name: {key: value for key, value in field.items() if key != "description"} for name, field in fields.items()
    }
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["images"],
                        "additionalProperties": False,
                        "properties": {"images": {**images, "items": {**image, "format": "byte"}}, **schemas},
                    }
                },
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["image"],
                        "additionalProperties": False,
                        "properties": {"image": {**images, "items": {**image, "format": "binary"}}, **schemas},
                    }
                },
                **{kind: {"schema": {**image, "format": "binary"}} for kind in ("image/*", "application/octet-stream")},
            },
        },
        "parameters": [
            {"name": name, "in": "query", "description": field["description"], "schema": schemas[name]}
            for name, field in fields.items()
        ],
    }


def classify_described(most: int) -> dict[str, Any]:
    """Describes a request for the labels of at most `most` images."""
    top_k = {"type": "integer", "minimum": 1, "default": TOP_K, "description": "Number of labels for each image."}
    return _described(most, {"top_k": top_k})


EXPLAIN = _described(
    1,
    {
        "method": {"type": "string", "enum": list(METHODS), "default": METHOD, "description": "Method of the maps."},
        "target": {
            "type": "string",
            "description": "Label to explain. Without it, the label that each token\u2019s own head decides for.",
        },
    },
)


def api_page(described: dict[str, Any]) -> str:
    """Returns the page /api, made from the OpenAPI description."""
    rows = []
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            kinds = ", ".join(operation.get("requestBody", {}).get("content", {}))
            said = "".join(
                f"<li>{status}: {html.escape(answer['description'])}</li>"
                for status, answer in operation["responses"].items()
            )
            rows.append(
                f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>"
                f"<p>{html.escape(operation.get('description', ''))}</p>"
                + (f"<p>Takes {html.escape(kinds)}.</p>" if kinds else "")
                + f"<ul>{said}</ul>"
            )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>deit: the API</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        '<link rel="stylesheet" href="/shown.css"><link rel="stylesheet" href="/page.css"></head><body><main>'
        "<h1>The API</h1>"
        '<p>The full description is <a href="/openapi.json">openapi.json</a>. '
        'You can try the API on <a href="/">the page</a>.</p>'
        f"{''.join(rows)}</main></body></html>"
    )
