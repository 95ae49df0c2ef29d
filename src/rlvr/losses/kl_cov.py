"""KL-Cov: no clip, and the tokens of highest covariance are held to the old policy."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlvr.losses.inputs import LossInputs, LossOutputs
from rlvr.losses.needs import Needs


@dataclass(frozen=True)
class KLCov:
    r"""Unclipped surrogate, with a penalty on the tokens of highest covariance.

    .. math:: \ell_t = -A_t r_t + c\,|\ln p_t - \ln q_t|\,[t \text{ chosen}]

    How covariance and choice are made is in :mod:`rlvr.losses.selection`.

    Args:
        fraction: share of the mini-batch's valid tokens that is chosen, in (0, 1]; 2e-3 for 7 B models.
        coef: :math:`c`, >= 0.

    Raises:
        ValueError: for an empty share or a negative coefficient.

    References:
        Cui et al. 2025, arXiv:2505.22617, sec. 4.
    """

    fraction: float = 2e-3
    coef: float = 1.0

    needs: ClassVar[Needs] = Needs(bounds="none")

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")
        if not self.coef >= 0:
            raise ValueError(f"coef must be >= 0, got {self.coef}")

    def scores(self, inputs: LossInputs, covariance: Tensor) -> Tensor:
        """The higher the covariance, the sooner."""
        return covariance

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Loss in the shape of the inputs; ``kept``, True everywhere; fact ``selected_frac``.

        Raises:
            ValueError: without ``selected``.
        """
        if inputs.selected is None:
            raise ValueError("kl_cov chooses over the mini-batch: LossInputs.selected is missing")
        penalty = torch.where(inputs.selected, inputs.log_ratio().abs(), 0.0)
        return LossOutputs(
            loss=-inputs.ratio() * inputs.advantages + self.coef * penalty,
            kept=torch.ones_like(inputs.mask),
            facts={"selected_frac": inputs.selected},
        )
