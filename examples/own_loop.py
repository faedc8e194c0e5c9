"""A plain PyTorch loop: a DeiT learns from labels and from a teacher in memory, without recipes.

    python examples/own_loop.py --data deit-quickstart/data --teacher deit-quickstart/teacher/model --out student

The teacher can be any module that gives logits for the same classes in the same order.
"""

import argparse

import torch
from torch.utils.data import DataLoader, Dataset

from deit import DeiTConfig, DeiTForImageClassificationWithTeacher, DeiTImageProcessor, fuse_heads, load_model
from deit.data import read_data


class Images(Dataset):
    """Images as the student and as the teacher see them, with their labels."""

    def __init__(self, split, *processors):
        self.split, self.processors = split, processors

    def __len__(self):
        return len(self.split)

    def __getitem__(self, number):
        views = [torch.from_numpy(processor(self.split.files[number]).pixel_values[0]) for processor in self.processors]
        return *views, self.split.labels[number]


parser = argparse.ArgumentParser(description="Distils a teacher into a DeiT in a plain PyTorch loop.")
parser.add_argument("--data", required=True, help="folder or list of labelled images")
parser.add_argument("--teacher", required=True, help="folder or hub name of a model of the same classes")
parser.add_argument("--out", required=True, help="folder for the student")
parser.add_argument("--epochs", type=int, default=20, help="length of training")
parser.add_argument("--batch", type=int, default=64, help="images of a step")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


def main():
    options = parser.parse_args()
    torch.manual_seed(0)
    splits = read_data(options.data, holdout=0.1, seed=0)
    classes = splits[0].classes

    teacher = load_model(options.teacher).eval().to(options.device)
    if tuple(teacher.config.id2label.values()) != classes:
        raise SystemExit(f"expected a teacher of the classes {classes}, found {teacher.config.id2label}")
    config = DeiTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
        image_size=32,
        patch_size=8,
        initializer_range=0.06,
        id2label=dict(enumerate(classes)),
    )
    student = DeiTForImageClassificationWithTeacher(config).to(options.device)
    processor = DeiTImageProcessor.paper(config.image_size, crop_ratio=1.0)
    processors = processor, DeiTImageProcessor.from_pretrained(options.teacher)
    loaders = [
        DataLoader(Images(split, *processors), options.batch, shuffle=number == 0)
        for number, split in enumerate(splits)
    ]

    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=options.epochs * len(loaders[0]))
    for epoch in range(options.epochs):
        student.train()
        for batch in loaders[0]:
            pixels, for_teacher, labels = (each.to(options.device) for each in batch)
            with torch.no_grad():
                teacher_logits = teacher(for_teacher).logits
            # distillation="soft" learns from the teacher's probabilities instead of its decisions
            loss = student(pixels, labels=labels, teacher_logits=teacher_logits, distillation="hard").loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

        student.eval()
        right = dict.fromkeys(("class", "distillation", "fused"), 0)
        with torch.no_grad():
            for pixels, _, labels in loaders[1]:
                out = student(pixels.to(options.device))
                for head in right:
                    answers = fuse_heads(out.cls_logits, out.distillation_logits, head).argmax(-1).cpu()
                    right[head] += int((answers == labels).sum())
        scores = "  ".join(f"{head} {count / len(splits[1]):.3f}" for head, count in right.items())
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}  {scores}")

    student.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"the student is in {options.out}; try `deit predict {options.out} IMAGE`")


if __name__ == "__main__":
    main()
