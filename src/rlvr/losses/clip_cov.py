"""Clip-Cov: PPO's clip, and a few tokens of high covariance lose their gradient."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rlvr.clipping import ClipRange
from rlvr.losses.inputs import LossInputs, LossOutputs
from rlvr.losses.needs import Needs
from rlvr.losses.ppo_clip import ppo_clip


def _judge(clip: ClipRange) -> str | None:
    tightest = min(clip.lower(0.0), clip.lower(1.0), clip.upper(0.0), clip.upper(1.0))
    if tightest >= 1:
        return None
    return (
        f"clip_cov under {clip}: its authors leave both thresholds at 1, for tighter ones act on tokens "
        "before the covariance does: clip=clip_cov"
    )


@dataclass(frozen=True)
class ClipCov:
    r"""PPO's clip, and a random few of the tokens with :math:`low < cov < high` lose their gradient.

    Their loss keeps its value, and they stay in the denominator. Tokens that PPO's clip has cut are not
    chosen. How covariance and choice are made is in :mod:`rlvr.losses.selection`.

    Args:
        fraction: share of the mini-batch's valid tokens that is chosen, in (0, 1].
        low: covariance above which a token can be chosen.
        high: and below which.

    Raises:
        ValueError: for a share or an interval that is empty.

    References:
        Cui et al. 2025, arXiv:2505.22617, sec. 4.
    """

    fraction: float = 2e-4
    low: float = 1.0
    high: float = 5.0

    needs: ClassVar[Needs] = Needs(judge=_judge)

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")

    def scores(self, inputs: LossInputs, covariance: Tensor) -> Tensor:
        """All tokens within the interval are equal: they are drawn."""
        within = (covariance > self.low) & (covariance < self.high) & ppo_clip(inputs).kept
        return torch.where(within, 0.0, -math.inf).double()

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Return :func:`rlvr.losses.ppo_clip` without the gradient of ``inputs.selected``.

        Fact ``selected_frac`` beside its facts.

        Raises:
            ValueError: without ``selected``.
        """
        if inputs.selected is None:
            raise ValueError("clip_cov chooses over the mini-batch: LossInputs.selected is missing")
        outputs = ppo_clip(inputs)
        return replace(
            outputs,
            loss=torch.where(inputs.selected, outputs.loss.detach(), outputs.loss),
            kept=outputs.kept & ~inputs.selected,
            facts={**outputs.facts, "selected_frac": inputs.selected},
        )
