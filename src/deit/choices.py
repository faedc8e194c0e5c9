"""The values of options that people choose, on the command line and in Python. Loads no framework."""

from __future__ import annotations

from typing import Literal

Head = Literal["fused", "class", "distillation", "softmax"]
"""Which head of a distilled model decides (`fuse_heads`)."""
Scoring = Literal["softmax", "sigmoid", "none"]
"""What turns a model's logits into scores (`DeiTConfig.scoring`)."""
Method = Literal["rollout", "relevance", "attention"]
"""How `deit.explain.explain` computes a map from inside a model."""
Runtime = Literal["auto", "torch", "openvino", "onnx"]
"""Which engine computes predictions (`Predictor`)."""
Format = Literal["torch", "onnx", "openvino", "web", "onnx-int8", "openvino-int8"]
"""Which format `deit export` writes."""
Dialect = Literal["hf", "timm", "original", "keras"]
"""Which project's files `deit convert` writes."""
Part = Literal["train", "val", "test"]
"""Which part of a data folder."""
Shell = Literal["bash", "zsh", "fish"]
"""Which shell `deit completion` is for."""
Prefer = Literal["accuracy", "speed"]
"""What `deit fit` chooses its model by."""
