"""Distillation as a person does it: a teacher trained, its labels stored, students trained with either."""

import json
import shutil
import signal
import statistics
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launch import assert_same_end, finish, kill, photos, reached, start, wait_for
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from deit import objectives, runs
from deit import train as loop
from deit.cli import main
from deit.config import DeiTConfig
from deit.convnet import ConvNet
from deit.data import read_data
from deit.machine import Processes
from deit.recipe import AdamW, Augment, Cosine, Data, Distilled, Mix, Recipe, Supervised, steps
from deit.teach import teach
from deit.train import _loop, _update  # noqa: F401

RECIPES = '''
from deit.config import ConvNetConfig, DeiTConfig
from deit.recipe import *

COMPUTE = Compute(precision="float32", workers=0)
MODEL = DeiTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=16,
                   patch_size=4, encoder_stride=4, layer_norm_eps=1e-6, drop_path_rate=0.2, distillation_token=True)


def teacher():
    return Recipe(
        name="teacher", model=ConvNetConfig(widths=(8, 16), depth=1, image_size=16),
        data=Data(batch=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)), objective=Supervised(),
        augment=Augment(flip=0.5), optim=SGD(lr=1e-2, per_images=8), schedule=Cosine(total=steps(20)),
        compute=COMPUTE, evaluate=steps(20))


def student():
    """Eight epochs of 21 images in batches of 8; everything random at once."""
    return Recipe(
        name="student", model=MODEL, data=Data(batch=8, repeats=2), objective=Distilled(smoothing=0.1),
        augment=Augment(crop=ResizedCrop(), flip=0.5, policy=RandAugment(std=0.5), erase=Erase(),
                        mix=Mix(mixup=0.8, cutmix=1.0)),
        optim=AdamW(lr=1e-2, per_images=8, clip=1.0), schedule=Cosine(total=steps(21), warmup=steps(5)), ema=0.9,
        compute=COMPUTE, evaluate=steps(7))
'''
