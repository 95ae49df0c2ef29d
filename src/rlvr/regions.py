r"""The four entropy regions E1..E4: one definition for ablation and diagnostics (arXiv:2602.09782, sec. 3).

A policy-gradient step on a token pushes its probability up (A > 0) or down (A < 0). Whether that raises or
lowers the policy's entropy depends on how probable the token is (eq. 5; eq. 6 keeps the sign of its first
term):

====== ===== ================= ================================ =======
region   A   theory            empirical (fig. 2b)              entropy
====== ===== ================= ================================ =======
E1     > 0   -ln p < H         p > 0.7 and r rising             falls
E2     > 0   -ln p > H         p <= 0.3 and r rising            rises
E3     < 0   -ln p < H         p > 0.7 and r falling            rises
E4     < 0   -ln p > H         p <= 0.3 and r falling           falls
====== ===== ================= ================================ =======
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from rlvr.clipping import ClipRange
from rlvr.losses import BAND, Loss, LossInputs, LossOutputs

Definition = Literal["empirical", "theory"]
AblationMode = Literal["only", "extend", "drop", "isolate"]
REGIONS = ("E1", "E2", "E3", "E4")

PROBABLE, IMPROBABLE = 0.7, 0.3
"""Probabilities above / up to which a token is in an empirical region."""
SURPRISAL_MARGIN = 1e-5
"""Tokens whose surprisal is this close to the entropy, in nats, are in no theory region: rounding."""


def touchable(inputs: LossInputs, tolerance: float) -> Tensor:
    """Tokens that clipping could act on: A > 0 with ln r > tolerance, or A < 0 with ln r < -tolerance.

    At the first update r is 1 up to rounding, and padding alone puts 9 % of tokens on a random side of it:
    hence a tolerance.
    """
    log_ratio = inputs.logprobs.detach() - inputs.old_logprobs
    return ((inputs.advantages > 0) & (log_ratio > tolerance)) | (
        (inputs.advantages < 0) & (log_ratio < -tolerance)
    )


def membership(inputs: LossInputs, by: Definition, tolerance: float | None) -> Tensor:
    """Which region each token is in.

    Args:
        inputs: ``logprobs``, ``old_logprobs``, ``advantages`` of one shape, and ``entropy`` for
            ``by="theory"``.
        by: ``empirical`` (fixed probabilities 0.7 and 0.3) or ``theory`` (surprisal against entropy, eq. 6).
        tolerance: how far ln r must have moved for an empirical region, in nats; None: membership without r.

    Returns:
        uint8 in that shape: 1..4 for E1..E4, 0 for none (A = 0, the margin, middling p).
    """
    logprobs = inputs.logprobs.detach()
    if by == "theory":
        if inputs.entropy is None:
            raise ValueError("theory regions compare surprisal with entropy: LossInputs.entropy is missing")
        excess = -logprobs - inputs.entropy.detach()
        probable, improbable = excess < -SURPRISAL_MARGIN, excess > SURPRISAL_MARGIN
    else:
        probs = logprobs.exp()
        probable, improbable = probs > PROBABLE, probs <= IMPROBABLE
        if tolerance is not None:
            moved = touchable(inputs, tolerance)
            probable, improbable = probable & moved, improbable & moved
    positive, negative = inputs.advantages > 0, inputs.advantages < 0
    region = torch.zeros_like(logprobs, dtype=torch.uint8)
    for code, where in enumerate(
        (positive & probable, positive & improbable, negative & probable, negative & improbable), start=1
    ):
        region = torch.where(where, code, region)
    return region


@dataclass(frozen=True)
class RegionAblation:
    """Let gradient through by region (fig. 2c and its variants); wraps any loss.

    It acts on the policy loss alone: an entropy bonus and a reference KL reach every token. The mean
    thresholds that a run logs are those after ``extend`` has widened them.

    Args:
        keep: the chosen regions, any subset of E1..E4. In ``drop`` these are the ones that lose their
            gradient.
        mode: ``only``: touchable tokens keep their gradient only inside a chosen region and the band 0.7 < r
            < 1.3, untouchable ones train, and the loss's own clip is off; ``extend``: the ordinary clip, but
            in chosen regions the wider of it and the band; ``drop``: the ordinary clip, then touchable tokens
            of the chosen regions lose their gradient; ``isolate``: every token outside the chosen regions
            loses its gradient, by the sign of A and p alone, so that it acts from the first update.
        by: region definition, see :func:`membership`.
        tolerance: see :func:`touchable`; 1e-3, or 2e-2 for a policy in bf16.

    Raises:
        ValueError: for an unknown region, mode or definition, or a negative tolerance.
    """

    keep: Sequence[str]
    mode: AblationMode = "only"
    by: Definition = "empirical"
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.keep) - set(REGIONS)):
            raise ValueError(
                f"regions.keep={list(self.keep)} has {unknown}, expected a subset of {list(REGIONS)}"
            )
        if self.mode not in get_args(AblationMode):
            raise ValueError(f"regions.mode={self.mode!r} is none of {', '.join(get_args(AblationMode))}")
        if self.by not in get_args(Definition):
            raise ValueError(f"regions.by={self.by!r} is none of {', '.join(get_args(Definition))}")
        if not self.tolerance >= 0:
            raise ValueError(f"regions.tolerance={self.tolerance} must be >= 0 nats")

    def apply(self, loss: Loss, inputs: LossInputs) -> LossOutputs:
        """Evaluate ``loss`` with gradient only where the ablation lets it through; values stay."""
        if self.mode == "extend":
            return loss(self.bounds_of(inputs))
        chosen = self._chosen(inputs)
        inputs = self.bounds_of(inputs)
        if self.mode == "only":
            ratio = inputs.ratio().detach()
            in_band = (ratio > BAND[0]) & (ratio < BAND[1])
            passes = ~touchable(inputs, self.tolerance) | (chosen & in_band)
        elif self.mode == "drop":
            passes = ~(touchable(inputs, self.tolerance) & chosen)
        else:
            passes = chosen
        outputs = loss(inputs)
        # In ``only`` the loss has no clip of its own, and nothing to say about one.
        facts = {} if self.mode == "only" else outputs.facts
        return LossOutputs(
            loss=torch.where(passes, outputs.loss, outputs.loss.detach()),
            kept=outputs.kept & passes,
            facts={**facts, "region_cut_frac": ~passes},
        )

    def bounds_of(self, inputs: LossInputs) -> LossInputs:
        """Return the inputs with the bounds that the loss gets to see."""
        if self.mode == "extend":
            return replace(inputs, widen=self._chosen(inputs))
        if self.mode == "only":
            return replace(inputs, clip=ClipRange.unclipped())
        return inputs

    def _chosen(self, inputs: LossInputs) -> Tensor:
        region = membership(inputs, self.by, None if self.mode == "isolate" else self.tolerance)
        codes = torch.tensor(
            [REGIONS.index(name) + 1 for name in self.keep], dtype=torch.uint8, device=region.device
        )
        return torch.isin(region, codes)


def entropy_inner_product(
    logprobs: Tensor, entropy: Tensor, moment: Tensor, log_moment: Tensor, advantages: Tensor
) -> Tensor:
    r"""Inner product of the policy gradient and the entropy gradient in logit space, eq. 5.

    .. math:: \langle \nabla_z L, \nabla_z H\rangle = -A\,[p(\ln p + H) - \sum_x \pi_x^2(\ln \pi_x + H)]

    Positive: a gradient step on this token, with its logits free, raises the entropy of its distribution.

    Args:
        logprobs: ln p of the sampled token, nats, any shape.
        entropy: H of its distribution, nats.
        moment: :math:`\sum_x \pi_x^2`.
        log_moment: :math:`\sum_x \pi_x^2 \ln \pi_x`, nats.
        advantages: A, or any weight on :math:`\nabla_z \ln p`: with ``g = -d(reduced loss)/d ln p`` this is
            the entropy flow, which holds advantage, ratio, clip and aggregation, for any loss.

    Returns:
        Tensor of the same shape, nats (times the unit of A).
    """
    first_term = logprobs.exp() * (logprobs + entropy)
    return -advantages * (first_term - (log_moment + entropy * moment))
