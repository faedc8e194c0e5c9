"""Batches that are copied ahead: the order of fetching, copying and waiting, with streams that only take notes."""

from contextlib import contextmanager

import pytest
import torch

from deit.data.ahead import Ahead
from deit.data.batches import Batch

CPU = torch.device("cpu")


class Notes:
    """A module of streams, as `torch.cuda` is one. `main` is the stream that computes."""

    def __init__(self):
        self.taken = []
        self.present = self.Stream(CPU)
        self.present.name = "main"

    def Stream(self, device):
        notes = self

        class Stream:
            name = "second"

            def wait_stream(self, other):
                notes.taken.append(f"{self.name} waits for {other.name}")

        return Stream()

    @contextmanager
    def stream(self, stream):
        before, self.present = self.present, stream
        yield
        self.present = before

    def current_stream(self, device):
        return self.present


class Noted(Batch):
    def to(self, device):
        NOTES.append(f"copy {self.step} on {self.labels.notes.present.name}")
        return self

    def used_by(self, stream):
        NOTES.append(f"{self.step} used by {stream.name}")


NOTES = []


@pytest.fixture
def notes():
    NOTES.clear()
    found = Notes()
    found.taken = NOTES
    return found


def batches(notes, count=3):
    try:
        for step in range(count):
            labels = torch.zeros(1)
            labels.notes = notes
            NOTES.append(f"load {step}")
            yield Noted(torch.zeros(1, 1), labels, step)
    finally:
        NOTES.append("closed")


def test_the_next_batch_is_copied_before_it_is_wanted(notes):
    ahead = Ahead(batches(notes), CPU, notes)
    assert NOTES == []  # a resumed run begins with the batch of its step, when that is wanted
    assert next(ahead).step == 0
    assert NOTES == ["load 0", "copy 0 on second", "main waits for second", "0 used by main"]
    NOTES.clear()
    ahead.fetch()
    ahead.fetch()  # there is one already
    assert NOTES == ["load 1", "copy 1 on second"]
    NOTES.clear()
    assert next(ahead).step == 1
    assert NOTES == ["main waits for second", "1 used by main"]
    assert [batch.step for batch in ahead] == [2]
    ahead.close()
    assert NOTES[-1] == "closed"


def test_closing_ends_the_loaders_with_a_batch_fetched(notes):
    ahead = Ahead(batches(notes), CPU, notes)
    next(ahead)
    ahead.fetch()
    ahead.close()
    assert NOTES[-1] == "closed"


def test_an_error_comes_in_place_of_its_batch(notes):
    def failing():
        yield from batches(notes, 1)
        raise RuntimeError("a loader process died")

    ahead = Ahead(failing(), CPU, notes)
    assert next(ahead).step == 0
    ahead.fetch()
    ahead.fetch()
    with pytest.raises(RuntimeError, match="died"):
        next(ahead)


def test_nothing_is_fetched_ahead_for_the_cpu(notes):
    ahead = Ahead(batches(notes), CPU)
    ahead.fetch()
    assert NOTES == []
    found = next(ahead)
    assert NOTES[0] == "load 0"
    assert found.step == 0
    ahead.close()
    assert NOTES[-1] == "closed"


def test_memory_stays_until_the_computing_stream_is_done_with_it():
    """`record_stream` needs a device; a meta tensor that says it is on a GPU stands for one."""
    recorded = []

    class OnGPU(torch.Tensor):
        is_cuda = True

        def record_stream(self, stream):
            recorded.append((tuple(self.shape), stream))

    def there(*shape):
        return torch.zeros(*shape).as_subclass(OnGPU)

    batch = Batch(there(2, 3), there(2), 0, torch.arange(2), there(2, 4))
    batch.used_by("computing")
    assert sorted(recorded) == [((2,), "computing"), ((2, 3), "computing"), ((2, 4), "computing")]
