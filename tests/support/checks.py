"""Assertions that say where values differ, and code in a fresh interpreter."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch


@contextmanager
def raises_saying(error: type[Exception], *parts: object) -> Iterator[None]:
    """Asserts that the block fails with `error`, in one line that holds all `parts`."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert [str(part) for part in parts if str(part) not in message] == [], message


def run_python(code: str, **environment: str | None) -> str:
    """Standard output of `code` in a fresh interpreter; None removes a variable."""
    variables = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in variables.items() if value is not None},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def assert_close(found: Any, expected: Any, atol: float = 1e-5) -> None:
    """Asserts equality of tensors, or of tuples and mappings of tensors, within an absolute difference."""
    if isinstance(expected, Mapping):
        assert set(found) == set(expected)
        for name in expected:
            assert_close(found[name], expected[name], atol)
    elif isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, atol)
    else:
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=atol)
