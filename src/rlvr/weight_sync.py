"""Handing the trainer's weights to the engine, and proving that it generates with them."""

import torch
from torch import Tensor

from rlvr.batch import Sequences
from rlvr.engines import PROBE_LENGTH, RolloutEngine
from rlvr.errors import RunError
from rlvr.policy import Policy
from rlvr.sharding import full_weights

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest mean gap of the probe's log-probs between engine and trainer by the coarser dtype, nats."""
NOISE = {torch.float32: 1e-4, torch.bfloat16: 0.06}
"""A mean gap that two implementations of the same weights stay below, nats."""
PROBE = "The sum of two and three is five, and the sum of five and five is ten. So we get 10."
"""Ordinary text: of improbable tokens, bfloat16 log-probs are off by whole nats."""


class WeightSync:
    """Syncs one engine with one policy, and scores a fixed sequence with both after every sync.

    Two checks, for a learning rate of 1e-6 moves log-probs by less than any safe tolerance: the gap is within
    :data:`TOLERANCE`, and where it exceeds :data:`NOISE`, the engine is not nearer to what the trainer said
    at the sync before. The trainer scores without autocast: this is about weights.

    Args:
        policy: the trainer's, sharded or not; with a sharded one every rank calls this, and all leave it.
        engine: the rollout engine.
        device: that the policy computes on; None: where its weights are.
    """

    def __init__(self, policy: Policy, engine: RolloutEngine, device: torch.device | None = None) -> None:
        self.policy, self.engine = policy, engine
        self._device = device
        # Flash attention takes no float32.
        self._half = policy.needs_half and (policy.compute_dtype or policy.dtype) == torch.float32
        dtypes = (policy.dtype, policy.compute_dtype, engine.dtype, torch.bfloat16 if self._half else None)
        self._dtype = torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32
        self._before: Tensor | None = None
        vocabulary = policy.model.config.get_text_config().vocab_size
        ids = policy.tokenizer.encode(PROBE, add_special_tokens=False)[:PROBE_LENGTH]
        # A tokenizer of letters may know little of it.
        self._probe = [*ids, *((13 + 7919 * i) % vocabulary for i in range(PROBE_LENGTH - len(ids)))]

    def __call__(self) -> float | None:
        """Sync and probe.

        Returns:
            The mean gap between engine and trainer, nats a token; None without weights of its own.

        Raises:
            RunError: where it generates with other weights than the trainer's.
            EngineDiedError: where it is gone.
        """
        device = self._device or next(self.policy.parameters()).device
        # Before anything can fail here: where the weights are sharded, every rank takes part in both.
        ours = self._ours(device)
        weights = full_weights(self.policy, device)
        try:
            self.engine.load_weights(weights)
        finally:
            for _ in weights:
                pass
        scores = self.engine.score(self._probe)
        if scores is None:
            return None
        theirs = torch.tensor(scores)
        gap = (ours - theirs).abs().mean().item()
        if not gap <= TOLERANCE[self._dtype]:
            raise RunError(
                f"after the weight sync the engine's log-probs differ from the trainer's by {gap:.2g} nats, "
                f"expected at most {TOLERANCE[self._dtype]}: it generates with other weights"
            )
        if self._before is not None and gap > NOISE[self._dtype]:
            before = (self._before - theirs).abs().mean().item()
            if before < 0.5 * gap:
                raise RunError(
                    f"after the weight sync the engine's log-probs differ from the trainer's by {gap:.2g} "
                    f"nats, and by {before:.2g} from those of the sync before: it kept the old weights"
                )
        self._before = ours
        return gap

    @torch.no_grad()
    def _ours(self, device: torch.device) -> Tensor:
        ids = torch.tensor([self._probe])
        everything = torch.ones_like(ids, dtype=torch.bool)
        sequences = Sequences(ids, everything, everything[:, 1:])
        with torch.autocast(device.type, torch.bfloat16, enabled=self._half):
            return self.policy.logprobs(sequences.to(device)).logprobs.float().cpu()
