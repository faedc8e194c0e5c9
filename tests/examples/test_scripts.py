"""The examples with the arguments of transformers' scripts."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
from support.examples import EXAMPLES
from support.models import trained_folder
from support.runs import photos

from deit import DeiTForMaskedImageModeling, Predictor
from deit.data import read_data, read_split
from deit.recipe import AdamW, Compute, Cosine, Distilled, MaskedImage, Recipe, Supervised, epochs, steps
from deit.train import Record

PUBLISHED = """--output_dir OUT --remove_unused_columns False --do_train --do_eval --learning_rate 2e-5
    --num_train_epochs 5 --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --logging_strategy steps
    --logging_steps 10 --eval_strategy epoch --save_strategy epoch --load_best_model_at_end True --save_total_limit 3
    --seed 1337"""
"""The arguments of the commands in the scripts' README, without their data."""
OF_THE_SCRIPTS = {
    "train_dir",
    "validation_dir",
    "train_val_split",
    "max_train_samples",
    "max_eval_samples",
    "ignore_mismatched_sizes",
    "trust_remote_code",
    "cache_dir",
    "token",
    "use_auth_token",
    "model_revision",
}
OLDER = {"overwrite_output_dir", "logging_dir", "push_to_hub_model_id", "warmup_ratio"}
"""Arguments of transformers 4 that version 5 has no more."""


@pytest.fixture
def data(tmp_path):
    root = photos(photos(tmp_path / "data"), split="val", count=3)
    return ["--train_dir", root / "train", "--validation_dir", root / "val", "--output_dir", tmp_path / "out"]


def refusal(capsys, examples, name, *arguments):
    """The sentence with which an example ends."""
    with pytest.raises(SystemExit) as caught:
        examples.run(name, *arguments)
    assert caught.value.code not in (0, None)
    return caught.value.code if isinstance(caught.value.code, str) else capsys.readouterr().err


def test_names_and_defaults_are_those_of_transformers(examples, quiet_transformers):
    shared = examples.load("trainer_arguments")
    theirs = {f.name: f.default for f in fields(quiet_transformers.TrainingArguments)}
    ours = {action.dest: action.default for action in shared.Arguments("")._actions if action.dest != "help"}
    assert ours.keys() - theirs.keys() - OF_THE_SCRIPTS - OLDER == set()
    honoured = (ours.keys() & theirs.keys()) - shared.NO_EFFECT.keys() - shared.INSTEAD.keys()
    assert {name: ours[name] for name in honoured if (ours[name] or None) != (theirs[name] or None)} == {
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch",
        "eval_steps": 500,
    }
    assert ours["learning_rate"] == 5e-5


@pytest.mark.parametrize("script", ["image_classification", "image_pretraining"])
def test_a_published_command_becomes_these_numbers(script, examples):
    options = examples.load(script).parser.parse_args(shlex.split(PUBLISHED))
    assert examples.load("trainer_arguments").settings(options) == {
        "optim": AdamW(lr=2e-5, per_images=8, weight_decay=0.0, clip=1.0),
        "schedule": Cosine(total=epochs(5), start=0, floor=0),
        "evaluate": epochs(1),
        "compute": Compute(),
        "seed": 1337,
    }
    assert (options.do_train, options.do_eval, options.train_val_split) == (True, True, 0.15)


def test_every_number_has_its_place(examples, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = (
        examples.load("trainer_arguments")
        .Arguments("")
        .parse_args(
            shlex.split(
                "--output-dir OUT --max_steps=40 --warmup-steps 0.1 --per-device-train-batch-size 4 --weight_decay=0.1 "
                "--gradient_accumulation_steps 3 --adam_beta1 0.8 --adam_beta2 0.9 --adam_epsilon 1e-6 "
                "--max_grad_norm 0 --evaluation_strategy steps --eval_steps 7 --bf16 "
                "--gradient_checkpointing True --torch_compile False "
                "--dataloader_num_workers 2 --report_to wandb --do_train no"
            )
        )
    )
    assert examples.load("trainer_arguments").settings(options) == {
        "optim": AdamW(lr=5e-5, per_images=24, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6, clip=None),
        "schedule": Cosine(total=steps(40), warmup=steps(4), start=0, floor=0),
        "evaluate": steps(7),
        "compute": Compute(
            precision="bfloat16", accumulate=3, checkpoint_blocks=True, compile=False, workers=2, log="wandb"
        ),
        "seed": 42,
    }
    assert options.do_train is False


def test_classification_trains_continues_and_evaluates(examples, data, tmp_path, capsys):
    start = trained_folder(tmp_path / "start")
    command = [*data, "--model_name_or_path", start, "--do_train", "--do_eval", "--learning_rate", "1e-3"]
    command += ["--save_strategy", "epoch", "--eval_strategy", "epoch", "--bf16", "False", "--max_eval_samples", "8"]
    examples.run("image_classification", *command)
    said = capsys.readouterr()
    assert "--save_strategy changes nothing: the run keeps its two newest checkpoints" in said.err
    out = tmp_path / "out"
    recipe = Recipe.from_dict(json.loads((out / "recipe.json").read_text()))
    assert (recipe.data.batch, recipe.start, recipe.objective) == (8, str(start), Supervised())
    assert [row["step"] for row in Record.read(out).rows if "val_accuracy" in row] == [3, 6, 8]

    val = read_split(tmp_path / "data", "val")
    kept = examples.load("trainer_arguments").some(val, 8, 42)
    best = Predictor(out / "model")(kept.files, top_k=1)
    right = [labels[0]["label"] == val.classes[label] for labels, label in zip(best, kept.labels, strict=True)]
    found = json.loads((out / "eval_results.json").read_text())
    assert found["eval_samples"] == 8
    assert found["eval_accuracy"] == pytest.approx(sum(right) / 8)
    assert f"eval_accuracy = {sum(right) / 8:.4g}" in said.out

    before = (out / "metrics.jsonl").read_text()
    examples.run("image_classification", *command)  # is at its end already
    assert (out / "metrics.jsonl").read_text() == before
    assert "holds a run of another recipe" in refusal(capsys, examples, "image_classification", *command, "--seed", "1")
    examples.run("image_classification", *command, "--seed", "1", "--overwrite_output_dir")
    assert Record.read(out).recipe["seed"] == 1
    examples.run("image_classification", *data, "--do_eval", "--model_name_or_path", out / "model")
    assert json.loads((out / "eval_results.json").read_text())["eval_samples"] == 9


def test_a_teacher_with_the_arguments_of_the_original_code(examples, data, tmp_path):
    start = trained_folder(tmp_path / "start", "plain", labels="abc")
    taught = ["--teacher_model", start, "--distillation-type", "soft", "--distillation-alpha", "0.3", "--tau", "3"]
    examples.run(
        "image_classification", *data, "--model_name_or_path", start, "--do_train", "--max_steps", "2", *taught
    )
    record = Record.read(tmp_path / "out")
    recipe = Recipe.from_dict(record.recipe)
    assert recipe.objective == Distilled(
        teacher=str(start), kind="soft", weight=0.3, temperature=3.0, normalisation="elements"
    )
    assert recipe.model.distillation_token
    assert 0 <= record.last("agreement") <= 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "add --do_train, --do_eval, or both"),
        ("--push_to_hub", "call push_to_hub of the trained model"),
        ("--fp16 True", "use --bf16"),
        ("--deepspeed file.json", "use torchrun"),
        ("--lr_scheduler_type linear", "choose from"),
        ("--do_train maybe", "expected True or False, found maybe"),
        ("--metric_for_best_model loss", "unrecognized arguments: --metric_for_best_model"),
        ("--do_train --distillation_type hard", "name it with --teacher_model"),
        ("--do_train --model_name_or_path nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments, sentence, examples, data, tmp_path, capsys):
    start = trained_folder(tmp_path / "start")
    given = [*data, "--model_name_or_path", start, *shlex.split(arguments)]
    assert sentence in refusal(capsys, examples, "image_classification", *given)
    assert not (tmp_path / "out/model").exists()


def test_no_data_is_refused(examples, monkeypatch, capsys):
    out = ["--output_dir", "out", "--do_train"]
    assert "give --train_dir" in refusal(capsys, examples, "image_classification", *out)
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = refusal(capsys, examples, "image_classification", *out, "--dataset_name", "beans")
    assert said == "--dataset_name needs the library datasets; install it, or give --train_dir"
    assert "give --train_dir" in refusal(capsys, examples, "image_pretraining", *out)
    said = refusal(capsys, examples, "image_pretraining", *out, "--dataset_name", "cifar10")
    assert "save the images of cifar10 in a folder" in said


@pytest.mark.slow
def test_a_data_set_becomes_folders(examples, tmp_path):
    pytest.importorskip("datasets")
    photos(photos(tmp_path / "data"), split="validation", count=3)
    start = trained_folder(tmp_path / "start")
    out = tmp_path / "out"
    given = ["--dataset_name", tmp_path / "data", "--output_dir", out, "--model_name_or_path", start, "--do_train"]
    with pytest.raises(SystemExit, match="has no column labels, but image, label; set"):
        examples.run("image_classification", *given, "--label_column_name", "labels")
    examples.run("image_classification", *given, "--do_eval", "--max_steps", "1")
    found, expected = (read_data(root, holdout=0, seed=0) for root in (out / "data", tmp_path / "data"))
    for one, other in zip(found, expected, strict=True):
        assert (one.classes, one.labels) == (other.classes, other.labels)
    assert json.loads((out / "eval_results.json").read_text())["eval_samples"] == 9


def test_pretraining_makes_a_start_for_classification(examples, data, tmp_path, capsys):
    sizes = "hidden_size=24,num_attention_heads=3,intermediate_size=48,num_hidden_layers=2,qkv_bias=false"
    masked = ["--image_size", "16", "--patch_size", "4", "--mask_patch_size", "8", "--mask_ratio", "0.5"]
    given = [*data, "--model_type", "vit", "--config_overrides", sizes, *masked, "--label_names", "bool_masked_pos"]
    examples.run("image_pretraining", *given, "--do_train", "--do_eval", "--max_steps", "3", "--bf16", "False")
    out = tmp_path / "out"
    record = Record.read(out)
    recipe = Recipe.from_dict(record.recipe)
    assert recipe.objective == MaskedImage(ratio=0.5, unit=8)
    config = DeiTForMaskedImageModeling.from_pretrained(out / "model").config
    assert (config.hidden_size, config.num_hidden_layers, config.qkv_bias) == (24, 2, False)
    assert (config.image_size, config.patch_size, config.encoder_stride) == (16, 4, 4)
    assert config.model_type == "vit"
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] == record.last("val_loss")
    assert sum(record.about.train) == 21
    assert sum(record.about.val) == 9

    capsys.readouterr()
    tuned = [
        "--output_dir",
        tmp_path / "tuned",
        "--model_name_or_path",
        out / "model",
        "--do_train",
        "--max_steps",
        "1",
    ]
    examples.run("image_classification", "--train_dir", tmp_path / "data/train", *tuned)
    assert "val" in capsys.readouterr().err
    record = Record.read(tmp_path / "tuned")
    assert (sum(record.about.train), sum(record.about.val)) == (18, 3)  # 0.15 of 7 for each class


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "add --do_train"),
        ("--do_train --encoder_stride 32", "--encoder_stride is the patch size 16, found 32"),
        ("--do_train --model_name_or_path START --config_overrides hidden_size=3", "leave one of them out"),
        ("--do_train --mask_patch_size 24", "must be a multiple of the patch size"),
        ("--do_train --mask_ratio 60", "ratio must be from 0.01 to 0.99"),
    ],
)
def test_pretraining_refuses(arguments, sentence, examples, data, tmp_path, capsys):
    start = str(trained_folder(tmp_path / "start"))
    given = [*data, *(start if word == "START" else word for word in shlex.split(arguments))]
    assert sentence in refusal(capsys, examples, "image_pretraining", *given)


def test_it_starts_from_another_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "image_pretraining.py"), "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--mask_ratio" in done.stdout
