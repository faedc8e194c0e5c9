"""Training a recipe: the loop, its objectives, the teachers, and the folder of a run."""

from typing import TYPE_CHECKING

from deit.lazy import offer

if TYPE_CHECKING:
    from deit.train.labels import LabelCache as LabelCache
    from deit.train.labels import teach as teach
    from deit.train.loop import Diverged as Diverged
    from deit.train.loop import Run as Run
    from deit.train.loop import Stopped as Stopped
    from deit.train.loop import train as train
    from deit.train.receivers import MLflow as MLflow
    from deit.train.receivers import Receiver as Receiver
    from deit.train.receivers import WandB as WandB
    from deit.train.records import Record as Record
    from deit.train.teacher import Teacher as Teacher

__getattr__, __dir__ = offer(
    __name__,
    {
        "deit.train.labels": ("LabelCache", "teach"),
        "deit.train.loop": ("Diverged", "Run", "Stopped", "train"),
        "deit.train.receivers": ("MLflow", "Receiver", "WandB"),
        "deit.train.records": ("Record",),
        "deit.train.teacher": ("Teacher",),
    },
)
