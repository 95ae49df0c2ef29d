"""``plan=true`` beside a real run: memory and seconds, predicted and measured, on a CPU.

    OMP_NUM_THREADS=1 .venv/bin/python experiments/benchmarks/plan.py policy.path=SMOLLM2_FOLDER_OR.gguf

Each run is a process of its own: ``experiment=smollm2_words``, one iteration of two updates, AdamW's state
there for the second; further arguments are overrides of all. Memory is the high-water mark of the resident
set (``VmHWM``) above what the process had with its libraries imported, before the first update and at the
end. The plan is asked for the longest prompt and response that the run had, and for no AdamW before the first
update. Seconds are the process's CPU time, for other processes must not count: of generating and scoring an
iteration's responses, and of its updates.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig

import rlvr.run
from rlvr.batch import Batch
from rlvr.instantiate import CONF
from rlvr.plan import job_of
from rlvr.planning import GIB, Hardware, memory, peaks, seconds, this_cpu

COMMON = (
    *("experiment=smollm2_words", "data.num_prompts=2", "data.minibatches=2", "trainer.max_epochs=1"),
    *("trainer.precision=32-true", "evaluation.num_prompts=1", "evaluation.samples=1", "logger=none"),
    *("hardware=cpu", "threads=1", "trainer.accelerator=cpu"),
)
RUNS = {
    f"{rows} rows, {'checkpointing' if checkpointing else 'all activations'}": (
        f"data.micro_batch_size={rows}",
        f"policy.activation_checkpointing={checkpointing}".lower(),
    )
    for checkpointing in (False, True)
    for rows in (4, 8)
}


def high_water() -> int:
    """Bytes that this process has had resident at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Watch(Callback):
    """Writes down high-water marks, CPU seconds, and the longest prompt and response of the updates."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {"imported": high_water(), "before": 0, "prompt": 0, "response": 0}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before an iteration's responses are generated."""
        self.begin = time.process_time()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Before a mini-batch's update."""
        if not self.found["before"]:
            self.found["before"], self.found["responses_s"] = high_water(), time.process_time() - self.begin
        response = batch.loss_mask.shape[1]
        prompt = batch.sequences.input_ids.shape[1] - response
        self.found["prompt"] = max(self.found["prompt"], prompt)
        self.found["response"] = max(self.found["response"], response)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last one."""
        self.found["end"] = high_water()
        self.found["update_s"] = time.process_time() - self.begin - self.found["responses_s"]
        (Path(trainer.default_root_dir) / "watched.json").write_text(json.dumps(self.found))


def config(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=[*COMMON, *overrides])


def measured(overrides: list[str]) -> dict[str, float]:
    """What :class:`Watch` wrote down of a run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--child", folder, *overrides], check=True)
        found: dict[str, float] = json.loads((Path(folder) / "watched.json").read_text())
        return found


def compare(name: str, overrides: list[str], hardware: Hardware) -> None:
    found = measured(overrides)
    lengths = [f"data.max_prompt_tokens={found['prompt']}", f"data.max_new_tokens={found['response']}"]
    job = job_of(config([*overrides, *lengths]), hardware)
    parts = memory(job, hardware)
    phases, times = peaks(parts), seconds(job, hardware)
    adamw = next(part.bytes for part in parts if part.name.startswith("AdamW, m"))
    rows = {
        "GiB before the first update": (
            max(phases["start"], *(phases[phase] - adamw for phase in ("rollout", "sync", "logprob"))) / GIB,
            (found["before"] - found["imported"]) / GIB,
        ),
        "GiB at most": (max(phases.values()) / GIB, (found["end"] - found["imported"]) / GIB),
        "s responses and their log-probs": (
            times["rollout: prefill"] + times["rollout: decode"] + times["old log-probs"],
            found["responses_s"],
        ),
        "s update": (times["update"], found["update_s"]),
    }
    for key, (plan, real) in rows.items():
        print(
            f"| {name}, {job.length} tokens | {key} | {plan:.2f} | {real:.2f} | {plan / real:.2f} |",
            flush=True,
        )


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        folder, *overrides = sys.argv[2:]
        torch.set_num_threads(1)
        sys.stdout = sys.stderr  # the table stays alone
        cfg = config([*overrides, "+callbacks.watch._target_=plan.Watch", "export=false"])
        sys.exit(rlvr.run.train(cfg, folder, overrides))
    torch.set_num_threads(1)
    hardware = this_cpu()
    gflops, copied = hardware.flops["float32"] / 1e9, hardware.memory_bytes_s / 1e9
    print(f"{gflops:.0f} GFLOP/s in float32, {copied:.1f} GB/s copied\n")
    print("| run | what | predicted | measured | ratio |\n|---|---|---|---|---|")
    for name, overrides in RUNS.items():
        compare(name, [*overrides, *sys.argv[1:]], hardware)


if __name__ == "__main__":
    main()
