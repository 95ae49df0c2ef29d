"""The contract every rollout engine keeps."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlvr.batch import Prompt, Rollout

PROBE_LENGTH = 16
"""Tokens of the sequence that every engine can score."""


class Place:
    """Where the trainer that an engine serves is; no dataclass, which Hydra would take for a configuration.

    Args:
        rank: of the trainer on its node.
        ranks: trainers on the node.
        world: trainers on all nodes.
        gpu: the trainer's, as it counts them; None on a CPU.
        sharing: trainers that share one engine.

    Attributes:
        node: where the engine's settings stand, for messages.
    """

    def __init__(
        self, *, rank: int = 0, ranks: int = 1, world: int = 1, gpu: int | None = None, sharing: int = 1
    ) -> None:
        self.rank, self.ranks, self.world, self.gpu, self.sharing = rank, ranks, world, gpu, sharing
        self.node = "engine" if sharing == 1 else "engine.engine"

    def shared(self, sharing: int) -> "Place":
        """The same place, of an engine that several trainers share."""
        return Place(rank=self.rank, ranks=self.ranks, world=self.world, gpu=self.gpu, sharing=sharing)


@dataclass(frozen=True)
class SamplingParams:
    """How to sample, and the key of every draw.

    Args:
        samples: responses a prompt.
        max_new_tokens: longest response, stop token included.
        temperature: logits are divided by it; 0 is greedy.
        top_p: smallest set of tokens with this probability; 1 is off.
        top_k: most probable tokens; 0 is off.
        seed: of the run.
        purpose: what the responses are for, such as ``train``; part of the key.
        iteration: k; part of the key, with the prompt's index and the sample number.

    Raises:
        ValueError: for values out of range.
    """

    samples: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    purpose: str = "train"
    iteration: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"samples={self.samples} and max_new_tokens={self.max_new_tokens} must both be at least 1"
            )
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be >= 0")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1], top_k={self.top_k} >= 0")


class RolloutEngine(Protocol):
    """Generates responses with weights that it is given; used by one thread at a time.

    Attributes:
        dtype: of its arithmetic, which says how close its log-probs come to the trainer's; None without
            weights of its own.
        concurrent: it can generate while the trainer trains.
    """

    dtype: torch.dtype | None
    concurrent: bool

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the trainer's weights, streamed as (name, full tensor); start a dead engine.

        Raises:
            RunError: where it has died more often than it is to be started again.
        """

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """Yield responses as they finish, in any order; the same call gives the same rollouts.

        Raises:
            EngineDiedError: where the engine is gone; what it has not yielded is lost.
        """

    def score(self, token_ids: Sequence[int]) -> list[float] | None:
        """Return ln p of every token but the first, at temperature 1, in nats: the probe of a weight sync.

        None where the engine has no weights that could be stale.
        """

    def close(self) -> None:
        """Give everything back; the engine is not used again."""
