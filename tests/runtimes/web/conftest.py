"""What the tests of the web page share."""

import pytest
from support.exports import calibration

from deit.export import web
from deit.export import write as export
from deit.export.web import Page


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    try:
        return Page()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def package(page):
    """The tarball of onnxruntime-web."""
    return web._package()


@pytest.fixture(scope="module")
def models(models):
    """The same, the distilled one calibrated."""
    calibration(0.5).save(models / "distilled")
    return models


@pytest.fixture(scope="module")
def exported(page, models, tmp_path_factory):
    """What `export` returns for a kind; each is made once, and not to be changed."""
    root, done = tmp_path_factory.mktemp("exported"), {}

    def get(kind):
        if kind not in done:
            done[kind] = export.export(models / kind, "web", root / kind)
        return done[kind]

    return get
