"""Faults that happen to one rank of a real run, for tests of what the others do."""

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter

from rlvr.batch import Prompt, Rollout
from rlvr.engines import SamplingParams
from rlvr.engines.transformers import TransformersEngine
from rlvr.errors import EngineDiedError, RunError


class Kill(Callback):
    """Fails one rank in an iteration.

    By SIGKILL in its ``rollout``, its ``update``, in mid-``save`` or before the ranks have met (``start``);
    by an exception in its update (``raise``).
    """

    def __init__(self, rank: int, phase: str, iteration: int = 1) -> None:
        self.rank, self.phase, self.iteration = rank, phase, iteration
        if phase == "start" and os.environ.get("LOCAL_RANK") == str(rank):
            _die()

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
        if (trainer.global_rank, trainer.current_epoch) != (self.rank, self.iteration):
            return
        if self.phase == "update":
            _die()
        if self.phase == "raise":
            raise ValueError("a planted fault")


class Mortal(TransformersEngine):
    """Dies in its second call, as a process would; the next sync starts it again."""

    calls = 0

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        self.calls += 1
        if self.calls == 2:
            raise EngineDiedError("the engine of a test")
        yield from super().generate(prompts, sampling)


class Stale(TransformersEngine):
    """Takes no weights."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        raise RunError("a planted fault of the engine")


def _die(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
