"""GSPO: the clip acts on a sequence's ratio."""

from rlvr.clipping import ClipRange
from rlvr.losses.inputs import LossInputs, LossOutputs, capped_exp
from rlvr.losses.needs import Needs, needing
from rlvr.losses.ppo_clip import clipped_surrogate

WIDE = 0.05
"""Thresholds from here on hardly ever bind on a mean over a sequence."""


def _judge(clip: ClipRange) -> str | None:
    widest = max(clip.lower.intercept, clip.upper.intercept)
    if widest < WIDE:
        return None
    return (
        f"gspo clips a sequence's mean log-ratio, which hardly ever leaves {clip}; its authors use 3e-4 and "
        "4e-4: clip=gspo"
    )


@needing(Needs(constant=True, sequence_stats=True, judge=_judge))
def gspo(inputs: LossInputs) -> LossOutputs:
    r"""Clipped surrogate of the sequence's geometric-mean ratio, per token.

    .. math:: s_t = \exp(\mathrm{sg}(\overline{d}) + \ln p_t - \mathrm{sg}(\ln p_t)), \qquad
        \ell_t = -\min(s_t A, \mathrm{clip}(s_t, 1 - E^-, 1 + E^+) A)

    with :math:`\overline{d}` the mean over the sequence of :math:`\ln p_t - \ln q_t`. In value all tokens of
    a sequence have one ratio, so a sequence is clipped as a whole.

    Args:
        inputs: see :class:`LossInputs`, with ``sequence_log_ratio``; ``clip`` holds constants, 3e-4 and 4e-4
            in ``conf/clip/gspo.yaml``.

    Returns:
        As :func:`rlvr.losses.ppo_clip`; fact ``sequence_ratio_mean``.

    Raises:
        ValueError: without ``sequence_log_ratio``.

    References:
        Zheng et al. 2025, arXiv:2507.18071, sec. 4.3 (GSPO-token).
    """
    if inputs.sequence_log_ratio is None:
        raise ValueError("gspo clips the ratio of sequences: LossInputs.sequence_log_ratio is missing")
    mean_ratio = capped_exp(inputs.sequence_log_ratio.detach())
    bounds = inputs.ratio_bounds()
    outputs = clipped_surrogate(
        mean_ratio * inputs.score(),
        inputs.advantages,
        *bounds,
        can_clip_high=(-inputs.old_logprobs).exp() > bounds[1],
    )
    outputs.facts["sequence_ratio_mean"] = mean_ratio
    return outputs
