"""The arguments of transformers' example scripts, as parts of a recipe.

`image_classification.py` and `image_pretraining.py` share them. An argument is honoured, or accepted with a sentence
that says why it changes nothing, or refused with a sentence that says what to do instead.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from deit.recipe import AdamW, Compute, Cosine, Duration, epochs, steps
from deit.train import train

CHECKPOINTS = "the run keeps its two newest checkpoints: one every ten minutes, and one at its end"
BEST = "OUT/model is always the best model by the validation images"
ROWS = "metrics.jsonl has a row for each evaluation, and at least one for 50 steps"
NO_EFFECT = {
    "remove_unused_columns": "images in folders have no columns",
    "label_names": "the objective knows its labels",
    "ignore_mismatched_sizes": "a head for other labels is always a fresh one",
    "per_device_eval_batch_size": "evaluation takes batches as large as in training, and the scores are the same",
    "eval_accumulation_steps": "answers never pile up on the GPU",
    "auto_find_batch_size": "if memory runs out, a batch is computed in parts",
    "save_strategy": CHECKPOINTS,
    "save_steps": CHECKPOINTS,
    "save_total_limit": CHECKPOINTS,
    "load_best_model_at_end": BEST,
    "resume_from_checkpoint": "a run in OUT is always continued, unless --overwrite_output_dir is given",
    "logging_strategy": ROWS,
    "logging_steps": ROWS,
    "logging_first_step": ROWS,
    "logging_dir": "TensorBoard's files are in OUT/tensorboard",
    "disable_tqdm": "a bar is shown on terminals alone",
    "trust_remote_code": "no code of a repository is run",
}
INSTEAD = {
    "fp16": "the models train in float32 or bfloat16; use --bf16",
    "push_to_hub": "nothing is sent from here; call push_to_hub of the trained model",
    "push_to_hub_model_id": "nothing is sent from here; call push_to_hub of the trained model",
    "hub_model_id": "nothing is sent from here; call push_to_hub of the trained model",
    "do_predict": "use `deit predict OUT/model IMAGES`",
    "deepspeed": "use torchrun, and compute.parallel=shard of `deit train`",
    "fsdp": "use torchrun, and compute.parallel=shard of `deit train`",
    "cache_dir": "set the environment variable HF_HOME",
    "token": "set the environment variable HF_TOKEN",
    "use_auth_token": "set the environment variable HF_TOKEN",
    "model_revision": "download that revision, and give its folder as --model_name_or_path",
}


def flag(text):
    """A truth value as transformers reads it: `--do_train`, `--do_train True`, `--do_train False`."""
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {text}")
    return text.lower() in ("true", "yes", "1")


class NoEffect(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(f"{option_string} changes nothing: {NO_EFFECT[self.dest]}", file=sys.stderr)


class Refused(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        if str(values).lower() not in ("false", "no", "0"):
            parser.error(f"{option_string} is not possible: {INSTEAD[self.dest]}")


class Arguments(argparse.ArgumentParser):
    """A parser that already has what both scripts share."""

    def __init__(self, description):
        super().__init__(
            description=description,
            usage="%(prog)s --train_dir FOLDER --output_dir OUT --do_train [--do_eval] [ARGUMENTS]",
            allow_abbrev=False,
        )
        add = self.add
        add("output_dir", required=True, metavar="OUT", help="folder of the run; its model is in OUT/model")
        add("train_dir", help="folder of training images")
        add("validation_dir", help="folder of validation images")
        add("train_val_split", type=float, default=0.15, help="share that is held out without a --validation_dir")
        add("max_train_samples", type=int, help="largest number of training images")
        add("max_eval_samples", type=int, help="largest number of validation images")
        add("do_train", type=flag, help="train")
        add("do_eval", type=flag, help="evaluate")
        add("overwrite_output_dir", type=flag, help="begin anew instead of continuing the run in OUT")
        add("num_train_epochs", type=float, default=3.0, help="length of training")
        add("max_steps", type=int, default=-1, help="length of training in steps, instead of epochs")
        add("per_device_train_batch_size", type=int, default=8, help="images of a step on each device")
        add("gradient_accumulation_steps", type=int, default=1, help="such batches in a step")
        add("learning_rate", type=float, default=5e-5, help="peak learning rate, whatever the batch size")
        add("lr_scheduler_type", default="cosine", choices=["cosine"], help="shape of the schedule")
        add("warmup_ratio", type=float, default=0.0, help="share of training with a rising learning rate")
        add("warmup_steps", type=float, default=0.0, help="the same in steps; below 1, it is a share")
        add("optim", default="adamw_torch", choices=["adamw_torch", "adamw_torch_fused"], help="optimizer")
        add("weight_decay", type=float, default=0.0, help="of all but biases, norms, positions, class and mask token")
        add("adam_beta1", type=float, default=0.9, help="AdamW's first decay")
        add("adam_beta2", type=float, default=0.999, help="AdamW's second decay")
        add("adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon")
        add("max_grad_norm", type=float, default=1.0, help="largest norm of all gradients; 0 turns clipping off")
        add(
            "eval_strategy", "evaluation_strategy", default="no", choices=["no", "steps", "epoch"], help="when to judge"
        )
        add("eval_steps", type=int, default=500, help="steps between evaluations, for --eval_strategy steps")
        add("bf16", type=flag, default=None, help="True: bfloat16; False: float32; left out: what is fast here")
        add("gradient_checkpointing", type=flag, help="recompute blocks to save memory")
        add("torch_compile", type=flag, default=None, help="whether to compile the model")
        add("dataloader_num_workers", type=int, help="loader processes")
        add("report_to", default="none", choices=["none", "tensorboard", "wandb", "mlflow"], help="receiver of metrics")
        add("seed", type=int, default=42, help="of everything random")
        hidden = {"nargs": "?", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        for action, names in ((NoEffect, NO_EFFECT), (Refused, INSTEAD)):
            for name in names:
                self.add(name, action=action, **hidden)

    def add(self, *names, **settings):
        if settings.get("type") is flag:
            settings = {"default": False, "nargs": "?", "const": True, "metavar": "True", **settings}
        self.add_argument(*(f"--{name}" for name in names), **settings)

    def parse_known_args(self, args=None, namespace=None):
        """Takes --train-dir for --train_dir too, as transformers does."""
        given = (arg.partition("=") for arg in (sys.argv[1:] if args is None else args))
        args = [
            (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + equals + value
            for name, equals, value in given
        ]
        return super().parse_known_args(args, namespace)


def some(split, count, seed):
    """At most `count` images of a split, drawn at random; all of them if it is None."""
    if count is None or count >= len(split):
        return split
    return split.take(np.sort(np.random.default_rng(seed).permutation(len(split))[:count]))


def settings(options):
    """The fields of a recipe that these arguments decide, apart from its data."""
    length = steps(options.max_steps) if options.max_steps > 0 else epochs(options.num_train_epochs)
    ratio = options.warmup_steps if 0 < options.warmup_steps < 1 else options.warmup_ratio
    rising = Duration(length.amount * ratio, length.unit)
    return {
        "optim": AdamW(
            lr=options.learning_rate,
            per_images=batch(options),
            weight_decay=options.weight_decay,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            clip=options.max_grad_norm or None,
        ),
        "schedule": Cosine(
            total=length, warmup=steps(options.warmup_steps) if options.warmup_steps >= 1 else rising, start=0, floor=0
        ),
        "evaluate": {"no": length, "epoch": epochs(1), "steps": steps(options.eval_steps)}[options.eval_strategy],
        "compute": Compute(
            precision={None: "auto", True: "bfloat16", False: "float32"}[options.bf16],
            accumulate=options.gradient_accumulation_steps,
            checkpoint_blocks=options.gradient_checkpointing,
            compile=options.torch_compile,
            workers=options.dataloader_num_workers,
            log=options.report_to if options.report_to in ("wandb", "mlflow") else None,
        ),
        "seed": options.seed,
    }


def main_process():
    """Whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def batch(options):
    """Number of images of a step, on all devices that torchrun uses."""
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    return options.per_device_train_batch_size * options.gradient_accumulation_steps * devices


def begin(recipe, splits, options):
    """Trains, or continues the run that is in OUT."""
    checkpoints = Path(options.output_dir) / "checkpoints"
    if options.overwrite_output_dir and checkpoints.exists():
        if "RANK" in os.environ:
            raise ValueError(f"--overwrite_output_dir needs one process; remove {checkpoints}, and leave it out")
        shutil.rmtree(checkpoints)
    return train(recipe, *splits, options.output_dir, resume=True)
