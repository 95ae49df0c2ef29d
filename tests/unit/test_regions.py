"""Regions, their ablation and eq. 5 against scalar rules and autograd (method.md, section 4)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rlvr.clipping import ClipRange, LinearThreshold
from rlvr.losses import LossInputs, LossOutputs, Totals, ppo_clip, token_mean
from rlvr.regions import REGIONS, RegionAblation, entropy_inner_product, membership, touchable

TOLERANCE = 1e-3
GRPO = ClipRange.fixed(0.2, 0.2)
DYNAMIC = ClipRange(lower=LinearThreshold(-0.13, 0.3), upper=LinearThreshold(-0.25, 0.5))


class Token(NamedTuple):
    """One token in plain floats: current probability, ratio to the old one, advantage, entropy in nats."""

    prob: float
    ratio: float
    advantage: float
    entropy: float


def tokens(rows: Sequence[Token], clip: ClipRange = GRPO) -> LossInputs:
    """[1, T] in float64."""
    prob, ratio, advantage, entropy = torch.tensor([list(rows)], dtype=torch.float64).unbind(dim=-1)
    return LossInputs(
        logprobs=prob.log(),
        old_logprobs=prob.log() - ratio.log(),
        advantages=advantage,
        mask=torch.ones_like(prob, dtype=torch.bool),
        clip=clip,
        entropy=entropy,
    )


def one(inputs: LossInputs, **fields: float) -> LossInputs:
    """Replace fields by a single number each."""
    return replace(
        inputs, **{name: torch.tensor([[value]], dtype=torch.float64) for name, value in fields.items()}
    )


def log_of(prob: float) -> float:
    """The float whose exp() in torch is exactly ``prob``."""
    candidate = math.log(prob)
    for _ in range(8):
        value = torch.tensor([[candidate]], dtype=torch.float64).exp().item()
        if value == prob:
            return candidate
        candidate = math.nextafter(candidate, math.inf if value < prob else -math.inf)
    raise AssertionError(f"no float has the exponential {prob}")


def name(code: int) -> str:
    return "none" if code == 0 else REGIONS[code - 1]


@pytest.mark.parametrize(
    ("prob", "ratio", "advantage", "region"),
    [
        pytest.param(0.9, 1.1, 1.0, "E1", id="E1: probable, pushed up, risen"),
        pytest.param(0.1, 1.1, 1.0, "E2", id="E2: improbable, pushed up, risen"),
        pytest.param(0.9, 0.9, -1.0, "E3", id="E3: probable, pushed down, fallen"),
        pytest.param(0.1, 0.9, -1.0, "E4", id="E4: improbable, pushed down, fallen"),
        pytest.param(0.9, 0.95, 1.0, "none", id="pushed up, but fallen"),
        pytest.param(0.1, 1.1, -1.0, "none", id="pushed down, but risen"),
        pytest.param(0.9, 1.0, 1.0, "none", id="on-policy: not moved"),
        pytest.param(0.9, 1.0009, 1.0, "none", id="risen by less than the tolerance"),
        pytest.param(0.9, 1.0011, 1.0, "E1", id="risen by more than the tolerance"),
        pytest.param(0.9, 0.9991, -1.0, "none", id="fallen by less than the tolerance"),
        pytest.param(0.9, 0.9989, -1.0, "E3", id="fallen by more than the tolerance"),
        pytest.param(0.5, 1.1, 1.0, "none", id="middling p"),
        pytest.param(0.69, 1.1, 1.0, "none", id="p just under 0.7"),
        pytest.param(0.71, 1.1, 1.0, "E1", id="p just over 0.7"),
        pytest.param(0.31, 0.9, -1.0, "none", id="p just over 0.3"),
        pytest.param(0.9, 1.1, 0.0, "none", id="A=0 is in no region"),
        pytest.param(0.1, 0.9, -0.0, "none", id="A=-0 is in no region"),
    ],
)
def test_empirical_membership_by_hand(prob: float, ratio: float, advantage: float, region: str) -> None:
    codes = membership(tokens([Token(prob, ratio, advantage, 1.0)]), "empirical", TOLERANCE)
    assert codes.dtype == torch.uint8
    assert name(codes.item()) == region


@pytest.mark.parametrize(
    ("prob", "advantage", "region"),
    [
        pytest.param(0.7, 1.0, "none", id="p = 0.7: not above it"),
        pytest.param(math.nextafter(0.7, 1), 1.0, "E1", id="the next float: E1"),
        pytest.param(0.3, 1.0, "E2", id="p = 0.3: up to and with it"),
        pytest.param(math.nextafter(0.3, 1), 1.0, "none", id="the next float: none"),
        pytest.param(0.3, -1.0, "E4", id="p = 0.3, A<0"),
        pytest.param(0.7, -1.0, "none", id="p = 0.7, A<0"),
    ],
)
def test_empirical_membership_on_its_edges(prob: float, advantage: float, region: str) -> None:
    inputs = tokens([Token(0.5, 1.0, advantage, 1.0)])
    logprob = log_of(prob)
    inputs = one(inputs, logprobs=logprob, old_logprobs=logprob - 0.1 * advantage)
    assert name(membership(inputs, "empirical", TOLERANCE).item()) == region


@pytest.mark.parametrize(
    ("surprisal", "entropy", "advantage", "region"),
    [
        pytest.param(0.5, 1.0, 1.0, "E1", id="E1: less surprising than average, pushed up"),
        pytest.param(2.0, 1.0, 1.0, "E2", id="E2: more surprising than average, pushed up"),
        pytest.param(0.5, 1.0, -1.0, "E3", id="E3: less surprising than average, pushed down"),
        pytest.param(2.0, 1.0, -1.0, "E4", id="E4: more surprising than average, pushed down"),
        pytest.param(1.0, 1.0, 1.0, "none", id="exactly the average"),
        pytest.param(1.0, 1.0 + 0.9e-5, 1.0, "none", id="less surprising by 0.9e-5: within the margin"),
        pytest.param(1.0, 1.0 + 1.1e-5, 1.0, "E1", id="less surprising by 1.1e-5: beyond it"),
        pytest.param(1.0, 1.0 - 0.9e-5, -1.0, "none", id="more surprising by 0.9e-5: within the margin"),
        pytest.param(1.0, 1.0 - 1.1e-5, -1.0, "E4", id="more surprising by 1.1e-5: beyond it"),
        pytest.param(0.0, 0.0, 1.0, "none", id="a certain token"),
        pytest.param(0.5, 1.0, 0.0, "none", id="A=0 is in no region"),
    ],
)
def test_theory_membership_by_hand(surprisal: float, entropy: float, advantage: float, region: str) -> None:
    """By surprisal and entropy alone: where r stands, on-policy or fallen or risen, is no matter."""
    for moved in (0.0, 0.2, -0.2):
        inputs = one(
            tokens([Token(0.5, 1.0, advantage, 1.0)]),
            logprobs=-surprisal,
            old_logprobs=-surprisal - moved,
            entropy=entropy,
        )
        for tolerance in (TOLERANCE, None):
            assert name(membership(inputs, "theory", tolerance).item()) == region


def test_without_a_tolerance_empirical_membership_leaves_r_out() -> None:
    rows = [Token(p, r, a, 1.0) for p, r, a in product((0.9, 0.1), (0.8, 1.0, 1.05), (1.0, -1.0))]
    codes = membership(tokens(rows), "empirical", None).flatten().tolist()
    expected = {(0.9, 1.0): "E1", (0.1, 1.0): "E2", (0.9, -1.0): "E3", (0.1, -1.0): "E4"}
    assert [name(code) for code in codes] == [expected[row.prob, row.advantage] for row in rows]


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "expected"),
    [
        pytest.param(2.0**-10, 1.0, False, id="A>0, exactly the tolerance: rounding"),
        pytest.param(2.0**-10 + 2.0**-30, 1.0, True, id="A>0, above it"),
        pytest.param(-(2.0**-10), -1.0, False, id="A<0, exactly the tolerance: rounding"),
        pytest.param(-(2.0**-10) - 2.0**-30, -1.0, True, id="A<0, beyond it"),
        pytest.param(1.0, -1.0, False, id="A<0, risen: clipping cannot act"),
        pytest.param(-1.0, 1.0, False, id="A>0, fallen: clipping cannot act"),
        pytest.param(1.0, 0.0, False, id="A=0"),
        pytest.param(0.0, 1.0, False, id="on-policy"),
    ],
)
def test_touchable(log_ratio: float, advantage: float, expected: bool) -> None:
    """Tolerance 2^-10, so that every difference is exact."""
    inputs = one(tokens([Token(0.5, 1.0, advantage, 1.0)]), logprobs=-1.25 + log_ratio, old_logprobs=-1.25)
    assert touchable(inputs, 2.0**-10).item() is expected


def test_nan_is_in_no_region() -> None:
    """Padding may hold anything; comparisons with it are false."""
    inputs = one(
        tokens([Token(0.5, 1.0, 1.0, 1.0)]), logprobs=math.nan, old_logprobs=math.nan, entropy=math.nan
    )
    for by, tolerance in product(("empirical", "theory"), (TOLERANCE, None)):
        assert membership(inputs, by, tolerance).item() == 0


def test_every_token_is_in_one_region_at_most_and_theory_splits_all_others() -> None:
    """Theory leaves out A = 0 and the margin alone."""
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 5, generator=draws, dtype=torch.float64) * 2
    logs = logits.log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    chosen = logs[:, 0]
    advantages = torch.randint(-1, 2, (500,), generator=draws).double()
    inputs = LossInputs(chosen, chosen, advantages, torch.ones(500, dtype=torch.bool), GRPO, entropy=entropy)
    codes = membership(inputs, "theory", TOLERANCE)
    assert torch.equal(codes == 0, advantages == 0)
    assert set(codes.tolist()) == {0, 1, 2, 3, 4}
    assert torch.equal((codes == 1) | (codes == 2), advantages > 0)


def test_theory_needs_the_entropy() -> None:
    inputs = replace(tokens([Token(0.5, 1.0, 1.0, 1.0)]), entropy=None)
    with pytest.raises(ValueError, match="entropy"):
        membership(inputs, "theory", TOLERANCE)


# Every combination of where p, r, A and H may stand: each region, the band and both clips from both sides.
TABLE = [
    Token(prob, ratio, advantage, entropy)
    for prob, ratio, advantage, entropy in product(
        (0.05, 0.29, 0.5, 0.72, 0.98),
        (0.4, 0.65, 0.72, 0.75, 0.79, 0.9, 0.9995, 1.0, 1.0005, 1.1, 1.22, 1.27, 1.29, 1.35, 1.6),
        (1.0, -0.5, 0.0),
        (0.01, 0.6, 3.0),
    )
    if prob / ratio <= 1
]
SUBSETS = [subset for size in range(5) for subset in combinations(REGIONS, size)]


def oracle_touchable(token: Token) -> bool:
    log_ratio = math.log(token.ratio)
    if token.advantage > 0:
        return log_ratio > TOLERANCE
    return token.advantage < 0 and log_ratio < -TOLERANCE


def oracle_region(token: Token, by: str, with_ratio: bool) -> str | None:
    """The region in the words of section 4's table, or None."""
    if token.advantage == 0:
        return None
    if by == "theory":
        surprisal = -math.log(token.prob)
        if abs(surprisal - token.entropy) <= 1e-5:
            return None
        probable = surprisal < token.entropy
    else:
        if 0.3 < token.prob <= 0.7 or (with_ratio and not oracle_touchable(token)):
            return None
        probable = token.prob > 0.7
    if token.advantage > 0:
        return "E1" if probable else "E2"
    return "E3" if probable else "E4"


def oracle_has_gradient(token: Token, subset: Sequence[str], mode: str, by: str, clip: ClipRange) -> bool:
    """Whether the token keeps its gradient, as section 4 words the modes."""
    if token.advantage == 0:
        return False
    chosen = oracle_region(token, by, with_ratio=mode != "isolate") in subset
    low, high = 1 - clip.lower(token.prob), 1 + clip.upper(token.prob)
    if mode == "only":
        return not oracle_touchable(token) or (chosen and 0.7 < token.ratio < 1.3)
    if mode == "extend" and chosen:
        low, high = min(low, 0.7), max(high, 1.3)
    ordinary = token.ratio <= high if token.advantage > 0 else token.ratio >= low
    if mode == "drop":
        return ordinary and not (oracle_touchable(token) and chosen)
    return ordinary and (chosen or mode == "extend")


def value_and_gradient(ablation: RegionAblation, inputs: LossInputs) -> tuple[LossOutputs, Tensor]:
    leaf = inputs.logprobs.clone().requires_grad_()
    outputs = ablation.apply(ppo_clip, replace(inputs, logprobs=leaf))
    if not outputs.loss.requires_grad:
        return outputs, torch.zeros_like(leaf)
    (grad,) = torch.autograd.grad(outputs.loss.sum(), leaf)
    return outputs, grad


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@pytest.mark.parametrize("by", ["empirical", "theory"])
@pytest.mark.parametrize("mode", ["only", "extend", "drop", "isolate"])
def test_modes_against_the_scalar_oracle(mode: str, by: str, subset: tuple[str, ...]) -> None:
    """Every token of TABLE has its ordinary gradient -r A or none; and ``kept`` says which."""
    ablation = RegionAblation(keep=subset, mode=mode, by=by)
    for clip in (GRPO, DYNAMIC, ClipRange.fixed(4e-4, 3e-4)):
        outputs, grad = value_and_gradient(ablation, tokens(TABLE, clip))
        kept, slopes = outputs.kept.flatten().tolist(), grad.flatten().tolist()
        for token, token_kept, slope in zip(TABLE, kept, slopes, strict=True):
            passes = oracle_has_gradient(token, subset, mode, by, clip)
            assert slope == pytest.approx(-token.ratio * token.advantage if passes else 0.0), (token, clip)
            assert token_kept == passes or token.advantage == 0, (token, clip)


NOTHING, ALL = (), tuple(REGIONS)


@pytest.mark.parametrize(
    ("by", "same"),
    [
        pytest.param("empirical", {(("extend", NOTHING), ("drop", NOTHING))}, id="empirical"),
        pytest.param(
            "theory",
            {
                (("extend", NOTHING), ("drop", NOTHING), ("isolate", ALL)),
                (("only", NOTHING), ("drop", ALL)),
            },
            id="theory: every token with A != 0 is in a region",
        ),
    ],
)
def test_the_table_tells_the_modes_apart(by: str, same: set[tuple[tuple[str, tuple[str, ...]], ...]]) -> None:
    """No two modes and no two subsets agree on all of TABLE, unless they must: the test above can fail."""
    alike: dict[tuple[bool, ...], list[tuple[str, tuple[str, ...]]]] = {}
    for mode, subset in product(("only", "extend", "drop", "isolate"), SUBSETS):
        key = tuple(
            oracle_has_gradient(token, subset, mode, by, clip) for clip in (GRPO, DYNAMIC) for token in TABLE
        )
        alike.setdefault(key, []).append((mode, subset))
    assert {tuple(group) for group in alike.values() if len(group) > 1} == same


@pytest.mark.parametrize(
    ("mode", "clip"),
    [
        pytest.param("drop", GRPO, id="drop: the ordinary loss"),
        pytest.param("isolate", GRPO, id="isolate: the ordinary loss"),
        pytest.param("only", ClipRange.unclipped(), id="only: the unclipped surrogate"),
    ],
)
def test_values_are_those_of_the_loss_whatever_is_chosen(mode: str, clip: ClipRange) -> None:
    expected = ppo_clip(tokens(TABLE, clip)).loss
    for subset in SUBSETS:
        outputs = RegionAblation(keep=subset, mode=mode).apply(ppo_clip, tokens(TABLE, GRPO))
        assert torch.equal(outputs.loss, expected)


@pytest.mark.parametrize(
    ("mode", "subset", "trains"),
    [
        pytest.param("only", (), True, id="only, nothing chosen: all train"),
        pytest.param("extend", (), True, id="extend: all train"),
        pytest.param("drop", REGIONS, True, id="drop, all chosen: all train"),
        pytest.param("isolate", (), False, id="isolate, nothing chosen: none trains"),
    ],
)
@pytest.mark.parametrize("by", ["empirical", "theory"])
def test_the_first_update(mode: str, subset: tuple[str, ...], trains: bool, by: str) -> None:
    """r is 1 up to float noise of either sign: only ``isolate`` acts yet."""
    rows = [
        Token(p, r, a, 1.0) for p, r, a in product((0.1, 0.5, 0.9), (1 - 1e-6, 1.0, 1 + 1e-6), (1.0, -1.0))
    ]
    _, grad = value_and_gradient(RegionAblation(keep=subset, mode=mode, by=by), tokens(rows))
    assert (grad != 0).all() if trains else not grad.any()


def test_the_tolerance_of_a_policy_in_bf16() -> None:
    """ln r = 0.015 is noise there, and such tokens must train."""
    inputs = tokens([Token(0.9, math.exp(0.015), 1.0, 1.0)])
    for tolerance, trains in ((1e-3, False), (2e-2, True)):
        _, grad = value_and_gradient(RegionAblation(keep=["E2"], tolerance=tolerance), inputs)
        assert bool(grad.any()) == trains


def test_the_dual_clip_of_a_wrapped_loss_stays() -> None:
    inputs = tokens([Token(0.9, 4.0, -1.0, 1.0)])
    outputs = RegionAblation(keep=["E3"], mode="drop").apply(lambda x: ppo_clip(x, dual_clip=3.0), inputs)
    assert not outputs.kept.item()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param({"keep": ["E1", "E5"]}, "E5", id="unknown region"),
        pytest.param({"keep": "E1"}, "keep", id="a string instead of a list"),
        pytest.param({"keep": ["e1"]}, "e1", id="lower case"),
        pytest.param({"keep": ["E1"], "mode": "solo"}, "'solo'", id="unknown mode"),
        pytest.param({"keep": ["E1"], "by": "feeling"}, "'feeling'", id="unknown definition"),
        pytest.param({"keep": ["E1"], "tolerance": -1e-3}, "-0.001", id="negative tolerance"),
        pytest.param({"keep": ["E1"], "tolerance": math.nan}, "nan", id="tolerance not a number"),
    ],
)
def test_ablations_refused(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RegionAblation(**arguments)


def distribution(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ln pi, H, sum pi^2 and sum pi^2 ln pi of explicit logits [..., V]."""
    logs = logits.log_softmax(dim=-1)
    probs = logs.exp()
    return logs, -(probs * logs).sum(-1), probs.square().sum(-1), (probs.square() * logs).sum(-1)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("advantage", [1.0, -0.3])
def test_eq_5_against_autograd_through_explicit_logits(seed: int, advantage: float) -> None:
    """<grad_z A ln p, grad_z H>, for every token of a random distribution."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2)
    logits.requires_grad_()
    logs, entropy, moment, log_moment = distribution(logits)
    (entropy_grad,) = torch.autograd.grad(entropy, logits, retain_graph=True)
    for token in range(7):
        (policy_grad,) = torch.autograd.grad(advantage * logs[token], logits, retain_graph=True)
        actual = entropy_inner_product(
            logs[token], entropy, moment, log_moment, torch.tensor(advantage, dtype=torch.float64)
        )
        assert actual.item() == pytest.approx((policy_grad @ entropy_grad).item(), rel=1e-10, abs=1e-14)


@pytest.mark.parametrize(
    ("token", "advantage", "rises"),
    [
        pytest.param(0, 1.0, False, id="E1: entropy falls"),
        pytest.param(3, 1.0, True, id="E2: entropy rises"),
        pytest.param(0, -1.0, True, id="E3: entropy rises"),
        pytest.param(3, -1.0, False, id="E4: entropy falls"),
    ],
)
def test_a_gradient_step_moves_entropy_as_the_table_says(token: int, advantage: float, rises: bool) -> None:
    """Not by derivatives: entropy before and after a small step, whose size eq. 5 predicts."""
    probs = torch.tensor([0.8, 0.12, 0.06, 0.02], dtype=torch.float64)
    logs, entropy, moment, log_moment = distribution(probs.log())
    step = 1e-6
    gradient = advantage * (torch.eye(4, dtype=torch.float64)[token] - probs)
    change = distribution(probs.log() + step * gradient)[1] - entropy
    inner = entropy_inner_product(logs[token], entropy, moment, log_moment, torch.tensor(advantage))
    assert (change > 0).item() == rises
    assert (change / step).item() == pytest.approx(inner.item(), rel=1e-4)
    inputs = LossInputs(
        logs[token], logs[token], torch.tensor(advantage), torch.tensor(True), GRPO, entropy=entropy
    )
    region = name(membership(inputs, "theory", None).item())
    assert region == {(0, 1.0): "E1", (3, 1.0): "E2", (0, -1.0): "E3", (3, -1.0): "E4"}[token, advantage]


def test_eq_6_is_the_sign_of_eq_5_s_first_term() -> None:
    """With the second term taken out (moments of 0), theory regions are the signs; with it some differ."""
    draws = torch.Generator().manual_seed(1)
    logs, entropy, moment, log_moment = distribution(
        torch.randn(400, 6, generator=draws, dtype=torch.float64)
    )
    chosen = logs[:, 0]
    advantages = torch.where(torch.rand(400, generator=draws) < 0.5, 1.0, -1.0).double()
    inputs = LossInputs(chosen, chosen, advantages, torch.ones(400, dtype=torch.bool), GRPO, entropy=entropy)
    codes = membership(inputs, "theory", None)
    rises = (codes == 2) | (codes == 3)
    zero = torch.zeros_like(moment)
    assert torch.equal(entropy_inner_product(chosen, entropy, zero, zero, advantages) > 0, rises)
    agreement = (entropy_inner_product(chosen, entropy, moment, log_moment, advantages) > 0) == rises
    assert 0.5 < agreement.double().mean() < 1.0


def test_uniform_and_certain_distributions_have_no_flow() -> None:
    """The entropy gradient is zero at both."""
    for logits in (torch.zeros(5, dtype=torch.float64), torch.tensor([500.0, 0.0, 0.0]).double()):
        logs, entropy, moment, log_moment = distribution(logits)
        flow = entropy_inner_product(logs[0], entropy, moment, log_moment, torch.tensor(1.0))
        assert flow.item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("clip", [GRPO, DYNAMIC], ids=str)
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_entropy_flow_of_ppo_clip_off_policy_against_autograd(
    clip: ClipRange, dual_clip: float | None
) -> None:
    """With g = -d(reduced loss)/d ln p in place of A: <-grad_z loss, grad_z H>, clipped tokens and all."""
    draws = torch.Generator().manual_seed(2)
    logits = torch.randn(60, 6, generator=draws, dtype=torch.float64).mul(1.5).requires_grad_()
    old_logits = logits.detach() + 0.4 * torch.randn(60, 6, generator=draws, dtype=torch.float64)
    actions = torch.randint(6, (60, 1), generator=draws)
    advantages = torch.randn(60, generator=draws, dtype=torch.float64)
    mask = torch.rand(60, generator=draws) < 0.9
    weights = token_mean(mask[None], Totals(tokens=int(mask.sum()), sequences=1))[0]
    old_logprobs = old_logits.log_softmax(-1).gather(-1, actions).squeeze(-1)

    def reduced(logprobs: Tensor) -> tuple[Tensor, Tensor]:
        outputs = ppo_clip(LossInputs(logprobs, old_logprobs, advantages, mask, clip), dual_clip=dual_clip)
        return (weights * outputs.loss).sum(), outputs.kept

    logs, entropy, moment, log_moment = distribution(logits)
    chosen = logs.gather(-1, actions).squeeze(-1)
    (loss_grad,) = torch.autograd.grad(reduced(chosen)[0], logits, retain_graph=True)
    (entropy_grad,) = torch.autograd.grad(entropy.sum(), logits, retain_graph=True)
    expected = -(loss_grad * entropy_grad).sum(dim=-1)

    leaf = chosen.detach().requires_grad_()
    loss, kept = reduced(leaf)
    (by_logprob,) = torch.autograd.grad(loss, leaf)
    flow = entropy_inner_product(leaf.detach(), entropy, moment, log_moment, -by_logprob)
    torch.testing.assert_close(flow, expected, rtol=1e-10, atol=1e-15)
    assert not flow[~kept | ~mask].any()
    assert 5 < kept.sum() < 60
