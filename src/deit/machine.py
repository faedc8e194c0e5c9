"""The machine that a run is on: its device, its precision, and the processes that share the run."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed, nn

from deit import host

_Named = TypeVar("_Named", bound=dict[Any, Any])
_PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others. On a loaded machine, one process' first evaluation may take that long."""
_NO_MEMORY = re.compile(
    "out of memory|not enough memory|can(?:'t|not) allocate memory|ALLOC_FAILED|ALLOCATION_FAILED", re.IGNORECASE
)
"""The texts of these errors: CUDA and NCCL, then the CPU, then cuBLAS and cuDNN."""
_LOST = re.compile("CUDA error:|device-side assert|cuDNN error:.*EXECUTION_FAILED")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_AHEAD = 2**28
"""Number of bytes that the C library asks the system for ahead."""
_MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
"""The fields of `struct mallinfo2` in malloc.h."""


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device with this name. `auto` is CUDA if there is a GPU, else the CPU.

    Under torchrun, each process takes the GPU with its own local rank. Raises `ValueError` if there is no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "device cuda needs a GPU, but PyTorch sees no GPU here; use --device cpu, or install "
                "PyTorch's CUDA build and a driver"
            )
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"expected a GPU with number {device.index}, but this machine has {torch.cuda.device_count()}; start "
                "at most one process for each GPU"
            )
    return device


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype with this name. `auto` is bfloat16 if the hardware computes with it, else float32.

    That hardware is CUDA since Ampere, and CPUs with AVX512-BF16 or AMX.
    """
    if precision == "auto":
        native = {
            "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "cpu": lambda: torch.cpu.get_capabilities().get("avx512_bf16", False),
        }
        return torch.bfloat16 if device.type in native and native[device.type]() else torch.float32
    return getattr(torch, precision)


@dataclass(frozen=True)
class Processes:
    """The place of this process among the processes of a run. A single process communicates nothing."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each of them."""
        if self.world > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values that all processes passed, by rank, in each of them."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Waits until all processes have called this."""
        if self.world > 1:
            distributed.barrier()

    def spread(self, model: nn.Module, parallel: Literal["replicate", "shard"]) -> nn.Module:
        """The module that computes `model` in all processes.

        `replicate` wraps `model` in DDP. `shard` returns `model` itself with its parameters sharded (FSDP2). Batch
        normalisation takes its statistics from the images of all processes (`SharedBatchNorm`).
        """
        if self.world == 1:
            return model
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.__class__ = SharedBatchNorm  # keeps parameters and their names
        if parallel == "replicate":
            where = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=where, gradient_as_bucket_view=True)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))  # without it, the GPU is taken even for the CPU
        for block in getattr(getattr(model, "backbone", None), "blocks", ()):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation with the statistics of the images of all processes together.

    It computes with sums over processes that autograd knows, so it works on every device. `nn.SyncBatchNorm` refuses
    the CPU.
    """

    alone = False
    """Whether this process takes the statistics of its own images, and talks to no other."""

    def forward(self, x: Tensor) -> Tensor:  # (B, channels, height, width)
        if not self.training or self.alone:
            return super().forward(x)
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        values, channels = x.float(), (1, -1, 1, 1)
        own = values.new_tensor([x.numel() / x.shape[1]])
        *totals, count = _SumOfAll.apply(torch.cat([values.sum((0, 2, 3)), own])).split([x.shape[1], 1])
        mean = totals[0] / count
        centred = values - mean.view(channels)
        variance = _SumOfAll.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(channels) + self.bias.view(channels)).to(x.dtype)


class _SumOfAll(torch.autograd.Function):
    """The sum over all processes. Each one's loss depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        distributed.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        distributed.all_reduce(gradient)
        return gradient


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Lets a model that `Processes.spread` spread compute in this process by itself, except if it is sharded."""
    parts = [part for part in model.modules() if isinstance(part, SharedBatchNorm)]
    for part in parts:
        part.alone = True
    try:
        yield
    finally:
        for part in parts:
            part.alone = False


@contextmanager
def synchronised(computing: nn.Module, on: bool) -> Iterator[None]:
    """Sums the gradients over all processes in the backward pass of this block, but only if `on` is true.

    The micro-batches of a step need only one such sum.
    """
    if isinstance(computing, nn.parallel.DistributedDataParallel) and not on:
        with computing.no_sync():
            yield
        return
    if hasattr(computing, "set_requires_gradient_sync"):  # what fully_shard adds
        computing.set_requires_gradient_sync(on)  # type: ignore[operator]
    yield


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Joins the processes that torchrun started, and leaves them at the end. Without torchrun, there is one process."""
    place = resolve_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if "RANK" not in os.environ or distributed.is_initialized():
        joined = distributed.is_initialized()
        yield Processes(place, distributed.get_rank() if joined else 0, distributed.get_world_size() if joined else 1)
        return
    store, rank, world = next(distributed.rendezvous("env://", timeout=_PATIENCE))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _own_part(store, rank, world)
    distributed.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=_PATIENCE,
        device_id=place if place.type == "cuda" else None,  # otherwise NCCL guesses the GPU from the rank
    )
    failed = True
    try:
        yield Processes(place, rank, world)
        distributed.barrier()  # a process that leaves early aborts what the others still exchange
        failed = False
    except SystemExit:  # all processes stop together
        failed = False
        raise
    finally:
        gc.collect()  # frees DDP, which keeps the group: the group's threads must end before the interpreter does
        _leave(failed)


def _leave(failed: bool) -> None:
    """Ends the process group. After a failure, NCCL would wait for what the other processes no longer do, so it is
    aborted."""
    abort = getattr(distributed.distributed_c10d, "_abort_process_group", None)  # PyTorch has it for NCCL alone
    if failed and abort is not None and distributed.get_backend() == "nccl":
        abort()
    else:
        distributed.destroy_process_group()


def _own_part(store: distributed.Store, rank: int, world: int) -> distributed.Store:
    """A part of torchrun's store that no earlier process wrote to.

    torchrun gives the same store to all restarts (PyTorch 2.15, `_create_c10d_store`). A process that finds the address
    of a dead one there waits for it or fails. So each process writes its name into the store, and the first one
    proposes the list of names. A process agrees if its own name is in the list. When all have agreed, the list names
    their part. A list with the name of a dead process is never agreed by all.
    """
    me = uuid.uuid4().hex
    store.set(f"deit/name/{rank}", me)
    end = time.monotonic() + _PATIENCE.total_seconds()
    while time.monotonic() < end:
        if rank == 0:
            store.set("deit/names", ",".join(store.get(f"deit/name/{other}").decode() for other in range(world)))
        names = store.get("deit/names").decode()
        if names.split(",")[rank : rank + 1] == [me]:
            part = f"deit/{hashlib.sha256(names.encode()).hexdigest()}"
            store.set(f"{part}/{rank}", "agreed")
            if rank == 0 and store.check([f"{part}/{other}" for other in range(world)]):
                store.set(f"{part}/complete", "")
            if store.check([f"{part}/complete"]):
                return distributed.PrefixStore(part, store)
        time.sleep(0.02)
    raise RuntimeError(
        f"expected {world} processes, but process {rank} waited {_PATIENCE} for the others; check that torchrun "
        "started them all"
    )


@contextmanager
def full_float32() -> Iterator[None]:
    """Computes products and convolutions of float32 in float32. On a GPU, PyTorch would round the inputs of
    convolutions to TF32, which has 10 bits, and those of products too if somebody has asked for it."""
    places: list[Any] = [getattr(torch.backends.cudnn, "conv", None), torch.backends.cuda.matmul]
    name, value = "fp32_precision", "ieee"
    if places[0] is None:  # PyTorch before 2.9; both ways can't be mixed
        places, name, value = [torch.backends.cudnn, torch.backends.cuda.matmul], "allow_tf32", False  # type: ignore[assignment]
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, value)
        yield
    finally:
        for place, old in zip(places, before, strict=True):
            setattr(place, name, old)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: main memory, or a GPU's as PyTorch, CUDA or its libraries say it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    )


def device_lost(error: BaseException) -> bool:
    """Whether an error means that no later work on the GPU can succeed in this process. After such an error, CUDA
    answers every call with an error, until the process is started again."""
    return (
        isinstance(error, RuntimeError)
        and not out_of_memory(error)
        and (type(error).__name__ == "AcceleratorError" or _LOST.search(str(error)) is not None)
    )


class Rows:
    """Computes rows of tensors, in smaller parts from the time on when memory runs out.

    Args:
        say: called with a sentence when the parts become smaller.
        divides: False raises the error at once, because many processes that hold one model must compute alike.
    """

    def __init__(self, say: Callable[[str], object], divides: bool = True):
        self.say, self.divides = say, divides
        self.most: int | None = None
        """The largest number of rows that are computed at once; None while there is no limit."""

    def __call__(self, compute: Callable[..., _Named], *given: Tensor) -> _Named:
        """The tensors that `compute` gives for all rows of `given`. Each of its rows must depend on the same row alone.

        Raises the error itself if memory runs out for a single row.
        """
        while True:
            count = len(given[0])
            size = count if self.most is None else min(count, self.most)
            try:
                found = [
                    compute(*(tensor[start : start + size] for tensor in given)) for start in range(0, count, size)
                ]
                if len(found) == 1:
                    return found[0]
                return type(found[0])({name: torch.cat([part[name] for part in found]) for name in found[0]})
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or size == 1 or not self.divides:
                    raise
            free_memory()
            self.most = (size + 1) // 2
            self.say(
                f"out of memory: {self.most} images are now computed at once instead of {size}; "
                "the answers stay the same"
            )


def free_memory() -> None:
    """Gives the memory that PyTorch keeps for later back to the GPU. To be called outside of the `except` block of an
    error, whose traceback holds tensors."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has used, of the GPU's memory or of main memory. 0 if the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    known = host.peak_memory()
    if known is not None:
        return known
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory(device: torch.device) -> int | None:
    """Number of bytes that this process can still take, of the GPU's memory or of its share of main memory. None if it
    isn't known. What the process has freed and keeps for later counts too."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = host.available_memory() if device.type == "cpu" else None
    return None if free is None else free // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + _kept_memory()


def _kept_memory() -> int:
    """Number of bytes that this process has freed and that the C library keeps. 0 if it isn't glibc 2.33 or newer.

    What `keep_memory` lets it ask for ahead is left out, because the system gives such pages only when they are used.
    """

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO]

    try:
        mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return 0
    mallinfo.restype = Info
    return max(0, int(mallinfo().fordblks) - _AHEAD)


def described(device: torch.device) -> str:
    """A device in words: the GPU's name, or the processor's name and the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return host.processor() if device.type == "cpu" else str(device)


def keep_memory() -> None:
    """Makes this process keep the memory that it frees, if the C library is glibc. Otherwise, does nothing.

    A step frees the hundreds of megabytes that it allocated. By default, glibc returns large pieces to the system, and
    the system hands them out again page by page. That costs some percent of a step on the CPU (docs/log.md).
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, _AHEAD)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its values. A sharded parameter is gathered, so every process must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
