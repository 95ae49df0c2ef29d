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


def sequence_mean_token_sum(mask: Tensor, totals: Totals) -> Tensor:
    """Every sequence's tokens summed, the sums averaged: a long sequence weighs more.

    Args:
        mask: [B, T] bool, valid tokens.
        totals: sizes of the whole mini-batch.

    Returns:
        Weights [B, T] in float64, zero outside the mask.
    """
    return mask.double() / max(totals.sequences, 1)


def sequence_mean_token_mean(mask: Tensor, totals: Totals) -> Tensor:
    """Every sequence counts the same, whatever its length (GRPO as published, arXiv:2402.03300, eq. 3).

    Args:
        mask: [B, T] bool, valid tokens; a sequence is a row, and counts if it has one.
        totals: sizes of the whole mini-batch.

    Returns:
        Weights [B, T] in float64, zero outside the mask, summing to 1 over the mini-batch.
    """
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mask.double() / lengths / max(totals.sequences, 1)


def constant_length(mask: Tensor, totals: Totals, *, length: int) -> Tensor:
    """Token sums over a constant, sequences x ``length``: no weight depends on a length (Dr.GRPO).

    Args:
        mask: [B, T] bool, valid tokens.
        totals: sizes of the whole mini-batch.
        length: of the longest response that can be, ``data.max_new_tokens``; at least 1.

    Returns:
        Weights [B, T] in float64, zero outside the mask.

    Raises:
        ValueError: for a length below 1.

    References:
        Liu et al. 2025, arXiv:2503.20783, sec. 3.2.
    """
    if not length >= 1:
        raise ValueError(f"length must be at least 1 token, got {length}")
    return mask.double() / (max(totals.sequences, 1) * length)
