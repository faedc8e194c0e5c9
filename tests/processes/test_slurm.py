"""The scripts in docs/clusters.md, as they stand, with programs that stand in for those of Slurm."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.models import trained_folder
from support.runs import assert_same_end, data_and_recipes, finish, photos, reached, start, wait_for

from deit.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"
STAND_INS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift 2; done\necho $$ > "$STEP"\nexec "$@"',
    "scancel": 'test "$1 $2" = "--signal=TERM $SLURM_JOB_ID" && kill -TERM "$(cat "$STEP")"',
    "scontrol": 'case "$1" in show) echo localhost;; requeue) echo "$2" >> "$QUEUED";; *) exit 1;; esac',
    "torchrun": f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"',
    "deit": f'exec {shlex.quote(sys.executable)} -m deit "$@"',
}


def scripts():
    """The scripts of the page by the names of their jobs."""
    blocks = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", PAGE.read_text(), re.DOTALL)
    return {re.search(r"--job-name=(\w+)", block)[1]: block for block in blocks}


@pytest.fixture
def slurm(tmp_path):
    """Starts a script in `tmp_path`, under the variables of a job on one machine."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    variables = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "STEP": str(tmp_path / "step"),
        "QUEUED": str(tmp_path / "queued"),
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "node[1]",
        "SLURM_CPUS_PER_TASK": "1",
    }

    def begin(script, **more):
        (tmp_path / "script").write_text(script)
        return subprocess.Popen(
            ["bash", str(tmp_path / "script")],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**variables, **more},
        )

    return begin


@pytest.mark.slow
def test_a_job_saves_before_its_time_is_up_and_continues_when_it_is_queued_again(slurm, tmp_path):
    data, recipes = data_and_recipes(tmp_path)
    out, options = tmp_path / "runs/base", "--device cpu --set compute.save_minutes=0"
    whole = start(
        "train", f"{recipes}:student", "--data", data, "--out", tmp_path / "whole", *options.split(), processes=2
    )
    finish(whole)
    script = scripts()["deit"]
    for theirs, ours in (
        ("--nproc-per-node 8", "--nproc-per-node 2"),
        ("train deit_base --data imagenet", f"train {recipes}:student --data {data} {options}"),
        (":29500", ":29517"),
    ):
        assert theirs in script
        script = script.replace(theirs, ours)
    job = slurm(script)
    assert wait_for(out, 8, job)
    os.kill(job.pid, signal.SIGUSR1)  # as --signal=B:USR1, to the script alone
    said = finish(job, 128 + signal.SIGUSR1)
    assert "the state is saved, continue with --resume" in said
    assert (tmp_path / "queued").read_text() == "4711\n"
    stopped = reached(out)
    assert 8 <= stopped < 96
    finish(slurm(script))
    assert (tmp_path / "queued").read_text() == "4711\n"  # a run that is finished is not queued again
    assert_same_end(out, tmp_path / "whole")
    before = (out / "model/model.safetensors").read_bytes()
    finish(slurm(script))
    assert (out / "model/model.safetensors").read_bytes() == before


def test_a_failed_job_is_not_queued_again(slurm, tmp_path):
    began = time.monotonic()
    said = finish(slurm(scripts()["deit"].replace("--nproc-per-node 8", "--nproc-per-node 1")), 1)
    assert "imagenet" in said  # is not here
    assert time.monotonic() - began < 100
    assert not (tmp_path / "queued").exists()


def test_an_array_labels_every_image_once(slurm, tmp_path, monkeypatch, capsys):
    trained_folder(tmp_path / "runs/taught/model")
    photos(tmp_path / "archive", count=3, size=16)
    script = scripts()["labels"]
    assert "--array=1-16 " in script
    for number in range(1, 4):
        finish(slurm(script, SLURM_ARRAY_TASK_ID=str(number), SLURM_ARRAY_TASK_COUNT="3"))
    rows = [json.loads(line) for file in tmp_path.glob("labels/*.jsonl") for line in file.read_text().splitlines()]
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "runs/taught/model", "archive", "--json", "--engine", "torch"]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(expected) == 9
    for row, other in zip(sorted(rows, key=lambda each: each["image"]), expected, strict=True):
        assert row["image"] == other["image"]
        assert [each["label"] for each in row["labels"]] == [each["label"] for each in other["labels"]]
        scores = [[each["score"] for each in found["labels"]] for found in (row, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
