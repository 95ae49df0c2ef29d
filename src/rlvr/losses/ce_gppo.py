"""CE-GPPO: tokens beyond a bound keep a bounded gradient."""

import torch

from rlvr.losses.inputs import LossInputs, LossOutputs


def ce_gppo(
    inputs: LossInputs, *, beta_low: float = 0.75, beta_high: float = 1.0, dual_clip: float = 10.0
) -> LossOutputs:
    r"""Clipped surrogate that hands clipped tokens a scaled gradient, per token.

    .. math::
        \ell_t = -A_t \begin{cases}
        \beta_1 (1 - E^-)\, r_t / \mathrm{sg}(r_t) & A_t < 0,\ r_t < 1 - E^- \\
        \beta_2 (1 + E^+)\, r_t / \mathrm{sg}(r_t) & A_t > 0,\ r_t > 1 + E^+ \\
        r_t & \text{otherwise} \end{cases}

    With A < 0 the loss is at most :math:`-c A`, where the gradient ends.

    Args:
        inputs: see :class:`LossInputs`.
        beta_low: :math:`\beta_1`, share of the gradient below the lower bound, >= 0; 0.75 for 7 B models.
        beta_high: :math:`\beta_2`, above the upper bound, >= 0.
        dual_clip: :math:`c > 1`, dimensionless.

    Returns:
        Loss in the shape of the inputs; ``kept``, False only where the gradient is cut to nothing; facts
        ``clip_frac_low`` and ``clip_frac_high`` (tokens beyond a bound), ``clip_low_mean``,
        ``clip_high_mean``, ``dual_clip_frac``.

    Raises:
        ValueError: for a negative share, or a dual clip of 1 or less.

    References:
        Su et al. 2025, arXiv:2509.20712.
    """
    if not (beta_low >= 0 and beta_high >= 0):
        raise ValueError(f"beta_low and beta_high must be >= 0, got {beta_low} and {beta_high}")
    if not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 (it bounds a ratio from above), got {dual_clip}")
    ratio, advantages = inputs.ratio(), inputs.advantages
    min_ratio, max_ratio = inputs.ratio_bounds()
    too_high = (advantages > 0) & (ratio > max_ratio)
    too_low = (advantages < 0) & (ratio < min_ratio)
    runaway = (advantages < 0) & (ratio > dual_clip)
    # Selected before they are multiplied: an infinite bound that is not used would leave 0 * inf.
    slope = torch.where(too_high, beta_high * max_ratio, torch.where(too_low, beta_low * min_ratio, ratio))
    surrogate = (slope.detach() * inputs.score()).masked_fill(runaway, dual_clip)
    dead = runaway | (too_low & (beta_low == 0)) | (too_high & (beta_high == 0))
    return LossOutputs(
        loss=-surrogate * advantages,
        kept=~dead,
        facts={
            "clip_frac_low": too_low,
            "clip_frac_high": too_high,
            "clip_low_mean": 1 - min_ratio,
            "clip_high_mean": max_ratio - 1,
            "dual_clip_frac": runaway,
        },
    )
