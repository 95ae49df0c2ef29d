"""Every loss against its formula in Python floats, value and gradient; and what must change nothing."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import oracles
import pytest
import torch
from torch import Tensor

from rlvr.clipping import ClipRange, LinearThreshold
from rlvr.errors import ConfigError
from rlvr.losses import (
    ClipCov,
    KLCov,
    Loss,
    LossInputs,
    ce_gppo,
    check_clip,
    cispo,
    dcpo_clip,
    gspo,
    ppo_clip,
    reinforce,
    sapo,
)

LOSSES: dict[str, tuple[Loss, ClipRange]] = {
    "ppo_clip": (ppo_clip, ClipRange.fixed(0.2, 0.28)),
    "ppo_clip, dual clip": (partial(ppo_clip, dual_clip=3.0), ClipRange.fixed(0.2, 0.28)),
    "clip_cov": (ClipCov(), ClipRange.fixed(1.0, 1.0)),
    "kl_cov": (KLCov(coef=0.5), ClipRange.fixed(0.2, 0.2)),
    "gspo": (gspo, ClipRange.fixed(0.1, 0.15)),
    "sapo": (sapo, ClipRange.fixed(0.2, 0.2)),
    "cispo": (cispo, ClipRange.fixed(1.0, 4.0)),
    "ce_gppo": (ce_gppo, ClipRange.fixed(0.2, 0.28)),
    "dcpo_clip": (dcpo_clip, ClipRange.fixed(0.16, 0.2)),
    "reinforce": (reinforce, ClipRange.fixed(0.2, 0.2)),
}
"""Each loss as its oracle has it, under bounds that some of the tokens below meet."""
DYNAMIC = ClipRange(lower=LinearThreshold(-0.13, 0.3), upper=LinearThreshold(-0.25, 0.5))
NAMES = list(LOSSES)
LENGTHS = [12, 1, 9, 0, 12, 5]
EDGES = [0.0, 19.0, 21.0, 1e4, -19.0, -21.0, -1e4, 1e-9, -1e-9, 0.3, -0.3, 1.0]
"""Log-ratios of the first row, A > 0, and of the fifth, A < 0."""


def batch(name: str, dtype: torch.dtype = torch.float64) -> LossInputs:
    """Six rows, one empty, one of one token, one with A = 0; NaN in the padding."""
    draws = torch.Generator().manual_seed(11)
    size = (len(LENGTHS), max(LENGTHS))
    mask = torch.arange(size[1]) < torch.tensor(LENGTHS)[:, None]
    old = -4 * torch.rand(size, generator=draws, dtype=dtype) - 1e-4
    log_ratio = 0.5 * torch.randn(size, generator=draws, dtype=dtype)
    log_ratio[0] = log_ratio[4] = torch.tensor(EDGES, dtype=dtype)
    logprobs = torch.where(log_ratio > 1, old, old + log_ratio)
    old = logprobs - log_ratio
    advantages = torch.tensor([1.3, -0.7, -1.1, 0.4, -0.9, 0.0], dtype=dtype)[:, None].expand(size)
    means = torch.where(mask, log_ratio, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    spoil = partial(torch.masked_fill, mask=~mask, value=math.nan)
    return LossInputs(
        logprobs=spoil(logprobs),
        old_logprobs=spoil(old),
        advantages=spoil(advantages),
        mask=mask,
        clip=LOSSES[name][1],
        sequence_log_ratio=spoil(means.expand(size)),
        selected=torch.rand(size, generator=draws) < 0.4,
    )


def run(loss: Loss, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, their derivatives by ln p, and ``kept``; 0 outside the mask where they are masked."""
    leaf = inputs.logprobs.detach().clone().requires_grad_()
    outputs = loss(replace(inputs, logprobs=leaf))
    losses = torch.where(inputs.mask, outputs.loss, 0.0)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad, outputs.kept


def expected(oracle: Callable[[oracles.Token], oracles.Dual], inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Values and gradients, a token at a time."""
    values, grads = torch.zeros_like(inputs.logprobs), torch.zeros_like(inputs.logprobs)
    for row, column in inputs.mask.nonzero().tolist():
        at = (row, column)
        result = oracle(
            oracles.Token(
                lnp=oracles.Dual(inputs.logprobs[at].item(), 1.0),
                lnq=inputs.old_logprobs[at].item(),
                A=inputs.advantages[at].item(),
                lo=inputs.clip.lower.intercept,
                hi=inputs.clip.upper.intercept,
                mean_d=0.0 if inputs.sequence_log_ratio is None else inputs.sequence_log_ratio[at].item(),
                selected=inputs.selected is not None and bool(inputs.selected[at]),
            )
        )
        values[at], grads[at] = result.value, result.slope
    return values, grads


def largest_errors(name: str) -> tuple[float, float]:
    """Largest relative error of value and of gradient over the batch and many random tokens."""
    loss = LOSSES[name][0]
    worst = [0.0, 0.0]
    for inputs in (batch(name), random_tokens(name)):
        wanted = expected(oracles.ORACLES[name], inputs)
        for place, (got, want) in enumerate(zip(run(loss, inputs)[:2], wanted, strict=True)):
            error = (got - want).abs() / want.abs().clamp(min=1e-300)
            worst[place] = max(worst[place], torch.where(got == want, 0.0, error).max().item())
    return worst[0], worst[1]


def random_tokens(name: str, number: int = 3000) -> LossInputs:
    """One row of tokens of every probability, ratio and advantage, bounds crossed both ways."""
    draws = torch.Generator().manual_seed(5)
    size = (1, number)
    uniform = partial(torch.rand, size, generator=draws, dtype=torch.float64)
    log_ratio = 0.7 * torch.randn(size, generator=draws, dtype=torch.float64)
    logprobs = -8 * uniform().square() - 1e-6
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs - log_ratio,
        advantages=torch.randn(size, generator=draws, dtype=torch.float64),
        mask=torch.ones(size, dtype=torch.bool),
        clip=LOSSES[name][1],
        sequence_log_ratio=0.2 * torch.randn(size, generator=draws, dtype=torch.float64),
        selected=uniform() < 0.3,
    )


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_the_formula_s(name: str) -> None:
    value, gradient = largest_errors(name)
    assert value < 1e-13
    # Far out on SAPO's gate autograd's 1 - sigmoid cancels: of a slope of 1e-5, a part in 1e10 is lost.
    assert gradient < (1e-9 if name == "sapo" else 1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_finite_at_the_edges(name: str) -> None:
    loss, inputs = LOSSES[name][0], batch(name, torch.float32)
    values, grads, _ = run(loss, inputs)
    assert values.isfinite().all()
    assert grads.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_token_loses_its_gradient_where_it_is_not_kept_and_only_there(name: str) -> None:
    """But where A = 0, or where the formula's own slope is 0: a ratio that underflows, a gate far out."""
    inputs = batch(name)
    _, grads, kept = run(LOSSES[name][0], inputs)
    _, slopes = expected(oracles.ORACLES[name], inputs)
    assert not grads[inputs.mask & ~kept].any()
    lost = inputs.mask & kept & (grads == 0)
    assert not slopes[lost].any()
    ordinary = lost & ((inputs.logprobs - inputs.old_logprobs).abs() < 10) & (inputs.advantages != 0)
    assert not ordinary.any()


@pytest.mark.parametrize("name", NAMES)
def test_nan_in_the_padding_reaches_neither_value_nor_gradient(name: str) -> None:
    inputs = batch(name)
    clean = {
        field: getattr(inputs, field).masked_fill(~inputs.mask, -0.5)
        for field in ("logprobs", "old_logprobs", "advantages", "sequence_log_ratio")
    }
    dirty, dirty_grad, _ = run(LOSSES[name][0], inputs)
    bare, bare_grad, _ = run(LOSSES[name][0], replace(inputs, **clean))
    assert torch.equal(dirty, bare)
    assert torch.equal(dirty_grad, bare_grad)
    assert not dirty_grad[~inputs.mask].any()


@pytest.mark.parametrize("name", NAMES)
def test_any_shape_and_order(name: str) -> None:
    """A chunk of tokens, in another order, gives what the whole gives; facts too."""
    inputs = batch(name)
    order = torch.randperm(int(inputs.mask.sum()), generator=torch.Generator().manual_seed(0))
    flat = replace(
        inputs,
        **{
            field: getattr(inputs, field)[inputs.mask][order]
            for field in ("logprobs", "old_logprobs", "advantages", "mask")
        },
        sequence_log_ratio=inputs.sequence_log_ratio[inputs.mask][order],
        selected=inputs.selected[inputs.mask][order],
    )
    loss = LOSSES[name][0]
    whole, part = run(loss, inputs), run(loss, flat)
    for left, right in zip(whole, part, strict=True):
        torch.testing.assert_close(right, left[inputs.mask][order], rtol=1e-13, atol=0)
    for key, value in loss(inputs).facts.items():
        right = loss(flat).facts[key]
        assert not right.requires_grad
        torch.testing.assert_close(right, value[inputs.mask][order], rtol=1e-13, atol=0)


# On a bound
# ------------------------------------------------------------


def one(old: float, advantage: float, clip: ClipRange) -> LossInputs:
    """A token of ln p = -1; for GSPO its sequence has the same log-ratio."""
    whole = partial(torch.full, (1, 1), dtype=torch.float64)
    return LossInputs(
        logprobs=whole(-1.0),
        old_logprobs=whole(old),
        advantages=whole(advantage),
        mask=torch.ones(1, 1, dtype=torch.bool),
        clip=clip,
        sequence_log_ratio=whole(-1.0 - old),
        selected=torch.zeros(1, 1, dtype=torch.bool),
    )


@pytest.mark.parametrize("steps", [-1, 0, 1], ids=["one float inside", "on it", "one float outside"])
@pytest.mark.parametrize("side", ["upper", "lower"])
@pytest.mark.parametrize("name", ["ppo_clip", "clip_cov", "gspo", "cispo", "ce_gppo"])
def test_on_a_bound(name: str, side: str, steps: int) -> None:
    """Bounds one float beyond, on, and one float short of the ratio; 1 + (r - 1) is exact here."""
    old, advantage = (-1.25, 2.0) if side == "upper" else (-0.75, -2.0)
    ratio = torch.tensor(-1.0 - old, dtype=torch.float64).exp().item()
    outward = math.inf if side == "upper" else -math.inf
    bound = ratio if steps == 0 else math.nextafter(ratio, -steps * outward)
    clip = ClipRange.fixed(0.9, bound - 1) if side == "upper" else ClipRange.fixed(1 - bound, 0.9)
    loss, grad, kept = run(LOSSES[name][0], one(old, advantage, clip))
    outside = steps > 0
    value = bound if outside else ratio
    beta = 0.75 if outside and side == "lower" else 1.0
    expected_loss, expected_grad = {
        "cispo": (value * advantage, -value * advantage),  # -w A ln p at ln p = -1
        "ce_gppo": (-advantage * value * beta, -advantage * value * beta),
    }.get(name, (-advantage * value, 0.0 if outside else -advantage * value))
    assert loss.item() == pytest.approx(expected_loss, rel=1e-15)
    assert grad.item() == pytest.approx(expected_grad, rel=1e-15)
    assert kept.item() == (name in ("cispo", "ce_gppo") or not outside)


@pytest.mark.parametrize(
    ("old_prob", "low", "high"),
    [
        pytest.param(0.5, 0.5, 1.3062, id="q=0.5: the lower root is not real"),
        pytest.param(0.9, 0.7687, 1.1872, id="q=0.9"),
        pytest.param(1e-4, 0.5, 10.0, id="q=1e-4: the upper bound is capped"),
    ],
)
def test_dcpo_bounds_by_hand(old_prob: float, low: float, high: float) -> None:
    inputs = one(math.log(old_prob), 1.0, LOSSES["dcpo_clip"][1])
    facts = dcpo_clip(inputs).facts
    assert 1 - facts["clip_low_mean"].item() == pytest.approx(low, abs=1e-4)
    assert 1 + facts["clip_high_mean"].item() == pytest.approx(high, abs=1e-4)


def test_sapo_starts_as_the_policy_gradient() -> None:
    """At r = 1 the slope is -A, whatever the temperature."""
    for advantage in (1.5, -1.5):
        _, grad, _ = run(sapo, one(-1.0, advantage, ClipRange.fixed(0.2, 0.2)))
        assert grad.item() == pytest.approx(-advantage)


def test_dynamic_bounds_reach_the_losses_that_read_them() -> None:
    """p = 0.56 from q = 0.4: 1 + U(p) = 1.36 is met."""
    probs = torch.tensor([[[0.56]], [[0.4]]], dtype=torch.float64).log()
    inputs = replace(one(0.0, 1.0, DYNAMIC), logprobs=probs[0], old_logprobs=probs[1])
    for loss in (ppo_clip, ce_gppo, ClipCov()):
        assert run(loss, inputs)[0].item() == pytest.approx(-1.36)


# What is asked of the caller
# ------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "missing"),
    [
        pytest.param(gspo, "sequence_log_ratio", id="gspo"),
        pytest.param(ClipCov(), "selected", id="clip_cov"),
        pytest.param(KLCov(), "selected", id="kl_cov"),
    ],
)
def test_what_is_missing_is_named(loss: Loss, missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        loss(replace(batch("gspo"), sequence_log_ratio=None, selected=None))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: sapo(batch("sapo"), tau_negative=0.0), id="a gate of temperature 0"),
        pytest.param(lambda: ce_gppo(batch("sapo"), beta_low=-1.0), id="a negative gradient"),
        pytest.param(lambda: ce_gppo(batch("sapo"), dual_clip=1.0), id="a dual clip of 1"),
        pytest.param(lambda: ClipCov(fraction=0.0), id="no tokens to clip"),
        pytest.param(lambda: ClipCov(fraction=1.5), id="more tokens than there are"),
        pytest.param(lambda: ClipCov(low=5.0, high=1.0), id="an empty interval"),
        pytest.param(lambda: KLCov(fraction=-0.1), id="a negative share"),
        pytest.param(lambda: KLCov(coef=math.nan), id="a coefficient not a number"),
    ],
)
def test_parameters_that_cannot_work_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()


@pytest.mark.parametrize(
    ("loss", "clip", "fix"),
    [
        pytest.param(sapo, ClipRange.fixed(0.2, 0.28), "clip=constant", id="SAPO has no bounds"),
        pytest.param(KLCov(), DYNAMIC, "clip=constant", id="KL-Cov has no bounds"),
        pytest.param(reinforce, ClipRange.fixed(0.1, 0.2), "clip=constant", id="REINFORCE has no bounds"),
        pytest.param(gspo, DYNAMIC, "clip=gspo", id="GSPO's cannot depend on a token's p"),
        pytest.param(dcpo_clip, DYNAMIC, "clip=dcpo", id="nor DCPO's on the new p"),
        pytest.param(cispo, ClipRange.fixed(0.2, 0.2), "clip=cispo", id="CISPO under PPO's cap"),
        pytest.param(
            cispo,
            ClipRange(LinearThreshold(0.0, 1.0), LinearThreshold(-3.5, 4.0)),
            "clip=cispo",
            id="CISPO under a cap that is too low at p = 1",
        ),
        pytest.param(partial(sapo, tau_positive=2.0), DYNAMIC, "clip=constant", id="through a partial"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(loss: Loss, clip: ClipRange, fix: str) -> None:
    with pytest.raises(ConfigError, match=f"expected .*; try {fix}"):
        check_clip(loss, clip)


@pytest.mark.parametrize(
    ("loss", "clip", "warning"),
    [
        pytest.param(gspo, ClipRange.fixed(0.2, 0.2), "clip=gspo", id="GSPO under PPO's bounds"),
        pytest.param(gspo, ClipRange.fixed(3e-4, 4e-4), None, id="GSPO under its own"),
        pytest.param(ClipCov(), ClipRange.fixed(0.2, 0.2), "clip=clip_cov", id="Clip-Cov under PPO's bounds"),
        pytest.param(ClipCov(), ClipRange.fixed(1.0, 1.0), None, id="Clip-Cov under its own"),
        pytest.param(cispo, ClipRange.fixed(1.0, 4.0), None, id="CISPO under its own"),
        pytest.param(dcpo_clip, ClipRange.fixed(0.16, 0.2), None, id="DCPO under its own"),
        pytest.param(sapo, ClipRange.fixed(0.2, 0.2), None, id="SAPO where nobody asked for bounds"),
        pytest.param(ce_gppo, DYNAMIC, None, id="CE-GPPO under the paper's thresholds"),
        pytest.param(lambda inputs: ppo_clip(inputs), DYNAMIC, None, id="a loss from outside"),
    ],
)
def test_bounds_that_are_unusual_are_warned_of(loss: Loss, clip: ClipRange, warning: str | None) -> None:
    found = check_clip(loss, clip)
    assert found is None if warning is None else found is not None and warning in found
