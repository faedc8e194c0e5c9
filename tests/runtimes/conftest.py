"""What the tests of exported models share."""

import pytest
from support.exports import KINDS, model_of, needs
from support.models import saved

from deit.export import write


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        saved(model_of(kind), root / kind)
    return root


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """What `export` returns for a kind and a format; each is made once, and not to be changed."""
    root, done = tmp_path_factory.mktemp("exported"), {}

    def get(kind, to):
        needs(to)
        if (kind, to) not in done:
            done[kind, to] = write.export(models / kind, to, root / f"{kind}-{to}")
        return done[kind, to]

    return get
