"""What `transformers.Trainer` leaves out of its folders for classes that are not its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from deit import files
from deit.config import DeiTConfig
from deit.image.processor import DeiTImageProcessor
from deit.weights import hub

WEIGHTS = "model.safetensors"


class Configured(Protocol):
    """A model with a config, which may have changed by the time it is saved."""

    @property
    def config(self) -> DeiTConfig: ...


class TrainerFiles:
    """A processor that also completes a folder of the Trainer: for `transformers.Trainer(processing_class=...)`.

    Of a class that is not its own the Trainer saves the weights alone, under the names in memory. After that it calls
    `save_pretrained` of its `processing_class`, which adds `config.json` here and gives the weights Hugging Face's
    names. So each checkpoint and each saved model loads in `from_pretrained`, here and in `transformers`.

    Everything else is the processor's.
    """

    def __init__(self, model: Configured, processor: DeiTImageProcessor):
        self.model = model
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "processor"):  # not there yet, while it is copied
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.processor(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Completes `save_directory`, where the Trainer has just written the weights."""
        self.processor.save_pretrained(save_directory, **options)
        path = Path(save_directory, WEIGHTS)
        config = self.model.config
        if path.is_file():
            found = hub.of_tensors(hub.read_tensors(path), config, str(path))
            hub.write_checkpoint(Path(save_directory), config, found.tensors, max_shard_size=2**63)
        else:  # sharded by another library, or not saved
            files.write_text(Path(save_directory, "config.json"), config.to_json_string())
