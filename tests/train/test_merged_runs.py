"""Training of a model that merges tokens."""

from dataclasses import replace

import torch
from rich.console import Console
from support.models import small
from support.runs import small_recipe, stopped_at

from deit.model.load import load_model
from deit.train import objectives
from deit.train.loop import train

RECIPE = small_recipe(model=small(merge=3, num_labels=None, distillation_token=False, drop_path_rate=0.2))


def run(recipe, given, out, **options):
    """The trained weights, by name."""
    train(recipe, *given[:2], out, device="cpu", console=Console(quiet=True), **options)
    model = load_model(out / "model")
    assert model.config.merge == recipe.model.merge
    return model.state_dict()


def test_a_run_is_the_same_to_the_bit_after_a_stop(given, tmp_path):
    whole = run(RECIPE, given, tmp_path / "whole")
    with stopped_at(2, objectives.SupervisedObjective):
        run(RECIPE, given, tmp_path / "broken")
    resumed = run(RECIPE, given, tmp_path / "broken", resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    plain = run(replace(RECIPE, model=RECIPE.model.replace(merge=0)), given, tmp_path / "plain")
    assert max(float((plain[name] - whole[name]).abs().max()) for name in whole) > 1e-4


def test_parts_and_recomputed_blocks_change_nothing_but_rounding(given, tmp_path):
    whole = run(RECIPE, given, tmp_path / "whole")
    divided = replace(RECIPE, compute=replace(RECIPE.compute, accumulate=2, checkpoint_blocks=True))
    parts = run(divided, given, tmp_path / "parts")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-4, msg=name)
