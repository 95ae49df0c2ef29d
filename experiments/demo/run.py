"""``make demo``: plain GRPO and a schedule from the same seed, side by side.

    python experiments/demo/run.py [OVERRIDE ...]     # overrides go to both runs

Leaves ``outputs/demo/<time>/{grpo,schedule}``, each a run folder, and ``comparison.png``.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from rlvr.report import compare

RUNS = {"grpo": ["clip=constant"], "schedule": []}
"""Overrides of each run on top of ``experiment=demo``, which names the schedule."""


def main() -> int:
    folder = Path("outputs") / "demo" / time.strftime("%Y-%m-%d_%H-%M-%S")
    begin = time.perf_counter()
    processes = {name: start(name, folder / name, overrides) for name, overrides in RUNS.items()}
    readers = [threading.Thread(target=show, args=(name, p)) for name, p in processes.items()]
    for reader in readers:
        reader.start()
    try:
        codes = {name: process.wait() for name, process in processes.items()}
    except KeyboardInterrupt:
        # The terminal has sent the signal to the runs as well; they finish their iteration and save.
        codes = {name: process.wait() for name, process in processes.items()}
    for reader in readers:
        reader.join()
    if failed := {name: code for name, code in codes.items() if code}:
        for name, code in failed.items():
            print(f"{name} ended with status {code}; its folder is {folder / name}", file=sys.stderr)
        return 1
    print("\n" + compare([folder / name for name in RUNS], folder / "comparison.png"))
    for name in RUNS:
        print(f"summary: {folder / name / 'summary.json'}")
    print(f"{time.perf_counter() - begin:.0f} s in all")
    return 0


def start(name: str, folder: Path, overrides: list[str]) -> subprocess.Popen[str]:
    """One run in a process of its own, on one core."""
    command = [sys.executable, "-m", "rlvr.train", "experiment=demo", f"hydra.run.dir={folder}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*command, *sys.argv[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def show(name: str, process: subprocess.Popen[str]) -> None:
    """Pass a run's lines on under its name."""
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{name:>8} | {line.rstrip()}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(main())
