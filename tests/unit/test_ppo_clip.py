"""The clipped surrogate against a scalar oracle in Python floats (method.md, sections 1, 2 and 6)."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlvr.clipping import ClipRange, LinearThreshold
from rlvr.losses import LossInputs, LossOutputs, ppo_clip

DYNAMIC = ClipRange(lower=LinearThreshold(-0.13, 0.3), upper=LinearThreshold(-0.25, 0.5))
GRPO = ClipRange.fixed(0.2, 0.2)
ANY = ClipRange.unclipped()


def tokens(
    logprobs: Tensor,
    *,
    old: float | Tensor,
    advantage: float | Tensor,
    clip: ClipRange = GRPO,
    mask: Tensor | None = None,
) -> LossInputs:
    """Inputs of one shape; ``old`` is ln q, ``advantage`` may be a scalar."""
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=torch.as_tensor(old, dtype=logprobs.dtype).expand_as(logprobs),
        advantages=torch.as_tensor(advantage, dtype=logprobs.dtype).expand_as(logprobs),
        mask=torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask,
        clip=clip,
    )


def run(inputs: LossInputs, dual_clip: float | None = None) -> tuple[LossOutputs, Tensor]:
    """Outputs, and d(sum of losses)/d ln p."""
    leaf = inputs.logprobs.detach().clone().requires_grad_()
    fields = {**vars(inputs), "logprobs": leaf}
    outputs = ppo_clip(LossInputs(**fields), dual_clip=dual_clip)
    (grad,) = torch.autograd.grad(outputs.loss.sum(), leaf)
    return outputs, grad


def from_probs(prob: float, old_prob: float, advantage: float, clip: ClipRange = GRPO) -> LossInputs:
    return tokens(
        torch.tensor([[math.log(prob)]], dtype=torch.float64),
        old=math.log(old_prob),
        advantage=advantage,
        clip=clip,
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "grad"),
    [
        pytest.param(1.0, 1.0, None, -1.0, -1.0, id="on-policy, A>0: kept"),
        pytest.param(1.0, -1.0, None, 1.0, 1.0, id="on-policy, A<0: kept"),
        pytest.param(1.0, 0.0, None, 0.0, 0.0, id="A=0: nothing"),
        pytest.param(1.19, 2.0, None, -2.38, -2.38, id="under the upper bound, A>0: kept"),
        pytest.param(1.21, 2.0, None, -2.4, 0.0, id="above the upper bound, A>0: clipped"),
        pytest.param(1.21, -2.0, None, 2.42, 2.42, id="above the upper bound, A<0: kept"),
        pytest.param(0.81, -2.0, None, 1.62, 1.62, id="over the lower bound, A<0: kept"),
        pytest.param(0.79, -2.0, None, 1.6, 0.0, id="below the lower bound, A<0: clipped"),
        pytest.param(0.79, 2.0, None, -1.58, -1.58, id="below the lower bound, A>0: kept"),
        pytest.param(9.0, 0.0, None, 0.0, 0.0, id="far off, A=0: nothing"),
        pytest.param(2.0, -1.0, 2.5, 2.0, 2.0, id="dual clip, r<c, A<0: kept"),
        pytest.param(2.6, -1.0, 2.5, 2.5, 0.0, id="dual clip, r>c, A<0: clipped at -cA"),
        pytest.param(2.6, 1.0, 2.5, -1.2, 0.0, id="dual clip, A>0: the ordinary clip"),
        pytest.param(0.5, -1.0, 2.5, 0.8, 0.0, id="dual clip, below the lower bound: the ordinary clip"),
    ],
)
def test_ppo_clip_by_hand(
    ratio: float, advantage: float, dual_clip: float | None, loss: float, grad: float
) -> None:
    """Thresholds 0.2: d loss / d ln p is -r A for a kept token and zero for a clipped one."""
    outputs, slope = run(from_probs(0.1 * ratio, 0.1, advantage), dual_clip)
    assert outputs.loss.item() == pytest.approx(loss)
    assert slope.item() == pytest.approx(grad)
    assert outputs.kept.item() == (grad != 0.0 or advantage == 0.0)


@pytest.mark.parametrize(
    ("prob", "old_prob", "advantage", "loss", "grad"),
    [
        pytest.param(0.52, 0.4, 1.0, -1.3, -1.3, id="r=1.3 under 1+U(0.52)=1.37: kept"),
        pytest.param(0.56, 0.4, 1.0, -1.36, 0.0, id="r=1.4 above 1+U(0.56)=1.36: clipped there"),
        pytest.param(0.0145, 0.01, 1.0, -1.45, -1.45, id="r=1.45 of an improbable token: kept"),
        pytest.param(0.64, 0.8, -1.0, 0.8, 0.8, id="r=0.8 over 1-M(0.64)=0.7832: kept"),
        pytest.param(0.60, 0.8, -1.0, 0.778, 0.0, id="r=0.75 below 1-M(0.6)=0.778: clipped there"),
        pytest.param(0.0071, 0.01, -1.0, 0.71, 0.71, id="r=0.71 of an improbable token: kept"),
    ],
)
def test_dynamic_bounds_by_hand(
    prob: float, old_prob: float, advantage: float, loss: float, grad: float
) -> None:
    """The bound depends on p without passing a gradient: a clipped token has none."""
    outputs, slope = run(from_probs(prob, old_prob, advantage, DYNAMIC))
    assert outputs.loss.item() == pytest.approx(loss)
    assert slope.item() == pytest.approx(grad, abs=1e-15)
    assert outputs.kept.item() == (grad != 0.0)


@pytest.mark.parametrize("steps", [-1, 0, 1])
@pytest.mark.parametrize("side", ["upper", "lower", "dual"])
def test_a_ratio_on_its_bound_is_kept(side: str, steps: int) -> None:
    """Bounds one float below, on, and one float above the ratio; 1 + (r - 1) is exact for r in [0.5, 2]."""
    logprobs = torch.tensor([[-1.0]], dtype=torch.float64)
    old = {"upper": -1.25, "lower": -0.75, "dual": -1.5}[side]
    ratio = (logprobs - old).exp().item()
    bound = ratio if steps == 0 else math.nextafter(ratio, math.inf * steps)
    if side == "dual":
        clip = ANY
    else:
        clip = ClipRange.fixed(0.2, bound - 1) if side == "upper" else ClipRange.fixed(1 - bound, 0.2)
    advantage = 1.0 if side == "upper" else -1.0
    outputs, grad = run(
        tokens(logprobs, old=old, advantage=advantage, clip=clip), bound if side == "dual" else None
    )
    kept = steps <= 0 if side == "lower" else steps >= 0
    assert outputs.kept.item() == kept
    assert grad.item() == (-ratio * advantage if kept else 0.0)
    assert outputs.loss.item() == (-ratio if kept else -bound) * advantage


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "clip", "dual_clip", "loss", "grad", "kept"),
    [
        pytest.param(19.0, -1.0, GRPO, None, math.exp(19), math.exp(19), True, id="d=19: as it is"),
        pytest.param(21.0, -1.0, GRPO, None, math.exp(20), math.exp(20), True, id="d=21: value e^20, kept"),
        pytest.param(1e4, -1.0, GRPO, None, math.exp(20), math.exp(20), True, id="d=1e4, A<0: finite, kept"),
        pytest.param(1e4, 1.0, ANY, None, -math.exp(20), -math.exp(20), True, id="d=1e4, no clip: kept"),
        pytest.param(1e4, 1.0, GRPO, None, -1.2, 0.0, False, id="d=1e4, A>0: clipped"),
        pytest.param(1e4, -1.0, GRPO, 3.0, 3.0, 0.0, False, id="d=1e4, dual clip: clipped"),
        pytest.param(-1e4, 1.0, GRPO, None, 0.0, 0.0, True, id="d=-1e4, A>0: kept, though r underflows"),
        pytest.param(-1e4, -1.0, GRPO, None, 0.8, 0.0, False, id="d=-1e4, A<0: clipped"),
    ],
)
def test_huge_log_ratios(
    log_ratio: float,
    advantage: float,
    clip: ClipRange,
    dual_clip: float | None,
    loss: float,
    grad: float,
    kept: bool,
    dtype: torch.dtype,
) -> None:
    logprobs = torch.tensor([[-1.0 + min(log_ratio, 0.0)]], dtype=dtype)
    old = -1.0 - max(log_ratio, 0.0)
    outputs, slope = run(tokens(logprobs, old=old, advantage=advantage, clip=clip), dual_clip)
    accuracy = 1e-5 if dtype == torch.float32 else 1e-12
    assert outputs.loss.item() == pytest.approx(loss, rel=accuracy)
    assert slope.item() == pytest.approx(grad, rel=accuracy)
    assert outputs.kept.item() == kept


def textbook(inputs: LossInputs, low: float, high: float) -> Tensor:
    """PPO as every textbook has it: constants, clamp and minimum."""
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    return -torch.min(ratio * inputs.advantages, clipped * inputs.advantages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.3, 0.5), (3e-4, 4e-4), (1.0, 1.0)])
@pytest.mark.parametrize("mode", ["current", "closed_form", "old"])
def test_slope_0_is_plain_grpo_bit_for_bit(dtype: torch.dtype, low: float, high: float, mode: str) -> None:
    draws = torch.Generator().manual_seed(3)
    old = -3 * torch.rand(64, 50, generator=draws, dtype=dtype)
    logprobs = (old + 0.3 * torch.randn(64, 50, generator=draws, dtype=dtype)).clamp(max=0)
    advantages = torch.randn(64, 1, generator=draws, dtype=dtype)
    clip = ClipRange(lower=LinearThreshold(0.0, low), upper=LinearThreshold(0.0, high), mode=mode)
    inputs = tokens(logprobs, old=old, advantage=advantages, clip=clip)
    outputs, grad = run(inputs)
    leaf = logprobs.clone().requires_grad_()
    loss = textbook(LossInputs(**{**vars(inputs), "logprobs": leaf}), low, high)
    (expected,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.equal(outputs.loss, loss)
    assert torch.equal(grad, expected)
    assert torch.equal(outputs.kept, expected != 0)


def scalar_oracle(
    prob: float, old_prob: float, advantage: float, clip: ClipRange, dual_clip: float | None
) -> tuple[float, float, bool, float]:
    """Loss, d loss / d ln p, kept, and the distance to the nearest bound, from method.md in Python floats.

    The value is section 6's max(-A r, -A clip(r)), min(., -A c); the gradient a central difference of it with
    the bounds held, which is what "p inside E detached" means; kept is section 1's rule.
    """
    low = 1 - (clip.lower.slope * prob + clip.lower.intercept)
    high = 1 + (clip.upper.slope * prob + clip.upper.intercept)

    def value(log_prob: float) -> float:
        r = math.exp(log_prob) / old_prob
        loss = max(-advantage * r, -advantage * min(max(r, low), high))
        return min(loss, -advantage * dual_clip) if dual_clip is not None and advantage < 0 else loss

    ratio, step = prob / old_prob, 1e-6
    grad = (value(math.log(prob) + step) - value(math.log(prob) - step)) / (2 * step)
    under_dual = dual_clip is None or ratio <= dual_clip
    kept = ratio <= high if advantage > 0 else ratio >= low and under_dual
    edges = [low, high, *([] if dual_clip is None else [dual_clip])]
    return value(math.log(prob)), grad, kept, min(abs(ratio - edge) for edge in edges)


probabilities = st.floats(1e-4, 1.0)
thresholds = st.tuples(st.floats(0.01, 0.9), st.floats(0.01, 0.9)).map(
    lambda ends: LinearThreshold(ends[1] - ends[0], ends[0])
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    prob=probabilities,
    old_prob=probabilities,
    near=st.booleans(),
    advantage=st.floats(0.01, 5.0),
    negative=st.booleans(),
    lower=thresholds,
    upper=thresholds,
    dual_clip=st.none() | st.floats(1.1, 4.0),
)
def test_any_token_against_the_scalar_oracle(
    prob: float,
    old_prob: float,
    near: bool,
    advantage: float,
    negative: bool,
    lower: LinearThreshold,
    upper: LinearThreshold,
    dual_clip: float | None,
) -> None:
    if near:  # half of the ratios within [0.5, 2]
        old_prob = min(prob * 2 ** (2 * old_prob - 1), 1.0)
    advantage = -advantage if negative else advantage
    clip = ClipRange(lower=lower, upper=upper)
    loss, grad, kept, distance = scalar_oracle(prob, old_prob, advantage, clip, dual_clip)
    ratio = prob / old_prob
    assume(distance > 1e-5 * (1 + ratio))
    outputs, slope = run(from_probs(prob, old_prob, advantage, clip), dual_clip)
    assert outputs.loss.item() == pytest.approx(loss, rel=1e-9, abs=1e-12)
    assert slope.item() == pytest.approx(grad, rel=1e-5, abs=1e-6)
    assert slope.item() == pytest.approx(-ratio * advantage if kept else 0.0, rel=1e-9, abs=1e-15)
    assert outputs.kept.item() == kept


def test_the_bounds_pass_no_gradient() -> None:
    """With p inside U attached, a clipped token would have the slope U'(p) p A."""
    _, grad = run(from_probs(0.9, 0.4, 1.0, DYNAMIC))
    assert grad.item() == 0.0


@pytest.mark.parametrize("field", ["logprobs", "old_logprobs", "advantages"])
def test_nan_outside_the_mask_reaches_neither_value_nor_gradient(field: str) -> None:
    """Selecting with where is enough, also for the gradient: no 0 * NaN in the backward pass."""
    mask = torch.tensor([[True, True, False]])
    values = {
        "logprobs": torch.tensor([[-0.5, -1.0, -2.0]], dtype=torch.float64),
        "old_logprobs": torch.tensor([[-0.6, -0.7, -2.0]], dtype=torch.float64),
        "advantages": torch.tensor([[1.0, -1.0, 1.0]], dtype=torch.float64),
    }
    values[field][0, 2] = math.nan
    leaf = values["logprobs"].requires_grad_()
    outputs = ppo_clip(LossInputs(**values, mask=mask, clip=DYNAMIC), dual_clip=3.0)
    total = torch.where(mask, outputs.loss, 0.0).sum()
    total.backward()
    assert total.isfinite()
    assert leaf.grad[0, 2].item() == 0.0
    _, expected = run(
        tokens(
            values["logprobs"][:, :2].detach(),
            old=values["old_logprobs"][:, :2],
            advantage=values["advantages"][:, :2],
            clip=DYNAMIC,
        ),
        3.0,
    )
    assert torch.equal(leaf.grad[:, :2], expected)


def test_facts_by_hand() -> None:
    """q, p, A of five tokens under U above and M below."""
    old_probs = [0.4, 0.4, 0.8, 0.8, 0.79]
    probs = [0.56, 0.52, 0.60, 0.64, 0.79]
    outputs, _ = run(
        tokens(
            torch.tensor([probs], dtype=torch.float64).log(),
            old=torch.tensor([old_probs], dtype=torch.float64).log(),
            advantage=torch.tensor([[1.0, 1.0, -1.0, -1.0, 0.0]], dtype=torch.float64),
            clip=DYNAMIC,
        )
    )
    facts = {key: value.flatten().tolist() for key, value in outputs.facts.items()}
    assert facts["clip_frac_high"] == [True, False, False, False, False]
    assert facts["clip_frac_low"] == [False, False, True, False, False]
    assert facts["clip_high_mean"] == pytest.approx([0.5 - 0.25 * p for p in probs])
    assert facts["clip_low_mean"] == pytest.approx([0.3 - 0.13 * p for p in probs])
    for value in outputs.facts.values():
        assert (value.shape, value.requires_grad) == (outputs.loss.shape, False)
    assert outputs.kept.tolist() == [[False, True, False, True, True]]


@pytest.mark.parametrize(
    ("clip", "old_prob", "expected"),
    [
        pytest.param(DYNAMIC, 0.79, True, id="U: 1/0.79 is above 1.25"),
        pytest.param(DYNAMIC, 0.81, False, id="U: 1/0.81 is under 1.25, the bound cannot bind"),
        pytest.param(GRPO, 0.83, True, id="0.2: 1/0.83 is above 1.2"),
        pytest.param(GRPO, 0.84, False, id="0.2: 1/0.84 is under 1.2"),
        pytest.param(ANY, 1e-6, False, id="no bound never binds"),
    ],
)
def test_where_the_upper_bound_can_bind_at_all(clip: ClipRange, old_prob: float, expected: bool) -> None:
    """A ratio reaches 1/q at most; whatever p is now."""
    for mode in ("current", "closed_form"):
        same = ClipRange(lower=clip.lower, upper=clip.upper, mode=mode)
        outputs, _ = run(from_probs(0.3, old_prob, 1.0, same))
        assert outputs.facts["can_clip_high_frac"].tolist() == [[expected]]


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, -3.0, math.nan])
def test_dual_clips_that_bind_inside_the_range_are_refused(dual_clip: float) -> None:
    with pytest.raises(ValueError, match=str(dual_clip)):
        ppo_clip(from_probs(0.5, 0.5, 1.0), dual_clip=dual_clip)


def test_tokens_do_not_see_each_other() -> None:
    """Any shape, any order: a chunk of tokens gives what the whole gives."""
    draws = torch.Generator().manual_seed(5)
    old = -2 * torch.rand(6, 7, generator=draws, dtype=torch.float64)
    logprobs = (old + 0.4 * torch.randn(6, 7, generator=draws, dtype=torch.float64)).clamp(max=0)
    advantages = torch.randn(6, 7, generator=draws, dtype=torch.float64)
    whole, grad = run(tokens(logprobs, old=old, advantage=advantages, clip=DYNAMIC))
    order = torch.randperm(42, generator=draws)
    flat = tokens(
        logprobs.flatten()[order],
        old=old.flatten()[order],
        advantage=advantages.flatten()[order],
        clip=DYNAMIC,
    )
    chunk, chunk_grad = run(flat)
    torch.testing.assert_close(chunk.loss, whole.loss.flatten()[order], rtol=1e-14, atol=0)
    torch.testing.assert_close(chunk_grad, grad.flatten()[order], rtol=1e-14, atol=0)
    assert torch.equal(chunk.kept, whole.kept.flatten()[order])
