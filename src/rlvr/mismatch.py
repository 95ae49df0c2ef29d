r"""The engine does not sample from quite the trainer's distribution: importance weights between the two.

With :math:`\rho = \exp(\ln q_{trainer} - \ln q_{engine})`, the policy loss of a token sampled by the engine
is multiplied by its weight. Tokens and sequences that a correction drops stay in the denominators.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_LOG_RHO = 20.0
"""Log-ratios are clamped to plus or minus this."""

Correction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(log_rho [B, T] in nats, mask [B, T] bool) -> (weights [B, T], cut [B, T] bool)``.

Weights are 0 outside the mask; ``cut`` are the tokens whose weight was truncated or dropped.
"""


def log_rho(logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Ln of the trainer's probability over the engine's, of the sampled tokens.

    Args:
        logprobs: [B, T] under the trainer's weights that the iteration starts from, nats.
        engine_logprobs: [B, T] of the engine, nats.
        mask: [B, T] bool, response tokens; elsewhere both may hold anything.

    Returns:
        [B, T] in nats, within 20 of 0; 0 outside the mask.
    """
    return torch.where(mask, logprobs - engine_logprobs, 0.0).clamp(-MAX_LOG_RHO, MAX_LOG_RHO)


def token_truncation(log_rho: Tensor, mask: Tensor, *, cap: float = 2.0) -> tuple[Tensor, Tensor]:
    """Truncated importance sampling: ``min(rho, cap)`` for every token.

    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".

    Args:
        log_rho: [B, T], nats.
        mask: [B, T] bool.
        cap: largest weight, dimensionless.

    Returns:
        Weights and cut tokens, [B, T], see :data:`Correction`.

    Raises:
        ValueError: for a cap below 1, which would bias tokens on which engine and trainer agree.
    """
    if not cap >= 1:
        raise ValueError(f"cap={cap} must be at least 1")
    rho = log_rho.exp()
    return torch.where(mask, rho.clamp(max=cap), 0.0), mask & (rho > cap)


def token_mask(
    log_rho: Tensor, mask: Tensor, *, low: float = 0.5, high: float = 2.0
) -> tuple[Tensor, Tensor]:
    """``rho`` where it lies within ``[low, high]``, else 0: tokens on which the two disagree do not train.

    Args:
        log_rho: [B, T], nats.
        mask: [B, T] bool.
        low: smallest ratio that is kept, dimensionless.
        high: largest.

    Returns:
        Weights and cut tokens, [B, T], see :data:`Correction`.

    Raises:
        ValueError: where ``0 <= low <= 1 <= high`` does not hold.
    """
    return _within(log_rho, mask, low, high)


def sequence_mask(
    log_rho: Tensor, mask: Tensor, *, low: float = 0.5, high: float = 2.0
) -> tuple[Tensor, Tensor]:
    """The whole response's ratio, the product of its tokens', where it lies within ``[low, high]``, else 0.

    Masked importance sampling on sequences (Liu et al. 2025, "When speed kills stability"). The product's
    logarithm is clamped to 20 like a token's.

    Args:
        log_rho: [B, T], nats.
        mask: [B, T] bool.
        low: smallest ratio that is kept, dimensionless.
        high: largest.

    Returns:
        Weights, the same for every token of a response, and cut tokens, [B, T], see :data:`Correction`.

    Raises:
        ValueError: where ``0 <= low <= 1 <= high`` does not hold.
    """
    total = torch.where(mask, log_rho, 0.0).sum(dim=-1, keepdim=True).clamp(-MAX_LOG_RHO, MAX_LOG_RHO)
    return _within(total.expand_as(log_rho), mask, low, high)


def _within(log_rho: Tensor, mask: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"low={low} and high={high} must enclose 1, with low >= 0")
    rho = log_rho.exp()
    inside = (rho >= low) & (rho <= high)
    return torch.where(mask & inside, rho, 0.0), mask & ~inside
