"""The examples for clusters, on workers of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.models import trained_folder

from deit.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "dask"])
def test_an_example_writes_the_rows_of_the_command_and_continues(engine, tmp_path):
    pytest.importorskip({"ray": "ray.data", "dask": "dask.distributed"}[engine])
    trained_folder(tmp_path / "m")
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(11):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"photos/{i:02}.png")
    (tmp_path / "photos/03.png").write_bytes(b"broken")
    inputs = [str(tmp_path / "m"), str(tmp_path / "photos"), str(tmp_path / "gone.png")]
    assert main(["predict", *inputs, "--engine", "torch", "--json", str(tmp_path / "whole.jsonl")]) == 1
    expected = (tmp_path / "whole.jsonl").read_text().splitlines()

    def run():
        options = ["--out", str(tmp_path / "out"), "--part", "3", "--workers", "2"]
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / f"predict_{engine}.py"), *inputs, *options],
            capture_output=True,
            text=True,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "12 images, 2 unreadable" in run()
    parts = sorted((tmp_path / "out").glob("*.jsonl"))
    assert [path.name for path in parts] == [f"{i:06}.jsonl" for i in range(4)]
    found = [line for path in parts for line in path.read_text().splitlines()]
    for line, other in zip(map(json.loads, found), map(json.loads, expected), strict=True):
        scores = [[each.pop("score") for each in row["labels"]] for row in (line, other)]
        assert line == other
        assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    kept = {path: path.stat().st_mtime_ns for path in parts}
    contents = parts[1].read_text()
    parts[1].unlink()
    assert "3 images, 1 unreadable" in run()  # the part with the broken file
    assert {path for path in parts if path.stat().st_mtime_ns != kept[path]} == {parts[1]}
    assert [json.loads(line)["image"] for line in parts[1].read_text().splitlines()] == [
        json.loads(line)["image"] for line in contents.splitlines()
    ]
