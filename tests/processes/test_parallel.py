"""Many processes do the work of one."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from support.checks import assert_close
from support.runs import (
    assert_same_end,
    data_and_recipes,
    finish,
    kill,
    metrics,
    reached,
    running,
    start,
    wait_for,
)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Data, the file of recipes, and 20 steps by one process."""
    root = tmp_path_factory.mktemp("parallel")
    data, recipes = data_and_recipes(root)
    finish(start(*command((data, recipes), root / "one")))
    return data, recipes, root / "one"


def command(given, out, *more):
    """The keys' biases have no gradient but rounding errors, as a softmax does not see them; AdamW makes full steps of
    these too, unless `eps` outweighs them."""
    return (
        "train",
        f"{given[1]}:student",
        "--data",
        given[0],
        "--out",
        out,
        "--device",
        "cpu",
        "--set",
        "schedule.total=steps(20)",
        "--set",
        "optim.eps=1e-3",
        *more,
    )


@pytest.mark.parametrize(
    "options",
    [(), ("--set", "compute.accumulate=2"), ("--set", "compute.parallel=shard")],
    ids=["ddp", "accumulated", "fsdp"],
)
def test_two_processes_give_the_run_of_one(given, tmp_path, options):
    """Views, mixing and stochastic depth belong to the global batch, so only the order of sums differs."""
    finish(start(*command(given, tmp_path / "two", *options), processes=2))
    assert_same_end(tmp_path / "two", given[2], atol=1e-5)
    two, one = metrics(tmp_path / "two"), metrics(given[2])
    assert [row["step"] for row in two] == [row["step"] for row in one] == [15, 20]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["val_accuracy"] == theirs["val_accuracy"]  # of 9 images over 2 processes: none twice, none lost
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_batch_normalisation_is_that_of_the_whole_batch(given, tmp_path, parallel):
    """Two processes with 4 images each have the statistics of 8, and so the weights and running statistics of one."""
    data, recipes, _ = given
    arguments = ("train", f"{recipes}:convnet", "--data", data, "--device", "cpu")
    options = ("--set", f"compute.parallel={parallel}", "--set", "data.batch=10")  # shares of 6 and 4
    finish(start(*arguments, "--out", tmp_path / "one", *options))
    finish(start(*arguments, "--out", tmp_path / "two", *options, processes=2))
    assert_same_end(tmp_path / "two", tmp_path / "one", atol=1e-5)
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


@pytest.mark.parametrize("parallel", ["replicate", "shard"])
@pytest.mark.parametrize("tuning", ["LastBlocks(count=1)", "LoRA(rank=2)"])
def test_a_part_of_the_model_is_trained_by_two(given, tmp_path, tuning, parallel):
    """Frozen parts are shared like trained ones, and adapters are merged from their shares."""
    if tuning.startswith("LoRA"):
        pytest.importorskip("peft")
    options = ("--set", f"start={given[2] / 'model'}", "--set", f"tuning={tuning}", "--set", "schedule.total=steps(6)")
    options = (*options, "--set", f"compute.parallel={parallel}")
    finish(start(*command(given, tmp_path / "one", *options)))
    finish(start(*command(given, tmp_path / "two", *options), processes=2))
    assert_same_end(tmp_path / "two", tmp_path / "one", atol=1e-5)
    files = ["model/model.safetensors", *(["adapter/adapter_model.safetensors"] if tuning.startswith("LoRA") else [])]
    for file in files:
        one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
        assert_close(two, one)


def test_two_processes_plan_the_same_schedule(given, tmp_path):
    """The main process's clock decides, also how many steps are timed."""
    finish(
        start(
            *command(
                given,
                tmp_path,
                "--time",
                "20s",
                "--set",
                "schedule.total=steps(1000000)",
                "--set",
                "evaluate=steps(100000)",
            ),
            processes=2,
        )
    )
    total = json.loads((tmp_path / "recipe.json").read_text())["schedule"]["total"]["amount"]
    assert 0 < metrics(tmp_path)[-1]["step"] <= total < 1_000_000


def test_a_killed_worker_is_restarted_and_the_run_ends_as_it_would(given, tmp_path):
    """torchrun starts both processes again, and they go on from the last checkpoint."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(*command(given, whole), processes=2))
    process = start(*command(given, broken, "--set", "compute.save_minutes=0"), processes=2, restarts=2)
    assert wait_for(broken, 7, process)
    workers = [number for number, parent in running(broken).items() if parent == process.pid]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    finish(process)
    assert_same_end(broken, whole)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_again_and_again(kills, given, tmp_path, record_property):
    """All processes at once, and each time another number of loaders."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    longer = ("--set", "schedule.total=steps(90)")
    finish(start(*command(given, whole, *longer), processes=2))
    for count in range(kills):
        process = start(
            *command(
                given,
                broken,
                "--resume",
                *longer,
                "--set",
                "compute.save_minutes=0",
                "--set",
                f"compute.workers={count % 3}",
            ),
            processes=2,
        )
        assert wait_for(broken, reached(broken) + 2, process)
        kill(process, broken)
    record_property("attacks", kills)
    assert reached(broken) < 90
    finish(start(*command(given, broken, *longer, "--resume"), processes=2))
    assert_same_end(broken, whole)


def test_one_process_goes_on_where_two_stopped(given, tmp_path):
    """The checkpoint does not know how many wrote it: sharded state is gathered, and spread again."""
    out = tmp_path / "run"
    process = start(
        *command(given, out, "--set", "compute.save_minutes=0", "--set", "compute.parallel=shard"), processes=2
    )
    assert wait_for(out, 8, process)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert 8 <= reached(out) < 20
    finish(start(*command(given, out, "--resume")))
    assert_same_end(out, given[2], atol=1e-5)


@pytest.fixture
def nodes():
    """Two hosts on this machine: network namespaces with a cable between them."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")

    def ip(*arguments):
        return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)

    names = [f"deit{os.getpid()}{letter}" for letter in "ab"]
    if ip("netns", "add", names[0]).returncode:
        pytest.skip("this machine makes no network namespaces")
    ip("netns", "add", names[1])
    ip("link", "add", "deitv0", "netns", names[0], "type", "veth", "peer", "name", "deitv1", "netns", names[1])
    for i, name in enumerate(names):
        ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", f"deitv{i}")
        ip("-n", name, "link", "set", f"deitv{i}", "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield names
    for name in names:
        ip("netns", "del", name)


@pytest.mark.slow
def test_two_nodes_meet_over_a_network(given, tmp_path, nodes):
    """`torchrun --rdzv-backend=c10d` on two hosts gives the run of one process."""
    out = tmp_path / "run"
    launched = []
    for i, name in enumerate(nodes):
        arguments = [
            "ip",
            "netns",
            "exec",
            name,
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
            "--rdzv-backend=c10d",
            "--rdzv-id=1",
            "--rdzv-endpoint=10.77.0.1:29511",
            f"--rdzv-conf=is_host={i == 0}",
            f"--local-addr=10.77.0.{i + 1}",
            "-m",
            "deit",
            *map(str, command(given, out)),
        ]
        launched.append(
            subprocess.Popen(
                arguments,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"deitv{i}"},
            )
        )
    for process in launched:
        finish(process)
    assert_same_end(out, given[2], atol=1e-5)
