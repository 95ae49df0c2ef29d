"""Rollouts with their verdicts: generated and judged at once, or ahead of their iteration."""

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, cast
from zlib import crc32

import torch

from rlvr.batch import Prompt, Rollout, Verdict
from rlvr.engines import RolloutEngine, SamplingParams
from rlvr.verifiers import AsyncVerifier, Verifier

Judged = tuple[Rollout, Verdict]


@dataclass(frozen=True)
class JudgedRollouts:
    """The responses to some prompts, and how they came about.

    Args:
        pairs: responses to train on with their verdicts, group by group, in the order of samples.
        left_out: further ones, of groups that dynamic sampling has replaced.
        rounds: of dynamic sampling that this took.
        version: the iteration whose starting weights generated them.
        rollout_s: seconds spent in the engine.
        verify_s: seconds spent in the verifier, or waiting for it.
        verifier_errors: responses that the verifier could not judge.
    """

    pairs: list[Judged]
    left_out: list[Judged]
    rounds: int
    version: int
    rollout_s: float
    verify_s: float
    verifier_errors: int

    @property
    def everything(self) -> list[Judged]:
        """All that was generated."""
        return self.pairs + self.left_out

    def plain(self) -> dict[str, Any]:
        """As plain data, for a checkpoint; prompts by their index."""
        numbers = {key: value for key, value in vars(self).items() if isinstance(value, int | float)}
        return {**numbers, "pairs": _plain(self.pairs), "left_out": _plain(self.left_out)}

    @classmethod
    def of_plain(
        cls, data: dict[str, Any], prompts: Sequence[Prompt], spares: Sequence[Prompt], group_size: int
    ) -> "JudgedRollouts | None":
        """What :meth:`plain` returned; None where it answers other prompts than a run would ask now.

        Args:
            data: from a checkpoint.
            prompts: of the iteration, one group each.
            spares: that may have replaced some of them; without any, all of ``prompts`` must be there.
            group_size: responses a prompt.
        """
        by_key = {_key(prompt): prompt for prompt in [*prompts, *spares]}
        judged: dict[str, list[Judged]] = {}
        for part in ("pairs", "left_out"):
            responses = [dict(response) for response in data[part]]
            asked = [by_key.get(tuple(response.pop("prompt"))) for response in responses]
            samples = [response["sample"] for response in responses]
            if None in asked or samples != [*range(group_size)] * (len(samples) // group_size):
                return None
            judged[part] = [
                (Rollout(prompt=prompt, **response), Verdict(**verdict))
                for prompt, response, verdict in zip(
                    cast(list[Prompt], asked), responses, [r.pop("verdict") for r in responses], strict=True
                )
            ]
        answered = [rollout.prompt for rollout, _ in judged["pairs"][::group_size]]
        if len(answered) != len(prompts) or not (spares or answered == [*prompts]):
            return None
        return cls(**{**data, **judged})


def _key(prompt: Prompt) -> tuple[int, int]:
    """What tells a prompt from another task's at the same place."""
    return prompt.index, crc32(repr(prompt.token_ids).encode())


def _plain(judged: list[Judged]) -> list[dict[str, Any]]:
    return [
        {
            **{name: value for name, value in vars(rollout).items() if name != "prompt"},
            "prompt": _key(rollout.prompt),
            "verdict": asdict(verdict),
        }
        for rollout, verdict in judged
    ]


class Judge:
    """A verifier as responses come: in the background where it can, and its failures counted, not raised.

    Args:
        verifier: who judges.
    """

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self._complained = False

    def judged(self, rollouts: Iterable[Rollout]) -> Iterator[Judged]:
        """Yield responses with their verdicts, in their order; each is judged while others still come."""
        waiting: deque[tuple[Rollout, Future[Verdict]]] = deque()
        for rollout in rollouts:
            waiting.append((rollout, self.submit(rollout)))
            while waiting and waiting[0][1].done():
                rollout, future = waiting.popleft()
                yield rollout, self.verdict(rollout, future)
        for rollout, future in waiting:
            yield rollout, self.verdict(rollout, future)

    def submit(self, rollout: Rollout) -> Future[Verdict]:
        """Start to judge one response; a verifier that cannot do so in the background does it now."""
        future: Future[Verdict] = Future()
        try:
            if isinstance(self.verifier, AsyncVerifier):
                return self.verifier.submit(rollout.prompt, rollout.text)
            future.set_result(self.verifier(rollout.prompt, rollout.text))
        except Exception as error:
            future.set_exception(error)
        return future

    def verdict(self, rollout: Rollout, future: Future[Verdict]) -> Verdict:
        """Wait for one verdict; what the verifier cannot take is reported and gets no reward."""
        try:
            said = future.result()
            # Plain values, whatever number types a verifier computes with: they go into checkpoints.
            answer = None if said.answer is None else str(said.answer)
            verdict = Verdict(float(said.reward), bool(said.correct), answer, str(said.reason))
            if math.isfinite(verdict.reward):
                return verdict
            problem = f"reward {verdict.reward}"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if not self._complained:
            self._complained = True
            print(
                f"verifier error on prompt {rollout.prompt.id}, response {rollout.text[:80]!r}: {problem} "
                "(reward 0; further ones are counted in rollout/verifier_errors)",
                file=sys.stderr,
            )
        return Verdict(reward=0.0, correct=False, answer=None, reason=f"verifier error: {problem}")


class RolloutSource:
    """An engine and a verifier at work together.

    Args:
        engine: who generates.
        verifier: who judges each response while others are still being generated.
    """

    def __init__(self, engine: RolloutEngine, verifier: Verifier) -> None:
        self.engine, self.judge = engine, Judge(verifier)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        version: int,
        *,
        spares: Iterable[Prompt] = (),
        rounds: int = 0,
    ) -> JudgedRollouts:
        """Generate and judge; replace groups whose rewards are all equal, for they teach nothing.

        Args:
            prompts: one group each.
            sampling: of every round.
            version: the iteration whose starting weights the engine has.
            spares: prompts to replace others with, in this order.
            rounds: of replacing; where some are still missing, the first that were equal fill up.

        Raises:
            EngineDiedError: where the engine is gone; everything has to be generated again.
            RuntimeError: where a response is missing or the verifier failed on every one.
        """
        begin = time.perf_counter()
        groups, verify_s, errors = self._round(prompts, sampling)
        chosen, equal, done, rest = groups, list[list[Judged]](), 0, iter(spares)
        if rounds:
            chosen, equal = _split(groups)
        while done < rounds and (more := list(islice(rest, len(prompts) - len(chosen)))):
            groups, seconds, failed = self._round(more, sampling)
            done, verify_s, errors = done + 1, verify_s + seconds, errors + failed
            uneven, even = _split(groups)
            chosen, equal = chosen + uneven, equal + even
        missing = len(prompts) - len(chosen)
        chosen, equal = chosen + equal[:missing], equal[missing:]
        return JudgedRollouts(
            pairs=[pair for group in chosen for pair in group],
            left_out=[pair for group in equal for pair in group],
            rounds=done,
            version=version,
            rollout_s=time.perf_counter() - begin - verify_s,
            verify_s=verify_s,
            verifier_errors=errors,
        )

    def stream(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Judged]:
        """Yield judged responses one by one, in the order in which the engine finishes them.

        Raises:
            EngineDiedError: where the engine is gone; what was yielded stands.
        """
        yield from self.judge.judged(self.engine.generate(prompts, sampling))

    def _round(
        self, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> tuple[list[list[Judged]], float, int]:
        """Groups in the order of the prompts, seconds in the verifier, responses it could not judge."""
        place = {prompt.index: i for i, prompt in enumerate(prompts)}
        waiting, verify_s = list[tuple[Rollout, Future[Verdict]]](), 0.0
        for rollout in self.engine.generate(prompts, sampling):
            started = time.perf_counter()
            waiting.append((rollout, self.judge.submit(rollout)))
            verify_s += time.perf_counter() - started
        started = time.perf_counter()
        pairs = [(rollout, self.judge.verdict(rollout, future)) for rollout, future in waiting]
        verify_s += time.perf_counter() - started
        errors = sum(verdict.reason.startswith("verifier error") for _, verdict in pairs)
        pairs.sort(key=lambda pair: (place[pair[0].prompt.index], pair[0].sample))
        wanted = [(prompt.index, sample) for prompt in prompts for sample in range(sampling.samples)]
        if [(rollout.prompt.index, rollout.sample) for rollout, _ in pairs] != wanted:
            raise RuntimeError(
                f"{type(self.engine).__name__} returned {len(pairs)} responses, expected each of "
                f"{len(prompts)} prompts x {sampling.samples} samples once"
            )
        if pairs and errors == len(pairs):
            raise RuntimeError(f"the verifier failed on every response: {pairs[0][1].reason}")
        size = sampling.samples
        return [pairs[i : i + size] for i in range(0, len(pairs), size)], verify_s, errors


def _split(groups: list[list[Judged]]) -> tuple[list[list[Judged]], list[list[Judged]]]:
    """Groups with unequal rewards, and those with equal ones."""
    uneven: list[list[Judged]] = []
    even: list[list[Judged]] = []
    for group in groups:
        (even if len({verdict.reward for _, verdict in group}) == 1 else uneven).append(group)
    return uneven, even


class Ahead:
    """The rollouts of a coming iteration, generated in a thread while this one trains.

    Args:
        iteration: that they are for.
        work: generates them.
    """

    def __init__(self, iteration: int, work: Callable[[], JudgedRollouts]) -> None:
        self.iteration = iteration
        self._future: Future[JudgedRollouts] = Future()
        # A daemon: nothing waits for it where the run is stopped at once.
        threading.Thread(target=self._run, args=(work, torch.get_num_threads()), daemon=True).start()

    def result(self) -> JudgedRollouts:
        """Wait for them; what went wrong meanwhile is raised here."""
        return self._future.result()

    def wait(self) -> JudgedRollouts | None:
        """Wait for them; None where something went wrong."""
        return None if self._future.exception() else self._future.result()

    def _run(self, work: Callable[[], JudgedRollouts], threads: int) -> None:
        torch.set_num_threads(threads)  # each thread has its own number
        try:
            self._future.set_result(work())
        except BaseException as error:
            self._future.set_exception(error)
