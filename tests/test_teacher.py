"""What the teacher sees and says."""

import pytest
import torch
import torch.nn.functional as F
from conftest import raises_saying

from deit.config import ConvNetConfig
from deit.convnet import ConvNet
from deit.data import Batch
from deit.files import CheckpointError
from deit.image import DeiTImageProcessor
from deit.losses import distillation_loss
from deit.model import DeiTForImageClassificationWithTeacher
from deit.objectives import Distilled, Supervised, build
from deit.recipe import Data
from deit.recipe import Distilled as DistilledRecipe
from deit.recipe import Supervised as SupervisedRecipe
from deit.recipes.digits import digits
from deit.teacher import Teacher

STUDENT = Data(batch=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
CLASSES = ("ant", "bee", "cat", "dog")


def convnet(size=16):
    model = ConvNet(ConvNetConfig(widths=(4, 8), depth=1, image_size=size, id2label=dict(enumerate(CLASSES))))
    for name, buffer in model.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)  # in training mode the answers would differ
    return model


@pytest.fixture
def folder(tmp_path):
    convnet().save_pretrained(tmp_path)
    DeiTImageProcessor.paper(16).save_pretrained(tmp_path)
    return tmp_path


def test_convnet_round_trip(folder):
    pixels = torch.randn(2, 3, 16, 16)
    model = convnet().eval()
    model.save_pretrained(folder)
    again = ConvNet.from_pretrained(folder)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert again.config == model.config
    kept = ConvNetConfig.from_dict({**model.config.to_dict(), "favourite": "tea"})
    assert kept.to_dict() == {**model.config.to_dict(), "favourite": "tea"}
    assert not again.training


def test_convnet_that_does_not_fit_its_config(folder):
    model = ConvNet(ConvNetConfig(widths=(4, 9), depth=1, image_size=16, id2label=dict(enumerate(CLASSES))))
    text = (folder / "config.json").read_text()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="does not fit the config"):
        ConvNet.from_pretrained(folder)


def test_the_teacher_sees_its_own_normalisation(folder):
    """The same pixels 0 to 1, normalised once as the student's and once as the teacher's, give the same answer."""
    raw = torch.rand(4, 3, 16, 16)

    def normal(mean, std):
        return (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    teacher = Teacher.from_folder(folder, CLASSES, STUDENT)
    expected = ConvNet.from_pretrained(folder)(normal((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))).logits
    torch.testing.assert_close(teacher(normal(STUDENT.mean, STUDENT.std)), expected, atol=1e-5, rtol=0)
    assert not teacher(raw).requires_grad
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())


def test_the_teacher_sees_its_own_resolution(folder):
    pixels = torch.randn(2, 3, 24, 24)
    same = Data(batch=2, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    shrunk = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True)
    found = Teacher.from_folder(folder, CLASSES, same)(pixels)
    torch.testing.assert_close(found, ConvNet.from_pretrained(folder)(shrunk).logits, atol=1e-5, rtol=0)


def test_classes_in_another_order_are_permuted_by_name(folder):
    pixels = torch.randn(3, 3, 16, 16)
    straight = Teacher.from_folder(folder, CLASSES, STUDENT)(pixels)
    turned = Teacher.from_folder(folder, ("dog", "ant", "cat", "bee"), STUDENT)(pixels)
    assert torch.equal(turned, straight[:, [3, 0, 2, 1]])


@pytest.mark.parametrize("classes", [("ant", "bee", "cat", "cow"), CLASSES[:3], (*CLASSES, "eel")])
def test_other_classes_are_refused(folder, classes):
    with raises_saying(ValueError, folder, "does not have the data's classes"):
        Teacher.from_folder(folder, classes, STUDENT)


def test_a_teacher_whose_names_repeat_is_refused(tmp_path):
    labels = {0: "crane", 1: "tench", 2: "crane"}
    ConvNet(ConvNetConfig(widths=(4,), depth=1, id2label=labels)).save_pretrained(tmp_path)
    with raises_saying(ValueError, tmp_path, "it gives a name to several classes (3 and 2 classes)"):
        Teacher.from_folder(tmp_path, ("crane", "tench"), STUDENT)


def test_distilled_objective_is_the_papers_loss_with_the_teachers_answers(folder):
    teacher = Teacher.from_folder(folder, CLASSES, STUDENT)
    model = DeiTForImageClassificationWithTeacher(digits().model.replace(
        image_size=16, patch_size=8, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, num_labels=4)).eval()
    batch = Batch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))
    for recipe in (DistilledRecipe(teacher="t"), DistilledRecipe(teacher="t", kind="soft", weight=0.3, temperature=2.0),
                   DistilledRecipe(teacher="t", smoothing=0.1)):
        loss, parts = Distilled(recipe, teacher)(model, batch)
        out = model(batch.pixels)
        expected = distillation_loss(out.cls_logits, out.distillation_logits, batch.labels, teacher(batch.pixels),
                                     kind=recipe.kind, weight=recipe.weight, temperature=recipe.temperature,
                                     smoothing=recipe.smoothing)
        torch.testing.assert_close(loss, expected)
        agreement = (out.distillation_logits.argmax(-1) == teacher(batch.pixels).argmax(-1)).float().mean()
        assert parts["agreement"] == agreement


def test_supervised_objective_is_smoothed_cross_entropy():
    model = convnet().eval()
    batch = Batch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))
    loss, parts = Supervised(SupervisedRecipe(smoothing=0.2))(model, batch)
    logits = model(batch.pixels).logits
    target = F.one_hot(batch.labels, 4) * 0.8 + 0.2 / 4
    torch.testing.assert_close(loss, -(target * logits.log_softmax(-1)).sum(-1).mean())
    assert parts["accuracy"] == (logits.argmax(-1) == batch.labels).float().mean()


def test_distillation_without_a_teacher_is_refused():
    with raises_saying(ValueError, "recipe digits distils without naming a teacher", "objective.teacher"):
        build(digits(), CLASSES, torch.device("cpu"))
