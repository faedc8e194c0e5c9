"""Requests that a library makes from the API's own description, right and wrong ones."""

import base64
import itertools
from collections import Counter

import pytest
from support.serving import picture, server

from deit.serve.connection import HEADERS

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as some  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

POSTED, READ = ("/v1/classify", "/v1/explain"), ("/model", "/healthz", "/readyz", "/metrics")
IMAGES = some.builds(
    picture, some.integers(0, 50), some.sampled_from(["JPEG", "PNG", "GIF"]), some.tuples(*[some.integers(1, 60)] * 2)
)
MAYBE_IMAGES = IMAGES | some.binary(min_size=1, max_size=60)
CHECKS = {
    "positive_data_acceptance": {"expected-statuses": [200, 422]},  # some bytes are no image
    "negative_data_rejection": {"expected-statuses": [400, 413, 415, 422]},
}
BEYOND = ("knows no class", "target is not one of the model's labels", "is given twice; give it once")
"""Refusals of what no description in OpenAPI can rule out."""


@pytest.fixture(scope="module")
def apis(folder, tmp_path_factory):
    """For right requests a server with keys, and for wrong ones one without, where each has to be wrong in itself."""
    schemathesis.openapi.format("binary", MAYBE_IMAGES)
    schemathesis.openapi.format("byte", MAYBE_IMAGES.map(lambda data: base64.b64encode(data).decode()))
    for kind in ("image/*", "application/octet-stream"):
        schemathesis.openapi.media_type(kind, MAYBE_IMAGES)
    keys, config = tmp_path_factory.mktemp("keys") / "keys", schemathesis.Config.from_dict({"checks": CHECKS})
    keys.write_text("one\n")
    closed = ("--api-key-file", str(keys), "--private")
    with server(folder, "--max-wait-ms", "0", *closed) as (_, one), server(folder, "--max-wait-ms", "0") as (_, other):
        yield {
            kind: schemathesis.openapi.from_url(f"{address}/openapi.json", config=config)
            for kind, address in (("right", one), ("wrong", other))
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "kind"), [*itertools.product(POSTED, ("right", "wrong")), *((path, "right") for path in READ)]
)
def test_each_answer_is_described(apis, path, kind, record_property):
    """Its status, type and content, and what is refused or taken is what has to be. Each has the security headers."""
    api = apis[kind]
    assert set(api) == {*POSTED, *READ}
    [method] = api[path]
    mode = schemathesis.GenerationMode.POSITIVE if kind == "right" else schemathesis.GenerationMode.NEGATIVE
    statuses: Counter[int] = Counter()

    @given(case=api[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=500, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True, database=None)
    def run(case):
        answer = case.call(headers={"Authorization": "Bearer one"} if kind == "right" else {})
        statuses[answer.status_code] += 1
        beyond = answer.status_code == 400 and any(part in answer.text for part in BEYOND)
        case.validate_response(answer, excluded_checks=[positive_data_acceptance] if beyond else [])
        for name, value in HEADERS:
            assert answer.headers[name.decode()] == [value.decode()]

    run()
    record_property("attacks", statuses.total())
    assert statuses[200] or kind == "wrong"
