"""Distributions in TensorBoard: ratio, probability, entropy."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger


class Histograms(Callback):
    """Histograms over rank 0's tokens of an iteration's last update, where the ratio has moved most.

    Args:
        every: iterations between two histograms.
    """

    def __init__(self, *, every: int = 10) -> None:
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write them after the last update."""
        k = trainer.current_epoch
        if k % self.every or batch_idx + 1 < trainer.num_training_batches or not trainer.is_global_zero:
            return
        mask = outputs["mask"]
        if not mask.any():
            return
        tokens = {
            "tokens/ratio": outputs["ratio"],
            "tokens/probability": outputs["logprobs"].exp(),
            "tokens/entropy": outputs["entropy"],
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, values in tokens.items():
                    logger.experiment.add_histogram(name, values[mask].float().cpu(), k)
