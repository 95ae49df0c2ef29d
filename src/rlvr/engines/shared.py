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
from rlvr.engines.protocol import Place, RolloutEngine, SamplingParams
from rlvr.errors import ConfigError, EngineDiedError, RunError
from rlvr.policy import Policy

ALONE = Place()
LONGEST_WAIT = timedelta(days=1)
"""Of a rank for the others' rollouts; one that dies is noticed at once."""


class SharedEngine:
    """Consecutive ranks of a node share one engine: the first of them has it, the others ask through it.

    All of them call every method, and an engine that dies has died for all. Weights are gathered on every
    rank, as sharded weights are, and the first one hands them over.

    Args:
        policy: the trainer's policy.
        engine: makes the engine, from ``policy`` and ``place``.
        ranks: that share it.
        place: of the trainer.

    Attributes:
        engine: what is shared, on the rank that has it; None on the others.

    Raises:
        ConfigError: where the ranks of a node do not divide into such groups.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        engine: Callable[..., RolloutEngine],
        ranks: int,
        place: Place = ALONE,
    ) -> None:
        if ranks < 1 or place.ranks % ranks:
            raise ConfigError(
                f"engine.ranks={ranks}",
                f"a divisor of the {place.ranks} ranks of a node",
                f"engine.ranks={place.ranks}",
            )
        self.ranks = ranks
        self.engine: RolloutEngine | None = None
        if place.rank % ranks == 0:
            takes = "place" in inspect.signature(engine).parameters
            self.engine = engine(policy=policy, **({"place": place.shared(ranks)} if takes else {}))
        # What the first rank's engine cannot do ends the run there, for all.
        self.concurrent = self.engine is None or self.engine.concurrent
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

        if self.engine is None:
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
        for rollout in self._first(answer, each=True):
            yield replace(rollout, prompt=ours[rollout.prompt.index])

    def score(self, token_ids: Sequence[int]) -> list[float] | None:
        """Ln p of every token but the first, in nats."""
        scores: list[float] | None = self._first(lambda engine: engine.score(token_ids))
        return scores

    def close(self) -> None:
        """End the engine where it is."""
        if self.engine is not None:
            self.engine.close()

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

    def _first(self, ask: Callable[[RolloutEngine], Any], *, each: bool = False) -> Any:
        """What the first rank's engine says, on every rank; ``each``: a list with something for each rank.

        Raises:
            Exception: on every rank, what the engine raises.
        """
        said: list[Any] = []
        if self.engine is not None:
            try:
                answer = ask(self.engine)
                said = answer if each else [answer] * self.ranks
            except Exception as error:
                known = isinstance(error, EngineDiedError | RunError | ConfigError)
                said = [error if known else RuntimeError(f"{type(error).__name__}: {error}")] * self.ranks
        mine = [said[0]] if said else [None]
        if dist.is_initialized():
            group = self._joined()
            dist.scatter_object_list(mine, said or None, src=dist.get_global_rank(group, 0), group=group)
        if isinstance(mine[0], Exception):
            raise mine[0]
        return mine[0]


def _drain(stream: Iterator[Any]) -> None:
    for _ in stream:
        pass
