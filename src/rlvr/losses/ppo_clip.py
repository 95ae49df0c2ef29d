"""PPO's clipped surrogate with the method's bounds: the loss of GRPO, Clip-Higher and every schedule."""

import torch
from torch import Tensor

from rlvr.losses.inputs import LossInputs, LossOutputs


def ppo_clip(inputs: LossInputs, *, dual_clip: float | None = None) -> LossOutputs:
    r"""Clipped surrogate with probability-dependent bounds, per token.

    .. math:: \ell_t = -\min(r_t A_t,\ \mathrm{clip}(r_t, 1 - E^-(p_t), 1 + E^+(p_t)) A_t)

    where :math:`r_t = p_t / q_t` and the bounds see :math:`p_t` detached. A clipped token has zero gradient.
    With dual clip and A < 0 the loss is at most :math:`-c A`.

    Args:
        inputs: see :class:`LossInputs`.
        dual_clip: :math:`c > 1`, dimensionless; None is off.

    Returns:
        Loss in the shape of the inputs; ``kept``; facts ``clip_frac_low`` and ``clip_frac_high`` (token
        clipped by either bound), ``can_clip_high_frac`` (1/q exceeds the upper bound), ``clip_low_mean`` and
        ``clip_high_mean`` (the thresholds themselves, figs. 10 and 11).

    Raises:
        ValueError: for a dual clip of 1 or less.

    References:
        Schulman et al. 2017, arXiv:1707.06347, eq. 7; Ye et al. 2020, arXiv:1912.09729, eq. 5 (dual clip);
        arXiv:2602.09782, sec. 4.2.
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 (it bounds a ratio from above), got {dual_clip}")
    # The largest ratio a token can reach is 1/q, at p = 1: where that is inside, the upper bound cannot bind.
    _, bound_at_one = inputs.clip.ratio_bounds(torch.zeros_like(inputs.old_logprobs), inputs.old_logprobs)
    return clipped_surrogate(
        inputs.ratio(),
        inputs.advantages,
        *inputs.ratio_bounds(),
        can_clip_high=(-inputs.old_logprobs).exp() > bound_at_one,
        dual_clip=dual_clip,
    )


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    min_ratio: Tensor,
    max_ratio: Tensor,
    *,
    can_clip_high: Tensor,
    dual_clip: float | None = None,
) -> LossOutputs:
    """PPO's clip of any ratio by any bounds; see :func:`ppo_clip` for what is returned.

    Args:
        ratio: of a token or of its sequence, with gradient.
        advantages: same shape.
        min_ratio: smallest ratio that keeps its gradient where A < 0, same shape.
        max_ratio: largest that keeps it where A > 0.
        can_clip_high: bool, tokens on which the upper bound could bind.
        dual_clip: see :func:`ppo_clip`.
    """
    too_high = (advantages > 0) & (ratio > max_ratio)
    too_low = (advantages < 0) & (ratio < min_ratio)
    surrogate = torch.where(too_high, max_ratio, torch.where(too_low, min_ratio, ratio))
    kept = ~(too_high | too_low)
    dual_facts = {}
    if dual_clip is not None:
        runaway = (advantages < 0) & (ratio > dual_clip)
        surrogate = surrogate.masked_fill(runaway, dual_clip)
        kept = kept & ~runaway
        dual_facts = {"dual_clip_frac": runaway}
    return LossOutputs(
        loss=-surrogate * advantages,
        kept=kept,
        facts={
            "clip_frac_low": too_low,
            "clip_frac_high": too_high,
            "can_clip_high_frac": can_clip_high,
            "clip_low_mean": 1 - min_ratio,
            "clip_high_mean": max_ratio - 1,
            **dual_facts,
        },
    )
