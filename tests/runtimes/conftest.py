"""What the tests of exported models share."""

import pytest
import torch
import torch.nn.functional as F
from support.exports import KINDS, model_of, needs
from support.models import saved

from deit.config import ConvNetConfig, DeiTConfig
from deit.data.folders import write_digits
from deit.export import write
from deit.image.processor import DeiTImageProcessor
from deit.model.convnet import ConvNet
from deit.model.network import DeiTForImageClassificationWithTeacher


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        saved(model_of(kind), root / kind)
    return root


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """What `export` returns for a kind and a format; each is made once, and not to be changed."""
    root, done = tmp_path_factory.mktemp("exported"), {}

    def get(kind, to):
        needs(to)
        if (kind, to) not in done:
            done[kind, to] = write.export(models / kind, to, root / f"{kind}-{to}")
        return done[kind, to]

    return get


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The digits on disk, and a small distilled model and a ConvNet trained on them for seconds."""
    root = tmp_path_factory.mktemp("digits")
    write_digits(root / "data", side=16)
    processor = DeiTImageProcessor.paper(16, crop_ratio=1.0)
    paths = sorted((root / "data" / "train").rglob("*.png"))
    pixels = processor(paths, return_tensors="pt").pixel_values
    labels = torch.tensor([int(path.parent.name) for path in paths])
    config = DeiTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=16,
        patch_size=4,
        encoder_stride=4,
        layer_norm_eps=1e-6,
        num_labels=10,
        initializer_range=0.06,
    )
    config = config.replace(id2label={i: str(i) for i in range(10)})
    torch.manual_seed(0)
    nets = {
        "distilled": DeiTForImageClassificationWithTeacher(config),
        "convnet": ConvNet(ConvNetConfig(widths=(16, 32), depth=1, image_size=16, id2label=config.id2label)),
    }
    for name, net in nets.items():
        net.train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2 if name == "convnet" else 3e-3)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=12)
        for _ in range(12):
            for rows in torch.randperm(len(labels)).split(64):
                out = net(pixels[rows])
                loss = F.cross_entropy(out.logits, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            decay.step()
        net.eval().save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root
