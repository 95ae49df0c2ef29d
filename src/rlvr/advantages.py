"""Group-relative advantages (GRPO)."""

import torch
from torch import Tensor


def group_relative(rewards: Tensor, *, normalize_std: bool = True, delta: float = 1e-6) -> Tensor:
    r"""How much better a response did than its group: :math:`(R_i - \bar R) / (\mathrm{std}(R) + \delta)`.

    Computed in float64; the standard deviation is Bessel-corrected. A group of equal rewards gets exactly 0
    by selection: in float32 its rounding error, divided by delta, would be 0.007 to 0.06 for rewards such as
    0.1 or 0.7.

    Args:
        rewards: [P, G], finite, dimensionless.
        normalize_std: divide by the group's standard deviation (False: Dr.GRPO, arXiv:2503.20783).
        delta: added to the standard deviation.

    Returns:
        Advantages [P, G] in float32.

    Raises:
        ValueError: for groups of one, whose advantage is always 0, or a reward that is not finite.

    References:
        Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"advantages need rewards [P, G] with G >= 2, got shape {list(rewards.shape)}")
    if not rewards.isfinite().all():
        raise ValueError("advantages need finite rewards")
    rewards = rewards.double()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize_std:
        centred = centred / (rewards.std(dim=1, keepdim=True) + delta)
    return torch.where(zero_variance(rewards)[:, None], 0.0, centred).float()


def zero_variance(rewards: Tensor) -> Tensor:
    """Groups whose rewards are all equal and so teach nothing: [P, G] -> [P] bool."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)


def overlong_penalty(lengths: Tensor, *, longest: int, buffer: int, factor: float) -> Tensor:
    r"""Soft penalty of responses that come near the limit (DAPO, arXiv:2503.14476, eq. 13).

    .. math:: \min\left(-\frac{len - (L_{max} - buffer)}{buffer} \cdot factor,\ 0\right)

    Args:
        lengths: tokens of each response, any shape.
        longest: :math:`L_{max}`, the most a response can have.
        buffer: tokens before it over which the penalty grows, >= 1.
        factor: the penalty at the limit, in units of reward.

    Returns:
        float64 in that shape, from ``-factor`` to 0; to be added to the rewards.
    """
    return (-(lengths.double() - (longest - buffer)) / buffer * factor).clamp(max=0.0)
