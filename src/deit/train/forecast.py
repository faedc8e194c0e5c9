"""What a run will take, said before its first step: steps, evaluations, and room on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from deit import files
from deit.train import checkpoint
from deit.train.records import MODEL, amount, in_epochs, span
from deit.train.runs import State, Work


@dataclass(frozen=True)
class Room:
    """The bytes that a run writes, and those that its disk has."""

    model: int
    """Bytes of the model's weights."""
    state: int
    """Bytes of a checkpoint, which holds the whole state of the run."""
    least: int
    """Bytes that any run needs that reaches its end."""
    most: int
    """Bytes that it needs at most. A checkpoint is written beside the older ones, and a model beside the one before."""
    free: int | None
    """Bytes that are free; None if the system doesn't say."""

    @classmethod
    def of(cls, work: Work, out: Path) -> Room:
        """What a run in the folder `out` needs. What an earlier session left there is counted once."""
        model = _size(work.model)
        state = model + work.optimizers.size + (work.average.size if work.average else 0)
        older = min(checkpoint.KEPT, len(checkpoint.saved(out / "checkpoints")))
        there = any((out / MODEL).glob("*.safetensors"))
        return cls(
            model,
            state,
            state + model * (not there),
            state * (checkpoint.KEPT + 1 - older) + model * (2 - there),
            files.free_bytes(out),
        )

    def refuse_too_little(self, out: Path) -> None:
        """Raises `DiskFull` if the run can't reach its end."""
        files.refuse_full(out, f"the run needs at least {amount(self.least)} there", self.least, self.free)

    def __str__(self) -> str:
        parts = f"a checkpoint takes {amount(self.state)}, the model {amount(self.model)}"
        if self.free is None:
            return f"{parts}; together at most {amount(self.most)}"
        found = f"{parts}; together at most {amount(self.most)} of the {amount(self.free)} that are free on the disk"
        if self.free >= self.most:
            return found
        return (
            f"warning: {found}, so a later checkpoint may not fit. Free {amount(self.most - self.free)} more, or the "
            "run may end there, with the checkpoint before it untouched"
        )


def opening(work: Work, state: State) -> Iterator[str]:
    """Says how many steps and evaluations the run has, and where it goes on."""
    images, views = len(work.batches.split), work.total * work.recipe.data.batch
    count = 1 + int((work.total - 1) / work.every)
    yield (
        f"{work.recipe.name}: {work.total:,} steps of {work.recipe.data.batch:,} images, "
        f"{in_epochs(views, images)} of {images:,} images, "
        f"and {count:,} evaluation{'s' * (count != 1)} on {len(work.validation.split):,} others"
    )
    if state.step:
        yield f"goes on after step {state.step:,}, which took {span(state.seconds)}"


def _size(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
