"""LoRA of the `peft` library on our models and on those of `transformers`, with the same adapters."""

import pytest
import torch
from support.checks import assert_close
from support.hugging_face import pair
from support.models import images, scramble, small

from deit import weights
from deit.model.network import DeiTForImageClassification

peft = pytest.importorskip("peft")
import transformers  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("quiet_transformers"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # which peft asks
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),  # peft, of a model in memory
]
NAME = "DeiTForImageClassification"
RANK = 4


def adapted(model, *targets):
    config = peft.LoraConfig(
        r=RANK, lora_alpha=8, target_modules=list(targets), modules_to_save=["classifier"], lora_dropout=0.0
    )
    return peft.get_peft_model(model, config)


def of(tuned, end):
    """Parameters of the adapters by their module's name."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix).split(f".{end}.")[0]: p for name, p in tuned.named_parameters() if f".{end}." in name
    }


@torch.no_grad()
def same_adapters(ours, theirs):
    """One fused adapter is three adapters that share their first matrix, the three parts of the second one apart."""
    for end in ("lora_A", "lora_B"):
        mine, apart = of(ours, end), of(theirs, end)
        for name, parameter in mine.items():
            block = name.split(".")[2]
            for i, letter in enumerate("qkv"):
                target = apart[f"deit.layers.{block}.attention.{letter}_proj"]
                target.copy_(parameter if end == "lora_A" else parameter[i * 24 : (i + 1) * 24])


@pytest.fixture
def tuned():
    """Both libraries' models with the same weights and adapters; that of the fused layer is on `qkv`."""
    ours, theirs = pair(NAME, small())
    both = adapted(ours, "qkv"), adapted(theirs, "q_proj", "k_proj", "v_proj")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for end in ("lora_A", "lora_B"):
            for parameter in of(both[0], end).values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    same_adapters(*both)
    return both


def test_answers_and_gradients(tuned):
    ours, theirs = (model.train() for model in tuned)
    plain = pair(NAME, small())[0]
    x, labels = images(plain.config, 4), torch.tensor([0, 1, 2, 3])
    found, expected = (model(pixel_values=x, labels=labels) for model in (ours, theirs))
    assert_close(found.logits, expected.logits)
    assert (found.logits - plain(x).logits).abs().max() > 0.1
    for out in (found, expected):
        out.loss.backward()
    firsts, seconds = of(theirs, "lora_A"), of(theirs, "lora_B")
    for name, parameter in of(ours, "lora_A").items():
        block = name.split(".")[2]
        parts = [f"deit.layers.{block}.attention.{letter}_proj" for letter in "qkv"]
        assert_close(parameter.grad, sum(firsts[part].grad for part in parts))
        assert_close(of(ours, "lora_B")[name].grad, torch.cat([seconds[part].grad for part in parts]))
    trained = {name for name, p in ours.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in ours.named_parameters() if "lora_" in n or "modules_to_save" in n}


def test_adapters_are_saved_and_read(tuned, tmp_path):
    ours, _ = tuned
    x = images(ours.config, 3)
    with torch.no_grad():
        expected = ours.eval()(x).logits
        ours.save_pretrained(tmp_path)
        fresh = pair(NAME, small())[0]
        again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
        assert_close(again(x).logits, expected, 1e-6)
        again.disable_adapter_layers()
        assert (again(x).logits - expected).abs().max() > 0.1


def test_merged(tuned, tmp_path):
    """The merged model is one of ours again, and loads in `transformers`."""
    ours, theirs = tuned
    x = images(ours.config, 3)
    with torch.no_grad():
        expected = theirs.eval()(x).logits
        merged = ours.merge_and_unload()
        assert type(merged) is DeiTForImageClassification
        assert_close(merged(x).logits, expected)
        merged.save_pretrained(tmp_path)
        assert_close(DeiTForImageClassification.from_pretrained(tmp_path)(x).logits, expected)
        assert_close(transformers.DeiTForImageClassification.from_pretrained(tmp_path)(x).logits, expected)
    state = theirs.merge_and_unload().state_dict()
    assert_close(weights.from_ours(merged._tensors(), "hf5"), state)


def test_layers_of_the_same_name():
    """`fc1` and `fc2` are called so in both libraries."""
    ours, theirs = (adapted(model, "fc1", "fc2") for model in pair(NAME, small()))
    for end in ("lora_A", "lora_B"):
        apart = of(theirs, end)
        for name, parameter in of(scramble(ours) if end == "lora_A" else ours, end).items():
            apart[name.replace("blocks", "layers")].data = parameter.data.clone()
    base = {n.removeprefix("base_model.model."): p for n, p in ours.named_parameters() if "lora_" not in n}
    plain = {n.replace(".base_layer", "").replace(".modules_to_save.default", ""): p for n, p in base.items()}
    plain = {n: p for n, p in plain.items() if "original_module" not in n}
    named = weights.from_ours(plain, "hf5")
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            key = name.removeprefix("base_model.model.").replace(".base_layer", "")
            key = key.replace(".modules_to_save.default", "").replace(".original_module", "")
            if "lora_" not in name:
                p.copy_(named[key])
    x = images(small(), 3)
    assert_close(ours.eval()(x).logits, theirs.eval()(x).logits)


def test_all_linear_layers():
    ours = peft.get_peft_model(pair(NAME, small())[0], peft.LoraConfig(r=RANK, target_modules="all-linear"))
    ends = {name.split(".")[-1] for name in of(ours, "lora_A")}
    assert ends == {"qkv", "out", "fc1", "fc2", "classifier"}


def test_the_trainer_saves_adapters(tuned, tmp_path):
    ours, _ = tuned
    x = images(ours.config, 4)
    data = [{"pixel_values": image, "labels": i} for i, image in enumerate(x)]
    args = transformers.TrainingArguments(
        tmp_path / "run", max_steps=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(model=ours, args=args, train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / "out")
    again = peft.PeftModel.from_pretrained(pair(NAME, small())[0], tmp_path / "out").eval()
    with torch.no_grad():
        assert_close(again(x).logits, ours.eval()(x).logits, 1e-6)


@pytest.mark.parametrize("targets", [["query", "value"], ["q_proj", "v_proj"]])
def test_names_of_other_layouts_are_refused(targets):
    """transformers 4 and 5 name three layers where these models have one."""
    with pytest.raises(ValueError, match="No modules were targeted"):
        adapted(pair(NAME, small())[0], *targets)
