"""One update, against an independent oracle and under all that must not change it; and whole short runs."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from rlvr.advantages import group_relative
from rlvr.algorithm import Algorithm
from rlvr.batch import Batch, IterationFacts, Prompt, Sequences
from rlvr.clipping import ClipRange, LinearThreshold
from rlvr.engines import SamplingParams
from rlvr.engines.transformers import TransformersEngine
from rlvr.losses import LossInputs, LossOutputs, Totals, ppo_clip
from rlvr.module import RLVRModule
from rlvr.packing import micro_batches
from rlvr.policy import Policy
from rlvr.regions import RegionAblation
from rlvr.schedules import decrease_increase_decrease, increase_then_decrease

FACTS = IterationFacts(iteration=0, entropy=1.5, reward_mean=0.5)
DYNAMIC = ClipRange(lower=LinearThreshold(-0.13, 0.3), upper=LinearThreshold(-0.25, 0.5))
GROUP = 4


class Batches(IterableDataset[Batch]):
    """These batches, once."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches


class Gradients(Callback):
    """Keeps what an update used: its outputs, and the gradients before they are clipped or dropped."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.grads: dict[str, Tensor] = {}
        for name, parameter in pl_module.named_parameters():
            self.grads[name] = torch.zeros_like(parameter)
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: self.grads.__setitem__(name, p.grad.clone())
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.outputs = dict(outputs)


def policy_in(dtype: torch.dtype, **settings: Any) -> Policy:
    return Policy(**settings).to(dtype)


def rollout_batch(policy: Policy, *, off_policy: float = 0.4) -> Batch:
    """Sampled responses to prompts of several lengths, under an old policy that is not this one."""
    texts = ["2:az>", "3:qbzkmt>", "4:lajgnphv>", "6:bpaxyvcutqjn>"]
    prompts = [
        Prompt(i, str(i), text, "", token_ids=tuple(policy.tokenizer.encode(text)))
        for i, text in enumerate(texts)
    ]
    sampling = SamplingParams(samples=GROUP, max_new_tokens=7, temperature=1.3, seed=3)
    rollouts = sorted(
        TransformersEngine(policy).generate(prompts, sampling), key=lambda r: (r.prompt.index, r.sample)
    )
    sequences = Sequences.of(rollouts, policy.pad_id)
    noise = torch.Generator().manual_seed(0)
    mask = sequences.loss_mask
    rewards = torch.rand(len(prompts), GROUP, generator=noise)
    rewards[1] = 0.7  # a group that teaches nothing
    old, ref = (torch.zeros(mask.shape, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        logprobs = policy.logprobs(sequences).logprobs.double()
    for target, width in ((old, off_policy), (ref, 0.3)):
        target[mask] = logprobs + width * torch.randn(len(logprobs), generator=noise).double()
    return Batch(
        sequences=sequences,
        advantages=group_relative(rewards).flatten(),
        old_logprobs=old.clamp(max=-1e-3),
        ref_logprobs=ref.clamp(max=-1e-3),
        rho=None,
        totals=Totals(tokens=int(mask.sum()), sequences=len(rollouts)),
        facts=FACTS,
        keys=torch.tensor([(rollout.prompt.index, rollout.sample) for rollout in rollouts]),
    )


ALGORITHM = Algorithm(entropy_coef=0.01, kl_coef=0.1, lr=1e-3, gradient_clip=None)


def update(
    policy: Policy,
    *batches: Batch,
    algorithm: Algorithm = ALGORITHM,
    clip: ClipRange = DYNAMIC,
    regions: RegionAblation | None = None,
    **trainer: Any,
) -> tuple[Gradients, RLVRModule]:
    """Train on these batches with a real trainer; what the last update used, and the module after it."""
    watcher = Gradients()
    module = RLVRModule(policy, algorithm, clip, regions=regions, updates=len(batches), seed=5)
    fit = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watcher],
        **trainer,
    )
    fit.fit(module, DataLoader(Batches(list(batches)), batch_size=None))
    return watcher, module


pytestmark = [
    # The stream has to be sized, see data.py; the rest is what Lightning says of a loader without workers.
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated"),
]


def assert_same_update(one: Gradients, other: Gradients, rows: Tensor | None = None) -> None:
    assert one.outputs["loss"].item() == pytest.approx(other.outputs["loss"].item(), rel=1e-10)
    for name, gradient in one.grads.items():
        torch.testing.assert_close(other.grads[name], gradient, rtol=1e-8, atol=1e-12, msg=name)
    mask = one.outputs["mask"]
    for key in ("logprobs", "entropy", "kept", "grad_logprobs", "ratio", "moment", "fact:clip_frac_low"):
        left, right = one.outputs[key], other.outputs[key]
        right = right if rows is None else right[rows.argsort()]
        torch.testing.assert_close(right[:, : mask.shape[1]], left, rtol=1e-8, atol=1e-12, msg=key)


def parts_of(batch: Batch, packed: bool, tokens: int, least: int = 1) -> tuple[Tensor, ...]:
    """Parts by a budget of tokens, as another rank with ``least`` parts would have it."""
    width = batch.sequences.attention_mask.shape[1] - batch.loss_mask.shape[1]
    attended = batch.sequences.attention_mask
    lengths = [(int(row[:width].sum()), int(row[width:].sum())) for row in attended]
    parts = micro_batches(lengths, rows=1, tokens=tokens, packed=packed, agree=lambda n: max(n, least))
    return tuple(torch.tensor(part, dtype=torch.long) for part in parts)


SPLITS = [
    pytest.param(lambda batch, packed: torch.arange(16).split(1), id="1"),
    pytest.param(lambda batch, packed: torch.arange(16).split(3), id="3"),
    pytest.param(lambda batch, packed: torch.arange(16).split(5), id="5"),
    pytest.param(lambda batch, packed: parts_of(batch, packed, 40), id="40 tokens"),
    pytest.param(lambda batch, packed: parts_of(batch, packed, 90), id="90 tokens"),
    pytest.param(lambda batch, packed: parts_of(batch, packed, 60, least=20), id="20 parts, empty ones too"),
]


@pytest.mark.parametrize("packing", [None, False], ids=["packed", "padded"])
@pytest.mark.parametrize("split", SPLITS)
def test_micro_batches_change_nothing(split: Any, packing: bool | None) -> None:
    """All rows at once, padded, against parts in any order: loss, gradients, and outputs in the batch's."""
    batch = rollout_batch(policy_in(torch.float64))
    whole, _ = update(policy_in(torch.float64, packing=False), batch)
    parts = split(batch, packing is None)
    ours, _ = update(policy_in(torch.float64, packing=packing), replace(batch, parts=parts))
    assert_same_update(whole, ours)


@pytest.mark.parametrize("packing", [None, False], ids=["packed", "padded"])
def test_a_rank_without_rows_adds_gradients_of_exactly_zero(packing: bool | None) -> None:
    """As many passes as the others make, for their collectives; the mini-batch's totals are the others'."""
    batch = rollout_batch(policy_in(torch.float64))
    nothing = torch.tensor([], dtype=torch.long)
    empty = replace(batch.rows(nothing), parts=(nothing,) * 3)
    policy = policy_in(torch.float64, packing=packing)
    passes: list[Any] = []
    policy.model.get_decoder().register_forward_hook(lambda *_: passes.append(None))
    watcher, module = update(policy, empty)
    assert len(passes) == 3
    assert all(grad.isfinite().all() and not grad.any() for grad in watcher.grads.values())
    assert watcher.outputs["loss"] == 0
    assert watcher.outputs["logprobs"].shape == watcher.outputs["mask"].shape == (0, 1)
    assert module.skipped == 0


def test_row_order_changes_nothing() -> None:
    batch = rollout_batch(policy_in(torch.float64))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    straight, _ = update(policy_in(torch.float64), batch)
    shuffled, _ = update(
        policy_in(torch.float64), replace(batch.rows(order), parts=torch.arange(16).split(3))
    )
    assert_same_update(straight, shuffled, rows=order)


def test_padding_changes_nothing() -> None:
    """Three more columns on the left, two on the right, filled with a token that is never looked at."""
    batch = rollout_batch(policy_in(torch.float64))
    pad = torch.nn.functional.pad
    sequences = Sequences(
        pad(batch.sequences.input_ids, (3, 2), value=7),
        pad(batch.sequences.attention_mask, (3, 2)),
        pad(batch.loss_mask, (0, 2)),
    )
    assert batch.ref_logprobs is not None
    padded = replace(
        batch,
        sequences=sequences,
        old_logprobs=pad(batch.old_logprobs, (0, 2), value=math.nan),
        ref_logprobs=pad(batch.ref_logprobs, (0, 2), value=math.nan),
    )
    bare, _ = update(policy_in(torch.float64), batch)
    wide, _ = update(policy_in(torch.float64), padded)
    assert_same_update(bare, wide)


def oracle(policy: Policy, batch: Batch) -> Tensor:
    """The objective in plain words: full logits, the paper's clip, token mean, entropy bonus, k3."""
    mask, length = batch.loss_mask, batch.loss_mask.shape[1]
    positions = (batch.sequences.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    logits = policy.model(
        input_ids=batch.sequences.input_ids,
        attention_mask=batch.sequences.attention_mask,
        position_ids=positions,
    ).logits[:, -length - 1 : -1]
    every = logits.log_softmax(dim=-1)
    logp = every.gather(-1, batch.sequences.input_ids[:, -length:, None]).squeeze(-1)
    entropy = -(every.exp() * every).sum(dim=-1)
    ratio = (logp - batch.old_logprobs).exp()
    p = logp.detach().exp()
    advantages = batch.advantages[:, None]
    clipped = torch.clamp(ratio, 1 - (0.3 - 0.13 * p), 1 + (0.5 - 0.25 * p))
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    d = batch.ref_logprobs - logp
    k3 = d.exp() - d - 1
    return (-surrogate - 0.01 * entropy + 0.1 * k3)[mask].sum() / mask.sum()


def test_gradient_is_the_oracle_s() -> None:
    policy = policy_in(torch.float64)
    batch = rollout_batch(policy)
    ours, _ = update(policy_in(torch.float64), replace(batch, parts=torch.arange(16).split(3)))
    loss = oracle(policy, batch)
    loss.backward()
    assert 0.1 < ours.outputs["kept"][batch.loss_mask].float().mean() < 0.95, "some are clipped, some are not"
    assert ours.outputs["loss"].item() == pytest.approx(loss.item(), rel=1e-9)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(
            ours.grads[f"policy.{name}"], parameter.grad, rtol=1e-6, atol=1e-10, msg=name
        )


def test_grad_logprobs_are_minus_the_loss_s_derivatives() -> None:
    """A policy update without bonus or divergence: g = r A / N for kept tokens, 0 for clipped ones."""
    plain = Algorithm(lr=1e-3, gradient_clip=None)
    batch = replace(rollout_batch(policy_in(torch.float64)), ref_logprobs=None)
    outputs = update(policy_in(torch.float64), batch, algorithm=plain)[0].outputs
    expected = outputs["ratio"] * batch.advantages[:, None] * outputs["kept"] / batch.totals.tokens
    torch.testing.assert_close(outputs["grad_logprobs"], expected, rtol=1e-6, atol=1e-12)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    batch = rollout_batch(policy_in(torch.float64))
    stored, _ = update(policy_in(torch.float64), batch)
    recomputed, _ = update(policy_in(torch.float64, activation_checkpointing=True), batch)
    assert_same_update(stored, recomputed)


def test_groups_without_variance_give_exactly_no_policy_gradient() -> None:
    batch = rollout_batch(policy_in(torch.float32))
    equal = replace(batch.rows(slice(GROUP, 2 * GROUP)), ref_logprobs=None)
    assert not equal.advantages.any()
    watcher, _ = update(policy_in(torch.float32), equal, algorithm=Algorithm(gradient_clip=None))
    assert not any(gradient.any() for gradient in watcher.grads.values())


def test_gradients_are_clipped_to_a_norm() -> None:
    """What is logged is the norm before."""
    batch = rollout_batch(policy_in(torch.float64))
    watcher, module = update(policy_in(torch.float64), batch)
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in watcher.grads.values()]))
    total, count = module.ledger._open["train/grad_norm"]
    assert (total / count).item() == pytest.approx(norm.item())


# Updates that are not finite
# ------------------------------------------------------------


class NaNFrom:
    """An outside loss that is not a number in some of its calls, one a micro-batch here."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.calls = first, last, 0

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        outputs = ppo_clip(inputs)
        self.calls += 1
        bad = math.nan if self.first <= self.calls <= self.last else 1.0
        return replace(outputs, loss=outputs.loss * bad)


class Weights(Callback):
    """Weights, moments and step counts around every update."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        states = trainer.optimizers[0].state.values()
        tensors = [*pl_module.parameters(), *(t for state in states for t in state.values())]
        self.seen.append([tensor.detach().clone() for tensor in tensors])


def test_a_step_that_is_not_finite_leaves_weights_and_moments_alone(tmp_path: Path) -> None:
    """The second of two updates; the first has made moments that a step by zeros would move."""
    nan = "algorithm.loss={_target_:test_training.NaNFrom,first:2,last:2}"
    watcher = "+callbacks.watcher._target_=test_training.Watching"
    Watching.last = None
    runs.train_only(tmp_path, "trainer.max_epochs=2", *as_loss(nan), watcher)
    assert Watching.last is not None
    first, second, third, _ = Watching.last.seen
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert runs.column(tmp_path, "train/skipped") == [0.5, 0.0]
    assert all(math.isfinite(norm) for norm in runs.column(tmp_path, "train/grad_norm"))


class Watching(Weights):
    """:class:`Weights` that the test finds again: the command line makes it."""

    last: "Watching | None" = None

    def __init__(self) -> None:
        super().__init__()
        type(self).last = self


def as_loss(override: str) -> list[str]:
    """Put an object, not a partial function, in the loss's place."""
    return ["~algorithm.loss", f"+{override}"]


def test_too_many_skipped_steps_stop_the_run_with_3_and_a_checkpoint(tmp_path: Path) -> None:
    nan = as_loss("algorithm.loss={_target_:test_training.NaNFrom,first:3,last:999}")
    assert runs.train(tmp_path, *nan, "algorithm.max_skipped=2", "trainer.max_epochs=9") == 3
    assert runs.column(tmp_path, "train/skipped") == [0.0, 1.0]
    assert runs.checkpoint(tmp_path)["rlvr"]["skipped"] == 2
    assert all(t.isfinite().all() for t in runs.checkpoint(tmp_path)["state_dict"].values())
    assert "algorithm.max_skipped=2" in (tmp_path / "summary.json").read_text()
    runs.train_only(tmp_path, "ckpt_path=last", "algorithm.max_skipped=5", "trainer.max_epochs=3")
    assert runs.column(tmp_path, "train/skipped") == [0.0, 1.0, 0.0]


# Whole runs
# ------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "factors"),
    [
        pytest.param(["algorithm.lr_schedule=constant"], [1.0] * 8, id="constant"),
        pytest.param(["algorithm.warmup=0.5"], [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0], id="warm-up"),
        pytest.param(
            ["algorithm.lr_schedule=cosine"],
            [0.5 * (1 + math.cos(math.pi * u / 8)) for u in range(8)],
            id="cosine",
        ),
        pytest.param(
            ["algorithm.lr_schedule=cosine", "algorithm.warmup=0.25"],
            [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * u / 6)) for u in range(6))],
            id="cosine after warm-up",
        ),
    ],
)
def test_learning_rates_are_logged_as_used(
    overrides: list[str], factors: list[float], tmp_path: Path
) -> None:
    """Every iteration's row holds the mean over its two updates."""
    runs.train_only(tmp_path, *overrides)
    expected = [3e-4 * (factors[2 * k] + factors[2 * k + 1]) / 2 for k in range(4)]
    assert runs.column(tmp_path, "train/lr") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("clip", "schedule"),
    [
        pytest.param("id", increase_then_decrease, id="ID"),
        pytest.param("did", decrease_increase_decrease, id="DID"),
    ],
)
def test_logged_thresholds_are_the_schedule_s(clip: str, schedule: Any, tmp_path: Path) -> None:
    runs.train_only(tmp_path, f"clip={clip}", "clip.turn=0.4")
    for side in ("lower", "upper"):
        for part in ("slope", "intercept"):
            expected = [getattr(getattr(schedule(k / 4, turn=0.4), side), part) for k in range(4)]
            assert runs.column(tmp_path, f"clip/{side}_{part}") == pytest.approx(expected, abs=1e-12)


class Diary(Callback):
    """Who was called when, and what the clip range and the engine were then."""

    entries: list[str] = []

    def __init__(self) -> None:
        self.entries.clear()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.entries.append(f"update {batch_idx} at +{pl_module.clip_range.upper.intercept:g}")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.entries.append("validated")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.entries.append("closed")


class Syncing(TransformersEngine):
    """Says when it is given weights."""

    def load_weights(self, weights: Any) -> None:
        Diary.entries.append("synced")
        super().load_weights(weights)


def test_order_of_an_iteration(tmp_path: Path) -> None:
    """Sync, then the scheduler before the first update; sync again before validation; then the row."""
    plugins = ["+callbacks.diary._target_=test_training.Diary", "engine._target_=test_training.Syncing"]
    runs.train_only(tmp_path, "clip=id", "trainer.max_epochs=2", "evaluation.every=1", *plugins)
    assert Diary.entries == [
        *("synced", "validated"),
        *("synced", "update 0 at +0.5", "update 1 at +0.5", "synced", "validated", "closed"),
        *("synced", "update 0 at +0.2", "update 1 at +0.2", "synced", "validated", "closed"),
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["trainer.precision=bf16-mixed"], id="bf16 arithmetic on float32 weights"),
        pytest.param(["trainer.precision=bf16-mixed", "engine.own_copy=true"], id="bf16 and a copy to sync"),
        pytest.param(["policy.activation_checkpointing=true"], id="activation checkpointing"),
        pytest.param(["policy.attention=eager"], id="eager attention"),
        pytest.param(["policy.packing=false", "data.micro_batch_size=5"], id="padded rows"),
        pytest.param(["data.micro_batch_size=3", "data.temperature=0.7", "data.top_p=0.9"], id="sampling"),
        pytest.param(["task.levels=[1]", "data.max_new_tokens=2"], id="every response truncated"),
    ],
)
def test_runs_with(overrides: list[str], tmp_path: Path) -> None:
    state = runs.train_only(tmp_path, "trainer.max_epochs=2", *overrides)
    assert all(value.dtype == torch.float32 for value in state["state_dict"].values())
    for key in ("train/loss", "train/entropy", "rollout/entropy", "train/ratio_mean", "train/lr"):
        assert all(math.isfinite(value) for value in runs.column(tmp_path, key))
    assert runs.column(tmp_path, "train/skipped") == [0.0, 0.0]


def test_the_first_update_of_an_iteration_is_on_policy(tmp_path: Path) -> None:
    """Old and new log-probs come from one function of the weights: with one update, every ratio is 1."""
    runs.train_only(tmp_path, "data.minibatches=1", "data.micro_batch_size=3")
    assert runs.column(tmp_path, "train/ratio_mean") == pytest.approx([1.0] * 4, abs=1e-5)
    assert runs.column(tmp_path, "train/kept_frac") == [1.0] * 4
    assert runs.column(tmp_path, "train/entropy") == pytest.approx(runs.column(tmp_path, "rollout/entropy"))


def test_a_run_with_one_update_says_that_clipping_is_powerless(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.train_only(tmp_path, "data.minibatches=1", "trainer.max_epochs=1")
    assert "WARNING: one update per rollout batch: every ratio is 1" in capsys.readouterr().err
