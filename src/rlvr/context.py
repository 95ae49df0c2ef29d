"""Context parallelism: ranks that compute one packed row together, each a chunk of its tokens (Ulysses).

Between attention layers a rank holds its chunk of the row, every head of it; in attention an all-to-all gives
it the whole row for its share of the heads, and another takes that back (DeepSpeed-Ulysses, Jacobs et al.
2023, arXiv:2309.14509). Outside the model's body nothing is shared: every rank brings its own sequences and
takes their states home, so that the head, the loss and diagnostics see whole sequences, as without it.
"""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


class ContextGroup:
    """The ranks that compute rows together; all of them have to make every call, in the same order.

    Args:
        group: two ranks or more.

    Attributes:
        size: how many they are.
        rank: this one's number among them.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.size, self.rank = group.size(), group.rank()
        self._group = group

    def gathered(self, value: Any) -> list[Any]:
        """The plain values of the group's ranks, in their order."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def cut(self, ids: Tensor, lengths: list[int], pad_id: int) -> "Chunk":
        """Put every rank's sequences one after the other into one row, and take this rank's chunk of it.

        Args:
            ids: [n] int64, the tokens of this rank's sequences; there may be none.
            lengths: of the sequences, n in all.
            pad_id: what fills the row up, as a last sequence of its own, so that all chunks are equally long;
                a row without any token has one in every chunk.
        """
        everyone = self.gathered((ids.cpu(), lengths))
        counts = [len(theirs) for theirs, _ in everyone]
        every = [length for _, theirs in everyone for length in theirs]
        width = max(-(-sum(counts) // self.size), 1)
        padding = width * self.size - sum(counts)
        every += [padding] if padding else []
        row = torch.cat([*(theirs for theirs, _ in everyone), torch.full((padding,), pad_id)])
        positions = torch.cat([torch.arange(length) for length in every])
        mine = slice(self.rank * width, (self.rank + 1) * width)
        return Chunk(row[mine].to(ids.device), positions[mine].to(ids.device), every, counts, context=self)

    def to_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """From every head of the chunk's tokens to this rank's share of the heads of all tokens.

        Args:
            parts: [1, heads, n, head size] each, in one exchange. Keys and values that several query heads
                share are repeated first where ``size`` does not divide their number.

        Returns:
            [1, heads / size, size x n, head size] each.
        """
        parts = tuple(self._repeated(part) for part in parts)
        flat = [part.reshape(self.size, -1) for part in parts]
        received = self._exchange(torch.cat(flat, dim=1)).split([part.shape[1] for part in flat], dim=1)
        return tuple(
            # [chunk, heads, n, head size]: the row's tokens are those of the chunks in turn.
            theirs.reshape(self.size, -1, *part.shape[2:]).transpose(0, 1).flatten(1, 2)[None]
            for theirs, part in zip(received, parts, strict=True)
        )

    def to_tokens(self, output: Tensor) -> Tensor:
        """Back from this rank's share of the heads of all tokens to every head of the chunk's.

        Args:
            output: [1, size x n, heads / size, head size].

        Returns:
            [1, n, heads, head size].
        """
        heads = self._exchange(output.reshape(self.size, -1, *output.shape[2:]))
        return heads.transpose(0, 1).flatten(1, 2)[None]

    def _repeated(self, part: Tensor) -> Tensor:
        heads = part.shape[1]
        times = math.lcm(heads, self.size) // heads
        return part if times == 1 else part.repeat_interleave(times, dim=1)

    def _exchange(
        self, parts: Tensor, receive: list[int] | None = None, send: list[int] | None = None
    ) -> Tensor:
        """Send slices of the first dimension, equal or of these lengths, one to each rank; differentiable."""
        exchanged: Tensor = all_to_all_single_autograd(parts.contiguous(), receive, send, self._group)
        return exchanged


@dataclass(frozen=True)
class Chunk:
    """A rank's part of a row.

    Args:
        ids: [n] int64.
        positions: [n] int64, of each token in its sequence.
        lengths: of all sequences in the row, the padding's included, size x n in all.
        counts: tokens in the row that each rank has brought, in the order of the ranks.
        context: the ranks.
    """

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    counts: list[int]
    context: ContextGroup

    def home(self, states: Tensor) -> Tensor:
        """Exchange the states of the chunk's tokens for those of the tokens that this rank has brought.

        Args:
            states: [n, D].

        Returns:
            [own tokens, D], with gradient.
        """
        rank, size, width = self.context.rank, self.context.size, len(self.ids)
        chunks = [range(i * width, (i + 1) * width) for i in range(size)]
        owned = [range(begin, end) for begin, end in pairwise(accumulate(self.counts, initial=0))]
        send = [_shared(chunks[rank], theirs) for theirs in owned]
        receive = [_shared(theirs, owned[rank]) for theirs in chunks]
        return self.context._exchange(states[: sum(send)], receive, send)


def _shared(first: range, second: range) -> int:
    return max(min(first.stop, second.stop) - max(first.start, second.start), 0)
