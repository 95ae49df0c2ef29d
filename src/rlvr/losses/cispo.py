"""CISPO: the bounds cap the importance weight, and no token loses its gradient."""

import torch

from rlvr.clipping import ClipRange
from rlvr.errors import ConfigError
from rlvr.losses.inputs import LossInputs, LossOutputs
from rlvr.losses.needs import Needs, needing


def _judge(clip: ClipRange) -> None:
    """Refuse an upper threshold below 1 at any probability: PPO's 0.2 would cap nearly every rising token."""
    least = min(clip.upper(0.0), clip.upper(1.0))
    if least < 1:
        raise ConfigError(
            f"clip: upper {clip.upper}",
            "at least 1 for every p, for CISPO caps a weight by it where PPO cuts a gradient",
            "clip=cispo",
        )


@needing(Needs(bounds="weight", judge=_judge))
def cispo(inputs: LossInputs) -> LossOutputs:
    r"""Policy gradient with a clipped, detached importance weight, per token.

    .. math:: \ell_t = -\mathrm{sg}(\mathrm{clip}(r_t, 1 - E^-, 1 + E^+))\, A_t \ln p_t

    Args:
        inputs: see :class:`LossInputs`; ``clip`` is lo 1, hi 4 in ``conf/clip/cispo.yaml``.

    Returns:
        Loss in the shape of the inputs; ``kept``, True everywhere; facts ``clip_frac_low`` and
        ``clip_frac_high`` (tokens whose weight a bound has changed), ``clip_low_mean`` and
        ``clip_high_mean``.

    References:
        MiniMax 2025, arXiv:2506.13585, sec. 3.1.
    """
    ratio = inputs.ratio().detach()
    min_ratio, max_ratio = inputs.ratio_bounds()
    too_low, too_high = ratio < min_ratio, ratio > max_ratio
    weight = torch.where(too_high, max_ratio, torch.where(too_low, min_ratio, ratio))
    return LossOutputs(
        loss=-weight * inputs.advantages * torch.where(inputs.mask, inputs.logprobs, 0.0),
        kept=torch.ones_like(inputs.mask),
        facts={
            "clip_frac_low": too_low,
            "clip_frac_high": too_high,
            "clip_low_mean": 1 - min_ratio,
            "clip_high_mean": max_ratio - 1,
        },
    )
