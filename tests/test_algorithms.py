"""Every recipe of ``conf/algorithm``: an update against the formula, what must not change it, a short run."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import oracles
import pytest
import runs
import torch
from hydra import compose, initialize_config_dir
from lightning import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from test_resume import assert_same_run
from test_training import Gradients, policy_in, pytestmark, rollout_batch, update  # noqa: F401  (the mark)
from torch import Tensor

from rlvr.algorithm import Algorithm
from rlvr.batch import Batch, Sequences
from rlvr.clipping import ClipRange
from rlvr.errors import ConfigError
from rlvr.instantiate import CONF, build
from rlvr.keyed import hashes
from rlvr.losses import ClipCov, KLCov, Totals, name_of, ppo_clip
from rlvr.policy import Policy
from rlvr.regions import RegionAblation

ALGORITHMS = sorted(path.stem for path in (CONF / "algorithm").glob("*.yaml"))
SCHEDULES = ["did", "did_steep", "id", "od"]
LOSSES = [
    *("ce_gppo", "cispo", "clip_cov", "dcpo_clip", "dr_grpo", "grpo", "gspo", "kl_cov", "reinforce", "sapo")
]
"""Recipes that differ by more than their bounds."""


def recipe(name: str) -> tuple[Algorithm, ClipRange]:
    """As composed, but for the learning rate, bounds that bind here and a selection of some tokens."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "train", overrides=[f"algorithm={name}", "hydra.run.dir=unused", "data.max_new_tokens=7"]
        )
    algorithm = replace(build(cfg, "algorithm"), lr=1e-3, gradient_clip=None)
    clip = build(cfg, "clip")
    if name == "clip_cov":
        algorithm = replace(algorithm, loss=ClipCov(fraction=0.06, low=0.0, high=2.0))
        clip = ClipRange.fixed(0.4, 0.4)
    if name == "kl_cov":
        algorithm = replace(algorithm, loss=KLCov(fraction=0.05, coef=0.5))
    if name == "gspo":
        clip = ClipRange.fixed(0.05, 0.05)
    return algorithm, clip


def mini_batch() -> Batch:
    """Sixteen rows off-policy, two of them without a token to learn from."""
    batch = rollout_batch(policy_in(torch.float64))
    mask = batch.loss_mask.clone()
    mask[[2, 13]] = False
    return replace(
        batch,
        sequences=replace(batch.sequences, loss_mask=mask),
        ref_logprobs=None,
        totals=Totals(tokens=int(mask.sum()), sequences=14),
    )


def log_probs(policy: Policy, batch: Batch) -> Tensor:
    """[B, T] from full logits, with gradient."""
    length = batch.loss_mask.shape[1]
    positions = (batch.sequences.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    logits = policy.model(
        input_ids=batch.sequences.input_ids,
        attention_mask=batch.sequences.attention_mask,
        position_ids=positions,
    ).logits[:, -length - 1 : -1]
    targets = batch.sequences.input_ids[:, -length:, None]
    return logits.log_softmax(dim=-1).gather(-1, targets).squeeze(-1)


class Expected(NamedTuple):
    loss: float
    grads: dict[str, Tensor]
    chosen: list[bool]
    slopes: list[float]


def expected(name: str, batch: Batch, clip: ClipRange) -> Expected:
    """Formulas a token at a time, chained to full logits."""
    policy = policy_in(torch.float64)
    logprobs = log_probs(policy, batch)
    loss = {"grpo": "ppo_clip", "dr_grpo": "ppo_clip"}.get(name, name)
    aggregation = {
        "dr_grpo": "constant_length",
        "gspo": "sequence_mean_token_mean",
        "sapo": "sequence_mean_token_mean",
    }.get(name, "token_mean")
    mask = batch.loss_mask.tolist()
    places = batch.loss_mask.nonzero().tolist()
    lnp, lnq = logprobs.tolist(), batch.old_logprobs.tolist()
    A = batch.advantages.tolist()
    tokens = [
        oracles.Token(
            lnp=oracles.Dual(lnp[row][column], 1.0),
            lnq=lnq[row][column],
            A=A[row],
            lo=clip.lower.intercept,
            hi=clip.upper.intercept,
            mean_d=fmean(lnp[row][t] - lnq[row][t] for r, t in places if r == row),
        )
        for row, column in places
    ]
    chosen = [False] * len(tokens)
    if name in ("clip_cov", "kl_cov"):
        mean_a, mean_l = fmean(t.A for t in tokens), fmean(t.lnp.value for t in tokens)
        scores: list[float | None] = [(t.A - mean_a) * (t.lnp.value - mean_l) for t in tokens]
        if name == "clip_cov":
            scores = [
                0.0 if 0 < score < 2 and (oracles.ppo_clip(t).slope or not t.A) else None
                for score, t in zip(scores, tokens, strict=True)
            ]
        rows, columns = (torch.tensor(index) for index in zip(*places, strict=True))
        assert batch.keys is not None
        keys = batch.keys[rows]
        draws = hashes(5, "select", 0, 0, keys[:, 0], keys[:, 1], columns).tolist()
        chosen = oracles.chosen(0.06 if name == "clip_cov" else 0.05, scores, draws)
        tokens = [replace(t, selected=yes) for t, yes in zip(tokens, chosen, strict=True)]
    total, slopes, chained = 0.0, [], torch.zeros((), dtype=torch.float64)
    for (row, column), token in zip(places, tokens, strict=True):
        result = oracles.ORACLES[loss](token)
        weight = oracles.weight(aggregation, mask, row, length=7)
        total += weight * result.value
        slopes.append(weight * result.slope)
        chained = chained + slopes[-1] * logprobs[row, column]
    chained.backward()
    grads = {f"policy.{key}": p.grad for key, p in policy.named_parameters()}
    return Expected(total, grads, chosen, slopes)


def assert_gradients(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(grads[key], gradient, rtol=1e-6, atol=1e-10 * scale, msg=key)


def step(name: str, batch: Batch, **given: Any) -> Gradients:
    algorithm, clip = recipe(name)
    return update(policy_in(torch.float64), batch, algorithm=algorithm, clip=clip, **given)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_an_update_is_the_formula_s(name: str) -> None:
    """In micro-batches of three, one pass or two, rows without a token among them; g of the flow too."""
    batch = mini_batch()
    _, clip = recipe(name)
    loss, grads, chosen, slopes = expected(name, batch, clip)
    ours = step(name, replace(batch, parts=torch.arange(16).split(3)))
    assert ours.outputs["loss"].item() == pytest.approx(loss, rel=1e-9)
    assert_gradients(ours.grads, grads)
    flow = ours.outputs["grad_logprobs"][batch.loss_mask].tolist()
    assert flow == pytest.approx([-slope for slope in slopes], rel=1e-8, abs=1e-12)
    if any(chosen):
        assert ours.outputs["fact:selected_frac"][batch.loss_mask].tolist() == chosen
    if name not in ("sapo", "cispo", "reinforce", "kl_cov", "ce_gppo"):
        assert 0.05 < ours.outputs["kept"][batch.loss_mask].double().mean() < 0.95, "some are clipped"


def padded(batch: Batch) -> Batch:
    """Three more columns on the left, two on the right, NaN where nothing is."""
    pad = torch.nn.functional.pad
    sequences = Sequences(
        pad(batch.sequences.input_ids, (3, 2), value=7),
        pad(batch.sequences.attention_mask, (3, 2)),
        pad(batch.loss_mask, (0, 2)),
    )
    return replace(batch, sequences=sequences, old_logprobs=pad(batch.old_logprobs, (0, 2), value=math.nan))


def with_tokens(batch: Batch) -> Tensor:
    """Rows that have a response token, the longest first."""
    lengths = batch.loss_mask.sum(dim=1)
    return lengths.argsort(descending=True)[: int((lengths > 0).sum())]


NOBODY = torch.tensor([], dtype=torch.long)
ORDER = torch.randperm(16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", LOSSES)
def test_split_order_and_padding_change_nothing(name: str) -> None:
    """One micro-batch against rows alone, rows in another order in fives, and wider rows."""
    batch = mini_batch()
    whole = step(name, batch)
    others = {
        "empty parts": step(name, replace(batch, parts=(NOBODY, *torch.arange(16).split(7), NOBODY))),
        "only rows with tokens": step(name, replace(batch, parts=with_tokens(batch).split(4))),
        "row by row": step(name, replace(batch, parts=torch.arange(16).split(1))),
        "another order": step(name, replace(batch.rows(ORDER), parts=torch.arange(16).split(5))),
        "wider": step(name, replace(padded(batch), parts=torch.arange(16).split(3))),
    }
    for how, other in others.items():
        assert other.outputs["loss"].item() == pytest.approx(whole.outputs["loss"].item(), rel=1e-10), how
        assert_gradients(other.grads, whole.grads)
    if "fact:selected_frac" in whole.outputs:
        chosen = whole.outputs["fact:selected_frac"]
        assert torch.equal(others["another order"].outputs["fact:selected_frac"], chosen[ORDER])
        assert torch.equal(others["wider"].outputs["fact:selected_frac"][:, : chosen.shape[1]], chosen)


# Selection
# ------------------------------------------------------------


def test_every_update_and_iteration_draws_anew() -> None:
    """The second update's choice is another one, although the weights are the same: lr 0."""
    batch = mini_batch()
    algorithm, clip = recipe("clip_cov")
    still = replace(algorithm, lr=0.0)
    first, _ = update(policy_in(torch.float64), batch, algorithm=still, clip=clip)
    second, _ = update(policy_in(torch.float64), batch, batch, algorithm=still, clip=clip)
    later = replace(batch, facts=replace(batch.facts, iteration=1))
    third, _ = update(policy_in(torch.float64), later, algorithm=still, clip=clip)
    chosen = [watcher.outputs["fact:selected_frac"] for watcher in (first, second, third)]
    assert chosen[0].sum() == chosen[1].sum() == chosen[2].sum() == max(1, int(0.06 * batch.totals.tokens))
    assert not torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])
    torch.testing.assert_close(first.outputs["logprobs"], second.outputs["logprobs"])


def test_the_selection_pass_leaves_the_gradients_of_mixed_precision_alone() -> None:
    """Weights that autocast has cast without gradient must not be used again in the pass with it."""
    batch = mini_batch()
    batch = replace(batch, old_logprobs=batch.old_logprobs.float())
    nobody = Algorithm(loss=ClipCov(low=1e6, high=1e7), gradient_clip=None)
    grads = []
    for algorithm in (nobody, Algorithm(loss=ppo_clip, gradient_clip=None)):
        policy = policy_in(torch.float32)
        grads.append(update(policy, batch, algorithm=algorithm, precision="bf16-mixed")[0].grads)
    assert all(gradient.any() for gradient in grads[1].values())
    for key, gradient in grads[0].items():
        assert torch.equal(gradient, grads[1][key]), key


def test_a_batch_without_keys_cannot_be_selected_from() -> None:
    with pytest.raises(ValueError, match=r"Batch\.keys"):
        step("kl_cov", replace(mini_batch(), keys=None))


class Keys(Callback):
    """Compares every row's key with the response that it belongs to."""

    rows = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        responses = {(r.prompt.index, r.sample): r.token_ids for r, _ in trainer.datamodule.rollouts}
        length = batch.loss_mask.shape[1]
        for key, ids, mask in zip(batch.keys, batch.sequences.input_ids, batch.loss_mask, strict=True):
            assert tuple(ids[-length:][mask].tolist()) == responses[tuple(key.tolist())]
            Keys.rows += 1


def test_keys_are_those_of_the_rows(tmp_path: Path) -> None:
    Keys.rows = 0
    runs.train_only(tmp_path, "trainer.max_epochs=2", "+callbacks.keys._target_=test_algorithms.Keys")
    assert Keys.rows == 32


@pytest.mark.parametrize("mode", ["only", "extend"])
def test_clip_cov_chooses_under_the_bounds_that_a_region_mode_gives(mode: Any) -> None:
    """Unclipped, or wider: tokens that PPO's clip would have cut can be chosen."""
    batch = mini_batch()
    loss = ClipCov(fraction=1.0, low=-1e6, high=1e6)
    chosen = []
    for regions in (None, RegionAblation(["E1", "E2", "E3", "E4"], mode=mode, by="theory")):
        module_batch = replace(batch, parts=torch.arange(16).split(4))
        watcher, _ = update(
            policy_in(torch.float64),
            module_batch,
            algorithm=Algorithm(loss=loss, gradient_clip=None),
            clip=ClipRange.fixed(0.1, 0.1),
            regions=regions,
        )
        chosen.append(~watcher.outputs["kept"] & batch.loss_mask)
    # Everything that is not clipped is chosen, so nothing keeps its gradient: with and without the mode.
    assert chosen[0].sum() == chosen[1].sum() == batch.loss_mask.sum()


# Bounds during a run
# ------------------------------------------------------------


def test_a_writer_of_bounds_that_the_loss_cannot_use_is_refused() -> None:
    algorithm, clip = recipe("sapo")
    _, module = update(policy_in(torch.float64), mini_batch(), algorithm=algorithm, clip=clip)
    module._clip_writer = None
    with pytest.raises(ConfigError, match="sapo has no bounds"):
        module.set_clip_range(ClipRange.fixed(0.2, 0.28), writer=module)


# Whole runs
# ------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two iterations of two updates; the objective line names the loss, and nothing is warned of."""
    sizes = ["trainer.max_epochs=2", "evaluation.every=9", "algorithm.lr=3e-4"]
    state = runs.train_only(tmp_path, f"algorithm={name}", *sizes)
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    assert runs.column(tmp_path, "train/skipped") == [0.0, 0.0]
    said = capsys.readouterr()
    assert f"objective: {name_of(recipe(name)[0].loss)}, " in said.out
    assert "WARNING" not in said.err
    for key in ("train/loss", "train/kept_frac", "train/grad_norm"):
        assert all(math.isfinite(value) for value in runs.column(tmp_path, key))


NUMBERS = {
    "grpo": (0.2, 0.2, {}),
    "clip_higher": (0.2, 0.28, {}),
    "clip_lower": (0.28, 0.2, {}),
    "dapo": (0.2, 0.28, {}),
    "dr_grpo": (0.2, 0.2, {"normalize_std": False, "aggregation.length": 10}),
    "entropy_reg": (0.2, 0.2, {"entropy_coef": 1e-3}),
    "clip_cov": (1.0, 1.0, {"loss.fraction": 2e-4, "loss.low": 1.0, "loss.high": 5.0}),
    "kl_cov": (0.2, 0.2, {"loss.fraction": 2e-3, "loss.coef": 1.0}),
    "gspo": (3e-4, 4e-4, {}),
    "sapo": (0.2, 0.2, {"loss.tau_positive": 1.0, "loss.tau_negative": 1.05}),
    "cispo": (1.0, 4.0, {}),
    "ce_gppo": (0.2, 0.2, {"loss.beta_low": 0.75, "loss.beta_high": 1.0, "loss.dual_clip": 10.0}),
    "dcpo_clip": (0.16, 0.2, {}),
    "reinforce": (0.2, 0.2, {}),
}
"""Lower and upper threshold, and what else is not GRPO's, as method.md has them."""


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in SCHEDULES])
def test_the_numbers_of_a_recipe(name: str) -> None:
    low, high, others = NUMBERS[name]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"algorithm={name}"])
    assert (cfg.clip.low, cfg.clip.high) == (low, high)
    shared = {"normalize_std": True, "entropy_coef": 0.0, "kl_coef": 0.0, "gradient_clip": 1.0}
    for key, value in {**shared, **others}.items():
        assert OmegaConf.select(cfg.algorithm, key) == value, key
    assert cfg.correction == ({} if name != "reinforce" else {**cfg.correction, "cap": 2.0})
    given = {f"loss.{key}" for key in map(str, cfg.algorithm.loss) if not key.startswith("_")}
    assert given == {key for key in others if key.startswith("loss.")}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_s_recipe_is_grpo_under_it(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"algorithm={name}"])
        plain = compose("train", overrides=[f"clip={name}"])
    assert cfg == plain


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_an_experiment_leaves_a_recipe_its_bounds(experiment: str) -> None:
    """An experiment that chose a clip itself would win over the algorithm of the command line."""
    asked = [f"experiment={experiment}", "algorithm=clip_higher"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        of_recipe = compose("train", overrides=asked)
        asked_for = compose("train", overrides=[*asked, "clip=dynamic_upper"])
    assert (of_recipe.clip.low, of_recipe.clip.high) == (0.2, 0.28)
    assert asked_for.clip.upper.slope == -0.25, "the command line's clip wins over both"


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        pytest.param(["algorithm=gspo", "clip=constant"], "clip=gspo", id="GSPO under 0.2"),
        pytest.param(["algorithm=clip_cov", "clip=id"], "clip=clip_cov", id="Clip-Cov under a schedule"),
    ],
)
def test_runs_but_says_so(
    overrides: list[str], warning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.train_only(tmp_path, *overrides, "trainer.max_epochs=1")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert warning in warnings[0]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["algorithm=ce_gppo", "clip=did"], id="CE-GPPO under a schedule"),
        pytest.param(["algorithm=dcpo_clip", "clip=id_fixed"], id="DCPO under a schedule of constants"),
        pytest.param(["algorithm=sapo", "regions.keep=[E1]", "regions.mode=drop"], id="SAPO, one region off"),
        pytest.param(["algorithm=gspo", "regions.keep=[E2]", "regions.mode=isolate"], id="GSPO, one region"),
        pytest.param(["algorithm=cispo", "regions.keep=[E1,E4]"], id="CISPO in the band"),
        pytest.param(
            ["algorithm=clip_cov", "regions.keep=[E1]", "regions.mode=extend", "clip=constant"],
            id="Clip-Cov with wider regions",
        ),
        pytest.param(["algorithm=gspo", "algorithm.kl_coef=0.1"], id="GSPO with a reference"),
    ],
)
def test_losses_combine_with_schedules_and_regions(overrides: list[str], tmp_path: Path) -> None:
    runs.train_only(tmp_path, *overrides, "trainer.max_epochs=1")
    assert runs.column(tmp_path, "train/skipped") == [0.0]


# Adaptive entropy bonus
# ------------------------------------------------------------

ADAPTIVE = ["callbacks=adaptive_entropy", "callbacks.entropy_coef.step=0.01", "algorithm.entropy_coef=0.02"]


@pytest.mark.parametrize(
    ("target", "coefs"),
    [
        pytest.param("9", [0.02, 0.03, 0.04, 0.04], id="too low an entropy: up, to the highest"),
        pytest.param("1e-3", [0.02, 0.01, 0.0, 0.0], id="too high: down, to nothing"),
    ],
)
def test_the_entropy_coefficient_follows_its_target(target: str, coefs: list[float], tmp_path: Path) -> None:
    asked = [f"callbacks.entropy_coef.target={target}", "callbacks.entropy_coef.highest=0.04"]
    runs.train_only(tmp_path, *ADAPTIVE, *asked)
    assert runs.column(tmp_path, "train/entropy_coef") == pytest.approx(coefs)


def test_the_entropy_coefficient_survives_a_resume(tmp_path: Path) -> None:
    asked = [*ADAPTIVE, "callbacks.entropy_coef.target=9", "algorithm=clip_cov"]
    runs.train_only(tmp_path / "whole", *asked)
    runs.train_only(tmp_path / "parts", *asked, until=2)
    runs.train_only(tmp_path / "parts", *asked, "ckpt_path=last")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert runs.column(tmp_path / "parts", "train/entropy_coef") == pytest.approx([0.02, 0.03, 0.04, 0.05])


def test_the_coefficient_acts_from_the_next_iteration_on(tmp_path: Path) -> None:
    weights = []
    for length in (1, 2):
        for name, asked in (("fixed", ["algorithm.entropy_coef=0.02"]), ("adaptive", ADAPTIVE)):
            size = f"trainer.max_epochs={length}"
            state = runs.train_only(tmp_path / f"{name}{length}", *asked, size)
            weights.append(state["state_dict"]["policy.model.model.embed_tokens.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[2], weights[3])
