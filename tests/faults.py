"""Faults that happen to one rank of a real run, for tests of what the others do."""

import os
import signal
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.distributed.checkpoint import FileSystemWriter


class Kill(Callback):
    """Kills one rank with SIGKILL in an iteration: in its ``rollout``, its ``update``, or in mid-``save``."""

    def __init__(self, rank: int, phase: str, iteration: int = 1) -> None:
        self.rank, self.phase, self.iteration = rank, phase, iteration

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.global_rank, trainer.current_epoch) != (self.rank, self.iteration):
            return
        if self.phase == "rollout":
            engine: Any = trainer.datamodule.engine  # type: ignore[attr-defined]
            engine.generate = _die
        elif self.phase == "save":
            write = FileSystemWriter.write_data

            def write_and_die(*args: Any) -> Any:
                write(*args).wait()
                _die()

            FileSystemWriter.write_data = write_and_die  # type: ignore[method-assign]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = (trainer.global_rank, trainer.current_epoch, self.phase)
        if now == (self.rank, self.iteration, "update"):
            _die()


def _die(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
