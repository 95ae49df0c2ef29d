"""A few responses an iteration, for people to read."""

import json
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from rlvr.data import RolloutDataModule


class Samples(Callback):
    """Writes some responses of every iteration to ``samples.jsonl``, and now and then to TensorBoard.

    Args:
        per_iteration: responses kept, the first of the first prompts.
        text_every: iterations between two texts in TensorBoard.

    Attributes:
        folder: of the run; set by the entry point.
    """

    folder: Path

    def __init__(self, *, per_iteration: int = 2, text_every: int = 10) -> None:
        self.per_iteration, self.text_every = per_iteration, text_every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what a killed run wrote after its last checkpoint (at fit start, no epoch is known yet)."""
        path = self.folder / "samples.jsonl"
        if trainer.is_global_zero and path.exists():
            lines = [
                line for line in path.read_text().splitlines() if _iteration(line) < trainer.current_epoch
            ]
            path.write_text("".join(f"{line}\n" for line in lines))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them down."""
        data: Any = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or not isinstance(data, RolloutDataModule):
            return
        k, group = trainer.current_epoch, data.config.group_size
        chosen = data.rollouts[::group][: self.per_iteration]
        lines = []
        for rollout, verdict in chosen:
            sample = {
                "iteration": k,
                "prompt_id": rollout.prompt.id,
                "prompt": rollout.prompt.text,
                "answer": rollout.prompt.answer,
                "response": rollout.text,
                "finish_reason": rollout.finish_reason,
                "reward": verdict.reward,
                "reason": verdict.reason,
            }
            # ASCII, so that no surrogate of the model's can make the line unwritable.
            lines.append(json.dumps(sample))
        with (self.folder / "samples.jsonl").open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))
        if k % self.text_every == 0:
            text = "\n\n".join(f"    {line}" for line in lines)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text("samples", text, k)


def _iteration(line: str) -> float:
    """A line's iteration; infinity for a line that a kill cut in half."""
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError):
        return float("inf")
