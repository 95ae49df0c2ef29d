"""One rank that dies ends the run, and says so; otherwise the others wait for it."""

import os
import signal
import subprocess
import sys
import threading
import time

from rlvr.errors import RunError


class RankWatch:
    """Ends this rank soon after another one has died, whatever it is waiting for.

    Rank 0 of a node watches the ranks that the trainer has started there, each of them what has started it.
    The others of torchrun and SLURM are watched by what has started them: run ``srun`` with
    ``--kill-on-bad-exit=1``.

    Args:
        every_s: seconds between two looks.
        grace_s: seconds in which a rank may end by itself when another one has died.
    """

    def __init__(self, *, every_s: float = 0.5, grace_s: float = 20.0) -> None:
        self.every_s, self.grace_s = every_s, grace_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self._parent = os.getppid() if os.environ.get("LOCAL_RANK", "0") != "0" else None
        self._known = threading.Event()
        if self._parent is not None:
            self._start()

    def processes(self, processes: list[subprocess.Popen[bytes]]) -> None:
        """Watch these, which this rank has just started."""
        self._processes = processes
        self._start()

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
        while (self._processes or self._parent) and time.monotonic() < deadline:
            if dead := self.dead():
                self._known.set()  # this rank now ends by itself, with a report
                return RunError(dead)
            time.sleep(0.05)
        return error

    def _start(self) -> None:
        threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()

    def _watch(self) -> None:
        while not (dead := self.dead()):
            time.sleep(self.every_s)
        known = self._known.wait(self.grace_s)
        for process in self._processes:
            process.kill()
        if not known:
            print(f"rlvr-train: {dead}; all ranks end, ckpt_path=auto continues", file=sys.stderr, flush=True)
            os._exit(1)
