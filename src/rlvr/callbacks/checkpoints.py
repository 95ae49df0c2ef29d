"""Checkpoints: written whole or not at all, and an orderly end on a signal."""

import os
import signal
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from rlvr.module import RLVRModule
from rlvr.strategies import gathered


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames.

    Lightning's own writer goes through the system's temporary folder: where that is another disk its last
    step is a copy, and a kill in it leaves half a file under the final name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a wish to stop after this iteration; the second stops now."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def install(self) -> None:
        """Listen; only the main thread may."""
        signal.signal(signal.SIGINT, self._receive)
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print(
            f"\n{signal.Signals(number).name}: finishing this iteration, then saving; once more stops now",
            flush=True,
        )


class Checkpoints(Checkpoint):
    """Saves ``checkpoints/last.ckpt`` every few iterations, at the end, and when the run is asked to stop.

    Args:
        folder: of the run.
        every: iterations between two checkpoints.
        keep_every: also keep ``checkpoints/iteration-K.ckpt`` every so many iterations; None keeps only the
            last.
        stop: where signals are noted.
    """

    def __init__(
        self, folder: Path, *, every: int = 1, keep_every: int | None = None, stop: StopRequest
    ) -> None:
        self.folder, self.every, self.keep_every, self.stop = folder / "checkpoints", every, keep_every, stop
        self.stop_reason: str | None = None

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen in the place of Lightning, which at a SIGTERM leaves in the middle of an iteration."""
        self.stop.install()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where it is time, or where the run stops here."""
        assert isinstance(pl_module, RLVRModule)
        done = trainer.current_epoch + 1
        limit = pl_module.algorithm.max_skipped
        asked = next((number for number in gathered(self.stop.signal) if number is not None), None)
        if asked is not None:
            self.stop.signal = asked  # perhaps of another rank alone
            self.stop_reason = signal.Signals(asked).name
        elif pl_module.skipped >= limit:
            self.stop_reason = (
                f"{pl_module.skipped} updates had a loss or gradient that is not finite, expected fewer than "
                f"algorithm.max_skipped={limit}; try a lower algorithm.lr"
            )
        if self.stop_reason:
            trainer.should_stop = True
        if trainer.should_stop or done % self.every == 0 or done == trainer.max_epochs:
            self._save(trainer, self.last)
        if self.keep_every and done % self.keep_every == 0:
            self._save(trainer, self.folder / f"iteration-{done}.ckpt")

    def _save(self, trainer: Trainer, path: Path) -> None:
        """Save; the seconds stand in the next iteration's row, for this one's is in the checkpoint."""
        begin = time.perf_counter()
        trainer.save_checkpoint(path)
        module = trainer.lightning_module
        assert isinstance(module, RLVRModule)
        module.ledger.add("time/checkpoint_s", time.perf_counter() - begin)
