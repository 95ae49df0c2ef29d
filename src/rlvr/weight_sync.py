"""Handing the trainer's weights to the engine, and proving that it generates with them."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from rlvr.batch import Sequences
from rlvr.engines import PROBE_LENGTH, RolloutEngine
from rlvr.errors import RunError
from rlvr.policy import Policy

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest gap of the probe's log-probs between engine and trainer by the coarser arithmetic, nats."""
NOISE = {torch.float32: 1e-4, torch.bfloat16: 0.03}
"""A gap that two implementations of the same weights stay below, nats."""


class WeightSync:
    """Syncs one engine with one policy, and scores a fixed sequence with both after every sync.

    Two checks, for a learning rate of 1e-6 moves log-probs by less than any safe tolerance: the gap is within
    :data:`TOLERANCE`, and where it exceeds :data:`NOISE`, the engine is not nearer to what the trainer said
    at the sync before.

    Args:
        policy: the trainer's.
        engine: the rollout engine.
        arithmetic: context of the trainer's forward passes.
        dtype: of the trainer's arithmetic.
    """

    def __init__(
        self,
        policy: Policy,
        engine: RolloutEngine,
        arithmetic: Callable[[], AbstractContextManager[None]],
        dtype: torch.dtype,
    ) -> None:
        self.policy, self.engine, self.arithmetic = policy, engine, arithmetic
        self._dtype = torch.bfloat16 if torch.bfloat16 in (dtype, engine.dtype) else torch.float32
        self._before: Tensor | None = None
        vocabulary = policy.model.config.get_text_config().vocab_size
        self._probe = [(13 + 7919 * i) % vocabulary for i in range(PROBE_LENGTH)]

    def __call__(self) -> float | None:
        """Sync and probe.

        Returns:
            The largest gap between engine and trainer, nats; None where the engine has no weights of its own.

        Raises:
            RunError: where it generates with other weights than the trainer's.
            EngineDiedError: where it is gone.
        """
        self.engine.load_weights(self.policy.named_weights())
        scores = self.engine.score(self._probe)
        if scores is None:
            return None
        theirs, ours = torch.tensor(scores), self._ours()
        gap = (ours - theirs).abs().max().item()
        if not gap <= TOLERANCE[self._dtype]:
            raise RunError(
                f"after the weight sync the engine's log-probs differ from the trainer's by {gap:.2g} nats, "
                f"expected at most {TOLERANCE[self._dtype]}: it generates with other weights"
            )
        if self._before is not None and gap > NOISE[self._dtype]:
            before = (self._before - theirs).abs().max().item()
            if before < 0.5 * gap:
                raise RunError(
                    f"after the weight sync the engine's log-probs differ from the trainer's by {gap:.2g} "
                    f"nats, and by {before:.2g} from those of the sync before: it kept the old weights"
                )
        self._before = ours
        return gap

    @torch.no_grad()
    def _ours(self) -> Tensor:
        ids = torch.tensor([self._probe])
        everything = torch.ones_like(ids, dtype=torch.bool)
        sequences = Sequences(ids, everything, everything[:, 1:])
        with self.arithmetic():
            stats = self.policy.logprobs(sequences.to(next(self.policy.parameters()).device))
        return stats.logprobs.float().cpu()
