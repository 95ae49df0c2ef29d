"""Time and memory of the language-model head with a PPO-clip loss: plain, checkpointed and fused.

    .venv/bin/python experiments/benchmarks/logprob_head.py --tokens 2048 --dim 576 --vocab 49152

Each way computes log-prob and entropy of N tokens, the clipped loss, and the gradients of hidden states
and weight, from the same inputs. Each runs in a fresh process, since allocators keep what an earlier way has
freed, and with ``MALLOC_MMAP_THRESHOLD_=1048576``, so that glibc returns every freed block over 1 MiB at once
and resident memory is what is really in use.

Extra memory is the peak of resident memory over one step, less what was resident before it, less the
gradients. Linux keeps the peak as ``VmHWM`` and resets it when 5 is written to ``/proc/self/clear_refs``;
where that is refused, the process's own peak is taken. On CUDA it is the allocator's peak.

- ``plain``: all logits, ``log_softmax``, autograd.
- ``checkpoint``: the same in chunks, each under ``torch.utils.checkpoint``.
- ``two-pass``: :func:`rlvr.logprobs.token_stats`, whose backward computes the logits again.
- ``one-pass``: :func:`rlvr.logprobs.token_objective`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlvr.logprobs import token_objective, token_stats

MIB = 2**20


class Problem:
    """Inputs of the benchmark and its loss, from one seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.chunk_size: int = args.chunk
        self.entropy_coef: float = args.entropy_coef
        dtype: torch.dtype = getattr(torch, args.dtype)
        generator = torch.Generator().manual_seed(args.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        # Logits of standard deviation 3: neither flat nor one-hot, as a language model's.
        self.hidden = normal(args.tokens, args.dim).mul_(3 * args.dim**-0.5).to(args.device, dtype)
        self.weight = normal(args.vocab, args.dim).to(args.device, dtype)
        self.targets = torch.randint(args.vocab, (args.tokens,), generator=generator).to(args.device)
        self.advantages = normal(args.tokens).to(args.device)
        with torch.no_grad():  # ratios around 1, so that a good share of tokens is clipped
            logprobs = token_stats(self.hidden, self.weight, self.targets).logprobs
        self.old_logprobs = logprobs + 0.2 * normal(args.tokens).to(args.device)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()

    def loss(self, logprobs: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        """These tokens' share of the token-mean PPO-clip loss, with an entropy bonus if asked for."""
        ratio = (logprobs - self.old_logprobs[rows]).exp()
        advantages = self.advantages[rows]
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        if self.entropy_coef:
            surrogate = surrogate + self.entropy_coef * entropy
        return -surrogate.sum() / len(self.targets)

    def full(self, hidden: Tensor, rows: slice) -> Tensor:
        """The loss by full logits of these rows."""
        logprobs = (hidden @ self.weight.t()).float().log_softmax(dim=-1)
        with torch.set_grad_enabled(bool(self.entropy_coef) and torch.is_grad_enabled()):
            entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
        chosen = logprobs.gather(-1, self.targets[rows, None]).squeeze(-1)
        return self.loss(chosen, entropy, rows)


def plain(problem: Problem) -> Tensor:
    return problem.full(problem.hidden, slice(0, len(problem.targets)))


def checkpointed(problem: Problem) -> Tensor:
    total = problem.hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(problem.targets), problem.chunk_size):
        rows = slice(start, min(start + problem.chunk_size, len(problem.targets)))
        total = total + checkpoint(problem.full, problem.hidden[rows], rows, use_reentrant=False)
    return total


def two_pass(problem: Problem) -> Tensor:
    stats = token_stats(problem.hidden, problem.weight, problem.targets, chunk_size=problem.chunk_size)
    return problem.loss(stats.logprobs, stats.entropy, slice(0, len(problem.targets)))


def one_pass(problem: Problem) -> Tensor:
    def objective(logprobs: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return problem.loss(logprobs, entropy, rows), {}

    chunk_size = problem.chunk_size
    return token_objective(problem.hidden, problem.weight, problem.targets, objective, chunk_size=chunk_size)[
        0
    ]


WAYS: dict[str, Callable[[Problem], Tensor]] = {
    "plain": plain,
    "checkpoint": checkpointed,
    "two-pass": two_pass,
    "one-pass": one_pass,
}


class PeakMemory:
    """Peak memory of a stretch of code over what was in use before it, in bytes."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            print(f"peak memory cannot be reset ({error}): taking the process's own", file=sys.stderr)
        self._before = self._status("VmRSS")

    def read(self) -> int:
        """Bytes since the start."""
        return (torch.cuda.max_memory_allocated() if self._cuda else self._status("VmHWM")) - self._before

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(args: argparse.Namespace) -> None:
    """Child process: one way's seconds, memory and gradients."""
    torch.set_num_threads(args.threads)
    way = WAYS[args.way]
    small = argparse.Namespace(**{**vars(args), "tokens": 8, "dim": 16, "vocab": 64})
    way(Problem(small)).backward()  # thread pools and kernels, so that they are in use before
    problem = Problem(args)
    parameters = (problem.hidden, problem.weight)
    seconds: list[float] = []
    peak = PeakMemory(args.device)
    for repeat in range(args.repeats):
        for parameter in parameters:
            parameter.grad = None
        started = time.perf_counter()
        loss = way(problem)
        loss.backward()
        value = loss.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
        if repeat == 0:
            grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
            extra = peak.read() - sum(grad.nbytes for grad in grads)
            torch.save([grad.cpu() for grad in grads], args.result)
            del grads
        del loss
    print(json.dumps({"seconds": min(seconds), "extra": extra, "loss": value}))


def run(way: str, arguments: list[str], result: Path) -> dict[str, float]:
    """Measure one way in a fresh process."""
    command = [sys.executable, __file__, *arguments, "--way", way, "--result", str(result)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    completed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, float] = json.loads(completed.stdout)
    return report


def gradient_difference(result: Path, reference: Path) -> float:
    """Largest absolute difference over the largest absolute value, the worse of hidden states and weight."""
    pairs = zip(torch.load(result), torch.load(reference), strict=True)
    return max(
        float((ours.float() - theirs.float()).abs().max() / theirs.abs().max()) for ours, theirs in pairs
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", type=int, default=2048, help="N")
    parser.add_argument("--dim", type=int, default=576, help="D")
    parser.add_argument("--vocab", type=int, default=49152, help="V")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--chunk", type=int, default=128, help="tokens whose logits exist at the same time")
    parser.add_argument(
        "--entropy-coef", type=float, default=0.0, help="with one, entropy has a gradient too"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="the best time of them is shown")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        measure(args)
        return
    print(
        f"N={args.tokens} D={args.dim} V={args.vocab} {args.dtype} chunk={args.chunk} threads={args.threads} "
        f"entropy_coef={args.entropy_coef} {args.device}, best of {args.repeats}, torch {torch.__version__}"
    )
    print(f"{'way':<11} {'seconds':>8} {'/ plain':>8} {'extra MiB':>10} {'/ plain':>8} {'grad diff':>10}")
    ways = ["plain", *(way for way in args.ways if way != "plain")]
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder, "plain.pt")
        for way in ways:
            result = Path(folder, f"{way}.pt")
            report = run(way, sys.argv[1:], result)
            if way == "plain":
                base = report
            difference = gradient_difference(result, reference)
            print(
                f"{way:<11} {report['seconds']:>8.2f} {report['seconds'] / base['seconds']:>8.2f} "
                f"{report['extra'] / MIB:>10.0f} {report['extra'] / base['extra']:>8.3f} {difference:>10.1e}",
                flush=True,
            )
            if way != "plain":
                result.unlink()


if __name__ == "__main__":
    main()
