"""What the tests of the server share. They import the server themselves, and are skipped if it can't be."""

import pytest
from support.models import trained_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a distilled model of five classes, a to e."""
    return trained_folder(tmp_path_factory.mktemp("m"))


@pytest.fixture(scope="module")
def web(folder):
    """A client of a server with its defaults."""
    from support.serving import client

    with client(folder) as found:
        yield found
