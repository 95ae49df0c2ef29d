"""SAPO: a soft gate in the place of the clip."""

import torch

from rlvr.losses.inputs import LossInputs, LossOutputs
from rlvr.losses.needs import Needs, needing


@needing(Needs(bounds="none"))
def sapo(inputs: LossInputs, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> LossOutputs:
    r"""Sigmoid-gated surrogate, per token; its slope in r is that of r A at r = 1 and fades on both sides.

    .. math:: \ell_t = -A_t\,\frac{4}{\tau}\,\sigma(\tau (r_t - 1))

    with :math:`\tau` by the sign of A. There are no bounds, and every token keeps its gradient.

    Args:
        inputs: see :class:`LossInputs`; ``clip`` is not read.
        tau_positive: temperature of the gate where A > 0, dimensionless, > 0.
        tau_negative: where A <= 0; larger, so that such tokens fade sooner.

    Returns:
        Loss in the shape of the inputs; ``kept``, True everywhere.

    Raises:
        ValueError: for a temperature that is not positive.

    References:
        Gao et al. 2025, arXiv:2511.20347.
    """
    if not (tau_positive > 0 and tau_negative > 0):
        raise ValueError(f"tau_positive and tau_negative must be > 0, got {tau_positive} and {tau_negative}")
    # A tensor, for two plain numbers would meet in float32.
    tau = torch.where(inputs.advantages > 0, inputs.logprobs.new_tensor(tau_positive), tau_negative)
    gate = 4 / tau * torch.sigmoid(tau * (inputs.ratio() - 1))
    return LossOutputs(loss=-gate * inputs.advantages, kept=torch.ones_like(inputs.mask))
