"""Speed of merged tokens: the network with and without them, on the CPU.

    python -m bench.speed.merge [--rounds 7] [--case "tiny 32 merge 8 float32"|...]

`deit` merges as many tokens in each block as the case says, and `plain` is the same model without merging. Both begin
with `pixel_values`. In `float32` and `bfloat16`, PyTorch computes; with `openvino`, the engine that `deit predict`
takes on a CPU computes in the precision of its own choice. Models have random weights and 1,000 classes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from bench.harness import Comparison, answer

BATCHES = {"tiny": 32, "base": 16}
CASES = {
    f"{size} {batch} merge {merge} {how}": {"size": size, "batch": batch, "merge": merge, "how": how}
    for how in ("float32", "bfloat16", "openvino")
    for size, batch in BATCHES.items()
    for merge in (8, 13, 16)
}


def contenders(case: Mapping[str, Any]) -> Iterable[str]:
    return "deit", "plain"


def work(contender: str, size: str, batch: int, merge: int, how: Literal["float32", "bfloat16", "openvino"]) -> None:
    """Computes the logits of a batch of random pixels whenever it is asked to."""
    import torch

    from deit import VARIANTS, DeiTForImageClassificationWithTeacher, DeiTImageProcessor

    torch.manual_seed(0)
    config = VARIANTS[f"deit-{size}-distilled-patch16-224"].replace(merge=merge if contender == "deit" else 0)
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
)

if __name__ == "__main__":
    COMPARISON.main()
