"""Random numbers that are computed from counters, not drawn one after another.

Every choice is a function of the seed and of its purpose. So a batch depends neither on the number of loader processes
nor on what came before, and a resumed run makes the same choices.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The purposes of random numbers. Each purpose has an independent stream.

    The values below are part of what makes a run repeatable. Changing one changes every run.
    """

    VIEWS = 0
    """Augmentation of an image."""
    ORDER = 1
    """Order of the images in one cycle of training."""
    MIXING = 2
    """Mixup and CutMix of a batch."""
    MASKS = 3
    """Patches hidden from masked image modelling."""
    DEPTH = 4
    """Branches that stochastic depth drops."""
    STAND_INS = 5
    """Images that stand in for unreadable ones."""
    DROPOUT = 6
    JUDGED_MASKS = 7
    """Patches hidden when masked image modelling is evaluated."""
    HOLDOUT = 8
    """Images held out for validation."""


def draws(seed: int, epoch: int, index: int, repeat: int = 0, stream: Stream = Stream.VIEWS) -> np.random.Generator:
    """The random number generator of one appearance of one image, in one stream.

    Philox (Salmon et al. 2011) counts in its first 64-bit word, which starts at 0. The other words and the key identify
    the appearance and the stream.
    """
    return np.random.Generator(np.random.Philox(key=[seed, int(stream)], counter=[0, epoch, index, repeat]))
