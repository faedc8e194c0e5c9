"""What else receives the rows of a run's metrics: TensorBoard, Weights & Biases, MLflow, or an object of the user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from deit import files, host
from deit.recipe import Recipe
from deit.train.records import flat


class Receiver(Protocol):
    """Receives the rows of `metrics.jsonl`, in the main process alone.

    If a call fails, the run says so once and calls the receiver no more.
    """

    def begin(self, out: Path, recipe: Recipe, step: int) -> None:
        """Called once before the first row. `out` is the run's folder, and `step` the number of steps done before."""

    def row(self, numbers: dict[str, Any]) -> None:
        """Called for each row. The keys are in docs/evaluation.md. A resumed run may repeat rows after `step`."""

    def close(self, finished: bool) -> None:
        """Called at the end of a session. `finished` is False if an error or a signal ended it."""


class TensorBoard:
    """Writes the rows into `RUN/tensorboard`."""

    def begin(self, out: Path, recipe: Recipe, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def row(self, numbers: dict[str, Any]) -> None:
        for name, value in numbers.items():
            self.board.add_scalar(name, value, numbers["step"])
        self.board.flush()

    def close(self, finished: bool) -> None:
        self.board.close()


class WandB:
    """Sends the rows to Weights & Biases, as a run with the name of the run's folder and the recipe as its config.

    A resumed training continues the same run, whose id is in `RUN/wandb.id`. W&B leaves out rows that it has already.

    Args:
        options: of `wandb.init`, such as `project` and `entity`. Without them, W&B's own settings hold (`WANDB_*`).
    """

    def __init__(self, **options: Any):
        try:
            from wandb import init
        except ImportError:
            raise host.missing("Weights & Biases needs wandb", "wandb") from None
        self.init, self.options = init, options

    def begin(self, out: Path, recipe: Recipe, step: int) -> None:
        known = _read(file := out / "wandb.id")
        resumed = {"id": known, "resume": "allow", "allow_val_change": True} if known else {}
        own = {"dir": str(out), "name": out.absolute().name, "config": recipe.to_dict(), "reinit": "create_new"}
        self.run = self.init(**{**own, **resumed, **self.options})
        files.write_text(file, self.run.id)

    def row(self, numbers: dict[str, Any]) -> None:
        self.run.log(numbers, step=numbers["step"])

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class MLflow:
    """Sends the rows to MLflow, as a run with the name of the run's folder and the recipe as its parameters.

    A resumed training continues the same run, whose id is in `RUN/mlflow.id`.

    Args:
        options: of `mlflow.start_run`, such as `experiment_id` and `tags`. The server and the experiment are MLflow's
            own settings (`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`).
    """

    def __init__(self, **options: Any):
        try:
            import mlflow
        except ImportError:
            raise host.missing("MLflow needs mlflow", "mlflow") from None
        self.mlflow, self.options = mlflow, options

    def begin(self, out: Path, recipe: Recipe, step: int) -> None:
        known = _read(file := out / "mlflow.id")
        named = {"run_id": known} if known else {"run_name": out.absolute().name}
        run = self.mlflow.start_run(**{**named, "nested": True, **self.options})
        files.write_text(file, run.info.run_id)
        if not known:  # parameters can't be changed
            self.mlflow.log_params(flat(recipe.to_dict()))

    def row(self, numbers: dict[str, Any]) -> None:
        # Without run_id, because MLflow would ask the server for that run at each row. Not in the background, because
        # the end of the process would then try each row again if the server has gone.
        self.mlflow.log_metrics(numbers, step=numbers["step"])

    def close(self, finished: bool) -> None:
        self.mlflow.end_run("FINISHED" if finished else "KILLED")


def named(log: str | None) -> list[Receiver]:
    """The receivers that `compute.log` asks for. Raises `ImportError` if the package is not installed."""
    kinds: dict[str | None, Callable[[], Receiver]] = {"wandb": WandB, "mlflow": MLflow}
    return [kinds[log]()] if log else []


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""
