"""REINFORCE: the floor, without ratio and clip."""

import torch

from rlvr.losses.inputs import LossInputs, LossOutputs
from rlvr.losses.needs import Needs, needing


@needing(Needs(bounds="none"))
def reinforce(inputs: LossInputs, *, max_rho: float = 2.0) -> LossOutputs:
    r"""Policy gradient with a truncated importance weight for the engine's distribution, per token.

    .. math:: \ell_t = -\mathrm{sg}(\min(\rho_t, c))\, A_t \ln p_t

    Args:
        inputs: see :class:`LossInputs`; ``rho`` None stands for 1; ``clip`` and ``old_logprobs`` are not
            read.
        max_rho: :math:`c`, dimensionless, > 0.

    Returns:
        Loss in the shape of the inputs; ``kept``, True everywhere.

    Raises:
        ValueError: for a truncation that is not positive.

    References:
        Williams 1992, Machine Learning 8, p. 229.
    """
    if not max_rho > 0:
        raise ValueError(f"max_rho must be > 0, got {max_rho}")
    loss = -inputs.advantages * torch.where(inputs.mask, inputs.logprobs, 0.0)
    if inputs.rho is not None:
        loss = inputs.rho.detach().clamp(max=max_rho) * loss
    return LossOutputs(loss=loss, kept=torch.ones_like(inputs.mask))
