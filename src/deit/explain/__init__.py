"""Maps of what each token's answer to an image rests on, with their scores and a figure."""

from typing import TYPE_CHECKING

from deit.lazy import offer

if TYPE_CHECKING:
    from deit.explain.explanation import Explanation as Explanation
    from deit.explain.explanation import Map as Map
    from deit.explain.explanation import Score as Score
    from deit.explain.explanation import TokenAnswer as TokenAnswer
    from deit.explain.explanation import explain_file as explain_file
    from deit.explain.explanation import explain_pixels as explain_pixels
    from deit.explain.maps import METHODS as METHODS
    from deit.explain.maps import Faithfulness as Faithfulness
    from deit.explain.maps import Target as Target
    from deit.explain.maps import Token as Token
    from deit.explain.maps import deletion_insertion as deletion_insertion
    from deit.explain.maps import explain as explain
    from deit.explain.maps import occlusion as occlusion
    from deit.explain.maps import random_order as random_order
    from deit.explain.picture import figure as figure

__getattr__, __dir__ = offer(
    __name__,
    {
        "deit.explain.explanation": (
            "Explanation",
            "Map",
            "Score",
            "TokenAnswer",
            "explain_file",
            "explain_pixels",
        ),
        "deit.explain.maps": (
            "METHODS",
            "Faithfulness",
            "Target",
            "Token",
            "deletion_insertion",
            "explain",
            "occlusion",
            "random_order",
        ),
        "deit.explain.picture": ("figure",),
    },
)
