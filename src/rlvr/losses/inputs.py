"""What every loss takes and returns: tensors of one shape, whatever it is, and no averages."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlvr.clipping import ClipRange

MAX_LOG_RATIO = 20.0
"""Log-ratios are capped here in value (e^20 is 4.9e8); the cap takes no gradient away."""
BAND = (0.7, 1.3)
"""The ratio band of the paper's region ablation (fig. 2c)."""


@dataclass(frozen=True)
class LossInputs:
    """Per-token inputs of a loss, all of one shape: ``[B, T]``, or a chunk of its tokens.

    Args:
        logprobs: ln p of the sampled tokens under the policy being trained, nats; the only one that carries
            gradient.
        old_logprobs: ln q under the policy that the iteration started from, nats.
        advantages: dimensionless.
        mask: bool, True at tokens that count; everything else may hold anything, NaN included.
        clip: the thresholds of this iteration.
        entropy: full-vocabulary entropy of the policy being trained, nats, detached.
        ref_logprobs: ln p under the reference policy, nats.
        sequence_log_ratio: mean of ln p - ln q over the token's sequence, nats, detached; for losses that
            need sequences.
        selected: bool, tokens that were chosen over the whole mini-batch; for losses that select.
        widen: bool, tokens whose bounds are at least as wide as :data:`BAND` (region mode ``extend``).
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    clip: ClipRange
    entropy: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sequence_log_ratio: Tensor | None = None
    selected: Tensor | None = None
    widen: Tensor | None = None

    def log_ratio(self) -> Tensor:
        """Log-ratio d = ln p - ln q, nats; 0, without gradient, outside the mask.

        A NaN there would make 0 * NaN of a gradient that is masked later.
        """
        return torch.where(self.mask, self.logprobs - self.old_logprobs, 0.0)

    def ratio(self) -> Tensor:
        """Ratio r = p/q with ln r capped at 20: beyond it the value stays e^20, and so does its slope.

        1, without gradient, outside the mask.
        """
        return capped_exp(self.log_ratio())

    def score(self) -> Tensor:
        """1 in value, with the gradient of ln p: p / sg(p), whatever p is; without it outside the mask."""
        logprobs = torch.where(self.mask, self.logprobs, 0.0)
        return (logprobs - logprobs.detach()).exp()

    def ratio_bounds(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest ratio that keep a token's gradient, without gradient themselves."""
        return self.widened(*self.clip.ratio_bounds(self.logprobs, self.old_logprobs))

    def widened(self, min_ratio: Tensor, max_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds at least as wide as the band on the tokens of ``widen``."""
        if self.widen is None:
            return min_ratio, max_ratio
        return (
            torch.where(self.widen, min_ratio.clamp(max=BAND[0]), min_ratio),
            torch.where(self.widen, max_ratio.clamp(min=BAND[1]), max_ratio),
        )


@dataclass(frozen=True)
class LossOutputs:
    """Per-token results of a loss, unmasked and unreduced.

    Args:
        loss: to be minimised, same shape as the inputs.
        kept: bool, tokens that keep their gradient; True too where A = 0, for nothing was clipped there.
        facts: further per-token tensors to be averaged and logged under ``train/``, detached.
    """

    loss: Tensor
    kept: Tensor
    facts: dict[str, Tensor] = field(default_factory=dict)


def capped_exp(log_ratio: Tensor) -> Tensor:
    """exp(d), with d capped at 20 in value; the cap takes no gradient away."""
    return (log_ratio - (log_ratio - MAX_LOG_RATIO).clamp(min=0.0).detach()).exp()


Loss = Callable[[LossInputs], LossOutputs]
