"""The report of a run or an evaluation: one HTML file without requests, in English and in Chinese."""

from typing import TYPE_CHECKING

from deit.lazy import offer

if TYPE_CHECKING:
    from deit.report.document import FILE as FILE
    from deit.report.document import of_evaluation as of_evaluation
    from deit.report.document import of_run as of_run
    from deit.report.document import of_training as of_training
    from deit.report.document import page as page
    from deit.report.document import write as write
    from deit.report.live import LivePage as LivePage
    from deit.report.maps import Maps as Maps
    from deit.report.maps import explained as explained

__getattr__, __dir__ = offer(
    __name__,
    {
        "deit.report.document": ("FILE", "of_evaluation", "of_run", "of_training", "page", "write"),
        "deit.report.live": ("LivePage",),
        "deit.report.maps": ("Maps", "explained"),
    },
)
