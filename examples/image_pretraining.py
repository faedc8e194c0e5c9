"""Pre-trains a model on images without labels, with the arguments of transformers' `run_mim.py`.

    python examples/image_pretraining.py --train_dir photos/train --output_dir runs/masked --do_train --do_eval \
        --model_type deit --config_overrides hidden_size=192,num_attention_heads=3,intermediate_size=768 \
        --mask_patch_size 32 --mask_ratio 0.6 --num_train_epochs 100 --learning_rate 2e-5

The model fills in hidden squares of the images (SimMIM). Afterwards, fine-tune it on labels with
`image_classification.py --model_name_or_path runs/masked/model`. OUT/reconstructions shows what it fills in.

These things differ from that script: the learning rate falls along a cosine and not a line, images are resized
bicubically, positions, class and mask token have no weight decay, and the model is in OUT/model.
"""

import ast
import json
import sys
from pathlib import Path

from trainer_arguments import Arguments, batch, begin, main_process, settings, some

from deit import DeiTConfig, DeiTImageProcessor, ViTConfig
from deit.data import Split, read_data
from deit.predict import find_images
from deit.recipe import Augment, Data, MaskedImage, Recipe, ResizedCrop

FAMILIES = {"deit": DeiTConfig, "vit": ViTConfig}

parser = Arguments("Pre-trains a model on masked images, with the arguments of transformers' run_mim.py.")
parser.add("model_name_or_path", help="model to start from; left out, training starts from random weights")
parser.add("config_name_or_path", "config_name", help="model whose sizes are taken, for random weights")
parser.add("model_type", default="deit", choices=FAMILIES, help="family of a model with random weights")
parser.add("config_overrides", help="changes to its config, e.g. hidden_size=192,num_attention_heads=3")
parser.add("image_processor_name", help="model whose preprocessing is taken")
parser.add("image_size", type=int, help="side of the images in pixels")
parser.add("patch_size", type=int, help="side of the patches in pixels")
parser.add("encoder_stride", type=int, help="the same as the patch size")
parser.add("mask_patch_size", type=int, default=32, help="side of the hidden squares in pixels")
parser.add("mask_ratio", type=float, default=0.6, help="share of the image that is hidden")
parser.add("dataset_name", help="refused: give --train_dir")


def read(options):
    """The training and the validation images, of whatever class."""
    if not options.train_dir:
        raise ValueError("there is no data; give --train_dir, a folder of images at any depth")
    if options.validation_dir:
        files = ([*map(Path, find_images([place]))] for place in (options.train_dir, options.validation_dir))
        splits = [Split(tuple(found), (0,) * len(found), ("image",)) for found in files]
    else:
        splits = read_data(options.train_dir, holdout=options.train_val_split, seed=options.seed, labelled=False)
    counts = options.max_train_samples, options.max_eval_samples
    return [some(split, count, options.seed) for split, count in zip(splits, counts, strict=True)]


def value(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def architecture(options):
    name = options.config_name_or_path or options.model_name_or_path
    changes = dict(pair.split("=", 1) for pair in (options.config_overrides or "").split(",") if pair)
    if name and changes:
        raise ValueError(f"--config_overrides are for random weights, found them with {name}; leave one of them out")
    model = DeiTConfig.from_pretrained(name) if name else FAMILIES[options.model_type]()
    sizes = {key: getattr(options, key) for key in ("image_size", "patch_size") if getattr(options, key)}
    model = model.replace(**{key: value(text) for key, text in changes.items()}, **sizes)
    if options.encoder_stride not in (None, model.patch_size):
        raise ValueError(
            f"the decoder paints whole patches, so --encoder_stride is the patch size {model.patch_size}, found "
            f"{options.encoder_stride}; leave it out"
        )
    return model.replace(num_labels=2, extra={}, encoder_stride=model.patch_size)


def recipe(options):
    name = options.image_processor_name or options.model_name_or_path
    processor = DeiTImageProcessor.from_pretrained(name) if name else DeiTImageProcessor()
    return Recipe(
        name="image_pretraining",
        model=architecture(options),
        data=Data(
            batch=batch(options),
            holdout=options.train_val_split,
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
        ),
        augment=Augment(crop=ResizedCrop(scale=(0.67, 1.0)), flip=0.5),
        objective=MaskedImage(ratio=options.mask_ratio, unit=options.mask_patch_size),
        start=options.model_name_or_path,
        **settings(options),
    )


def main():
    options = parser.parse_args()
    if options.dataset_name and not options.train_dir:
        raise ValueError(f"save the images of {options.dataset_name} in a folder, and give it as --train_dir")
    if not options.do_train:
        raise ValueError("there is nothing to do; add --do_train, which also judges the model")
    run = begin(recipe(options), read(options), options)
    if options.do_eval and main_process():
        found = {"eval_loss": -run.score}
        (Path(options.output_dir) / "eval_results.json").write_text(json.dumps(found, indent=4))
        print(f"eval_loss = {-run.score:.4g}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
