"""Iteration time with and without ``data.lookahead``, engine and trainer on one core each, on the same work.

    .venv/bin/python experiments/benchmarks/lookahead.py policy.path=SMOLLM2_FOLDER_OR.gguf

Two runs of ``experiment=smollm2_words engine=vllm``, one after the other; further arguments are overrides of
both. Iterations 2 to the last but one count: with lookahead the first generates twice, the last launches
nothing.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

COMMON = (
    *(
        "experiment=smollm2_words",
        "engine=vllm",
        "engine.enforce_eager=true",
        "engine.threads=1",
        "threads=1",
    ),
    *("trainer.max_epochs=6", "evaluation.num_prompts=1", "evaluation.samples=1", "logger=none"),
    "correction=token_truncation",
)
KEYS = ("time/iteration_s", "time/rollout_s", "time/logprob_s", "time/update_s", "time/weight_sync_s")


def run(folder: Path, lookahead: int, overrides: list[str]) -> dict[str, float]:
    """Mean seconds of the iterations that count, by phase."""
    command = [Path(sys.executable).parent / "rlvr-train", *COMMON, f"data.lookahead={lookahead}"]
    # A waiting OpenMP thread that spins would take the other's core.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([*command, *overrides, f"hydra.run.dir={folder}"], check=True, env=environment)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))[1:-1]
    return {key: mean(float(row[key]) for row in rows) for key in KEYS}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = [run(Path(folder) / str(ahead), ahead, sys.argv[1:]) for ahead in (0, 1)]
    print("| seconds an iteration | lookahead 0 | lookahead 1 | ratio |\n|---|---|---|---|")
    for key in KEYS:
        print(f"| {key} | {found[0][key]:.2f} | {found[1][key]:.2f} | {found[1][key] / found[0][key]:.2f} |")


if __name__ == "__main__":
    main()
