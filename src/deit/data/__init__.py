"""From files to batches: labelled images on disk, their splits, augmentation, mixing, and the streams of batches."""

from typing import TYPE_CHECKING

from deit.lazy import offer

if TYPE_CHECKING:
    from deit.data.augment import patch_mask as patch_mask
    from deit.data.batches import BadImages as BadImages
    from deit.data.batches import Batch as Batch
    from deit.data.batches import EvaluationBatches as EvaluationBatches
    from deit.data.batches import Faults as Faults
    from deit.data.batches import TrainingBatches as TrainingBatches
    from deit.data.batches import processor_for as processor_for
    from deit.data.folders import Split as Split
    from deit.data.folders import fingerprint as fingerprint
    from deit.data.folders import read_data as read_data
    from deit.data.folders import read_examples as read_examples
    from deit.data.folders import read_split as read_split
    from deit.data.loading import LoaderDied as LoaderDied

__getattr__, __dir__ = offer(
    __name__,
    {
        "deit.data.augment": ("patch_mask",),
        "deit.data.batches": (
            "BadImages",
            "Batch",
            "EvaluationBatches",
            "Faults",
            "TrainingBatches",
            "processor_for",
        ),
        "deit.data.folders": ("Split", "fingerprint", "read_data", "read_examples", "read_split"),
        "deit.data.loading": ("LoaderDied",),
    },
)
