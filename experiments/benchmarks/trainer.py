"""The trainer's two passes on rows of realistic lengths: padded, beside their like, packed, and TRL's.

    .venv/bin/python experiments/benchmarks/trainer.py --policy SMOLLM2_FOLDER_OR.gguf

Every way scores the same rows (log-probs and entropies, without gradient) and makes one optimizer step of
PPO-clip on them: micro-batches, forward and backward, gradient norm clipped to 1, AdamW; after an unmeasured
round on two short rows. Losses and gradient norms must agree, or the run fails.

- ``padded``: rows as they come, padded to the longest of their micro-batch.
- ``sorted``: ``policy.packing=false``, rows beside others of their length.
- ``packed``: what ``policy.packing`` does by default, no padding at all.
- ``trl``: TRL's ``GRPOTrainer``, where it is installed: its log-prob pass, ``compute_loss`` and backward,
  with its fused head and no gradient checkpointing, on micro-batches trimmed as ``padded`` (its own are as
  wide as the whole batch).

A way runs in a process of its own each time, and the ways take turns, so that a slow minute of the machine
does not fall on one. Medians of the rounds; a ratio is one of the same round. Tokens are real ones, prompts
and responses, whatever was computed beside them. MFU is the work on real tokens (2 operations a parameter,
attention within the sequence, the head on responses; three times that with backward) over the seconds and
the rate of a plain matrix product in the same arithmetic, measured in every process. Memory is the highest
of the process, on CUDA of the allocator.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from rlvr.algorithm import Algorithm
from rlvr.batch import Batch, IterationFacts, Prompt, Rollout, Sequences
from rlvr.clipping import ClipRange
from rlvr.losses import Totals
from rlvr.module import RLVRModule
from rlvr.packing import micro_batches
from rlvr.policy import Policy

MIB = 2**20
WAYS = ("padded", "sorted", "packed", "trl")
PRECISIONS = {"fp32": "32-true", "bf16-mixed": "bf16-mixed"}
LR = 1e-6


class Problem:
    """Rows, advantages and old log-probs, from one seed; the same for every way."""

    def __init__(self, args: argparse.Namespace, rows: int, longest: int) -> None:
        generator = torch.Generator().manual_seed(args.seed)

        def between(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=generator))

        def row(index: int) -> Rollout:
            # Half of the rows short, half of them of any length: responses to problems easy and hard.
            total = between(20, max(longest * 3 // 10, 20)) if index % 2 else between(longest // 4, longest)
            prompt = min(between(10, 100), total // 2)
            ids = torch.randint(3, args.vocabulary, (total,), generator=generator).tolist()
            return Rollout(
                Prompt(index, "", "", "", {}, tuple(ids[:prompt])), 0, tuple(ids[prompt:]), (), "stop", ""
            )

        self.rollouts = [row(index) for index in range(rows)]
        self.sequences = Sequences.of(self.rollouts, pad_id=0)
        self.advantages = torch.randn(rows, generator=generator)
        self.noise = 0.2 * torch.randn(self.sequences.loss_mask.shape, generator=generator)
        self.lengths = [(len(rollout.prompt.token_ids), len(rollout.token_ids)) for rollout in self.rollouts]
        self.tokens, self.responses = sum(map(sum, self.lengths)), int(self.sequences.loss_mask.sum())

    def old_logprobs(self, logprobs: Tensor) -> Tensor:
        """As of another policy nearby, so that a good share of tokens is clipped."""
        return torch.where(self.sequences.loss_mask, (logprobs + self.noise).clamp(max=-1e-4), 0)


Step = tuple[Problem, Tensor]
"""Rows, and old log-probs [B, T] of them."""
Passes = tuple[Callable[[Problem], Tensor], Callable[[list[Step]], tuple[float, float, float]]]
"""``score(problem) -> [B, T]``, and ``update(steps) -> seconds, loss and gradient norm`` of the last step."""


class Batches(IterableDataset[Batch]):
    """These batches, once."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches


class Watch(Callback):
    """Seconds, loss and gradient norm of the last update."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Forget the update before."""
        pl_module.ledger.close(lambda values: values)
        self.begin = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Read off the module what it has done."""
        loss = float(outputs["loss"])  # waits for the device
        row = pl_module.ledger.close(lambda values: values)
        self.seen = time.perf_counter() - self.begin, loss, row["train/grad_norm"]


def autocast(args: argparse.Namespace) -> AbstractContextManager[Any]:
    return torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.precision != "fp32")


def parts_of(args: argparse.Namespace, problem: Problem) -> tuple[Tensor, ...]:
    """Rows of each forward pass."""
    if args.way in ("padded", "trl"):
        return torch.arange(len(problem.lengths)).split(args.rows_per_pass)
    parts = micro_batches(
        problem.lengths,
        rows=args.rows_per_pass,
        tokens=args.tokens_per_pass,
        packed=args.way == "packed",
        agree=lambda count: count,
    )
    return tuple(torch.tensor(part) for part in parts)


def ours(args: argparse.Namespace) -> Passes:
    """The policy's own passes, as the stream and the module make them."""
    policy = Policy(args.policy, packing=args.way == "packed", attention=args.attention)
    module = RLVRModule(
        policy.to(args.device), Algorithm(lr=LR, gradient_clip=1.0), ClipRange.fixed(0.2, 0.2)
    )

    @torch.no_grad()
    def score(problem: Problem) -> Tensor:
        batch = batch_of(problem, problem.noise)
        values = []
        for micro in batch.micro_batches():
            with autocast(args):
                values.append(policy.logprobs(micro.sequences.to(torch.device(args.device))).logprobs.cpu())
        return batch.join(values)

    def batch_of(problem: Problem, old_logprobs: Tensor) -> Batch:
        return Batch(
            sequences=problem.sequences,
            advantages=problem.advantages,
            old_logprobs=old_logprobs,
            ref_logprobs=None,
            rho=None,
            totals=Totals(tokens=problem.responses, sequences=len(problem.rollouts)),
            facts=IterationFacts(iteration=0, entropy=1.0, reward_mean=0.5),
            parts=parts_of(args, problem),
        )

    def update(steps: list[Step]) -> tuple[float, float, float]:
        watch = Watch()
        trainer = Trainer(
            accelerator="cpu" if args.device == "cpu" else "gpu",
            devices=1,
            precision=PRECISIONS[args.precision],  # type: ignore[arg-type]
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[watch],
        )
        trainer.fit(module, DataLoader(Batches([batch_of(*step) for step in steps]), batch_size=None))
        return watch.seen

    return score, update


def trl(args: argparse.Namespace) -> Passes:
    """TRL's trainer on inputs that are ready."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    policy = Policy(args.policy, attention=args.attention)
    config = GRPOConfig(
        output_dir=args.folder,
        per_device_train_batch_size=args.rows_per_pass,
        num_generations=args.rows_per_pass,
        learning_rate=LR,
        loss_type="dapo",
        beta=0.0,
        bf16=args.precision != "fp32",
        use_cpu=args.device == "cpu",
        gradient_checkpointing=False,
        report_to="none",
        temperature=1.0,
    )
    policy.model.set_attn_implementation(args.attention)
    trainer = GRPOTrainer(
        model=policy.model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a"]}),
        processing_class=policy.tokenizer,
    )
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    optimizer = trainer.create_optimizer()

    def micros(problem: Problem) -> Iterator[tuple[Tensor, Sequences]]:
        for part in parts_of(args, problem):
            yield part, problem.sequences.rows(part).to(torch.device(args.device))

    @torch.no_grad()
    def score(problem: Problem) -> Tensor:
        logprobs = torch.zeros_like(problem.noise)
        for part, micro in micros(problem):
            values, _, _ = trainer._get_per_token_logps_and_entropies(
                model,
                micro.input_ids,
                micro.attention_mask.long(),
                micro.loss_mask.shape[1],
                compute_entropy=True,
            )
            logprobs[part, : micro.loss_mask.shape[1]] = values.float().cpu()
        return logprobs

    def step(problem: Problem, old_logprobs: Tensor) -> tuple[float, float]:
        total = 0.0
        for part, micro in micros(problem):
            length = micro.loss_mask.shape[1]
            inputs = {
                "prompt_ids": micro.input_ids[:, :-length],
                "prompt_mask": micro.attention_mask[:, :-length].long(),
                "completion_ids": micro.input_ids[:, -length:],
                "completion_mask": micro.loss_mask.long(),
                "advantages": problem.advantages[part].to(args.device),
                "old_per_token_logps": old_logprobs[part, :length].to(args.device),
                "num_items_in_batch": torch.tensor(problem.responses, device=args.device),
            }
            loss = trainer.compute_loss(model, inputs)
            trainer.accelerator.backward(loss)
            total += float(loss)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        return total, norm

    def update(steps: list[Step]) -> tuple[float, float, float]:
        done = [timed(args, partial(step, *each)) for each in steps]
        seconds, (loss, norm) = done[-1]
        return seconds, loss, norm

    return score, update


def timed(args: argparse.Namespace, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    begin = time.perf_counter()
    result = work()
    if args.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def matmul_rate(args: argparse.Namespace, size: int) -> float:
    """Floating-point operations a second of a square matrix product in this precision: the best of three."""
    dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
    left, right = (torch.randn(size, size).to(args.device, dtype) for _ in range(2))
    seconds = [timed(args, lambda: left @ right)[0] for _ in range(4)]
    return 2 * size**3 / min(seconds[1:])


def peak_memory(args: argparse.Namespace) -> int:
    """Bytes."""
    if args.device != "cpu":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measure(args: argparse.Namespace) -> None:
    """Child process: one way, once."""
    torch.set_num_threads(args.threads)
    problem, small = Problem(args, args.rows, args.longest), Problem(args, 2, 20)
    score, update = (trl if args.way == "trl" else ours)(args)
    warm_up = (small, small.old_logprobs(score(small)))
    score_s, logprobs = timed(args, lambda: score(problem))
    update_s, loss, norm = update([warm_up, (problem, problem.old_logprobs(logprobs))])
    report = {"score_s": score_s, "update_s": update_s, "loss": loss, "norm": norm, "peak": peak_memory(args)}
    print(
        "report " + json.dumps({**report, "rate": matmul_rate(args, 2048 if args.device == "cpu" else 8192)})
    )


def run(args: argparse.Namespace, way: str, precision: str) -> dict[str, float]:
    """Measure one way in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--precision", precision]
    # glibc then returns every freed block over 1 MiB at once, and the peak is of what is really in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB), "OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as folder:
        command += ["--folder", folder, "--vocabulary", str(args.vocabulary)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("report ")]
    if not lines:
        sys.exit(f"{way}, {precision}: {done.stderr[-3000:]}")
    report: dict[str, float] = json.loads(lines[0].removeprefix("report "))
    return report


def forward_flops(config: Any, parameters: int, problem: Problem) -> float:
    """Operations of a forward pass on real tokens: body, causal attention, and the head on responses."""
    embedding = config.vocab_size * config.hidden_size
    body = parameters - embedding * (1 if config.tie_word_embeddings else 2)
    squares = sum(sum(row) ** 2 for row in problem.lengths)
    attention = 2 * squares * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 2 * body * problem.tokens + attention + 2 * embedding * problem.responses


def padding(args: argparse.Namespace, problem: Problem, way: str) -> float:
    """Share of computed tokens that are padding."""
    if way == "packed":
        return 0.0
    args = argparse.Namespace(**{**vars(args), "way": way})
    computed = sum(problem.sequences.rows(part).attention_mask.numel() for part in parts_of(args, problem))
    return 1 - problem.tokens / computed


def check(reports: dict[str, list[dict[str, float]]], precision: str) -> float:
    """The largest difference from the first way, over its gradient norm; too large a one ends the run."""
    first = next(iter(reports.values()))[0]
    gaps = [
        abs(report[key] - first[key]) / abs(first["norm"])
        for rounds in reports.values()
        for report in rounds
        for key in ("loss", "norm")
    ]
    if max(gaps) > (1e-3 if precision == "fp32" else 0.1):
        sys.exit(f"{precision}: the ways do not compute the same update: {reports}")
    return max(gaps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--policy", help="hub id, folder or .gguf; default: the embedded policy")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument(
        "--longest", type=int, default=400, help="tokens of the longest row that there can be"
    )
    parser.add_argument("--rows-per-pass", type=int, default=8)
    parser.add_argument("--tokens-per-pass", type=int, help="instead of rows, for sorted and packed")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=PRECISIONS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        measure(args)
        return
    if "trl" in args.ways and importlib.util.find_spec("trl") is None:
        print("trl is not installed: left out")
        args.ways.remove("trl")
    policy = Policy(args.policy)
    config, parameters = policy.model.config, sum(parameter.numel() for parameter in policy.parameters())
    args.vocabulary = config.vocab_size
    del policy
    problem = Problem(args, args.rows, args.longest)
    flops = forward_flops(config, parameters, problem)
    print(
        f"{args.rows} rows of {min(map(sum, problem.lengths))} to {max(map(sum, problem.lengths))} tokens, "
        f"{problem.tokens} in all, {problem.responses} of them responses; {args.rows_per_pass} rows a pass; "
        f"{args.device}, {args.threads} threads, median of {args.repeats}, torch {torch.__version__}; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    for precision in args.precisions:
        reports: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
        for _ in range(args.repeats):
            for way in args.ways:
                reports[way].append(run(args, way, precision))
        gap = check(reports, precision)
        rates = [report["rate"] for rounds in reports.values() for report in rounds]
        rate = statistics.median(rates)
        print(
            f"\n{precision}: matrix product {rate / 1e9:.0f} GFLOP/s ({min(rates) / 1e9:.0f} to "
            f"{max(rates) / 1e9:.0f}); losses and gradient norms agree to {gap:.0e}; "
            f"load {os.getloadavg()[0]:.1f}"
        )
        print(
            "| way | padding | scored, tokens/s | to first | MFU | updated, tokens/s | to first | MFU | MiB |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for way, rounds in reports.items():
            cells = [way, f"{padding(args, problem, way):.2f}"]
            for key, passes in (("score_s", 1), ("update_s", 3)):
                seconds = statistics.median(report[key] for report in rounds)
                # Of the same round: what slowed one way down slowed down its neighbours.
                pairs = zip(rounds, reports[args.ways[0]], strict=True)
                ratio = statistics.median(first[key] / report[key] for report, first in pairs)
                cells += [
                    f"{problem.tokens / seconds:.0f}",
                    f"{ratio:.2f}",
                    f"{passes * flops / seconds / rate:.2f}",
                ]
            cells.append(f"{statistics.median(report['peak'] for report in rounds) / MIB:.0f}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
