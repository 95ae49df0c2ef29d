"""The run's metrics: sums and counts while an iteration lasts, one row when it is over."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
Gather = Callable[[list[str]], list[list[str]]]


class Ledger:
    """Collects ``(total, count)`` pairs under a key and closes them to one mean an iteration.

    The only way a metric reaches ``metrics.csv``, TensorBoard, the console and ``summary.json``; a callback
    of yours calls ``pl_module.ledger.add("mine/key", total, count)`` before the iteration ends. Pairs, not
    means, so that uneven micro-batches and ranks weigh what they should.

    Attributes:
        rows: one dictionary an iteration, plain floats, in order; in the checkpoint.
        start: what was measured before the first iteration.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.start: dict[str, float] = {}
        self._open: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, key: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        """Add to ``key`` a sum over ``count`` things; the row will hold the mean over all ranks."""
        total = torch.as_tensor(total, dtype=torch.float64).detach()
        count = torch.as_tensor(count, dtype=torch.float64).detach()
        if key in self._open:
            old_total, old_count = self._open[key]
            total, count = old_total + total, old_count + count
        self._open[key] = (total, count)

    @contextmanager
    def timed(self, key: str) -> Iterator[None]:
        """Add the seconds that the body takes."""
        begin = time.perf_counter()
        yield
        self.add(key, time.perf_counter() - begin)

    def close(self, reduce: Reduce, gather: Gather = lambda keys: [keys]) -> dict[str, float]:
        """Return the means of everything added since the last call, and forget it.

        Args:
            reduce: sums a tensor over all ranks.
            gather: the keys of every rank; a callback of yours may add one on some of them only.

        Returns:
            A mean for every key; NaN where nothing was counted.
        """
        keys = sorted(set().union(*gather(sorted(self._open))))
        if not keys:
            return {}
        nothing = (torch.zeros((), dtype=torch.float64),) * 2
        pairs = reduce(
            torch.stack([torch.stack([part.cpu() for part in self._open.get(key, nothing)]) for key in keys])
        ).tolist()
        self._open.clear()
        return {
            key: total / count if count else math.nan for key, (total, count) in zip(keys, pairs, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Rows and start, as plain data."""
        return {"rows": self.rows, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.rows, self.start = [dict(row) for row in state["rows"]], dict(state["start"])
        self._open.clear()
