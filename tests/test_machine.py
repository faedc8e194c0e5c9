"""What the machine says when memory runs out, and how the work is then divided."""

import pytest
import torch
from support.checks import raises_saying

from deit import machine

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
