"""The stream: an iteration's prompts, what a verifier may do, how rollouts become mini-batches."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from rlvr.algorithm import Algorithm
from rlvr.batch import Batch, Prompt, Rollout, Verdict
from rlvr.clipping import ClipRange
from rlvr.data import RolloutDataModule
from rlvr.engines.scripted import ScriptedEngine
from rlvr.errors import ConfigError
from rlvr.module import RLVRModule
from rlvr.policy import Policy
from rlvr.prompts import encode
from rlvr.settings import DataConfig, EvaluationConfig
from rlvr.tasks import LettersTask
from rlvr.verifiers import LettersVerifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
]


def script(prompt: Prompt, iteration: int, sample: int) -> str:
    """Samples 0 and 2 are right; 3 is too long for the limit."""
    return [prompt.answer, "z", prompt.answer, "abcdefgh"][sample]


class Seen(Callback):
    """Batches, and the rollouts of every iteration."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.rollouts: list[list[tuple[Rollout, Verdict]]] = []
        self.rows: list[dict[str, float]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.batches.append(batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RLVRModule)
        self.rollouts.append(list(trainer.datamodule.rollouts))  # type: ignore[attr-defined]
        self.rows.append(pl_module.ledger.close(trainer.strategy.reduce))


def fit(
    folder: Path,
    *,
    iterations: int = 2,
    verifier: object = None,
    train: int = 8,
    heldout: int = 4,
    seed: int = 0,
    policy: Policy | None = None,
    **sizes: int,
) -> Seen:
    """A real fit on scripted responses of a policy that is not trained (lr 0)."""
    policy = policy or Policy()
    config = DataConfig(**{"num_prompts": 4, "group_size": 4, "minibatches": 2, "max_new_tokens": 7, **sizes})
    module = RLVRModule(policy, Algorithm(lr=0.0), ClipRange.fixed(0.2, 0.2), updates=config.updates)
    task = LettersTask(train=train, heldout=heldout, levels=[1])
    data = RolloutDataModule(
        task,
        ScriptedEngine(policy, script),
        verifier or LettersVerifier(),  # type: ignore[arg-type]
        config,
        EvaluationConfig(samples=2, every=100),
        seed=seed,
    )
    seen = Seen()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=iterations,
        check_val_every_n_epoch=100,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[seen],
    )
    trainer.fit(module, data)
    return seen


def prompts_of(rollouts: list[tuple[Rollout, Verdict]]) -> set[int]:
    return {rollout.prompt.index for rollout, _ in rollouts}


def test_a_pass_takes_every_prompt_once(tmp_path: Path) -> None:
    """Eight prompts, four an iteration: disjoint pairs of iterations, in another order in the next pass."""
    chosen = [prompts_of(rollouts) for rollouts in fit(tmp_path, iterations=6).rollouts]
    for first in (0, 2, 4):
        assert chosen[first] | chosen[first + 1] == set(range(8))
        assert not chosen[first] & chosen[first + 1]
    assert len({frozenset(prompts) for prompts in chosen[::2]}) > 1


def test_the_order_of_prompts_is_the_seed_s(tmp_path: Path) -> None:
    orders = [
        [[rollout.prompt.index for rollout, _ in rollouts] for rollouts in fit(tmp_path, seed=seed).rollouts]
        for seed in (3, 3, 4)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_prompts_that_do_not_fill_an_iteration_wait_for_another_pass(tmp_path: Path) -> None:
    chosen = [prompts_of(rollouts) for rollouts in fit(tmp_path, iterations=4, train=10).rollouts]
    assert all(len(prompts) == 4 for prompts in chosen)
    assert not chosen[0] & chosen[1]
    assert not chosen[2] & chosen[3]


def test_mini_batches_take_every_response_once_an_epoch(tmp_path: Path) -> None:
    seen = fit(tmp_path, iterations=1, epochs=2, minibatches=4)
    assert len(seen.batches) == 8
    for epoch in (seen.batches[:4], seen.batches[4:]):
        taken = Counter(
            tuple(row[at].tolist())
            for batch in epoch
            for row, at in zip(batch.sequences.input_ids, batch.sequences.attention_mask, strict=True)
        )
        given = Counter(r.prompt.token_ids + r.token_ids for r, _ in seen.rollouts[0])
        assert taken == given
        assert sum(batch.totals.tokens for batch in epoch) == sum(
            len(r.token_ids) for r, _ in seen.rollouts[0]
        )
    for batch in seen.batches:
        assert batch.totals.tokens == batch.loss_mask.sum()
        assert batch.totals.sequences == len(batch.advantages) == 4


def test_old_logprobs_are_the_policy_s_and_0_outside_the_mask(tmp_path: Path) -> None:
    policy = Policy()
    for batch in fit(tmp_path, iterations=1, micro_batch_size=3).batches:
        with torch.no_grad():
            expected = policy.logprobs(batch.sequences).logprobs
        torch.testing.assert_close(batch.old_logprobs[batch.loss_mask], expected, atol=1e-5, rtol=0)
        assert not batch.old_logprobs[~batch.loss_mask].any()


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        pytest.param({}, 8, id="all rows of a mini-batch"),
        pytest.param({"micro_batch_size": 3}, 3, id="three rows"),
        pytest.param({"max_prompt_tokens": 10, "tokens_per_micro_batch": 17}, 8, id="17 tokens"),
        pytest.param({"max_prompt_tokens": 10, "tokens_per_micro_batch": 40}, 8, id="40 tokens"),
    ],
)
def test_mini_batches_carry_their_micro_batches(sizes: dict[str, int], most: int, tmp_path: Path) -> None:
    seen = fit(tmp_path, iterations=1, **sizes)
    for batch in seen.batches:
        assert batch.parts is not None
        assert sorted(torch.cat(batch.parts).tolist()) == list(range(len(batch.advantages)))
        tokens = batch.sequences.attention_mask.sum(dim=1)
        for part in batch.parts:
            assert len(part) <= most
            assert tokens[part].sum() <= sizes.get("tokens_per_micro_batch", 10**9)
        spread = max(tokens[part].sum() for part in batch.parts) - min(
            tokens[part].sum() for part in batch.parts
        )
        assert "tokens_per_micro_batch" not in sizes or spread <= tokens.max()


def test_truncated_responses_that_do_not_train_take_part_in_no_pass(tmp_path: Path) -> None:
    """Sample 3 of every group is cut off."""
    for batch in fit(tmp_path, iterations=1, mask_truncated=True).batches:
        assert batch.parts is not None
        trained = batch.loss_mask.any(dim=1)
        assert trained.sum() == 0.75 * len(trained)
        assert sorted(torch.cat(batch.parts).tolist()) == trained.nonzero().flatten().tolist()


@pytest.mark.parametrize("size", [1, 8])
def test_share_of_padding_is_logged(size: int, tmp_path: Path) -> None:
    """By hand for padded rows, in the log-prob pass and in one update on all rows; packed rows have none."""
    assert fit(tmp_path, iterations=1, micro_batch_size=size).rows[0]["perf/padding_frac"] == 0.0
    given = {"iterations": 1, "minibatches": 1, "micro_batch_size": size}
    seen = fit(tmp_path, policy=Policy(packing=False), **given)
    lengths = sorted(
        ((len(r.prompt.token_ids), len(r.token_ids)) for r, _ in seen.rollouts[0]), key=sum, reverse=True
    )
    computed = sum(
        size * (max(prompt for prompt, _ in rows) + max(response for _, response in rows))
        for rows in (lengths[i : i + size] for i in range(0, len(lengths), size))
    )
    real = sum(map(sum, lengths))
    assert seen.rows[0]["perf/padding_frac"] == pytest.approx(1 - real / computed)
    assert (size == 1) == (real == computed)


def test_metrics_of_scripted_rollouts(tmp_path: Path) -> None:
    """Two of four right, one of four cut off at seven tokens, two of four alike."""
    row = fit(tmp_path, iterations=1).rows[0]
    assert row["rollout/reward_mean"] == 0.5
    assert row["rollout/pass_at_k"] == 1.0
    assert row["rollout/truncated_frac"] == 0.25
    assert row["rollout/distinct_frac"] == 0.75
    assert row["rollout/zero_variance_frac"] == 0.0
    assert row["rollout/length_mean"] == (4 + 2 + 4 + 7) / 4
    assert row["rollout/verifier_errors"] == 0.0


# Verifiers
# ------------------------------------------------------------


class Fragile(LettersVerifier):
    """Cannot take responses that begin with ``z``."""

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        if completion.startswith("z"):
            raise KeyError("z")
        return super().__call__(prompt, completion)


class Giving:
    """Gives the same reward to everything."""

    def __init__(self, reward: float) -> None:
        self.reward = reward

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        return Verdict(self.reward, correct=False, answer=None, reason="given")


def test_a_verifier_s_exceptions_are_counted_and_not_fatal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = fit(tmp_path, verifier=Fragile())
    assert [row["rollout/verifier_errors"] for row in seen.rows] == [4.0, 4.0]
    failed = [verdict for _, verdict in seen.rollouts[0] if verdict.reason.startswith("verifier error")]
    assert {(verdict.reward, verdict.correct) for verdict in failed} == {(0.0, False)}
    assert "KeyError" in failed[0].reason
    error = capsys.readouterr().err
    assert error.count("verifier error on prompt") == 1, "said once, then counted"


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_verifier_that_fails_on_everything_is_fatal(reward: float, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the verifier failed on every response: verifier error: reward"):
        fit(tmp_path, verifier=Giving(reward))


@pytest.mark.parametrize("reward", [0.1, 0.7, -3.0])
def test_equal_rewards_teach_nothing(reward: float, tmp_path: Path) -> None:
    seen = fit(tmp_path, verifier=Giving(reward))
    assert not any(batch.advantages.any() for batch in seen.batches)
    assert seen.rows[0]["rollout/zero_variance_frac"] == 1.0


# Refusals, and prompts that do not fit
# ------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        pytest.param({"num_prompts": 9, "minibatches": 4}, "data.num_prompts=8", id="too few prompts"),
        pytest.param({"max_new_tokens": 60}, "data.max_new_tokens=5", id="too long for the policy"),
        pytest.param({"max_prompt_tokens": 3}, "data.max_prompt_tokens=1024", id="no prompt that fits"),
    ],
)
def test_what_the_task_and_the_policy_cannot_do_is_refused_with_a_fix(
    sizes: dict[str, int], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"; try {says}"):
        fit(tmp_path, **sizes)


@pytest.mark.parametrize(
    ("prompt", "response", "fix"),
    [
        pytest.param(60, 10, {"max_new_tokens": 4}, id="a shorter response is enough"),
        pytest.param(64, 10, {"max_prompt_tokens": 54}, id="not beside the longest prompt"),
        pytest.param(90, 80, {"max_prompt_tokens": 32, "max_new_tokens": 32}, id="both too long"),
    ],
)
def test_what_does_not_fit_the_policy_is_refused_with_what_does(
    prompt: int, response: int, fix: dict[str, int]
) -> None:
    policy = Policy()
    assert policy.max_length == 64
    prompts = [Prompt(i, str(i), "a" * length, "") for i, length in enumerate((prompt, 3))]
    limits = {"max_prompt_tokens": 1024, "max_new_tokens": response}
    with pytest.raises(ConfigError) as refused:
        encode(prompts, policy, **limits, chat=False, split="training")
    said = str(refused.value).partition("; try ")[2]
    assert said == " ".join(f"data.{name}={value}" for name, value in fix.items())
    assert encode(prompts, policy, **{**limits, **fix}, chat=False, split="training")[-1].index == 1


class Long(LettersTask):
    """Two prompts longer than the others."""

    def train(self) -> list[Prompt]:
        extra = [Prompt(100 + i, f"long-{i}", "3:" + "a" * 30 + ">", "", {}) for i in range(2)]
        return [*super().train(), *extra]


def test_long_prompts_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = Policy()
    data = RolloutDataModule(
        Long(train=8, heldout=4, levels=[1]),
        ScriptedEngine(policy, script),
        LettersVerifier(),
        DataConfig(num_prompts=4, group_size=4, minibatches=2, max_prompt_tokens=20, max_new_tokens=7),
        EvaluationConfig(samples=2),
    )
    module = RLVRModule(policy, Algorithm(), ClipRange.fixed(0.2, 0.2))
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.validate(module, data, verbose=False)
    assert "left out 2 of 10 training prompts" in capsys.readouterr().err
