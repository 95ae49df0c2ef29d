"""Both engines against vLLM called bare: tokens a second on the same prompts and weights; seconds a sync.

    .venv/bin/python experiments/benchmarks/engines.py --policy SMOLLM2_FOLDER_OR.gguf
    .venv/bin/python experiments/benchmarks/engines.py                      # the embedded policy

Every way generates exactly ``prompts x samples x new tokens`` tokens, none stops early: first once
unmeasured, then ``--repeat`` times, of which the best counts. One after the other, on the same number of
threads; each vLLM in a process of its own. A sync is compared with a copy of all weights in memory.
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

from rlvr.batch import Prompt
from rlvr.engines import RolloutEngine, SamplingParams
from rlvr.engines.transformers import TransformersEngine
from rlvr.engines.vllm import VllmEngine
from rlvr.policy import Policy


def best(work: Callable[[], object], repeat: int) -> float:
    """Seconds of the fastest of ``repeat`` calls, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def prompts_of(policy: Policy, args: argparse.Namespace) -> list[Prompt]:
    """Fixed token sequences, different from their first token on."""
    vocabulary = policy.model.config.vocab_size
    rows = [
        [(13 + 7919 * (i * args.length + j)) % vocabulary for j in range(args.length)]
        for i in range(args.prompts)
    ]
    return [Prompt(i, str(i), "", "", token_ids=tuple(row)) for i, row in enumerate(rows)]


def bare(args: argparse.Namespace) -> None:
    """Time vLLM's own offline interface, with the settings that the engine uses."""
    from vllm import LLM
    from vllm import SamplingParams as VllmSamplingParams

    with open(args.bare) as file:
        prompts = [{"prompt_token_ids": row} for row in json.load(file)["prompts"]]
    llm = LLM(
        model=os.path.dirname(args.bare),
        dtype=args.dtype,
        skip_tokenizer_init=True,
        max_model_len=args.length + args.tokens,
        max_num_seqs=256,
        enforce_eager=not args.compiled,
        kv_cache_memory_bytes=1 << 30,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        block_size=32,
        disable_log_stats=True,
    )
    params = VllmSamplingParams(
        n=args.samples, max_tokens=args.tokens, temperature=1.0, seed=0, logprobs=0, ignore_eos=True
    )
    params.detokenize, params.flat_logprobs = False, True  # as the engine asks, or it would build objects
    seconds = best(lambda: llm.generate(prompts, params, use_tqdm=False), args.repeat)
    print(f"seconds {seconds}", flush=True)


def run_bare(args: argparse.Namespace, policy: Policy, prompts: list[Prompt]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder))
        file = os.path.join(folder, "prompts.json")
        with open(file, "w") as out:
            json.dump({"prompts": [list(prompt.token_ids) for prompt in prompts]}, out)
        command = [sys.executable, __file__, *sys.argv[1:], "--bare", file]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as in the engine's own process
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("seconds ")]
        if not lines:
            sys.exit(done.stderr[-2000:])
        return float(lines[0].split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--policy", default=None, help="hub id, folder or .gguf; default: the embedded policy"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a response")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="by torch.compile")
    parser.add_argument("--bare", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.bare:
        bare(args)
        return
    policy = Policy(args.policy)
    prompts = prompts_of(policy, args)
    sampling = SamplingParams(samples=args.samples, max_new_tokens=args.tokens)
    total = args.prompts * args.samples * args.tokens
    seconds: dict[str, float] = {"vllm, bare": run_bare(args, policy, prompts)}

    vllm = VllmEngine(
        policy,
        max_prompt_tokens=args.length,
        max_new_tokens=args.tokens,
        dtype=args.dtype,
        enforce_eager=not args.compiled,
        threads=args.threads,
    )
    engines: dict[str, RolloutEngine] = {
        "engine=vllm": vllm,
        "engine=transformers": TransformersEngine(policy),
    }
    vllm.load_weights(policy.named_weights())
    for name, engine in engines.items():
        engine.stop_ids = ()  # type: ignore[attr-defined]
        seconds[name] = best(lambda engine=engine: list(engine.generate(prompts, sampling)), args.repeat)

    weights = dict(policy.named_weights())
    copies = {name: torch.empty_like(tensor) for name, tensor in weights.items()}

    def copy() -> None:
        for name, tensor in weights.items():
            copies[name].copy_(tensor)

    sync_s = best(lambda: vllm.load_weights(policy.named_weights()), args.repeat)
    copy_s = best(copy, args.repeat)
    vllm.close()

    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) / 2**20
    print(
        f"\n{total} tokens: {args.prompts} prompts x {args.samples} x {args.tokens}, {args.threads} threads"
    )
    print("| way | seconds | tokens/s | to bare |\n|---|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {total / value:.0f} | {seconds['vllm, bare'] / value:.2f} |")
    print(
        f"\nsync of {size:.0f} MiB: {sync_s:.3f} s, "
        f"{sync_s / copy_s:.1f} times a copy in memory ({copy_s:.3f} s)"
    )


if __name__ == "__main__":
    main()
