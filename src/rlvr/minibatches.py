"""Which responses make an optimizer mini-batch: the same ones for any number of ranks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlvr.keyed import generator
from rlvr.settings import DataConfig


def minibatch_rows(sizes: DataConfig, rank: int, ranks: int, key: tuple[int, int, int]) -> Iterator[Tensor]:
    """Yield one rank's rows of each mini-batch of one pass.

    An iteration's prompts are dealt to the ranks in turn, see :class:`rlvr.prompts.PromptOrder`. Of S whole
    prompts in a mini-batch, the i-th is one of those at i, i + S, i + 2 S and so on, in a keyed order: where
    S is a multiple of the number of ranks, each holds as much of it as the others, and what it consists of
    does not depend on that number. Where mini-batches cut groups, prompts come in any order.

    Args:
        sizes: of the iteration.
        rank: this one.
        ranks: how many there are.
        key: seed, iteration and epoch, of the order.

    Yields:
        Row numbers among this rank's own, ``prompt * group_size + sample``: int64, none where the rank has
        nothing in that mini-batch.
    """
    seed, iteration, epoch = key
    rows = sizes.num_prompts * sizes.group_size // sizes.minibatches
    columns = rows // sizes.group_size if rows % sizes.group_size == 0 else 1
    orders = [
        torch.from_numpy(
            generator(seed, "minibatches", iteration, epoch, column).permutation(sizes.num_prompts // columns)
        )
        for column in range(columns)
    ]
    positions = (torch.stack(orders, dim=1) * columns + torch.arange(columns)).flatten()
    samples = torch.arange(sizes.group_size)
    for chunk in (positions[:, None] * sizes.group_size + samples).flatten().split(rows):
        position, sample = chunk // sizes.group_size, chunk % sizes.group_size
        mine = position % ranks == rank
        yield (position // ranks * sizes.group_size + sample)[mine]
