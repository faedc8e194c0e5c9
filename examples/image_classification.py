"""Fine-tunes a model on folders of images, with the arguments of transformers' `run_image_classification.py`.

    python examples/image_classification.py --model_name_or_path facebook/deit-tiny-distilled-patch16-224 \
        --train_dir photos/train --validation_dir photos/val --output_dir runs/photos --do_train --do_eval \
        --learning_rate 5e-5 --num_train_epochs 5 --remove_unused_columns False --seed 1337

A command that was written for that script runs here, if you exchange the name of the script. These things differ:

- The learning rate falls along a cosine and not a line.
- Images are resized bicubically, and keep their aspect ratio in evaluation.
- Positions and the class token have no weight decay.
- The model is in OUT/model, and it is the best one by the validation images.

With a teacher, the model is a distilled DeiT, and these arguments mean what they mean in DeiT's original main.py:

    python examples/image_classification.py ... --teacher_model runs/teacher/model --distillation_type soft --tau 3
"""

import json
import sys
from pathlib import Path

from trainer_arguments import Arguments, batch, begin, main_process, settings, some

from deit import DeiTConfig, DeiTImageProcessor
from deit.data.folders import matched, read_data, read_examples
from deit.evaluate import examine_split
from deit.recipe import Augment, Data, Distilled, Recipe, ResizedCrop, Supervised

parser = Arguments("Fine-tunes an image classifier, with the arguments of transformers' run_image_classification.py.")
parser.add(
    "model_name_or_path", default="google/vit-base-patch16-224-in21k", help="folder or hub name of a DeiT or ViT"
)
parser.add("image_processor_name", "feature_extractor_name", help="another model whose preprocessing is taken")
parser.add("dataset_name", help="a data set for the library `datasets`, instead of the folders")
parser.add("dataset_config_name", help="its configuration")
parser.add("image_column_name", default="image", help="its column of images")
parser.add("label_column_name", default="label", help="its column of labels")
parser.add("label_smoothing_factor", type=float, default=0.0, help="label smoothing, 0 to <1")
parser.add("teacher_model", help="a trained folder, a hub name, timm:NAME, or FILE.py:FUNCTION")
parser.add("distillation_type", choices=["none", "soft", "hard"], help="how it teaches; hard with a --teacher_model")
parser.add("alpha", "distillation_alpha", type=float, default=0.5, help="the teacher's share of the loss")
parser.add("tau", "distillation_tau", type=float, default=1.0, help="temperature of soft distillation")


def stored(options):
    """Writes the images of a data set into OUT/data, and gives its folders of training and validation images."""
    try:
        import datasets
    except ImportError:
        sys.exit("--dataset_name needs the library datasets; install it, or give --train_dir")
    root = Path(options.output_dir) / "data"
    found = datasets.load_dataset(options.dataset_name, options.dataset_config_name)
    for split, rows in found.items():
        if missing := {options.image_column_name, options.label_column_name} - rows.features.keys():
            raise ValueError(
                f"{options.dataset_name} has no column {', '.join(missing)}, but {', '.join(rows.features)}; set "
                "--image_column_name and --label_column_name"
            )
        names = rows.features[options.label_column_name]
        for number, row in enumerate(rows):
            folder = root / split / names.int2str(row[options.label_column_name])
            folder.mkdir(parents=True, exist_ok=True)
            row[options.image_column_name].convert("RGB").save(folder / f"{number:07}.png")
    return root / "train", root / "validation" if "validation" in found else None


def read(options):
    """The training and the validation images."""
    train_dir, validation_dir = stored(options) if options.dataset_name else (options.train_dir, options.validation_dir)
    if not train_dir:
        raise ValueError("there is no data; give --train_dir, a folder with a folder of images for each class")
    if validation_dir is None:
        splits = read_data(train_dir, holdout=options.train_val_split, seed=options.seed)
    else:
        train, _ = read_examples(train_dir)
        splits = train, matched(read_examples(validation_dir)[0], train.classes)
    counts = options.max_train_samples, options.max_eval_samples
    return [some(split, count, options.seed) for split, count in zip(splits, counts, strict=True)]


def objective(options):
    kind = options.distillation_type or ("hard" if options.teacher_model else "none")
    if kind == "none":
        return Supervised(smoothing=options.label_smoothing_factor)
    if not options.teacher_model:
        raise ValueError(f"--distillation_type {kind} needs a teacher; name it with --teacher_model")
    soft = {"temperature": options.tau, "normalisation": "elements"} if kind == "soft" else {}
    return Distilled(
        teacher=options.teacher_model, kind=kind, weight=options.alpha, smoothing=options.label_smoothing_factor, **soft
    )


def recipe(options, classes):
    processor = DeiTImageProcessor.from_pretrained(options.image_processor_name or options.model_name_or_path)
    goal = objective(options)
    model = DeiTConfig.from_pretrained(options.model_name_or_path).replace(id2label=dict(enumerate(classes)), extra={})
    return Recipe(
        name="image_classification",
        model=model.replace(distillation_token=True) if isinstance(goal, Distilled) else model,
        data=Data(
            batch=batch(options),
            holdout=options.train_val_split,
            crop_ratio=processor.crop_ratio or 1.0,
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
        ),
        augment=Augment(crop=ResizedCrop(), flip=0.5),
        objective=goal,
        start=options.model_name_or_path,
        **settings(options),
    )


def main():
    options = parser.parse_args()
    out, model = Path(options.output_dir), options.model_name_or_path
    if not (options.do_train or options.do_eval):
        raise ValueError("there is nothing to do; add --do_train, --do_eval, or both")
    splits = read(options)
    if options.do_train:
        model = begin(recipe(options, splits[0].classes), splits, options).model
    if options.do_eval and main_process():
        report = examine_split(model, splits[1], str(options.validation_dir or options.train_dir), "val").main.report
        found = {"eval_accuracy": report.accuracy().value, "eval_loss": report.nll, "eval_samples": report.images}
        out.mkdir(parents=True, exist_ok=True)
        (out / "eval_results.json").write_text(json.dumps(found, indent=4))
        print(*(f"{name} = {value:.4g}" for name, value in found.items()), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
