"""One evaluation, from a composed configuration to its tables."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers.utils.logging import disable_progress_bar

from rlvr.batch import Prompt
from rlvr.benchmarks import Benchmark
from rlvr.engines import RolloutEngine, SamplingParams
from rlvr.errors import ConfigError, EngineDiedError, RunError
from rlvr.instantiate import build, build_benchmarks, check_nodes, plain
from rlvr.policy import Policy
from rlvr.responses import Response, ResponseFile, claim, prompts_digest, weights_digest
from rlvr.results import Scored, results, results_table
from rlvr.rollouts import RolloutSource
from rlvr.settings import EvaluationConfig
from rlvr.sources import load_policy, run_folder
from rlvr.verifiers import close_verifiers
from rlvr.weight_sync import WeightSync

NODES = (
    "policy",
    "task",
    "engine",
    "verifier",
    "benchmark",
    "data",
    "evaluation",
    "seed",
    "threads",
    "device",
)
LENGTHS = {"max_prompt_tokens": 1024, "max_new_tokens": 3072}
"""Where neither the command line nor a run says: the paper's 4096 in all for Qwen2.5-Math-7B."""
CONSOLE_EVERY_S = 10.0


def evaluate(cfg: DictConfig, run_dir: str) -> int:
    """Ask a policy every problem, and leave a folder: responses, ``results.json``, ``results.md``.

    Started again on the same folder, it goes on where it was: every draw is keyed by benchmark, problem and
    sample.

    Args:
        cfg: composed ``conf/evaluate.yaml``.
        run_dir: the evaluation's folder.

    Returns:
        Exit status: 0, 3 where the engine gave up, 130 where it was interrupted.

    Raises:
        ConfigError: for anything that cannot work.
    """
    folder = Path(run_dir)
    disable_progress_bar()
    follow_run(cfg)
    check_nodes(cfg, NODES, ("policy", "engine"))
    for name in LENGTHS:
        value = cfg.data[name]
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"data.{name}={value}", "a number of tokens", f"data.{name}={LENGTHS[name]}")
    evaluation = EvaluationConfig(**plain(cfg.evaluation))
    task = None if cfg.task is None else build(cfg, "task")
    verifier = None if cfg.verifier is None else build(cfg, "verifier")
    benchmarks = build_benchmarks(cfg, task, verifier)
    if not benchmarks:
        raise ConfigError("benchmark=[]", "at least one benchmark", "benchmark=aime24,math500")
    policy = load_policy(cfg.policy.path, lambda path, dtype: build(cfg, "policy", path=path))
    if cfg.threads is not None or policy.source is None:
        # A model of the embedded one's size runs fastest on one thread.
        torch.set_num_threads(cfg.threads or 1)
    lengths = plain(cfg.data)
    asked = [(each, each.prompts(policy, evaluation, **lengths)) for each in benchmarks]
    claim(folder, facts(cfg, policy, asked, evaluation))
    policy.to(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kept = ResponseFile(folder)
    respondent = Respondent(cfg, policy, kept)
    scored = []
    try:
        for benchmark, prompts in asked:
            sampling = benchmark.sampling(evaluation, max_new_tokens=lengths["max_new_tokens"], seed=cfg.seed)
            respondent.answer(benchmark, prompts, sampling)
            scored.append(Scored.of(benchmark.name, kept.of(benchmark.name), sampling.samples))
    except KeyboardInterrupt:
        print(f"interrupted; hydra.run.dir={folder} and the same settings continue", file=sys.stderr)
        return 130
    except RunError as error:
        print(f"stopped: {error}; hydra.run.dir={folder} and the same settings continue", file=sys.stderr)
        return 3
    finally:
        respondent.close()
        kept.close()
        close_verifiers(each.verifier for each in benchmarks)
    found = {"policy": cfg.policy.path, **results(scored, cfg.seed)}
    (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "results.md").write_text(results_table(found))
    print(results_table(found), end="")
    print(f"evaluation folder: {folder}", flush=True)
    return 0


def follow_run(cfg: DictConfig) -> None:
    """Take from the run that a policy is of what is null here: task and verifier, and the lengths."""
    folder = run_folder(cfg.policy.path)
    file = None if folder is None else folder / ".hydra" / "config.yaml"
    run: Any = OmegaConf.load(file) if file is not None and file.exists() else None
    if cfg.task is None and run is not None:
        cfg.task, cfg.verifier = (
            OmegaConf.to_container(run[name], resolve=True) for name in ("task", "verifier")
        )
    for name, otherwise in LENGTHS.items():
        if cfg.data[name] is None:
            cfg.data[name] = otherwise if run is None else run.data[name]


def facts(
    cfg: DictConfig,
    policy: Policy,
    asked: list[tuple[Benchmark, list[Prompt]]],
    evaluation: EvaluationConfig,
) -> dict[str, Any]:
    """What decides the responses and their scores, as plain data: weights, sampling, problems, verifiers."""
    benchmarks = {}
    for benchmark, prompts in asked:
        judge = cfg.verifier if benchmark.name == "heldout" else cfg.benchmark[benchmark.name].verifier
        benchmarks[benchmark.name] = {
            "samples": evaluation.samples or benchmark.samples,
            "problems": len(prompts),
            "left_out": len(benchmark.problems[: evaluation.num_prompts]) - len(prompts),
            "asked": prompts_digest(prompts),
            "verifier": plain(judge),
        }
    return {
        "policy": weights_digest(policy.named_weights()),
        "engine": {key: cfg.engine[key] for key in ("_target_", "dtype") if key in cfg.engine},
        "seed": cfg.seed,
        **plain(cfg.data),
        "temperature": evaluation.temperature,
        "top_p": evaluation.top_p,
        "benchmarks": benchmarks,
    }


class Respondent:
    """Has the policy answer what it has not answered yet; the engine starts when there is something.

    Args:
        cfg: the whole configuration.
        policy: whose weights the engine gets.
        kept: where responses go as they come.
    """

    def __init__(self, cfg: DictConfig, policy: Policy, kept: ResponseFile) -> None:
        self.cfg, self.policy, self.kept = cfg, policy, kept
        self.engine: RolloutEngine | None = None

    def answer(self, benchmark: Benchmark, prompts: list[Prompt], sampling: SamplingParams) -> None:
        """Generate, judge and keep all that is missing, through deaths of the engine.

        Raises:
            RunError: where it died too often, left something out, or the verifier failed on everything.
        """
        total, name = len(prompts) * sampling.samples, benchmark.name
        while missing := self.kept.missing(name, prompts, sampling.samples):
            have = len(self.kept.of(name))
            print(
                f"{name}: {len(prompts)} problems x {sampling.samples}, {have} of {total} there", flush=True
            )
            try:
                self._answer(benchmark, missing, sampling, total)
            except EngineDiedError as error:
                print(f"{error}; starting it again, and going on", file=sys.stderr, flush=True)
                continue
            if left := self.kept.missing(name, prompts, sampling.samples):
                raise RunError(f"{name}: the engine left {len(left)} problems without all their responses")
            reasons = {each.reason for each in self.kept.of(name)}
            if all(reason.startswith("verifier error") for reason in reasons):
                raise RunError(f"{name}: the verifier failed on every response: {reasons.pop()}")

    def _answer(
        self, benchmark: Benchmark, prompts: list[Prompt], sampling: SamplingParams, total: int
    ) -> None:
        if self.engine is None:
            self.engine = build(self.cfg, "engine", policy=self.policy)
        WeightSync(self.policy, self.engine)()
        said = time.monotonic()
        for rollout, verdict in RolloutSource(self.engine, benchmark.verifier).stream(prompts, sampling):
            self.kept.add(Response.of(benchmark.name, rollout, verdict))
            if time.monotonic() - said >= CONSOLE_EVERY_S:
                said = time.monotonic()
                print(f"{benchmark.name}: {len(self.kept.of(benchmark.name))} of {total}", flush=True)

    def close(self) -> None:
        """Close the engine, if it was started."""
        if self.engine is not None:
            self.engine.close()
