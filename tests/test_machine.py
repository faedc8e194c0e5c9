"""What the machine says when memory runs out, and how the work is then divided."""

import socket
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.checks import raises_saying
from support.models import build, small, trained_folder

from deit import host, machine
from deit.data.batches import Batch
from deit.evaluate.models import examine
from deit.explain.explanation import explain_pixels
from deit.predict.predictor import Predictor

LACK_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuda's own": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "nccl": RuntimeError("NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nCuda failure 2 'out of memory'"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
    "python": MemoryError(),
}
"""As PyTorch 2.15, cuDNN 8 and 9 and NCCL 2 write them."""
if hasattr(torch, "AcceleratorError"):
    LACK_OF_MEMORY["accelerator"] = torch.AcceleratorError("CUDA error: out of memory")
if hasattr(torch.distributed, "DistBackendError"):
    LACK_OF_MEMORY["nccl's class"] = torch.distributed.DistBackendError("Last error:\nCuda failure 2 'out of memory'")


@pytest.mark.parametrize("error", LACK_OF_MEMORY.values(), ids=LACK_OF_MEMORY)
def test_lack_of_memory_is_known_whoever_says_it(error):
    assert machine.out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("Triton Error [CUDA]: out of resources: shared memory"),
        ValueError("out of memory, says a file's name"),
    ],
)
def test_other_errors_are_not_lack_of_memory(error):
    assert not machine.out_of_memory(error)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
def test_a_lost_gpu_is_known(text):
    assert machine.device_lost(RuntimeError(text))
    if hasattr(torch, "AcceleratorError"):
        assert machine.device_lost(torch.AcceleratorError(text))


@pytest.mark.parametrize(
    "error", [*LACK_OF_MEMORY.values(), RuntimeError("shapes cannot be multiplied"), ValueError("CUDA error: x")]
)
def test_other_errors_leave_the_gpu_as_it_is(error):
    assert not machine.device_lost(error)


def limited(most, calls):
    """Squares, for at most `most` rows at once."""

    def compute(numbers, factors):
        calls.append(len(numbers))
        if len(numbers) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"squares": numbers**2 * factors}

    return compute


def test_rows_are_halved_until_they_fit_and_stay_so():
    calls, said = [], []
    rows, numbers = machine.Rows(said.append), torch.arange(11.0)
    for _ in range(2):
        found = rows(limited(3, calls), numbers, 2 * torch.ones(11))
        assert torch.equal(found["squares"], 2 * numbers**2)
    assert calls == [11, 6, 3, 3, 3, 2, 3, 3, 3, 2]
    assert [sentence.split(";")[0] for sentence in said] == [
        "out of memory: 6 images are now computed at once instead of 11",
        "out of memory: 3 images are now computed at once instead of 6",
    ]


def test_rows_that_can_not_be_divided_are_refused():
    """A single row, or a model that many processes hold together."""
    with raises_saying(torch.OutOfMemoryError, "out of memory"):
        machine.Rows(lambda _: None)(limited(0, []), torch.ones(4), torch.ones(4))
    calls = []
    with raises_saying(torch.OutOfMemoryError, "out of memory"):
        machine.Rows(lambda _: None, divides=False)(limited(2, calls), torch.ones(4), torch.ones(4))
    assert calls == [4]


def precisions():
    """The number formats in which a GPU would compute convolutions and products of float32."""
    if hasattr(torch.backends.cudnn, "conv"):
        return [torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision]
    return [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]


@pytest.mark.parametrize("wish", ["highest", "high"])
def test_float32_is_float32_on_a_gpu_too(wish, tmp_path):
    """For `deit eval`, `predict` and `explain`, so that their probabilities agree.

    PyTorch's own choice for convolutions is TF32, and it is there again afterwards.
    """
    torch.set_float32_matmul_precision(wish)
    asked, before = [], precisions()
    predictor = Predictor(trained_folder(tmp_path))
    predictor.model.register_forward_pre_hook(lambda *_: asked.append(precisions()))
    pixels = torch.randn(2, 3, 16, 16)
    try:
        predictor.scores(pixels.numpy())
        examine(predictor.model, [Batch(pixels, torch.tensor([0, 1]))], predictor.labels)
        explain_pixels(predictor.model, predictor.processor, pixels[:1], methods=["attention"])
        assert precisions() == before
        assert torch.get_float32_matmul_precision() == wish
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert before[0] in ("tf32", True)
    assert before[1] in (("tf32", True) if wish == "high" else ("none", "ieee", False))
    exact = ["ieee"] * 2 if isinstance(before[0], str) else [False] * 2
    assert len(asked) >= 3
    assert all(each == exact for each in asked)


def test_the_memory_used_is_what_the_system_says(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(host, "peak_memory", lambda: 123)
    assert machine.peak_memory(torch.device("cpu")) == 123
    monkeypatch.setattr(host, "peak_memory", lambda: None)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=2048))
    for system, used in (("linux", 2048 * 1024), ("darwin", 2048)):
        monkeypatch.setattr(machine.sys, "platform", system)
        assert machine.peak_memory(torch.device("cpu")) == used


# ------------------------------------------------------------------------------------------------------ many processes


@pytest.fixture
def alone_under_torchrun(monkeypatch):
    """The variables that torchrun would set for a single process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("error", "backend", "ending"),
    [
        (None, "nccl", "destroyed"),
        (SystemExit(143), "nccl", "destroyed"),
        (RuntimeError("one process failed"), "nccl", "aborted"),
        (KeyboardInterrupt(), "nccl", "aborted"),
        (RuntimeError("one process failed"), "gloo", "destroyed"),
    ],
)
def test_a_process_that_failed_does_not_wait_for_the_others(error, backend, ending, alone_under_torchrun, monkeypatch):
    distributed, endings = torch.distributed, []
    destroy = distributed.destroy_process_group
    monkeypatch.setattr(distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: endings.append("destroyed") or destroy())
    monkeypatch.setattr(
        distributed.distributed_c10d,
        "_abort_process_group",
        lambda: endings.append("aborted") or destroy(),
        raising=False,
    )
    with pytest.raises(type(error)) if error else nullcontext(), machine.processes("cpu") as us:
        assert (us.rank, us.world) == (0, 1)
        if error:
            raise error
    assert endings == [ending]
    assert not distributed.is_initialized()


def test_parameters_are_sharded_on_the_device_of_the_run(monkeypatch):
    """FSDP alone would take the GPU of the machine, also for a run on the CPU."""
    from torch.distributed import fsdp
    from torch.testing._internal.distributed.fake_pg import FakeStore

    meshes = []
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, *, mesh: meshes.append((type(module).__name__, mesh)))
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        machine.Processes(torch.device("cpu"), 0, 2).spread(build("classification", small()), "shard")
    finally:
        torch.distributed.destroy_process_group()
    assert [name for name, _ in meshes] == ["Block"] * 3 + ["DeiTForImageClassification"]
    assert {(mesh.device_type, mesh.size()) for _, mesh in meshes} == {("cpu", 2)}
