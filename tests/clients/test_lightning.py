"""Lightning trains a module that holds one of our models, and its checkpoint loads in `from_pretrained`."""

import pytest
import torch
from support.checks import assert_close
from support.hugging_face import pair
from support.models import images, small

from deit import weights
from deit.model.network import DeiTForImageClassification

lightning = pytest.importorskip("lightning")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of Lightning itself


class Member(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        return self.model(pixel_values=batch[0], labels=batch[1]).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fitted(model, folder):
    data = torch.utils.data.TensorDataset(images(small(), 8), torch.arange(8) % 5)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Member(model), torch.utils.data.DataLoader(data, batch_size=4))
    (path,) = folder.rglob("*.ckpt")
    return path


def test_one_epoch(tmp_path):
    ours, theirs = (model.train() for model in pair("DeiTForImageClassification", small()))
    before = ours.classifier.weight.detach().clone()
    path = fitted(ours, tmp_path / "ours")
    fitted(theirs, tmp_path / "theirs")
    assert (ours.classifier.weight - before).abs().max() > 1e-3
    assert_close(weights.from_ours(ours._tensors(), "hf5"), theirs.state_dict(), 1e-4)
    with pytest.warns(UserWarning, match="every name begins with 'model.', and is read without it"):
        again = DeiTForImageClassification.from_pretrained(path, config=ours.config)
    assert_close(again.state_dict(), ours.state_dict(), 0)
    x = images(small())
    with torch.no_grad():
        assert_close(again(x).logits, theirs.eval()(x).logits, 1e-3)
