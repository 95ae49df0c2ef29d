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
from rlvr.files import write_whole
from rlvr.instantiate import build, build_benchmarks, check_nodes, plain
from rlvr.policy import Policy
from rlvr.responses import Response, ResponseFile, claim, prompts_digest, weights_digest
from rlvr.results import Scored, results, results_table
from rlvr.rollouts import Judge, RolloutSource
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
FOLLOWED = {
    "task": None,
    "verifier": None,
    "seed": 0,
    "data.max_prompt_tokens": 1024,  # the paper's 4096 in all for Qwen2.5-Math-7B
    "data.max_new_tokens": 3072,
    "evaluation.temperature": 1.0,
    "evaluation.top_p": 1.0,
}
"""What is taken from a run where it is null, and its value where there is no run either."""
WITHOUT_EFFECT = {"workers", "deadline_s", "memory_mib"}
"""Settings of a verifier that say how it works, not what is right: they may change when one goes on."""
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
    for name in ("max_prompt_tokens", "max_new_tokens"):
        value, fix = cfg.data[name], FOLLOWED[f"data.{name}"]
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"data.{name}={value}", "a number of tokens", f"data.{name}={fix}")
    evaluation = EvaluationConfig(**plain(cfg.evaluation))
    task = None if cfg.task is None else build(cfg, "task")
    verifier = None if cfg.verifier is None else build(cfg, "verifier")
    benchmarks = build_benchmarks(cfg, task, verifier)
    if not benchmarks:
        raise ConfigError("benchmark=[]", "at least one benchmark", "benchmark=aime24,math500")
    policy = load_policy(cfg.policy.path, lambda path: build(cfg, "policy", path=path))
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
    write_whole(folder / "results.json", json.dumps(found, indent=2) + "\n")
    write_whole(folder / "results.md", results_table(found))
    print(results_table(found), end="")
    print(f"evaluation folder: {folder}", flush=True)
    return 0


def follow_run(cfg: DictConfig) -> None:
    """Fill what is null of :data:`FOLLOWED`: from the run that the policy is of, else by its own value."""
    folder = run_folder(cfg.policy.path)
    file = None if folder is None else folder / ".hydra" / "config.yaml"
    run = OmegaConf.load(file) if file is not None and file.exists() else OmegaConf.create()
    for path, otherwise in FOLLOWED.items():
        if OmegaConf.select(cfg, path) is None:
            theirs = OmegaConf.select(run, path)
            if OmegaConf.is_config(theirs):
                theirs = OmegaConf.to_container(theirs, resolve=True)
            OmegaConf.update(cfg, path, otherwise if theirs is None else theirs)


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
            "verifier": decisive(plain(judge)),
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


def decisive(node: Any) -> Any:
    """A verifier's settings, plain and nested, without those of :data:`WITHOUT_EFFECT`."""
    if isinstance(node, list):
        return [decisive(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {key: decisive(value) for key, value in node.items() if key not in WITHOUT_EFFECT}


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

        What the verifier failed on the last time is judged again first, not generated again.

        Raises:
            RunError: where it died too often, left something out, or the verifier failed on everything.
        """
        total, name = len(prompts) * sampling.samples, benchmark.name
        self._judge_again(benchmark, prompts)
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
        responses = self.kept.of(name)
        if all(each.unjudged for each in responses):
            raise RunError(f"{name}: the verifier failed on every response: {responses[0].reason}")

    def _judge_again(self, benchmark: Benchmark, prompts: list[Prompt]) -> None:
        asked = {prompt.index: prompt for prompt in prompts}
        unjudged = [each for each in self.kept.of(benchmark.name) if each.unjudged]
        if not unjudged:
            return
        print(f"{benchmark.name}: judging {len(unjudged)} responses again, after errors", flush=True)
        rollouts = (each.rollout(asked[each.index]) for each in unjudged)
        judged = Judge(benchmark.verifier).judged(rollouts)
        for response, (_, verdict) in zip(unjudged, judged, strict=True):
            self.kept.amend(response.judged(verdict))

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
