"""Runs of several ranks, started as torchrun starts them, and callbacks that note what each rank saw."""

import json
import os
import socket
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from runs import FORKSERVER, SMALL, entry
from torch.profiler import ProfilerActivity, profile

from rlvr.context import ContextGroup


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


def on_ranks(
    folder: Path, ranks: int, work: Callable[..., None], *arguments: Any, backend: str = "gloo"
) -> None:
    """Call ``work(context, *arguments)`` in processes that are the ranks of one group; fails as it does."""
    processes = [
        FORKSERVER.Process(target=_member, args=(folder, rank, ranks, backend, work, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    errors = [(folder / f"{rank}.txt").read_text() for rank in range(ranks)]
    assert [process.exitcode for process in processes] == [0] * ranks, "\n".join(errors)


def _member(
    folder: Path, rank: int, ranks: int, backend: str, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.dup2(os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT), 2)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    work(ContextGroup(dist.group.WORLD), *arguments)
    dist.destroy_process_group()


def _rank(overrides: list[str], folder: Path, environment: dict[str, Any]) -> None:
    folder.mkdir()
    os.environ.update({key: str(value) for key, value in environment.items()})
    entry(overrides, folder)
