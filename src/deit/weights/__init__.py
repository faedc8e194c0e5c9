"""A model's tensors: their names in every dialect, and the files that hold them, read safely and written whole.

`names` holds the tables. `hub` finds, reads, writes and shares checkpoints. Loads no framework.
"""

from typing import TYPE_CHECKING

from deit.lazy import offer

if TYPE_CHECKING:
    from deit.weights.hub import Checkpoint as Checkpoint
    from deit.weights.hub import read_checkpoint as read_checkpoint
    from deit.weights.names import BASE as BASE
    from deit.weights.names import DIALECTS as DIALECTS
    from deit.weights.names import Kind as Kind
    from deit.weights.names import detect as detect
    from deit.weights.names import from_ours as from_ours
    from deit.weights.names import from_tensorflow as from_tensorflow
    from deit.weights.names import infer_config as infer_config
    from deit.weights.names import kind_of as kind_of
    from deit.weights.names import manifest as manifest
    from deit.weights.names import resize_kernel as resize_kernel
    from deit.weights.names import resize_matrix as resize_matrix
    from deit.weights.names import resize_positions as resize_positions
    from deit.weights.names import to_ours as to_ours
    from deit.weights.names import unwrap as unwrap

__getattr__, __dir__ = offer(
    __name__,
    {
        "deit.weights.hub": ("Checkpoint", "read_checkpoint"),
        "deit.weights.names": (
            "BASE",
            "DIALECTS",
            "Kind",
            "detect",
            "from_ours",
            "from_tensorflow",
            "infer_config",
            "kind_of",
            "manifest",
            "resize_kernel",
            "resize_matrix",
            "resize_positions",
            "to_ours",
            "unwrap",
        ),
    },
)
