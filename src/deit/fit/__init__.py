"""From a folder of labelled images to the best classifier that they allow: baseline, teacher, student, choice."""

from typing import TYPE_CHECKING

from deit.lazy import offer

if TYPE_CHECKING:
    from deit.fit.judging import Fitted as Fitted
    from deit.fit.plan import Plan as Plan
    from deit.fit.plan import make_plan as make_plan
    from deit.fit.work import carry_out as carry_out
    from deit.fit.work import fit as fit

__getattr__, __dir__ = offer(
    __name__,
    {
        "deit.fit.judging": ("Fitted",),
        "deit.fit.plan": ("Plan", "make_plan"),
        "deit.fit.work": ("carry_out", "fit"),
    },
)
