"""Thresholds and bounds against bisection and exact fractions (method.md, section 2)."""

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
import torch

from rlvr.clipping import ClipRange, LinearThreshold, Mode
from rlvr.losses import LossInputs, ppo_clip

U = LinearThreshold(-0.25, 0.5)
M = LinearThreshold(-0.13, 0.3)
EPS = LinearThreshold(0.0, 0.2)


def bisect(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """The point between ``inside`` and ``outside`` at which ``holds`` turns from True to False."""
    for _ in range(200):
        middle = 0.5 * (inside + outside)
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


def largest_ratio(upper: LinearThreshold, old_prob: float) -> float:
    """Largest r with r <= 1 + E(r q), by bisection."""
    return bisect(lambda r: r <= 1 + (upper.slope * (r * old_prob) + upper.intercept), 0.0, 1e3)


def smallest_ratio(lower: LinearThreshold, old_prob: float) -> float:
    """Smallest r with r >= 1 - E(r q), by bisection."""
    return bisect(lambda r: r >= 1 - (lower.slope * (r * old_prob) + lower.intercept), 1e3, 0.0)


def bounds(clip: ClipRange, prob: float, old_prob: float) -> tuple[float, float]:
    """Ratio bounds of one token, from probabilities."""
    pair = torch.tensor([prob, old_prob], dtype=torch.float64).log()
    low, high = clip.ratio_bounds(pair[:1], pair[1:])
    return low.item(), high.item()


@pytest.mark.parametrize(
    ("threshold", "prob", "expected"),
    [
        pytest.param(U, 0.0, 0.5, id="U(0) = 0.5"),
        pytest.param(U, 0.5, 0.375, id="U(0.5) = 0.375"),
        pytest.param(U, 0.88, 0.28, id="U(0.88) = 0.28: Clip-Higher's"),
        pytest.param(U, 1.0, 0.25, id="U(1) = 0.25: looser than 0.2 even here"),
        pytest.param(M, 0.0, 0.3, id="M(0) = 0.3"),
        pytest.param(M, 0.5, 0.235, id="M(0.5) = 0.235"),
        pytest.param(M, 10 / 13, 0.2, id="M(0.769) = 0.2: GRPO's"),
        pytest.param(M, 1.0, 0.17, id="M(1) = 0.17"),
        pytest.param(EPS, 0.3, 0.2, id="a constant"),
    ],
)
def test_thresholds_by_hand(threshold: LinearThreshold, prob: float, expected: float) -> None:
    assert threshold(prob) == pytest.approx(expected, abs=1e-15)
    probs = torch.full((2, 3), prob, dtype=torch.float64)
    assert threshold(probs).shape == (2, 3)
    assert threshold(probs).flatten().tolist() == pytest.approx([expected] * 6, abs=1e-15)


@pytest.mark.parametrize(
    ("mode", "prob", "old_prob", "low", "high"),
    [
        pytest.param("closed_form", 0.5, 0.0, 0.70, 1.5, id="closed form, q=0: 0.70 and 1.5"),
        pytest.param("closed_form", 0.5, 0.5, 0.7 / 0.935, 4 / 3, id="closed form, q=0.5: upper 1.3333"),
        pytest.param("closed_form", 0.5, 1.0, 0.7 / 0.87, 1.2, id="closed form, q=1: 0.8046 and 1.2"),
        pytest.param("old", 0.9, 0.5, 0.765, 1.375, id="old, q=0.5: another rule, upper 1.375"),
        pytest.param("old", 0.1, 1.0, 0.83, 1.25, id="old, q=1"),
        pytest.param("current", 0.5, 0.9, 0.765, 1.375, id="current: p, not q"),
        pytest.param("current", 2 / 3, 0.5, 1 - (0.3 - 0.26 / 3), 4 / 3, id="current at eq. 8's own bound"),
    ],
)
def test_bounds_by_hand(mode: Mode, prob: float, old_prob: float, low: float, high: float) -> None:
    actual = bounds(ClipRange(lower=M, upper=U, mode=mode), prob, old_prob)
    assert actual == pytest.approx((low, high), abs=1e-15)


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        pytest.param(M, U, id="the paper's"),
        pytest.param(EPS, EPS, id="constant"),
        pytest.param(LinearThreshold(0.5, 0.1), LinearThreshold(0.9, 0.1), id="rising in p"),
        pytest.param(LinearThreshold(-0.9, 0.95), LinearThreshold(-3.0, 3.5), id="steep"),
    ],
)
def test_closed_form_solves_eq_8(lower: LinearThreshold, upper: LinearThreshold) -> None:
    clip = ClipRange(lower=lower, upper=upper, mode="closed_form")
    for old_prob in [0.0, 1e-6, 0.1, 0.25, 0.5, 0.77, 0.99, 1.0]:
        low, high = bounds(clip, 0.5, old_prob)
        assert low == pytest.approx(smallest_ratio(lower, old_prob), rel=1e-12)
        assert high == pytest.approx(largest_ratio(upper, old_prob), rel=1e-12)


@pytest.mark.parametrize("advantage", [1.0, -0.7])
def test_current_and_closed_form_keep_the_same_tokens_with_the_same_gradient(advantage: float) -> None:
    """Random tokens, each at least 1e-6 away from the bound that bisection finds: none is a tie."""
    draws = torch.Generator().manual_seed(7)
    old_probs = torch.rand(400, generator=draws, dtype=torch.float64).clamp(min=1e-3)
    edge = largest_ratio if advantage > 0 else smallest_ratio
    at_bound = torch.tensor([edge(U if advantage > 0 else M, q) for q in old_probs.tolist()]).double()
    distance = 1e-6 + 0.4 * torch.rand(400, generator=draws, dtype=torch.float64).pow(4)
    sign = torch.where(torch.rand(400, generator=draws) < 0.5, 1.0, -1.0)
    probs = old_probs * at_bound * (sign * distance).exp()
    possible = probs <= 1
    logprobs, old_logprobs = probs[possible].log(), old_probs[possible].log()
    results = []
    for mode in ("current", "closed_form"):
        leaf = logprobs.clone().requires_grad_()
        outputs = ppo_clip(
            LossInputs(
                logprobs=leaf,
                old_logprobs=old_logprobs,
                advantages=torch.full_like(logprobs, advantage),
                mask=torch.ones_like(logprobs, dtype=torch.bool),
                clip=ClipRange(lower=M, upper=U, mode=mode),
            )
        )
        outputs.loss.sum().backward()
        results.append((outputs.kept, leaf.grad))
    (kept, grad), (closed_kept, closed_grad) = results
    inside = sign[possible] * advantage < 0
    assert kept.tolist() == inside.tolist()
    assert 50 < kept.sum() < len(kept) - 50
    assert torch.equal(kept, closed_kept)
    assert torch.equal(grad, closed_grad)
    assert torch.equal(grad != 0, kept)


def test_dynamic_upper_is_looser_than_grpo_everywhere_and_dynamic_lower_tighter_only_above_0_769() -> None:
    for prob in (Fraction(i, 1000) for i in range(1001)):
        assert U(float(prob)) > 0.2
        assert (U(float(prob)) < 0.28 - 1e-12) == (prob > Fraction(88, 100))
        assert (M(float(prob)) < 0.2) == (prob > Fraction(10, 13))


@pytest.mark.parametrize("mode", ["current", "closed_form", "old"])
def test_bounds_keep_shape_and_dtype_and_carry_no_gradient(mode: Mode) -> None:
    for dtype in (torch.float32, torch.float64):
        logprobs = torch.full((2, 3), -1.0, dtype=dtype, requires_grad=True)
        old_logprobs = torch.full((2, 3), -1.2, dtype=dtype, requires_grad=True)
        for bound in ClipRange(lower=M, upper=U, mode=mode).ratio_bounds(logprobs, old_logprobs):
            assert (bound.shape, bound.dtype, bound.requires_grad) == ((2, 3), dtype, False)


@pytest.mark.parametrize("mode", ["current", "closed_form", "old"])
def test_constant_thresholds_are_the_same_in_every_mode(mode: Mode) -> None:
    clip = ClipRange(lower=EPS, upper=LinearThreshold(0.0, 0.28), mode=mode)
    assert bounds(clip, 0.3, 0.9) == (1 - 0.2, 1 + 0.28)


def test_named_ranges() -> None:
    assert ClipRange.fixed(0.2, 0.28) == ClipRange(lower=EPS, upper=LinearThreshold(0.0, 0.28))
    assert bounds(ClipRange.unclipped(), 1e-9, 1.0) == (0.0, math.inf)


@pytest.mark.parametrize(
    ("slope", "intercept", "named"),
    [
        pytest.param(math.nan, 0.2, "nan", id="slope not a number"),
        pytest.param(math.inf, 0.2, "inf", id="slope infinite"),
        pytest.param(0.0, math.nan, "nan", id="intercept not a number"),
        pytest.param(0.0, -0.2, "-0.2", id="negative"),
        pytest.param(0.0, -math.inf, "-inf", id="minus infinity"),
        pytest.param(-0.5, 0.3, "-0.2 at p = 1", id="negative at p = 1"),
        pytest.param(0.5, -0.1, "-0.1", id="negative at p = 0"),
    ],
)
def test_thresholds_refused(slope: float, intercept: float, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LinearThreshold(slope, intercept)


@pytest.mark.parametrize(
    ("lower", "upper", "mode", "named"),
    [
        pytest.param(EPS, U, "new", "'new'", id="unknown mode"),
        pytest.param(LinearThreshold(0.0, 1.1), U, "current", "1.1", id="lower above 1: ratios below 0"),
        pytest.param(LinearThreshold(0.3, 0.8), U, "current", "0.3p", id="lower above 1 at p = 1"),
        pytest.param(
            EPS, LinearThreshold(1.0, 0.2), "closed_form", "1p", id="eq. 8 unbounded above at q = 1"
        ),
        pytest.param(
            LinearThreshold(-1.0, 1.0), U, "closed_form", "-1p", id="eq. 8 unbounded below at q = 1"
        ),
    ],
)
def test_ranges_refused(lower: LinearThreshold, upper: LinearThreshold, mode: Mode, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ClipRange(lower=lower, upper=upper, mode=mode)


def test_edges_allowed() -> None:
    """A threshold of 0 (no move allowed) and a lower one of 1 (any fall allowed) are legitimate."""
    assert bounds(ClipRange.fixed(0.0, 0.0), 0.5, 0.5) == (1.0, 1.0)
    assert bounds(ClipRange.fixed(1.0, 0.0), 0.5, 0.5) == (0.0, 1.0)
    assert bounds(ClipRange(lower=LinearThreshold(-1.0, 1.0), upper=EPS), 1.0, 1.0)[0] == 1.0


def test_both_are_frozen_values() -> None:
    clip = ClipRange(lower=M, upper=U)
    with pytest.raises(FrozenInstanceError):
        clip.lower = U  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        U.slope = 0.0  # type: ignore[misc]
    assert clip == ClipRange(lower=LinearThreshold(-0.13, 0.3), upper=LinearThreshold(-0.25, 0.5))
    assert len({clip, ClipRange(lower=M, upper=U), ClipRange(lower=M, upper=U, mode="old")}) == 2


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_a_mixture_is_linear_in_share_and_probability(share: float) -> None:
    mixed = U.mix(EPS, share)
    weight = Fraction(share)
    for prob in (Fraction(i, 8) for i in range(9)):
        high = Fraction(1, 2) - prob / 4
        expected = (1 - weight) * high + weight * Fraction(1, 5)
        assert mixed(float(prob)) == pytest.approx(float(expected), abs=1e-15)


def test_a_mixture_begins_and_ends_exactly() -> None:
    assert U.mix(M, 0.0) == U
    assert U.mix(M, 1.0) == M


def test_mixtures_of_valid_thresholds_are_valid() -> None:
    """Rounding may take 0.2302 + 0.7698 over 1; a run must not die of it halfway."""
    for i in range(0, 100, 7):
        for j in range(0, 100, 7):
            first, second = LinearThreshold(i / 100, 1 - i / 100), LinearThreshold(j / 100, 1 - j / 100)
            for share in range(0, 100, 3):
                ClipRange(lower=first.mix(second, share / 100), upper=EPS)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_shares_outside_0_1_refused(share: float) -> None:
    with pytest.raises(ValueError, match=str(share)):
        U.mix(EPS, share)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(U, "-0.25p+0.5", id="linear"),
        pytest.param(EPS, "0.2", id="constant"),
        pytest.param(ClipRange(lower=EPS, upper=U), "upper -0.25p+0.5, lower 0.2", id="range"),
        pytest.param(
            ClipRange(lower=M, upper=EPS, mode="old"),
            "upper 0.2, lower -0.13p+0.3 (old)",
            id="range with its mode",
        ),
    ],
)
def test_str(value: LinearThreshold | ClipRange, text: str) -> None:
    assert str(value) == text
