"""Attention over sequences that stand one after the other in a single row, none of which sees another."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "rlvr_packed_sdpa"
"""Name under which transformers finds :func:`packed_sdpa`; without ``sequence_lengths`` it is ``sdpa``."""


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence, one after the other: no mask, and no work across sequences.

    A block-diagonal mask over the row gives the same numbers, at a cost quadratic in the row's length.

    Args:
        module: the attention layer.
        query: [1, heads, N, head size].
        key: [1, key heads, N, head size].
        value: as ``key``.
        attention_mask: ignored where there are ``sequence_lengths``.
        sequence_lengths: of the sequences, N in all; None for an ordinary batch of rows.
        kwargs: what the model hands to its attention.

    Returns:
        [1, N, heads, head size], and no attention weights.
    """
    attend: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
    if sequence_lengths is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    outputs = []
    for parts in zip(*(part.split(sequence_lengths, dim=2) for part in (query, key, value)), strict=True):
        length = parts[0].shape[2]
        band = None
        if window is not None and length > window:
            band = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device)
            band = band.tril().triu(1 - window)
        outputs.append(attend(module, *parts, band, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
