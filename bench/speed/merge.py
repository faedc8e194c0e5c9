"""Speed of merged tokens: the network without and with them, on the CPU.

    python -m bench.speed.merge [--rounds 7] [--case "tiny 32 float32"|...]

`deit` merges nothing, and `merge-8` is the same model that merges 8 tokens in each block. All begin with
`pixel_values`. In `float32` and `bfloat16`, PyTorch computes. With `openvino`, the engine that `deit predict` takes on
a CPU computes in the precision of its own choice. Models have random weights and 1,000 classes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from bench.harness import Comparison, answer

How = Literal["float32", "bfloat16", "openvino"]
CASES = {
    f"{size} {batch} {how}": {"size": size, "batch": batch, "how": how}
    for size, batch, how in (
        ("tiny", 32, "float32"),
        ("tiny", 32, "bfloat16"),
        ("tiny", 32, "openvino"),
        ("base", 16, "float32"),
        ("base", 16, "bfloat16"),
    )
}


def contenders(case: Mapping[str, Any]) -> Iterable[str]:
    return "deit", "merge-8", "merge-13", "merge-16"


def work(contender: str, size: str, batch: int, how: How) -> None:
    """Computes the logits of a batch of random pixels whenever it is asked to."""
    import torch

    from deit import VARIANTS, DeiTForImageClassificationWithTeacher, DeiTImageProcessor

    torch.manual_seed(0)
    merge = int(contender.partition("-")[2] or 0)
    config = VARIANTS[f"deit-{size}-distilled-patch16-224"].replace(merge=merge)
    model = DeiTForImageClassificationWithTeacher(config).eval()
    pixels = torch.randn(batch, 3, 224, 224)
    if how == "openvino":
        from deit.export.cache import cached_engine
        from deit.model.load import load_classifier

        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            DeiTImageProcessor.paper(config.image_size).save_pretrained(scratch)
            engine = cached_engine(load_classifier(scratch), "openvino")
        answer(lambda: engine(pixels.numpy()))
    else:
        precision = getattr(torch, how)
        with torch.inference_mode(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
            answer(lambda: model(pixels))


COMPARISON = Comparison(
    module="bench.speed.merge",
    description=__doc__,
    records=Path(__file__).with_suffix(".jsonl"),
    cases=CASES,
    contenders=contenders,
    work=work,
    step="call",
    images="batch",
    packages=("torch", "openvino"),
    circumstances={"threads": os.environ.get("OMP_NUM_THREADS", "all")},
)

if __name__ == "__main__":
    COMPARISON.main()
