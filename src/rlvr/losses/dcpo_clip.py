"""DCPO: PPO's clip with bounds that widen as the old probability falls."""

from rlvr.losses.inputs import LossInputs, LossOutputs
from rlvr.losses.needs import Needs, needing
from rlvr.losses.ppo_clip import clipped_surrogate

MAX_RATIO = 10.0
"""Largest upper bound."""


@needing(Needs(constant=True))
def dcpo_clip(inputs: LossInputs) -> LossOutputs:
    r"""Clipped surrogate with bounds in q, the token's old probability.

    .. math::
        \tfrac12 + \tfrac12 \sqrt{\max(1 - 4\,\mathrm{lo}/q,\ 0)} \ \le\ r \ \le\
        \min(\tfrac12 + \tfrac12 \sqrt{1 + 4\,\mathrm{hi}/q},\ 10)

    Args:
        inputs: see :class:`LossInputs`; ``clip`` holds the constants lo and hi, 0.16 and 0.2 in
            ``conf/clip/dcpo.yaml``.

    Returns:
        As :func:`rlvr.losses.ppo_clip`.

    References:
        Yang et al. 2025, arXiv:2509.02333; the formula is that of re-implementations.
    """
    low, high = inputs.clip.lower.intercept, inputs.clip.upper.intercept
    reciprocal = (-inputs.old_logprobs.detach()).exp()
    bounds = inputs.widened(
        0.5 + 0.5 * (1 - 4 * low * reciprocal).clamp(min=0.0).sqrt(),
        (0.5 + 0.5 * (1 + 4 * high * reciprocal).sqrt()).clamp(max=MAX_RATIO),
    )
    # The bounds do not depend on p: what a ratio of 1/q meets is the bound itself.
    return clipped_surrogate(inputs.ratio(), inputs.advantages, *bounds, can_clip_high=reciprocal > bounds[1])
