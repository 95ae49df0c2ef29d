r"""Choosing tokens of a whole mini-batch, over all ranks, so that how it is split changes nothing.

The covariance of Clip-Cov and KL-Cov is a token's share in that of advantage and log-prob,
:math:`(A_t - \bar A)(\ln p_t - \overline{\ln p})`, with means over the valid tokens of the mini-batch (Cui et
al. 2025, arXiv:2505.22617, sec. 4).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Gather = Callable[[Tensor], Tensor]
"""Every rank's values of a vector, one after the other, the same on every rank."""


def token_covariance(advantages: Tensor, logprobs: Tensor, totals: Callable[[Tensor], Tensor]) -> Tensor:
    """Each token's share of the covariance of advantage and log-prob.

    Args:
        advantages: [N], this rank's valid tokens.
        logprobs: [N], nats.
        totals: sums a tensor over all ranks.

    Returns:
        [N] in float64, nats times the unit of A.
    """
    advantages, logprobs = advantages.double(), logprobs.double()
    count = advantages.new_tensor(float(len(advantages)))
    sums = totals(torch.stack([advantages.sum(), logprobs.sum(), count]))
    means = sums[:2] / sums[2].clamp(min=1.0)
    return (advantages - means[0]) * (logprobs - means[1])


def count_of(fraction: float, tokens: int) -> int:
    """How many of ``tokens`` are chosen: the share rounded down, but one at least."""
    return max(1, int(fraction * tokens))


def select(scores: Tensor, draws: Tensor, count: int, gather: Gather) -> Tensor:
    """Choose the ``count`` tokens of all ranks with the highest scores, among equal ones by their draws.

    Args:
        scores: [N] float64 of this rank's tokens; -inf: never chosen.
        draws: [N] int64, of each token alone; the smaller goes first.
        count: how many over all ranks, the same on each.
        gather: collects a vector of ``count`` values from every rank.

    Returns:
        [N] bool; all that can be chosen where they are fewer than ``count``.
    """
    best = _best(scores, draws, count)
    missing = count - len(best)
    every_score = gather(torch.cat([scores[best], scores.new_full((missing,), -math.inf)]))
    every_draw = gather(torch.cat([draws[best], draws.new_full((missing,), torch.iinfo(torch.int64).max)]))
    last = _best(every_score, every_draw, count)[-1]
    score, draw = every_score[last], every_draw[last]
    return (scores > -math.inf) & ((scores > score) | ((scores == score) & (draws <= draw)))


def _best(scores: Tensor, draws: Tensor, count: int) -> Tensor:
    """Indices of the first ``count`` by (score, falling; draw, rising)."""
    by_draw = draws.argsort(stable=True)
    return by_draw[scores[by_draw].argsort(descending=True, stable=True)][:count]
