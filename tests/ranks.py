"""Runs of several ranks, started as torchrun starts them, and callbacks that note what each rank saw."""

import json
import os
import socket
from collections import Counter
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from runs import FORKSERVER, SMALL, entry
from torch.profiler import ProfilerActivity, profile


class Witness(Callback):
    """Writes what a rank decided on to ``rank-R.jsonl``, and in the first iteration what it sent."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 0:
            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._profile.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sent: Counter[str] = Counter()
        if trainer.current_epoch == 0:
            self._profile.stop()
            sent.update(event.name for event in self._profile.events() if event.name.startswith("c10d::"))
        seen = {
            "facts": vars(batch.facts),
            "totals": vars(batch.totals),
            "clip_range": str(pl_module.clip_range),
            "iteration": trainer.current_epoch,
            "prompts": batch.keys[:, 0].unique().tolist(),
            "sent": sent,
        }
        with (self.folder / f"rank-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(seen) + "\n")


def train_ranks(folder: Path, ranks: int, *overrides: str, timeout_s: float = 120.0) -> list[int | None]:
    """``rlvr-train`` on this many ranks; returns their exit codes, and leaves out-R.txt and err-R.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
        }  # fmt: skip
        arguments = [*SMALL, f"hydra.run.dir={folder}", f"trainer.devices={ranks}", *overrides]
        process = FORKSERVER.Process(target=_rank, args=(arguments, folder / str(rank), environment))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(timeout_s)
        process.kill()
    return [process.exitcode for process in processes]


def _rank(overrides: list[str], folder: Path, environment: dict[str, Any]) -> None:
    folder.mkdir()
    os.environ.update({key: str(value) for key, value in environment.items()})
    entry(overrides, folder)
