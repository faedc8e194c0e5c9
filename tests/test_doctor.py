"""What `deit doctor` finds out, against the machine itself, and the faults that it names."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from support.checks import run_python

from deit import doctor, files, host
from deit.cli import main
from deit.data.batches import TrainingBatches
from deit.data.folders import Split
from deit.doctor import Fault
from deit.image.jpeg import reader
from deit.machine import resolve_device, resolve_precision
from deit.predict.predictor import auto_engine
from deit.recipe import override
from deit.recipes import find

ROOT = Path(__file__).parents[1]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def quick(monkeypatch):
    """Without the import of torchvision, which takes seconds."""
    monkeypatch.setattr(doctor, "_importing_torchvision", lambda: None)


@LINUX
def test_the_machine(quick):
    found = doctor.examine()
    able, flags = found["machine"], set(re.search(r"flags\s*:(.*)", Path("/proc/cpuinfo").read_text())[1].split())
    expected = {"AVX2": {"avx2"}, "AVX-512": {"avx512f"}, "AMX": {"amx_tile"}, "bfloat16": {"avx512_bf16", "amx_bf16"}}
    assert able["instructions"] == [name for name, any_of in expected.items() if flags & any_of]
    assert able["cores"] == host.cores()
    whole = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    assert 0 < able["memory"] <= whole
    for key, place in (("disk", "."), ("shared_memory", "/dev/shm")):
        assert able[key] == pytest.approx(shutil.disk_usage(place).free, rel=0.1)
    assert len(able["gpus"]) == torch.cuda.device_count()
    assert able["hub"] == "off"
    assert found["unknown"] == {}


def test_what_is_installed(quick):
    found = doctor.examine()["installed"]
    for name, version in found.items():
        if name not in ("deit", "Python", "torch_build", "keras_backend"):
            try:
                assert version == metadata.version(name)
            except metadata.PackageNotFoundError:
                assert version is None
    assert {"torch", "torchvision", "timm", "transformers", "keras", "onnxruntime", "openvino"} <= found.keys()
    assert {"simplejpeg", "peft", "scikit-learn", "huggingface_hub", "numpy", "safetensors"} <= found.keys()
    assert found["deit"] == host.VERSION
    assert found["torch_build"] == (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU")


def test_the_back_end_of_keras(tmp_path):
    code = "import keras; print(keras.backend.backend())"
    (tmp_path / "keras.json").write_text('{"backend": "numpy", "floatx": "float32"}')
    for environment in ({"KERAS_BACKEND": "jax"}, {"KERAS_BACKEND": None, "KERAS_HOME": str(tmp_path)}):
        stated = {name: value for name, value in environment.items() if value}
        assert doctor.keras_backend(stated) == run_python(code, **environment)
    assert doctor.keras_backend({"KERAS_HOME": str(tmp_path / "none")}) == "tensorflow"


def test_extras_agree_with_packaging():
    expected = {name: [] for name in metadata.metadata("deit").get_all("Provides-Extra")}
    for line in metadata.requires("deit"):
        needed = Requirement(line)
        for extra, missing in expected.items():
            asked = needed.marker is not None and needed.marker.evaluate({"extra": extra})
            try:
                there = needed.specifier.contains(metadata.version(needed.name), prereleases=True)
            except metadata.PackageNotFoundError:
                there = False
            if asked and not there:
                missing.append(f"{needed.name}{needed.specifier}")
    found = doctor.extras()
    assert {name: extra["missing"] for name, extra in found.items()} == expected
    for name, missing in expected.items():
        assert found[name]["install"] == (f'pip install "deit[{name}]"' if missing else None)
    assert doctor.check_requirements() is None


@pytest.mark.parametrize(
    ("least", "fits"), [("3.9", True), ("3.10", True), ("3.10.0", True), ("3.10.1", False), ("3.11", False)]
)
def test_packages_that_are_too_old(monkeypatch, least, fits):
    monkeypatch.setattr(metadata, "requires", lambda _: [f"keras>={least}; extra == 'keras'", f"keras (>={least})"])
    monkeypatch.setattr(metadata, "version", lambda _: "3.10.0+local")
    assert doctor.extras()["keras"]["missing"] == ([] if fits else [f"keras>={least}"])
    fault = doctor.check_requirements()
    assert fits if fault is None else fault.mend == f'pip install --upgrade "keras>={least}"'


def test_choices_are_those_of_the_functions_that_choose(quick):
    device = resolve_device("auto")
    chosen = {name: choice["value"] for name, choice in doctor.examine()["chosen"].items()}
    share = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert chosen == {
        "device": str(device),
        "precision": str(resolve_precision("auto", device)).removeprefix("torch."),
        "loaders": max(1, min(8, share) if device.type == "cpu" else share - 1),
        "engine": auto_engine(device),
        "jpeg_reader": reader(),
    }


@LINUX
def test_a_process_on_one_core():
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from deit import doctor; doctor._importing_torchvision = lambda: None\n"
        "found = doctor.examine(); print(found['machine']['cores'], found['chosen']['loaders']['value'])"
    )
    assert run_python(code, HF_HUB_OFFLINE="1") == "1 1"


def test_every_key_is_documented(quick):
    text = (ROOT / "docs" / "doctor.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    found = doctor.examine()
    assert list(rows) == list(found)
    for group in ("machine", "chosen"):
        for key in found[group]:
            assert f"`{key}`" in rows[group] or key in ("cores",), key


def test_the_page_has_everything(quick):
    found = doctor.examine()
    page = doctor.text(found)
    for name, version in found["installed"].items():
        assert name.startswith(("torch_", "keras_")) or (version or name) in page
    for extra in found["extras"].values():
        assert (extra["install"] or "") in page
    for choice in found["chosen"].values():
        assert f"{choice['value']}: {choice['why']}" in page
    assert page.endswith("Broken\n  nothing")
    page = doctor.text({**found, "broken": [{"what": "the \x1b[1mcable", "mend": "plug it in"}]})
    assert page.endswith("Broken\n  the \\x1b[1mcable\n    -> plug it in")


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "torchvision::nms does not exist"),
        ("import os; os.abort()", "status -6"),
        ("", None),
    ],
)
def test_torchvision_that_does_not_fit(tmp_path, monkeypatch, broken, fault):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "ops.py").write_text(broken)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    versions = {"torch": "2.9.1+cpu", "torchvision": "0.20.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    found = doctor.check_torchvision(doctor._importing_torchvision())
    if fault is None:
        assert found is None
        return
    assert found.what.startswith("torchvision 0.20.0 does not fit PyTorch 2.9.1+cpu (")
    assert fault in found.what
    assert found.mend == (
        "pip install --force-reinstall torch==2.9.1 torchvision --index-url https://download.pytorch.org/whl/cpu"
    )


def test_torchvision_without_pytorch(monkeypatch):
    """PyTorch that is missing is a fault of its own, and no version of it can be named."""
    monkeypatch.setattr(doctor, "_version", {"torchvision": "0.20.0"}.get)
    broken = [sys.executable, "-c", "raise ImportError('no torch')"]
    with subprocess.Popen(broken, stderr=subprocess.PIPE, text=True) as importing:
        assert doctor.check_torchvision(importing) is None


def torch_of(cuda, reason=None):
    def init():
        raise RuntimeError(reason)

    seen = SimpleNamespace(is_available=lambda: reason is None, init=init)
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda, hip=None), cuda=seen)


@pytest.mark.parametrize(
    ("torch_", "environment", "count", "runs", "what", "mend"),
    [
        (torch_of("12.6", "no"), {}, 0, None, None, None),
        (torch_of("12.6"), {}, 1, "12.8", None, None),
        (torch_of("12.6", "no"), {"CUDA_VISIBLE_DEVICES": ""}, 1, "12.8", None, None),
        (torch_of(None, "no"), {}, 2, "12.8", "there are 2 NVIDIA GPUs, but PyTorch's CPU build", "torch torchvision"),
        (torch_of("13.0", "no"), {}, 1, "12.7", "its driver runs CUDA 12.7 at most", "whl/cu126"),
        (torch_of("13.0", "no"), {}, 1, "11.4", "is built for CUDA 13.0", "whl/cu118"),
        (torch_of("12.6", "error 802\nmore"), {}, 1, "12.8", "PyTorch sees none (error 802)", "nvidia-smi"),
        (torch_of("12.6", "error 802"), {}, 1, None, "PyTorch sees none (error 802)", "nvidia-smi"),
    ],
)
def test_gpus_that_pytorch_does_not_see(torch_, environment, count, runs, what, mend):
    found = doctor.check_gpu(torch_, environment, count, runs and {"version": "1.2", "cuda": runs})
    if what is None:
        assert found is None
    else:
        assert what in found.what
        assert mend in found.mend


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build", "570.86.15"),
    ],
)
def test_what_the_system_says_of_gpus(tmp_path, line, version):
    assert doctor.nvidia(str(tmp_path)) == 0
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    assert doctor.nvidia(str(tmp_path)) == 2
    folder = tmp_path / "proc" / "driver" / "nvidia"
    (folder / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert doctor.nvidia(str(tmp_path)) == 1
    (folder / "version").write_text(f"{line}\nGCC version: gcc 12.2.0\n")
    assert doctor.driver(str(tmp_path))["version"] == version


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX modes")
def test_a_refused_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert doctor.check_cache() is None
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "open"))
    found = doctor.check_cache()
    assert f"lies in {tmp_path / 'open'}, which others can write to" in found.what
    assert "export XDG_CACHE_HOME=" in found.mend


def hub_at(monkeypatch, address):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return doctor._asking_hub()(time.monotonic())


def test_the_hub(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert hub_at(monkeypatch, address) == address
    found = hub_at(monkeypatch, address)
    assert found == "unreachable"
    assert "HF_HUB_OFFLINE=1" in doctor.check_hub(found).mend
    assert doctor.check_hub(address) is None
    assert doctor.check_hub("off") is None


def test_a_hub_that_never_answers_costs_less_than_three_seconds(monkeypatch):
    monkeypatch.setattr(files, "reachable", lambda *_: time.sleep(20))
    began = time.monotonic()
    assert hub_at(monkeypatch, "http://far.invalid") == "unreachable"
    assert time.monotonic() - began < 3


def test_one_thread_for_many_cores():
    assert doctor.check_threads({"OMP_NUM_THREADS": "1"}, 4).mend == "unset OMP_NUM_THREADS"
    assert "this process has 4" in doctor.check_threads({"OMP_NUM_THREADS": "1"}, 4).what
    for environment, cores in (({"OMP_NUM_THREADS": "1"}, 1), ({"OMP_NUM_THREADS": "4"}, 4), ({}, 4)):
        assert doctor.check_threads(environment, cores) is None


def test_shared_memory_that_is_too_small(tmp_path):
    Image.new("RGB", (40, 30), (1, 2, 3)).save(tmp_path / "0.jpg")
    split = Split((tmp_path / "0.jpg",), (0,), ("ant", "bee"))
    recipe = override(find("finetune"), ["compute.workers=0"])
    each = 2 * next(TrainingBatches(split, recipe).from_step(0)).images.values.nbytes
    assert doctor.check_shared_memory(4 * each, {"value": 4}) is None
    found = doctor.check_shared_memory(4 * each - 1, {"value": 4})
    assert f"hand up to {4 * each / 2**20:.0f} MiB" in found.what
    assert found.mend.endswith("--set compute.workers=3")
    assert doctor.check_shared_memory(None, {"value": 4}) is None


def test_probes_that_fail_stand_alone(quick, monkeypatch):
    def fail(*_, **__):
        raise KeyError("what\nis this")

    for where, name in (
        (host, "cores"),
        (host, "available_memory"),
        (shutil, "disk_usage"),
        (metadata, "requires"),
        (torch.cpu, "get_capabilities"),
        (doctor, "driver"),
        (doctor, "check_gpu"),
    ):
        monkeypatch.setattr(where, name, fail, raising=False)
    found = doctor.examine()
    assert json.loads(json.dumps(found)) == found
    failed = {"cores", "memory", "disk", "shared_memory", "extras", "installed", "requirements", "instructions"}
    assert failed <= found["unknown"].keys()
    assert found["unknown"]["cores"] == "KeyError: 'what\\nis this'"
    assert found["chosen"]["device"]["value"] == str(resolve_device("auto"))
    assert "KeyError" in doctor.text(found)


def test_without_pytorch():
    code = (
        "import sys, json; sys.modules['torch'] = None\n"
        "from deit.cli import main; print(main(['doctor', '--json'])); print(main(['doctor']))"
    )
    line, status, *page, again = run_python(code, HF_HUB_OFFLINE="1").splitlines()
    found = json.loads(line)
    assert (status, again, found["chosen"]) == ("1", "1", {})
    assert found["unknown"] == {}
    assert found["machine"]["processor"] == host.processor()
    assert any(fault["what"].startswith("PyTorch can't be imported (") for fault in found["broken"])
    assert any("-> pip install --force-reinstall torch" in line for line in page)


@pytest.mark.parametrize("faults", [[], [Fault("the cable", "plug it in")]])
def test_the_status_tells_whether_something_is_broken(quick, monkeypatch, capsys, faults):
    monkeypatch.setattr(doctor, "check_gpu", lambda *_: faults[0] if faults else None)
    assert main(["doctor", "--json"]) == len(faults)
    assert json.loads(capsys.readouterr().out)["broken"] == [vars(fault) for fault in faults]
