"""Evaluation: scores with intervals (NumPy only), models over images, calibration, tables."""

from typing import TYPE_CHECKING

from deit.lazy import offer

if TYPE_CHECKING:
    from deit.evaluate.models import Evaluation as Evaluation
    from deit.evaluate.models import Examined as Examined
    from deit.evaluate.models import evaluate as evaluate
    from deit.evaluate.models import examine as examine
    from deit.evaluate.models import examine_files as examine_files
    from deit.evaluate.models import examine_split as examine_split
    from deit.evaluate.scores import Accuracy as Accuracy
    from deit.evaluate.scores import Comparison as Comparison
    from deit.evaluate.scores import Report as Report
    from deit.evaluate.scores import compare as compare

__getattr__, __dir__ = offer(
    __name__,
    {
        "deit.evaluate.models": ("Evaluation", "Examined", "evaluate", "examine", "examine_files", "examine_split"),
        "deit.evaluate.scores": ("Accuracy", "Comparison", "Report", "compare"),
    },
)
