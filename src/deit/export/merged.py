"""How many tokens an exported model merges: a number that was asked for, or the largest that costs little accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from deit.evaluate.scores import Accuracy
from deit.export.checking import LOSS, Examples, TooInaccurate, accuracy_of, accurate_enough
from deit.export.subject import Subject

Merge = int | Literal["auto"] | None
"""A number of tokens for each block; `auto` for the largest that keeps the accuracy; None for the model's own."""


def refuse_unmergeable(merge: Merge, judged: bool) -> None:
    """Raises `ValueError` for anything but a `Merge`, and for `auto` without images that judge it."""
    if merge is None:
        return
    if merge == "auto":
        if not judged:
            raise ValueError(
                "--merge auto needs images to judge its accuracy; give labelled images with --calibrate DATA, or a "
                "number of tokens"
            )
    elif isinstance(merge, bool) or not isinstance(merge, int) or merge < 0:
        raise ValueError(f"merge must be a whole number of at least 0, or auto, found {merge!r:.80}")


def attempts(
    subject: Subject, merge: Merge, examples: Examples | None, before: Accuracy | None
) -> Iterator[tuple[Subject, Accuracy | None]]:
    """Yields the subject with merging, the strongest that may do first, and its accuracy if there are images.

    `before` is the accuracy of the subject itself, which comes last with `auto`.

    Raises `ValueError` for a model without tokens, and `TooInaccurate` for a number that loses more than `LOSS`.
    """
    if merge is None:
        yield subject, None
        return
    if not subject.transformer:
        raise ValueError(f"{subject.name} has no tokens to merge; leave --merge out, or take a DeiT or ViT")
    if examples is None or before is None:
        assert merge != "auto"
        yield subject.merging(merge), None
        return
    for count in _counts(subject) if merge == "auto" else (merge,):
        lighter = subject.merging(count)
        after = accuracy_of(lighter, examples.batches())
        if accurate_enough(after, before):
            yield lighter, after
        elif merge != "auto":
            raise TooInaccurate(
                f"merging was not kept: on {before.total} images ({examples.source}) the accuracy falls from "
                f"{before.value:.4f} to {after.value:.4f} with merge={merge}, by more than {LOSS:.1%}; take "
                "--merge auto or a smaller number, or leave --calibrate out to accept any accuracy"
            )
    if merge == "auto":
        yield subject, before


def _counts(subject: Subject) -> range:
    """From the number with which no patch would be left after the last block, down to what the model merges already."""
    config = subject.model.config
    return range(max(1, config.num_patches // config.num_hidden_layers), subject.merge, -1)
