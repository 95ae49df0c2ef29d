"""Rollouts: a function of key and weights, with the log-probs of the distribution they were drawn from."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from rlvr.algorithm import Algorithm
from rlvr.batch import Prompt, Rollout, Sequences
from rlvr.clipping import ClipRange
from rlvr.engines import SamplingParams
from rlvr.engines.transformers import TransformersEngine
from rlvr.policy import Policy

TEXTS = ["2:az>", "3:qbzkmt>", "4:lajgnphv>", "6:bpaxyvcutqjn>", "5:qflkojvgmt>"]
SAMPLING = SamplingParams(samples=4, max_new_tokens=7, seed=11, iteration=2)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy()


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[Prompt]:
    """Of five lengths."""
    return [
        Prompt(i, str(i), t, "", token_ids=tuple(policy.tokenizer.encode(t))) for i, t in enumerate(TEXTS)
    ]


def generated(engine: TransformersEngine, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
    """In prompt and sample order."""
    return sorted(engine.generate(prompts, sampling), key=lambda r: (r.prompt.index, r.sample))


def moved(policy: Policy) -> Policy:
    """The same architecture with other weights."""
    other = Policy()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    return other


def test_the_same_submission_gives_the_same_rollouts(policy: Policy, prompts: list[Prompt]) -> None:
    first, second = (generated(TransformersEngine(policy), prompts, SAMPLING) for _ in range(2))
    assert first == second
    assert len(first) == 20
    assert {rollout.sample for rollout in first} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"seed": 12}, id="seed"),
        pytest.param({"iteration": 3}, id="iteration"),
        pytest.param({"purpose": "heldout"}, id="purpose"),
    ],
)
def test_another_key_draws_anew(change: dict[str, object], policy: Policy, prompts: list[Prompt]) -> None:
    engine = TransformersEngine(policy)
    ours = [r.token_ids for r in generated(engine, prompts, SAMPLING)]
    theirs = [r.token_ids for r in generated(engine, prompts, replace(SAMPLING, **change))]
    assert ours != theirs


@pytest.mark.parametrize("size", [1, 3, 64])
def test_batching_changes_no_response(size: int, policy: Policy, prompts: list[Prompt]) -> None:
    reference = generated(TransformersEngine(policy), prompts, SAMPLING)
    batched = generated(TransformersEngine(policy, max_num_seqs=size), prompts, SAMPLING)
    for one, other in zip(reference, batched, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_the_order_of_prompts_changes_no_response(policy: Policy, prompts: list[Prompt]) -> None:
    engine = TransformersEngine(policy, max_num_seqs=6)
    straight = generated(engine, prompts, SAMPLING)
    for order in (prompts[::-1], prompts[2:] + prompts[:2]):
        turned = generated(engine, order, SAMPLING)
        assert [r.token_ids for r in turned] == [r.token_ids for r in straight]


def test_fewer_samples_are_the_first_ones(policy: Policy, prompts: list[Prompt]) -> None:
    engine = TransformersEngine(policy)
    two = generated(engine, prompts, replace(SAMPLING, samples=2))
    four = generated(engine, prompts, SAMPLING)
    assert [r.token_ids for r in two] == [r.token_ids for r in four if r.sample < 2]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_logprobs_are_the_policy_s(temperature: float, policy: Policy, prompts: list[Prompt]) -> None:
    """Prompts of several lengths, padded on the left, with a cache here and without one there."""
    sampling = replace(SAMPLING, temperature=temperature)
    rollouts = generated(TransformersEngine(policy), prompts, sampling)
    sequences = Sequences.of(rollouts, policy.pad_id)
    with torch.no_grad():
        expected = policy.logprobs(sequences, temperature=temperature).logprobs
    ours = torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_a_response_ends_with_its_only_stop_token_or_at_the_limit(
    policy: Policy, prompts: list[Prompt]
) -> None:
    rollouts = generated(TransformersEngine(policy), prompts, replace(SAMPLING, max_new_tokens=5))
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        *body, last = rollout.token_ids
        assert not set(body) & set(policy.stop_ids)
        assert (last in policy.stop_ids) == (rollout.finish_reason == "stop")
        assert rollout.finish_reason == "stop" or len(rollout.token_ids) == 5
        assert len(rollout.logprobs) == len(rollout.token_ids)
        assert rollout.text == policy.tokenizer.decode(rollout.token_ids, skip_special_tokens=True)


def test_greedy_is_transformers_own(policy: Policy, prompts: list[Prompt]) -> None:
    """Temperature 0, against ``generate(do_sample=False)`` prompt by prompt."""
    sampling = SamplingParams(samples=1, max_new_tokens=8, temperature=0.0)
    for rollout in generated(TransformersEngine(policy), prompts, sampling):
        ids = torch.tensor([rollout.prompt.token_ids])
        expected = policy.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, use_cache=True
        )
        assert list(rollout.token_ids) == expected[0, ids.shape[1] :].tolist()


def first_token_probs(policy: Policy, prompt: Prompt, temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1]
    return (logits.double() / temperature).softmax(dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_first_tokens_follow_their_distribution(
    temperature: float, policy: Policy, prompts: list[Prompt]
) -> None:
    """Chi-square over 4000 keyed draws, which are the same in every run of this test; rare tokens pooled."""
    number = 4000
    sampling = SamplingParams(samples=number, max_new_tokens=1, temperature=temperature, seed=1)
    engine = TransformersEngine(policy, max_num_seqs=number)
    tokens = torch.tensor([r.token_ids[0] for r in engine.generate(prompts[1:2], sampling)])
    expected = first_token_probs(policy, prompts[1], temperature) * number
    counts = tokens.bincount(minlength=len(expected)).double()
    common = expected >= 5
    observed = [*counts[common].tolist(), counts[~common].sum().item()]
    wanted = [*expected[common].tolist(), expected[~common].sum().item()]
    assert len(wanted) > 4
    assert chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize(
    ("settings", "support"),
    [
        pytest.param({"top_k": 1}, lambda p: p == p.max(), id="top-k 1"),
        pytest.param({"top_k": 3}, lambda p: p >= p.topk(3).values[-1], id="top-k 3"),
        pytest.param(
            {"top_p": 0.6}, lambda p: (p[:, None] < p[None]).double().mul(p).sum(dim=1) < 0.6, id="top-p 0.6"
        ),
    ],
)
def test_truncated_sampling_stays_in_its_support(
    settings: dict[str, float], support: object, policy: Policy, prompts: list[Prompt]
) -> None:
    """All of the support is reached, and log-probs are those of the truncated distribution."""
    assert callable(support)
    sampling = SamplingParams(samples=600, max_new_tokens=1, seed=1, **settings)
    rollouts = list(TransformersEngine(policy, max_num_seqs=600).generate(prompts[1:2], sampling))
    probs = first_token_probs(policy, prompts[1])
    allowed = support(probs)
    assert {r.token_ids[0] for r in rollouts} == set(allowed.nonzero().flatten().tolist())
    for rollout in rollouts[:20]:
        expected = (probs[rollout.token_ids[0]] / probs[allowed].sum()).log().item()
        assert rollout.logprobs[0] == pytest.approx(expected, abs=1e-4)


# Weights
# ------------------------------------------------------------


def test_a_copy_is_stale_until_it_is_synced(prompts: list[Prompt], policy: Policy) -> None:
    trained = moved(policy)
    engine = TransformersEngine(policy, own_copy=True)
    probe = [5, 9, 13, 20]
    before = engine.score(probe)
    assert before == TransformersEngine(Policy(), own_copy=True).score(probe)
    engine.load_weights(trained.named_weights())
    fresh = TransformersEngine(trained, own_copy=True)
    assert engine.score(probe) == fresh.score(probe) != before
    assert generated(engine, prompts, SAMPLING) == generated(fresh, prompts, SAMPLING)


def test_a_copy_does_not_follow_the_trainer_by_itself() -> None:
    policy = Policy()
    engine = TransformersEngine(policy, own_copy=True)
    before = engine.score([5, 9, 13])
    with torch.no_grad():
        next(policy.parameters()).mul_(2.0)
    assert engine.score([5, 9, 13]) == before


def test_shared_weights_need_no_sync_and_no_probe(policy: Policy) -> None:
    engine = TransformersEngine(policy)
    engine.load_weights(policy.named_weights())
    assert engine.model is policy.model
    assert engine.score([5, 9, 13]) is None


def test_a_sync_that_leaves_tensors_out_is_an_error(policy: Policy) -> None:
    engine = TransformersEngine(policy, own_copy=True)
    weights = list(policy.named_weights())
    with pytest.raises(RuntimeError, match="left 1 tensors stale"):
        engine.load_weights(weights[:-1])


class Deaf(TransformersEngine):
    """Takes no weights, and says nothing."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for _ in weights:
            pass


@pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers")
def test_a_skipped_sync_stops_the_run(tmp_path: Path) -> None:
    """The probe after every sync; here the trainer's weights are others from the start."""
    from lightning import Trainer

    from rlvr.data import RolloutDataModule
    from rlvr.module import RLVRModule
    from rlvr.settings import DataConfig, EvaluationConfig
    from rlvr.tasks import LettersTask
    from rlvr.verifiers import LettersVerifier

    policy = Policy()
    engine = Deaf(policy, own_copy=True)
    module = RLVRModule(moved(policy), Algorithm(), ClipRange.fixed(0.2, 0.2))
    data = RolloutDataModule(
        LettersTask(train=8, heldout=4),
        engine,
        LettersVerifier(),
        DataConfig(num_prompts=2, group_size=2, minibatches=1, max_new_tokens=4),
        EvaluationConfig(samples=2),
    )
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(RuntimeError, match="after the weight sync the engine's log-probs differ"):
        trainer.validate(module, data, verbose=False)


def test_training_mode_is_put_back(policy: Policy, prompts: list[Prompt]) -> None:
    """Also where the caller stops in the middle."""
    assert policy.model.training
    rollouts = TransformersEngine(policy).generate(prompts, SAMPLING)
    next(rollouts)
    rollouts.close()
    assert policy.model.training


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"samples": 0}, id="no samples"),
        pytest.param({"max_new_tokens": 0}, id="no tokens"),
        pytest.param({"temperature": -1.0}, id="temperature below 0"),
        pytest.param({"temperature": float("nan")}, id="temperature not a number"),
        pytest.param({"top_p": 0.0}, id="top-p 0"),
        pytest.param({"top_p": 1.1}, id="top-p above 1"),
        pytest.param({"top_k": -1}, id="top-k below 0"),
    ],
)
def test_sampling_refuses(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        SamplingParams(**{"samples": 1, "max_new_tokens": 1, **settings})
