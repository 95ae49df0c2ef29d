"""Rollouts with their verdicts: generated and judged at once, or ahead of their iteration."""

import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rlvr.batch import Prompt, Rollout, Verdict
from rlvr.engines import RolloutEngine, SamplingParams
from rlvr.verifiers import Verifier


@dataclass(frozen=True)
class JudgedRollouts:
    """The responses to some prompts, and how they came about.

    Args:
        pairs: responses with their verdicts, in the order of prompts and samples.
        version: the iteration whose starting weights generated them.
        rollout_s: seconds spent in the engine.
        verify_s: seconds spent in the verifier.
        verifier_errors: responses that the verifier could not judge.
    """

    pairs: list[tuple[Rollout, Verdict]]
    version: int
    rollout_s: float
    verify_s: float
    verifier_errors: int

    def plain(self) -> dict[str, Any]:
        """As plain data, for a checkpoint; prompts by their index."""
        responses = [
            {
                "prompt": rollout.prompt.index,
                "sample": rollout.sample,
                "token_ids": rollout.token_ids,
                "logprobs": rollout.logprobs,
                "finish_reason": rollout.finish_reason,
                "text": rollout.text,
                "verdict": asdict(verdict),
            }
            for rollout, verdict in self.pairs
        ]
        return {**{key: value for key, value in vars(self).items() if key != "pairs"}, "responses": responses}

    @classmethod
    def of_plain(cls, data: dict[str, Any], prompts: Sequence[Prompt]) -> "JudgedRollouts | None":
        """What :meth:`plain` returned; None where it does not answer just these prompts.

        Args:
            data: from a checkpoint.
            prompts: in the order they were asked.
        """
        by_index = {prompt.index: prompt for prompt in prompts}
        responses = [dict(response) for response in data["responses"]]
        if [*dict.fromkeys(response["prompt"] for response in responses)] != [*by_index]:
            return None
        pairs = []
        for response in responses:
            verdict = Verdict(**response.pop("verdict"))
            prompt = by_index[response.pop("prompt")]
            pairs.append((Rollout(prompt=prompt, **response), verdict))
        return cls(pairs=pairs, **{key: value for key, value in data.items() if key != "responses"})


class RolloutSource:
    """An engine and a verifier at work together.

    Args:
        engine: who generates.
        verifier: who judges each response while others are still being generated.
    """

    def __init__(self, engine: RolloutEngine, verifier: Verifier) -> None:
        self.engine, self.verifier = engine, verifier
        self._complained = False

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams, version: int) -> JudgedRollouts:
        """Generate and judge.

        Raises:
            EngineDiedError: where the engine is gone; everything has to be generated again.
            RuntimeError: where a response is missing or the verifier failed on every one.
        """
        place = {prompt.index: i for i, prompt in enumerate(prompts)}
        pairs, verify_s, errors, begin = [], 0.0, 0, time.perf_counter()
        for rollout in self.engine.generate(prompts, sampling):
            started = time.perf_counter()
            verdict = self._verdict(rollout)
            verify_s += time.perf_counter() - started
            errors += verdict.reason.startswith("verifier error")
            pairs.append((rollout, verdict))
        pairs.sort(key=lambda pair: (place[pair[0].prompt.index], pair[0].sample))
        wanted = [(prompt.index, sample) for prompt in prompts for sample in range(sampling.samples)]
        if [(rollout.prompt.index, rollout.sample) for rollout, _ in pairs] != wanted:
            raise RuntimeError(
                f"{type(self.engine).__name__} returned {len(pairs)} responses, expected each of "
                f"{len(prompts)} prompts x {sampling.samples} samples once"
            )
        if pairs and errors == len(pairs):
            raise RuntimeError(f"the verifier failed on every response: {pairs[0][1].reason}")
        rollout_s = time.perf_counter() - begin - verify_s
        return JudgedRollouts(pairs, version, rollout_s, verify_s, errors)

    def _verdict(self, rollout: Rollout) -> Verdict:
        """Judge one response; what the verifier cannot take is reported and gets no reward."""
        try:
            verdict = self.verifier(rollout.prompt, rollout.text)
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
