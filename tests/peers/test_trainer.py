"""`transformers.Trainer` over our classes: the values that it has over those of `transformers`, and what it saves."""

import copy

import pytest
import torch
from support.checks import assert_close, raises_saying
from support.hugging_face import CLASSES, hf_prefix, pair
from support.models import LABELS, build, images, mask_for, small

import deit
from deit import weights
from deit.image.processor import DeiTImageProcessor

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("quiet_transformers")

IMAGES = 10


class Data(torch.utils.data.Dataset):
    """As many images as `count`, with what a class takes beside them."""

    def __init__(self, kind, config, count=IMAGES):
        self.columns = {"pixel_values": images(config, count)}
        if kind == "masked_image":
            self.columns["bool_masked_pos"] = mask_for(config, count)
        elif kind != "backbone":
            self.columns["labels"] = torch.arange(count) % config.num_labels
        if kind == "with_teacher":
            generator = torch.Generator().manual_seed(4)
            self.columns["teacher_logits"] = torch.randn(count, config.num_labels, generator=generator)

    def __len__(self):
        return len(self.columns["pixel_values"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


def of_backbone(output, _, num_items_in_batch=None):
    return output.last_hidden_state.square().mean()


def trainer(model, kind, folder, *, config=None, processor=None, **arguments):
    config = config or model.config
    settings = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "label_names": ["bool_masked_pos"] if kind == "masked_image" else None,  # else it evaluates without a loss
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(str(folder), **settings | arguments),
        train_dataset=Data(kind, config),
        eval_dataset=Data(kind, config, 6),
        processing_class=processor,
        compute_loss_func=of_backbone if kind == "backbone" else None,
        callbacks=[],
    )


def losses(done):
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def tensors_of(ours, name):
    return weights.from_ours(ours._tensors(), "hf5", prefix=hf_prefix(name))


OPTIONS = {
    "plain": {},
    # Ten images in batches of four: the last step has other batches than the first ones.
    "accumulated": {"gradient_accumulation_steps": 2},
    "recomputed": {"activation_checkpointing": True},
    "recomputed, reentrant": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "smoothed": {"label_smoothing_factor": 0.3},
    "smoothed and accumulated": {"label_smoothing_factor": 0.3, "gradient_accumulation_steps": 2},
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name, kind in CLASSES.items()
        for option in OPTIONS
        if kind == "classification" or (kind != "with_teacher" and "smoothed" not in option)
    ],
)
def test_same_training(name, option, tmp_path):
    """Losses, evaluation and final weights, from the same start on the same data."""
    kind, options = CLASSES[name], OPTIONS[option]
    config = small(distillation_token=name.startswith("DeiT"), num_hidden_layers=2)
    ours, theirs = pair(name, config, attn="sdpa")
    start = copy.deepcopy(theirs.state_dict())
    done = [
        # Adam would make steps of their full length out of gradients that are zero but for rounding.
        trainer(model, kind, tmp_path / str(i), config=config, optim="sgd", learning_rate=0.1, **options)
        for i, model in enumerate((ours, theirs))
    ]
    for each in done:
        each.train()
    assert len(losses(done[0])) == len(losses(done[1])) >= 4
    assert losses(done[0]) == pytest.approx(losses(done[1]), abs=1e-4)
    if kind != "backbone":
        found, expected = (each.evaluate()["eval_loss"] for each in done)
        assert found == pytest.approx(expected, abs=1e-4)
    trained = tensors_of(ours, name)
    assert max((trained[key] - start[key]).abs().max() for key in trained) > 1e-2
    assert_close(trained, theirs.state_dict(), 1e-4)
    assert ours.is_gradient_checkpointing == ("activation_checkpointing" in options)


@pytest.mark.parametrize("kind", ["classification", "masked_image", "with_teacher"])
def test_bfloat16(kind, tmp_path):
    """Autocast to bfloat16 gives float32 outputs, near those without it."""
    model = build(kind, small())
    plain, mixed = trainer(copy.deepcopy(model), kind, tmp_path), trainer(model, kind, tmp_path, bf16=True)
    for each in (plain, mixed):
        each.train()
    assert losses(mixed) == pytest.approx(losses(plain), rel=0.1)
    assert losses(mixed) != losses(plain)
    batch = {name: torch.stack([row[name] for row in Data(kind, model.config)]) for name in Data(kind, model.config)[0]}
    output = mixed.model_wrapped.train()(**batch)
    assert type(output) is type(model(**batch))
    assert {value.dtype for value in output.values()} == {torch.float32}


def test_distillation(tmp_path):
    """The steps of a class that `transformers` does not train, against a loop of our own."""
    config = small()
    model = build("with_teacher", config)
    again = copy.deepcopy(model)
    data = Data("with_teacher", config, 8)
    done = trainer(model, "with_teacher", tmp_path, gradient_accumulation_steps=2, optim="sgd", max_grad_norm=0.0)
    done.train_dataset = data
    done.train()
    optimizer = torch.optim.SGD(again.parameters(), lr=1e-2)
    expected = []
    for _ in range(2):  # one step an epoch: all eight images, whatever their order
        optimizer.zero_grad()
        loss = again.train()(**data.columns).loss
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses(done) == pytest.approx(expected, abs=1e-4)
    assert_close(model.state_dict(), again.state_dict())


@pytest.mark.parametrize(
    ("labels", "changes"),
    [
        (torch.randn(6, 1), {"num_labels": 1}),
        (torch.randn(6, 3), {"num_labels": 3, "problem_type": "regression"}),
        ((torch.randn(6, 3) > 0).float(), {"num_labels": 3}),
        (torch.tensor([0, 1, -100, 2, -100, 1]), {"num_labels": 3}),
    ],
    ids=["regression", "targets", "multi-label", "ignored"],
)
def test_losses_of_parts_add_up(labels, changes):
    """With `num_items_in_batch`, unequal batches of a step give its mean."""
    config = small(**changes)
    model, x = build("classification", config), images(config, 6)
    items = labels.ne(-100).sum()
    whole = model(x, labels=labels).loss
    parts = [model(x[part], labels=labels[part], num_items_in_batch=items).loss for part in (slice(4), slice(4, 6))]
    assert_close(sum(parts), whole)
    assert_close(model(x[4:5], labels=labels[4:5], num_items_in_batch=int(items)).loss.isfinite(), torch.tensor(True))


def test_loss_of_a_part_is_theirs():
    ours, theirs = pair("ViTForImageClassification", small(distillation_token=False))
    given = {"pixel_values": images(ours.config, 3), "labels": torch.tensor([0, 3, 4]), "num_items_in_batch": 7}
    assert_close(ours(**given).loss, theirs(**given).loss)
    assert transformers.Trainer(model=ours).model_accepts_loss_kwargs
    assert transformers.Trainer(model=theirs).model_accepts_loss_kwargs


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("kind", ["backbone", "masked_image", "classification", "with_teacher"])
def test_resumes(kind, tmp_path):
    """Two epochs at once, and one epoch and another, give the same weights."""
    start = build(kind, small())

    def run(name, model, epochs, resume=None):
        each = trainer(
            model,
            kind,
            tmp_path / name,
            num_train_epochs=epochs,
            save_strategy="epoch",
            processor=model.for_trainer(DeiTImageProcessor.paper(16)),
        )
        each.train(resume_from_checkpoint=resume)
        return each

    straight = run("straight", copy.deepcopy(start), 2)
    run("halves", copy.deepcopy(start), 1)
    fresh = build(kind, small(), seed=5)
    resumed = run("halves", fresh, 2, resume=str(tmp_path / "halves" / "checkpoint-3"))
    assert resumed.state.global_step == straight.state.global_step == 6
    assert_close(fresh.state_dict(), straight.model.state_dict(), 1e-6)


def test_best_model(tmp_path):
    """The best model is loaded at the end: the one whose loss is the lowest of all epochs."""
    model = build("classification", small(id2label=LABELS))
    done = trainer(
        model,
        "classification",
        tmp_path,
        num_train_epochs=4,
        learning_rate=0.1,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        processor=model.for_trainer(DeiTImageProcessor.paper(16)),
    )
    done.train()
    found = [entry["eval_loss"] for entry in done.state.log_history if "eval_loss" in entry]
    assert done.state.best_metric == min(found)
    assert done.evaluate()["eval_loss"] == pytest.approx(min(found))
    best = deit.DeiTForImageClassification.from_pretrained(done.state.best_model_checkpoint)
    assert_close(best.state_dict(), model.state_dict(), 0)


@pytest.mark.parametrize("name", CLASSES)
def test_saved_folder(name, tmp_path):
    """It has a config.json, the preprocessing and weights that load here and in `transformers`, labels and all."""
    kind = CLASSES[name]
    config = small(distillation_token=name.startswith("DeiT"), id2label=LABELS, layer_norm_eps=1e-4)
    model = build(kind, config)
    processor = DeiTImageProcessor(size=20, crop_size=16, image_mean=(0.1, 0.2, 0.3))
    done = trainer(model, kind, tmp_path, num_train_epochs=1, processor=model.for_trainer(processor))
    done.train()
    done.save_model()
    again = deit.load_model(tmp_path)
    assert again.config.replace(extra={}) == config
    assert again.config.use_cache is False  # what the Trainer sets
    assert DeiTImageProcessor.from_pretrained(tmp_path) == processor
    assert_close(again.state_dict(), model.state_dict(), 0)
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    x = images(config)
    key = {"backbone": "last_hidden_state", "masked_image": "reconstruction"}.get(kind, "logits")
    with torch.no_grad():
        assert_close(theirs.eval()(x)[key], model.eval()(x)[key])
    if kind == "classification":
        assert theirs.config.id2label == LABELS


def test_folder_without_our_help(tmp_path):
    """With a processor alone the Trainer writes no config.json; the model's own stands in for it."""
    model = build("classification", small(id2label=LABELS))
    done = trainer(model, "classification", tmp_path, processor=DeiTImageProcessor.paper(16))
    done.save_model()
    assert not (tmp_path / "config.json").exists()
    again = deit.DeiTForImageClassification.from_pretrained(tmp_path, config=model.config)
    assert_close(again.state_dict(), model.state_dict(), 0)


def test_files_of_the_trainer_are_a_processor(photos, tmp_path_factory):
    model = build("classification", small())
    processor = DeiTImageProcessor.paper(16)
    both = copy.deepcopy(model.for_trainer(processor))
    assert_close(both(photos, return_tensors="pt").pixel_values, processor(photos, return_tensors="pt").pixel_values, 0)
    assert both.model_input_names == transformers.DeiTImageProcessor().model_input_names == ["pixel_values"]
    assert both.crop_size == processor.crop_size
    folder = tmp_path_factory.mktemp("empty")
    both.save_pretrained(folder)  # where no weights are yet
    assert {path.name for path in folder.iterdir()} == {"config.json", "preprocessor_config.json"}


def test_a_teacher_needs_labels(tmp_path):
    """Label smoothing takes the labels out of the batch, so the distillation would be lost: the model refuses."""
    done = trainer(build("with_teacher", small()), "with_teacher", tmp_path, label_smoothing_factor=0.1)
    with raises_saying(ValueError, "labels and teacher_logits together"):
        done.train()
