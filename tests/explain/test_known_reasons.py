"""Maps of a model whose reasons are known."""

import pytest
import torch
import torch.nn.functional as F
from support.checks import assert_close
from support.models import CLASS_OF, small

from deit.explain.maps import deletion_insertion, explain, occlusion, random_order


def squares(count, seed, config):
    """Noise with one patch lit in one colour, which is the class; its place, (row, column)."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(count, 3, *config.image_hw, generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    places = torch.stack([torch.randint(side, (count,), generator=generator) for side in config.grid], 1)
    for b in range(count):
        light(x[b], labels[b], places[b])
    return x, labels, places


def light(x, label, place):
    row, column = (4 * int(each) for each in place)
    x[label, row : row + 4, column : column + 4] += 2


@pytest.fixture(scope="module")
def spotter():
    """Both heads trained to name the colour of the square, wherever it is on a grid of 3 rows and 5 columns."""
    torch.manual_seed(0)
    model = CLASS_OF["with_teacher"](small(image_size=(12, 20), num_labels=3, num_hidden_layers=2)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        x, labels, _ = squares(64, 1000 + step, model.config)
        out = model(x)
        optimizer.zero_grad()
        (F.cross_entropy(out.cls_logits, labels) + F.cross_entropy(out.distillation_logits, labels)).backward()
        optimizer.step()
    return model.eval()


def strongest(values):
    """(row, column) of the largest value of each map."""
    places = values.flatten(1).argmax(-1)
    return torch.stack([places // values.shape[2], places % values.shape[2]], 1)


def test_the_reason_is_found(spotter):
    x, labels, places = squares(40, 1, spotter.config)
    out = spotter(x)
    assert (out.cls_logits.argmax(-1) == labels).all()
    assert (out.distillation_logits.argmax(-1) == labels).all()
    chance = random_order(spotter, x, labels)
    # Of 15 patches chance finds the right one in 0.07 of the images.
    for maps, share in (
        (explain(spotter, x, "rollout"), 0.95),
        (explain(spotter, x, "relevance"), 0.5),
        (explain(spotter, x, "attention"), 0.95),
        (occlusion(spotter, x), 0.95),
    ):
        scores = deletion_insertion(spotter, x, maps)
        for token, values in maps.items():
            assert (strongest(values) == places).all(1).float().mean() >= share
            assert (scores[token].deletion < chance[token].deletion).float().mean() >= 0.9
            assert (scores[token].insertion > chance[token].insertion).float().mean() >= 0.9
            assert (chance[token].deletion - scores[token].deletion).mean() > 0.1
            assert (scores[token].insertion - chance[token].insertion).mean() > 0.1


def test_the_reason_for_either_of_two_classes(spotter):
    """A red square and a blue one: relevance and occlusion tell which is the reason for which."""
    x, labels, places = squares(40, 2, spotter.config)
    others = (labels + 1) % 3
    elsewhere = torch.stack([(places[:, 0] + 1) % 3, (places[:, 1] + 2) % 5], 1)
    for each, label, place in zip(x, others, elsewhere, strict=True):
        light(each, label, place)
    rollout = explain(spotter, x, "rollout", labels)
    assert_close(explain(spotter, x, "rollout", others), rollout, 0)
    for target, where in ((labels, places), (others, elsewhere)):
        chance = random_order(spotter, x, target)
        for maps, share in ((explain(spotter, x, "relevance", target), 0.5), (occlusion(spotter, x, target), 0.6)):
            scores = deletion_insertion(spotter, x, maps, target)
            for token, values in maps.items():
                assert (strongest(values) == where).all(1).float().mean() >= share
                assert (chance[token].deletion - scores[token].deletion).mean() > 0.1
                assert (scores[token].insertion - chance[token].insertion).mean() > 0.05
