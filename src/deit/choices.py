"""The names that people choose among, on the command line and in Python. Loads nothing."""

from __future__ import annotations

from typing import Literal

Head = Literal["fused", "class", "distillation", "softmax"]
"""Which head of a distilled model decides (`fuse_heads`)."""
Method = Literal["rollout", "relevance", "attention"]
"""How a map is drawn from inside a model (`deit.explain.explain`)."""
Runtime = Literal["auto", "torch", "openvino", "onnx"]
"""What computes predictions (`Predictor`)."""
Format = Literal["torch", "onnx", "openvino", "web", "onnx-int8", "openvino-int8"]
"""What `deit export` writes."""
Dialect = Literal["hf", "timm", "original", "keras"]
"""Whose files `deit convert` writes."""
Part = Literal["train", "val", "test"]
"""Which part of a data folder."""
