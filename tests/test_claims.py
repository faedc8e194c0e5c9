"""The experiments in bench/claims: what differs between arms, and how claims are judged."""

import json

import pytest

from bench.claims import experiments, report, runs


def _flat(value, path=""):
    if not isinstance(value, dict):
        return {path: value}
    return {
        key: found for name, part in value.items() for key, found in _flat(part, f"{path}.{name}".lstrip(".")).items()
    }


LENGTH = {"schedule.total.amount", "schedule.warmup.amount", "evaluate.amount"}
DIFFERENCES = {
    ("few", "no_randaugment"): {"augment.policy"},
    ("few", "no_mixup"): {"augment.mix.mixup"},
    ("few", "no_cutmix"): {"augment.mix.cutmix"},
    ("few", "no_mixing"): {"augment.mix"},
    ("few", "no_erasing"): {"augment.erase"},
    ("few", "no_stochastic_depth"): {"model.drop_path_rate"},
    ("few", "no_repeats"): {"data.repeats"},
    ("few", "sgd"): {"optim"},
    ("few", "dropout"): {"model.hidden_dropout_prob"},
    ("few", "ema"): {"ema"},
    ("none", "soft"): {"objective"},
    ("none", "hard"): {"objective"},
    ("none", "distilled"): {"objective", "model.distillation_token", "model.architectures", "model.model_type"},
    ("none", "masked_finetuned"): {"start"},
    ("none", "none_twice"): LENGTH,
    ("none", "transformer"): LENGTH,
    ("soft", "soft_elements"): {"objective.normalisation"},
    ("distilled", "distilled_by_matched"): {"objective.teacher"},
    ("distilled_by_matched", "distilled_by_transformer"): {"objective.teacher"},
    ("finetuned_24", "finetuned_32_teacher_24"): {"model.image_size"},
    ("finetuned_32_teacher_24", "finetuned_32"): {"objective.teacher"},
    ("finetuned_32", "finetuned_32_labels"): {"objective.weight"},
}


@pytest.mark.parametrize("pair", DIFFERENCES, ids=" ".join)
def test_arms_differ_in_what_is_named_only(pair):
    one, other = (_flat(experiments.ARMS[name].to_dict()) for name in pair)
    changed = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)} - {"name"}
    assert changed
    expected = DIFFERENCES[pair]
    assert all(any(f"{key}.".startswith(f"{field}.") for field in expected) for key in changed), changed


def test_compared_students_take_as_many_updates():
    for experiment in experiments.EXPERIMENTS.values():
        for claim in experiment.claims:
            names = {claim.one[0], claim.other[0]} - {"agreement", "none_twice"}
            assert len({experiments.updates_of(name) for name in names}) <= 1


def test_every_arm_is_a_recipe_and_every_name_is_known(tmp_path, monkeypatch):
    from deit.recipe import Recipe

    monkeypatch.setattr(runs, "_matched", lambda: "convnet_8")
    for name in experiments.ARMS:
        recipe = runs.recipe_of(name, 1, tmp_path)
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
        assert "@" not in json.dumps(recipe.to_dict())
        assert recipe.seed == 1
    for experiment in experiments.EXPERIMENTS.values():
        for arm, _ in [experiment.control, *(side for claim in experiment.claims for side in (claim.one, claim.other))]:
            assert arm in experiment.arms


def test_plan_keeps_what_is_needed_before_and_seeds_together():
    order = experiments.plan(experiments.EXPERIMENTS, [0, 1])
    assert len(order) == len(set(order))
    for place, (arm, seed) in enumerate(order):
        for other in experiments.needs(arm):
            assert order.index((other, 0 if other in experiments.ONCE else seed)) < place
    assert {arm for arm, seed in order if seed == 1}.isdisjoint(experiments.ONCE)
    assert max(order.index((arm, 0)) for arm in ("none", "soft", "hard", "distilled")) < order.index(("none", 1))


def test_interval_is_students():
    stats = pytest.importorskip("scipy.stats")
    for count in range(2, 21):
        values = [0.01 * ((7 * i) % 5) - 0.02 + 0.001 * i for i in range(count)]
        mean, low, high = report.interval(values)
        expected = stats.t.interval(0.95, count - 1, loc=mean, scale=stats.sem(values))
        assert mean == pytest.approx(sum(values) / count)
        assert (low, high) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("differences", "expected", "found"),
    [
        ([0.02, 0.021, 0.022], "above", "holds"),
        ([0.02, 0.021, 0.022], "below", "does not hold"),
        ([-0.02, -0.021, -0.022], "below", "holds"),
        ([-0.02, -0.021, -0.022], "above", "does not hold"),
        ([0.02, -0.01, 0.05], "above", "not decided"),
        ([0.02, 0.021], "above", "not decided"),
        ([], "below", "not decided"),
        ([0.001, -0.001, 0.0], "equal", "holds"),
        ([0.03, 0.031, 0.032], "equal", "does not hold"),
        ([-0.03, -0.031, -0.032], "equal", "does not hold"),
        ([0.02, -0.02, 0.0], "equal", "not decided"),
        ([0.0, 0.0, 0.0], "above", "not decided"),
    ],
)
def test_verdict(differences, expected, found):
    assert report.verdict(differences, expected) == found


def _record(arm, seed, **test):
    return {
        "arm": arm,
        "seed": seed,
        "base": experiments.UPDATES,
        "updates": experiments.updates_of(arm),
        "validation": 0.5,
        "test": test,
        "curve": [[100, 0.2], [200, 0.2 + test.get("fused", 0)]],
        "seconds": 1.0,
    }


def test_tables_and_pictures_from_records(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(report, "PICTURES", tmp_path / "pictures")
    found = [_record("none", seed, fused=0.4 + 0.01 * seed) for seed in range(3)]
    found += [_record("hard", seed, fused=0.45 + 0.01 * seed + 0.001 * (seed % 2)) for seed in range(3)]
    old = _record("none", 0, fused=0.9) | {"base": experiments.UPDATES + 1}
    report.RESULTS.write_text("\n".join(map(json.dumps, [*found, old])), encoding="utf-8")
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- claims: begin -->\nstale\n<!-- claims: end -->\nafter\n", encoding="utf-8")
    report.draw()
    report.write(page, report.table())
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("<!-- claims: end -->\nafter\n")
    assert "| `none` | fused | 41.0 | 1.0 | 3 | control |" in text
    assert "| hard distillation beats labels alone | table 3: 83.0, 81.8 | +5.0 (+4.9 to +5.2) | 3 | holds |" in text
    assert "stale" not in text
    assert "claims-distillation.svg" in text
    from xml.etree import ElementTree

    picture = ElementTree.parse(tmp_path / "pictures" / "claims-distillation.svg")
    assert len(picture.findall("{http://www.w3.org/2000/svg}polyline")) == 2
