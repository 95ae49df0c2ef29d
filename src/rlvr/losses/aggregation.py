"""From token losses to one number: weights that come before the loss, ``sum(weights * token_loss)``.

Denominators are those of the whole optimizer mini-batch over all ranks, so that micro-batch size, padding and
ranks change nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Totals:
    """Sizes of one optimizer mini-batch over all ranks: valid tokens, and sequences that have one."""

    tokens: int
    sequences: int


Aggregation = Callable[[Tensor, Totals], Tensor]


def token_mean(mask: Tensor, totals: Totals) -> Tensor:
    """Every valid token counts the same (DAPO, arXiv:2503.14476, eq. 12; verl's default).

    Args:
        mask: [B, T] bool, valid tokens.
        totals: sizes of the whole mini-batch.

    Returns:
        Weights [B, T] in float64, zero outside the mask, summing to 1 over the mini-batch; 0 everywhere where
        it has no token.
    """
    return mask.double() / max(totals.tokens, 1)
