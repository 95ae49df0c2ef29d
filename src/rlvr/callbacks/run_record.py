"""Closing the iteration: one row in metrics.csv, TensorBoard and on the console."""

import resource
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from rlvr.module import RLVRModule
from rlvr.report import write_rows
from rlvr.strategies import gathered


class RunRecord(Callback):
    """Closes the ledger at the end of every iteration and writes its row everywhere.

    Runs after the callbacks that measure and before the one that saves, so that a checkpoint holds the rows
    of all the iterations it has seen; after a resume ``metrics.csv`` is written anew from those.

    Args:
        folder: of the run.
        name: printed before every line, to tell runs apart; empty for none.
        console_every_s: seconds between two progress lines.
    """

    def __init__(self, folder: Path, *, name: str = "", console_every_s: float = 2.0) -> None:
        self.folder, self.name, self.console_every_s = folder, name, console_every_s
        self._begin = self._printed = time.perf_counter()
        self._epoch_begin = self._begin
        self._first = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows that a checkpoint brought."""
        assert isinstance(pl_module, RLVRModule)
        self._begin = time.perf_counter()
        self._first = len(pl_module.ledger.rows)
        if trainer.is_global_zero and pl_module.ledger.rows:
            write_rows(self.folder / "metrics.csv", pl_module.ledger.rows)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the iteration's clock."""
        self._epoch_begin = time.perf_counter()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the update's clock."""
        self._update_begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sum the updates' seconds; a sum over the iteration, hence the share of a count."""
        assert isinstance(pl_module, RLVRModule)
        share = 1 / (trainer.num_training_batches * trainer.world_size)
        pl_module.ledger.add("time/update_s", time.perf_counter() - self._update_begin, share)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is measured before training starts is kept apart from the rows."""
        assert isinstance(pl_module, RLVRModule)
        if trainer.state.fn == TrainerFn.VALIDATING:  # on its own, not within an iteration
            values = pl_module.ledger.close(trainer.strategy.reduce, gathered)
            scores = {key: value for key, value in values.items() if key.startswith("val/")}
            target = pl_module.ledger.rows[-1] if pl_module.ledger.rows else pl_module.ledger.start
            target.update(scores)
            if trainer.is_global_zero and pl_module.ledger.rows:
                write_rows(self.folder / "metrics.csv", pl_module.ledger.rows)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the row."""
        assert isinstance(pl_module, RLVRModule)
        ledger, k = pl_module.ledger, trainer.current_epoch
        seconds = time.perf_counter() - self._epoch_begin
        ledger.add("time/iteration_s", seconds)
        data: Any = getattr(trainer, "datamodule", None)
        tokens = sum(len(rollout.token_ids) for rollout, _ in data.rollouts)
        ledger.add("perf/tokens_per_s", tokens, seconds / trainer.world_size)
        ledger.add("perf/peak_gib", _peak_gib(pl_module.device))
        for side in ("lower", "upper"):
            threshold = getattr(pl_module.clip_range, side)
            ledger.add(f"clip/{side}_slope", threshold.slope)
            ledger.add(f"clip/{side}_intercept", threshold.intercept)
        row = {"iteration": float(k), **ledger.close(trainer.strategy.reduce, gathered)}
        ledger.rows.append(row)
        if not trainer.is_global_zero:
            return
        write_rows(self.folder / "metrics.csv", ledger.rows)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=k)
        now = time.perf_counter()
        last = k + 1 == trainer.max_epochs
        if now - self._printed >= self.console_every_s or last or k == self._first:
            self._printed = now
            left = (now - self._begin) / (k + 1 - self._first) * ((trainer.max_epochs or 0) - k - 1)
            print(f"{self.name}{progress_line(row, trainer.max_epochs or 0)}  {left:4.0f} s left", flush=True)


def _peak_gib(device: torch.device) -> float:
    """Most memory held so far: the device's, or on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def progress_line(row: dict[str, float], total: int) -> str:
    """One iteration as a line: reward, entropy (nats), share clipped, mean thresholds, held-out score."""
    clipped = row.get("train/clip_frac_low", 0.0) + row.get("train/clip_frac_high", 0.0)
    heldout = next(
        (f"  held-out {v:.3f}" for key, v in row.items() if key.startswith("val/heldout/mean")), ""
    )
    return (
        f"{row['iteration'] + 1:4.0f}/{total}  reward {row['rollout/reward_mean']:.3f}  "
        f"entropy {row['rollout/entropy']:.3f}  clipped {clipped:5.1%}  "
        f"thresholds +{row.get('train/clip_high_mean', 0.0):.3f} "
        f"-{row.get('train/clip_low_mean', 0.0):.3f}{heldout}"
    )
