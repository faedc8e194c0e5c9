# %% [markdown]
# # From a folder of images to a distilled model
#
# This notebook trains a small teacher and a DeiT that learns from labels and from that teacher. It then judges both,
# looks at what the answers rest on, and labels images. It needs no internet, and some minutes on a laptop:
#
# ```sh
# pip install ".[quickstart]" matplotlib
# ```
#
# For your own images, leave out the first step, and let `data` be a folder with a folder of images for each class. For
# photos, take the recipes `teacher` and `finetune_distilled` instead of those for digits.

# %%
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from rich.console import Console

from deit import Predictor
from deit.data import read_data, read_split
from deit.data.folders import write_digits
from deit.evaluate import examine_split
from deit.explain import explain_file, figure
from deit.recipe import epochs
from deit.recipes.digits import digits, digits_teacher
from deit.report import of_run
from deit.train import Record, train

data, runs = Path("notebook-run/data"), Path("notebook-run")
quiet = Console(quiet=True)  # leave it out, and training shows its progress

# %% [markdown]
# ## The images
#
# scikit-learn brings 1,797 scanned digits. They are written as a folder `train`, `val` and `test`, each with a folder
# for every class.

# %%
sizes = write_digits(data)
train_split, val_split = read_data(data, holdout=0.1, seed=0)
test_split = read_split(data, "test", train_split.classes)
print(sizes)


# %%
def show(files, titles, columns=10):
    rows = -(-len(files) // columns)
    _, axes = plt.subplots(rows, columns, figsize=(columns, 1.3 * rows))
    for axis, file, title in zip(axes.flat, files, titles, strict=True):
        axis.imshow(Image.open(file), cmap="gray")
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    plt.show()


some = np.random.default_rng(0).permutation(len(train_split))[:10]
show([train_split.files[i] for i in some], [train_split.classes[train_split.labels[i]] for i in some])

# %% [markdown]
# ## The teacher
#
# A recipe is the complete description of an experiment. `digits_teacher` is a small ConvNet. Everything in it can be
# changed with `replace`: here its length, because 10 of its 20 epochs are enough to see how it works.

# %%
recipe = digits_teacher()
recipe = replace(recipe, schedule=replace(recipe.schedule, total=epochs(10)))
teacher = train(recipe, train_split, val_split, runs / "teacher", console=quiet)
print(f"the teacher is right on {teacher.score:.3f} of the validation images")

# %% [markdown]
# ## The student
#
# The student is a DeiT. Its class token learns from the labels, and its distillation token from the teacher's
# decisions. The recipe has 50 epochs, and this notebook takes 15.

# %%
recipe = digits(teacher=teacher.model)
recipe = replace(recipe, schedule=replace(recipe.schedule, total=epochs(15)))
student = train(recipe, train_split, val_split, runs / "student", console=quiet)
print(f"the student is right on {student.score:.3f} of the validation images")

# %%
rows = Record.read(runs / "student").rows
_, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
losses = [row for row in rows if "loss" in row]
left.plot([row["epoch"] for row in losses], [row["loss"] for row in losses])
left.set(xlabel="epoch", title="loss on training images")
judged = [row for row in rows if "val_accuracy" in row]
for head in ("class", "distillation", "fused"):
    key = "val_accuracy" if head == "fused" else f"val_accuracy_{head}"
    right.plot([row["epoch"] for row in judged], [row[key] for row in judged], label=head)
right.set(xlabel="epoch", title="accuracy on validation images")
right.legend(title="head")
plt.show()

# %% [markdown]
# ## What they are worth
#
# The validation images chose the best model of each run, so the test images judge. The interval is for 95 %.

# %%
found = examine_split(student.model, test_split, str(data), "test", other=teacher.model, console=quiet)
report = found.main.report
for head in ("class", "distillation", "fused"):
    low, high = report.accuracy(head).interval
    print(f"{head:12} {report.accuracy(head).value:.3f} ({low:.3f} to {high:.3f})")
comparison = found.comparison
print(f"student {comparison.first.value:.3f}, teacher {comparison.second.value:.3f}, p = {comparison.p_value:.2f}")

# %%
_, axis = plt.subplots(figsize=(4, 4))
axis.imshow(np.sqrt(report.confusion()), cmap="Greys")
axis.set(xlabel="answer", ylabel="true digit", title="test images (square roots of counts)")
axis.set_xticks(range(10), report.classes)
axis.set_yticks(range(10), report.classes)
plt.show()

# %% [markdown]
# ## What an answer rests on
#
# Each token has maps of its own. A good map has a small deletion and a large insertion, compared with random orders
# ([docs/explain.md](../docs/explain.md)).

# %%
image = test_split.files[-100]
explanation = explain_file(student.model, image, methods=["relevance"])
print(explanation)
figure(explanation).quantize(64)  # few colours make a small file

# %% [markdown]
# ## Labels for images

# %%
predictor = Predictor(student.model)
files = list(test_split.files[::36])
best = [labels[0] for labels in predictor(files, top_k=1)]
show(files, [f"{label['label']} ({label['score']:.2f})" for label in best])

# %% [markdown]
# ## The report
#
# `report.html` has all of it on one page: curves, scores, mistakes and maps. The same model works with every command:
#
# ```sh
# deit predict notebook-run/student/model IMAGE
# deit serve notebook-run/student/model
# deit export notebook-run/student/model --to openvino --out student-openvino
# ```

# %%
print(of_run(runs / "student", data, console=quiet))
