"""REINFORCE: the floor, without ratio and clip."""

import torch

from rlvr.losses.inputs import LossInputs, LossOutputs
from rlvr.losses.needs import Needs, needing


@needing(Needs(bounds="none"))
def reinforce(inputs: LossInputs) -> LossOutputs:
    r"""Policy gradient, per token.

    .. math:: \ell_t = -A_t \ln p_t

    The recipe ``algorithm=reinforce`` multiplies it by ``min(rho, 2)``, the correction for the engine's
    distribution (:func:`rlvr.mismatch.token_truncation`).

    Args:
        inputs: see :class:`LossInputs`; ``clip`` and ``old_logprobs`` are not read.

    Returns:
        Loss in the shape of the inputs; ``kept``, True everywhere.

    References:
        Williams 1992, Machine Learning 8, p. 229.
    """
    loss = -inputs.advantages * torch.where(inputs.mask, inputs.logprobs, 0.0)
    return LossOutputs(loss=loss, kept=torch.ones_like(inputs.mask))
