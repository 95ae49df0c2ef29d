"""One rank that dies ends the run, and says so; otherwise the others wait for it."""

import os
import signal
import subprocess
import sys
import threading
import time

from lightning import Callback, LightningModule, Trainer

from rlvr.errors import RunError


class RankWatch(Callback):
    """Ends this rank soon after another one has died, whatever it is waiting for.

    For the ranks that the trainer starts on this node. Those of torchrun and SLURM are watched by what has
    started them: run ``srun`` with ``--kill-on-bad-exit=1``.

    Args:
        every_s: seconds between two looks.
        grace_s: seconds in which a rank may end by itself when another one has died.
    """

    def __init__(self, *, every_s: float = 0.5, grace_s: float = 20.0) -> None:
        self.every_s, self.grace_s = every_s, grace_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self._parent: int | None = None
        self._thread: threading.Thread | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start to watch, where there are other ranks."""
        if self._thread is not None or trainer.world_size == 1:
            return
        self._processes = list(getattr(trainer.strategy.launcher, "procs", []))
        self._parent = os.getppid() if trainer.local_rank else None  # Lightning's rank 0, or torchrun
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
        self._thread.start()

    def dead(self) -> str | None:
        """Which rank of this node has died, if one has, and of what."""
        if self._parent is not None and os.getppid() != self._parent:
            return f"process {self._parent}, which started this rank, is gone"
        for rank, process in enumerate(self._processes, start=1):
            if code := process.poll():
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                return f"rank {rank} (process {process.pid}) {how}"
        return None

    def explain(self, error: Exception) -> Exception:
        """What to raise for an error that may only be the echo of another rank's death."""
        deadline = time.monotonic() + 2.0
        while self._thread is not None and time.monotonic() < deadline:
            if dead := self.dead():
                return RunError(dead)
            time.sleep(0.05)
        return error

    def _watch(self) -> None:
        while not (dead := self.dead()):
            time.sleep(self.every_s)
        time.sleep(self.grace_s)
        print(f"rlvr-train: {dead}; all ranks end, ckpt_path=auto continues", file=sys.stderr, flush=True)
        for process in self._processes:
            process.kill()
        os._exit(1)
