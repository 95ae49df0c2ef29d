"""Estimators of the KL divergence from a reference policy, per valid token (Schulman 2020)."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlvr.losses.inputs import MAX_LOG_RATIO


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased, high variance: ln p - ln ref, nats. A metric only: its gradient is zero on average."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Half the squared log-ratio, nats; its gradient is that of the KL divergence on-policy."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased and never negative: exp(d) - d - 1 with d = ln ref - ln p, d capped at 20 in exp; nats."""
    d = ref_logprobs - logprobs
    return torch.exp(d - (d - MAX_LOG_RATIO).clamp(min=0.0).detach()) - d - 1


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""By name; ``k1`` is refused as a loss."""
