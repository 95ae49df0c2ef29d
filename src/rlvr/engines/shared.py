"""One engine for several ranks, for instance tensor-parallel over their GPUs."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlvr.batch import Prompt, Rollout
from rlvr.engines.protocol import RolloutEngine, SamplingParams
from rlvr.errors import ConfigError, EngineDiedError, RunError
from rlvr.policy import Policy

LONGEST_WAIT = timedelta(days=1)
"""Of a rank for the others' rollouts; one that dies is noticed at once."""


class SharedEngine:
    """Consecutive ranks of a node share one engine: the first of them has it, the others ask through it.

    All of them call every method, and an engine that dies has died for all. Weights are gathered on every
    rank, as sharded weights are, and the first one hands them over.

    Args:
        policy: the trainer's policy.
        engine: makes the engine, from ``policy``, ``local_rank`` and ``local_ranks``.
        ranks: that share it.
        local_rank: this rank on its node.
        local_ranks: ranks on this node.

    Raises:
        ConfigError: where the ranks of a node do not divide into such groups.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        engine: Callable[..., RolloutEngine],
        ranks: int,
        local_rank: int = 0,
        local_ranks: int = 1,
    ) -> None:
        if ranks < 1 or local_ranks % ranks:
            raise ConfigError(
                f"engine.ranks={ranks}",
                f"a divisor of the {local_ranks} ranks of a node",
                f"engine.ranks={local_ranks}",
            )
        self.ranks = ranks
        self._engine: RolloutEngine | None = None
        if local_rank % ranks == 0:
            given = {"local_rank": local_rank, "local_ranks": local_ranks}
            self._engine = engine(policy=policy, **{k: v for k, v in given.items() if _takes(engine, k)})
        # What the first rank's engine cannot do ends the run there, for all.
        self.concurrent = self._engine is None or self._engine.concurrent
        self._group: dist.ProcessGroup | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the engine's arithmetic."""
        dtype: torch.dtype | None = self._first(lambda engine: engine.dtype)
        return dtype

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Hand the weights to the engine; every rank takes all of them, for they are gathered on the way."""
        stream = iter(weights)

        def load(engine: RolloutEngine) -> None:
            try:
                engine.load_weights(stream)
            finally:
                _drain(stream)

        if self._engine is None:
            _drain(stream)
        self._first(load)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """Yield this rank's rollouts once all ranks' are finished."""
        asked = self._exchange(list(prompts))
        owner = {prompt.index: rank for rank, theirs in enumerate(asked) for prompt in theirs}

        def answer(engine: RolloutEngine) -> list[list[Rollout]]:
            everyone = [prompt for theirs in asked for prompt in theirs]
            answers: list[list[Rollout]] = [[] for _ in asked]
            for rollout in engine.generate(everyone, sampling) if everyone else ():
                answers[owner[rollout.prompt.index]].append(rollout)
            return answers

        ours = {prompt.index: prompt for prompt in prompts}
        for rollout in self._first(answer)[self._rank]:
            yield replace(rollout, prompt=ours[rollout.prompt.index])

    def score(self, token_ids: Sequence[int]) -> list[float] | None:
        """Ln p of every token but the first, in nats."""
        scores: list[float] | None = self._first(lambda engine: engine.score(token_ids))
        return scores

    def close(self) -> None:
        """End the engine where it is."""
        if self._engine is not None:
            self._engine.close()

    @property
    def _rank(self) -> int:
        """This rank among those that share."""
        return dist.get_rank(self._joined()) if dist.is_initialized() else 0

    def _joined(self) -> dist.ProcessGroup:
        """The group that shares; on the CPU, for what crosses is plain data."""
        if self._group is None:
            world = range(dist.get_world_size())
            groups = [world[begin : begin + self.ranks] for begin in world[:: self.ranks]]
            self._group, _ = dist.new_subgroups_by_enumeration(
                [list(group) for group in groups], timeout=LONGEST_WAIT, backend="gloo"
            )
            assert self._group is not None
        return self._group

    def _exchange(self, value: Any) -> list[Any]:
        """Every rank's value."""
        if not dist.is_initialized():
            return [value]
        values = [None] * self.ranks
        dist.all_gather_object(values, value, group=self._joined())
        return values

    def _first(self, ask: Callable[[RolloutEngine], Any]) -> Any:
        """What the first rank's engine says, on every rank.

        Raises:
            EngineDiedError: on every rank, where it is gone.
            RunError: on every rank, where it is gone for good.
        """
        outcome: Any = None
        if self._engine is not None:
            try:
                outcome = ask(self._engine)
            except (EngineDiedError, RunError) as error:
                outcome = error
        outcome = self._exchange(outcome)[0]
        if isinstance(outcome, EngineDiedError | RunError):
            raise outcome
        return outcome


def _drain(stream: Iterator[Any]) -> None:
    for _ in stream:
        pass


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters
