"""Stored models and their answers, to which either framework is held where the other isn't installed.

python tests/golden/twins.py keras|torch      # compares
python tests/golden/twins.py write            # writes, from the PyTorch classes
"""

import sys
from pathlib import Path

import numpy as np

import deit

FOLDER = Path(__file__).parent / "twins"
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": (8, 12),
    "patch_size": 4,
    "encoder_stride": 4,
    "layer_norm_eps": 1e-6,
    "num_labels": 3,
}
MODELS = {
    "DeiTModel": {"drop_path_rate": 0.5},
    "DeiTForMaskedImageModeling": {},
    "DeiTForImageClassification": {
        "distillation_token": False,
        "layer_scale_init_value": 0.1,
        "position_on_class_token": False,
    },
    "DeiTForImageClassificationWithTeacher": {},
}


def inputs() -> dict[str, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    pixels = {"pixel_values": random.standard_normal((2, 3, 8, 12)).astype("float32")}
    return {
        "DeiTModel": pixels,
        "DeiTForImageClassification": pixels | {"labels": np.array([2, 0])},
        "DeiTForMaskedImageModeling": pixels | {"bool_masked_pos": random.random((2, 6)) < 0.5},
        "DeiTForImageClassificationWithTeacher": pixels
        | {"labels": np.array([2, 0]), "teacher_logits": random.standard_normal((2, 3)).astype("float32")},
    }


def answers(framework: str, name: str) -> dict[str, np.ndarray]:
    """Every intermediate and every output of a stored model."""
    trace: dict = {}
    if framework == "keras":
        out = getattr(deit, f"TF{name}").from_pretrained(FOLDER / name)(**inputs()[name], trace=trace)
    else:
        import torch

        with torch.no_grad():
            out = getattr(deit, name).from_pretrained(FOLDER / name)(
                **{key: torch.from_numpy(value) for key, value in inputs()[name].items()}, trace=trace
            )
    return {key: np.asarray(value) for key, value in {**trace, **dict(out.items())}.items()}


def write() -> None:
    import torch

    for number, (name, changes) in enumerate(MODELS.items()):
        model = getattr(deit, name)(deit.DeiTConfig(**SIZES, **changes))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(FOLDER / name)
        np.savez_compressed(FOLDER / name / "golden.npz", **answers("torch", name))


def compare(framework: str) -> None:
    for name in MODELS:
        golden, found = np.load(FOLDER / name / "golden.npz"), answers(framework, name)
        assert list(found) == golden.files, (name, list(found), golden.files)
        for key in golden.files:
            np.testing.assert_allclose(found[key], golden[key], rtol=0, atol=1e-5, err_msg=f"{name}: {key}")
    print(f"{framework}: {len(MODELS)} models as stored")


if __name__ == "__main__":
    write() if sys.argv[1] == "write" else compare(sys.argv[1])
