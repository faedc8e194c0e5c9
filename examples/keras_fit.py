"""Distils a teacher into a DeiT with Keras' own `fit`, and saves it as a folder that PyTorch reads too.

    python examples/keras_fit.py --data deit-quickstart/data --teacher deit-quickstart/teacher/model --out keras-student
    KERAS_BACKEND=jax python examples/keras_fit.py ...

PyTorch computes the teacher's logits once, before training. With a teacher in Keras, call its `predict` instead.
"""

import argparse

import numpy as np

from deit import DeiTConfig, DeiTImageProcessor, TFDeiTForImageClassificationWithTeacher  # isort: skip
import keras
import torch

from deit import load_model
from deit.data import read_data

parser = argparse.ArgumentParser(description="Distils a teacher into a DeiT with Keras.")
parser.add_argument("--data", required=True, help="folder or list of labelled images")
parser.add_argument("--teacher", required=True, help="folder or hub name of a model of the same classes")
parser.add_argument("--out", required=True, help="folder for the student")
parser.add_argument("--epochs", type=int, default=20, help="length of training")
parser.add_argument("--batch", type=int, default=64, help="images of a step")


def teacher_logits(name, split):
    model, processor = load_model(name).eval(), DeiTImageProcessor.from_pretrained(name)
    if tuple(model.config.id2label.values()) != split.classes:
        raise SystemExit(f"expected a teacher of the classes {split.classes}, found {model.config.id2label}")
    found = []
    with torch.no_grad():
        for first in range(0, len(split), 64):
            found.append(
                model(processor(list(split.files[first : first + 64]), return_tensors="pt").pixel_values).logits
            )
    return torch.cat(found).numpy()


def main():
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    train, val = read_data(options.data, holdout=0.1, seed=0)
    config = DeiTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
        image_size=32,
        patch_size=8,
        initializer_range=0.06,
        id2label=dict(enumerate(train.classes)),
    )
    processor = DeiTImageProcessor.paper(config.image_size, crop_ratio=1.0)
    images, val_images = (processor(list(split.files), return_tensors="np").pixel_values for split in (train, val))
    labels, val_labels = (np.array(split.labels, "int32") for split in (train, val))

    model = TFDeiTForImageClassificationWithTeacher(config)
    rate = keras.optimizers.schedules.CosineDecay(1e-3, options.epochs * -(-len(train) // options.batch))
    # Without a loss, the model takes the one of the paper: labels for one token, the teacher's decisions for the other.
    model.compile(keras.optimizers.AdamW(rate, weight_decay=0.05), metrics=["accuracy"])
    model.fit(
        {"pixel_values": images, "teacher_logits": teacher_logits(options.teacher, train)},
        labels,
        validation_data=(val_images, val_labels),
        batch_size=options.batch,
        epochs=options.epochs,
        verbose=2,
    )
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"the student is in {options.out}; try `deit predict {options.out} IMAGE`")


if __name__ == "__main__":
    main()
