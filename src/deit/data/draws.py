"""Random numbers that are counted, not drawn one after the other.

Every choice is a function of the seed and of what it is for. So a batch depends neither on the number of loader
processes nor on what came before, and a run that is resumed makes the same choices.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are for: each purpose has an independent stream.

    The numbers are part of what makes a run repeatable: one that is changed changes every run.
    """

    VIEWS = 0
    """Augmentation of an image."""
    ORDER = 1
    """Order of the images in a pass through them."""
    MIXING = 2
    """Mixup and CutMix of a batch."""
    MASKS = 3
    """Patches hidden from masked image modelling."""
    DEPTH = 4
    """Branches that stochastic depth drops."""
    STAND_INS = 5
    """Images that take the place of unreadable ones."""
    DROPOUT = 6
    JUDGED_MASKS = 7
    """Patches hidden when masked image modelling is evaluated."""
    HOLDOUT = 8
    """Images held out for validation."""


def draws(seed: int, epoch: int, index: int, repeat: int = 0, stream: Stream = Stream.VIEWS) -> np.random.Generator:
    """The random numbers of one appearance of one image, in one stream.

    Philox (Salmon et al. 2011) counts in its first 64-bit word, which starts at 0. The other words and the key name the
    appearance and the stream.
    """
    return np.random.Generator(np.random.Philox(key=[seed, int(stream)], counter=[0, epoch, index, repeat]))
