"""Whole runs of the embedded policy, as small as they get: in this process, or in one of their own."""

import csv
import multiprocessing
import os
import signal
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig

from rlvr.instantiate import CONF

SMALL = (
    "data.num_prompts=4",
    "data.group_size=4",
    "data.minibatches=2",
    "task.train=64",
    "task.heldout=8",
    "evaluation.samples=2",
    "evaluation.every=2",
    "algorithm.lr=3e-4",
    "trainer.max_epochs=4",
    "trainer.accelerator=cpu",
    "logger=none",
    "export=false",
)
"""Four iterations of two updates on 16 responses: a second, but for the report."""

SMALL_EVALUATION = ("task=letters", "task.train=8", "task.heldout=8", "data.max_new_tokens=10")
"""64 responses of the embedded policy, on the same problems as the runs above."""

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["rlvr.run", "rlvr.train", "rlvr.evaluation", "rlvr.evaluate"])


class LeftError(Exception):
    """What :class:`Leave` raises."""


class Leave(Callback):
    """Breaks off at the start of an iteration, or at the very end, before the report, which takes seconds."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.at:
            raise LeftError

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise LeftError


def config(*overrides: str) -> DictConfig:
    """``conf/train.yaml`` with the small sizes and these overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=[*SMALL, *overrides])


def train(folder: Path, *overrides: str) -> int:
    """One run in this process, with its report; returns its exit status."""
    from rlvr.run import train as run

    folder.mkdir(parents=True, exist_ok=True)
    return run(config(*overrides), str(folder), list(overrides))


def train_only(folder: Path, *overrides: str, until: int | None = None) -> dict[str, Any]:
    """One run in this process, broken off before iteration ``until`` or the report: its last checkpoint."""
    leave = ["+callbacks.leave._target_=runs.Leave"]
    if until is not None:
        leave.append(f"+callbacks.leave.at={until}")
    try:
        train(folder, *overrides, *leave)
    except LeftError:
        return checkpoint(folder)
    raise AssertionError("the run went on to its report")


def evaluate(folder: Path, *overrides: str, small: tuple[str, ...] = SMALL_EVALUATION) -> int:
    """One evaluation in this process; returns its exit status."""
    from rlvr.evaluation import evaluate as run

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", overrides=[*small, *overrides])
    folder.mkdir(parents=True, exist_ok=True)
    return run(cfg, str(folder))


def start(folder: Path, *overrides: str) -> ForkServerProcess:
    """``rlvr-train`` in a process of its own, with its output in ``folder``'s out.txt and err.txt."""
    return _started("rlvr-train", folder, *SMALL, *overrides)


def start_evaluation(folder: Path, *overrides: str) -> ForkServerProcess:
    """``rlvr-eval`` in a process of its own, likewise."""
    return _started("rlvr-eval", folder, *overrides)


def _started(command: str, folder: Path, *overrides: str) -> ForkServerProcess:
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [*overrides, f"hydra.run.dir={folder}"]
    process = FORKSERVER.Process(target=entry, args=(arguments, folder, command))
    process.start()
    return process


def entry(overrides: list[str], folder: Path, command: str = "rlvr-train") -> None:
    from rlvr import evaluate, train

    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.argv = [command, *overrides]
    os.environ.pop("HYDRA_FULL_ERROR", None)
    # As from a terminal: what is started in the background of a script ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    {"rlvr-train": train, "rlvr-eval": evaluate}[command].main()


def checkpoint(folder: Path) -> dict[str, Any]:
    """The run's last checkpoint, which holds plain data only."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def rows(folder: Path) -> list[dict[str, str]]:
    """``metrics.csv``, as text, without what the clock says."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}
            for row in csv.DictReader(file)
        ]


def column(folder: Path, key: str) -> list[float]:
    """One metric of every iteration."""
    return [float(row[key]) for row in rows(folder)]
