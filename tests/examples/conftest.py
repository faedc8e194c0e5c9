import pytest
from support.examples import Examples


@pytest.fixture
def examples(monkeypatch, tmp_path):
    return Examples(monkeypatch, tmp_path)
