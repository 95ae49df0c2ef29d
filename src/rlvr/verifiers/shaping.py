"""Rewards for form beside the one for the answer: format, length, and their weighted sum."""

import math
from collections.abc import Sequence
from concurrent.futures import Future

from rlvr.answers.extraction import final_answer
from rlvr.batch import Prompt, Verdict
from rlvr.errors import ConfigError
from rlvr.verifiers.pool import then
from rlvr.verifiers.protocol import AsyncVerifier, Verifier


class FormatVerifier:
    r"""Reward 1 for a response of the wanted form, else 0.

    Args:
        tags: each must open and close exactly once, in this order, none inside another: ``[think, answer]``
            wants ``<think>...</think>...<answer>...</answer>``.
        boxed: whether a balanced ``\boxed{}`` must follow where the first tag closes.
    """

    def __init__(self, *, tags: Sequence[str] = (), boxed: bool = True) -> None:
        self.marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
        self.boxed = boxed

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        """Judge the form of one response."""
        places = [completion.find(mark) for mark in self.marks]
        once = all(completion.count(mark) == 1 for mark in self.marks) and places == sorted(places)
        after = completion[places[1] :] if places else completion
        fits = once and (not self.boxed or final_answer(after, "boxed") is not None)
        reason = "well formed" if fits else "other form"
        return Verdict(float(fits), correct=fits, answer=None, reason=reason)


class LengthVerifier:
    """Reward 0 up to a length, from there falling linearly to -1 at a second one and staying there.

    The soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 13), in characters, since a
    verifier sees text and no tokens.

    Args:
        free: characters without penalty.
        limit: characters from which the penalty is whole, more than ``free``.

    Raises:
        ConfigError: where ``limit`` is not above ``free``.
    """

    def __init__(self, *, free: int, limit: int) -> None:
        if not 0 <= free < limit:
            raise ConfigError(
                f"verifier: free={free}, limit={limit}",
                "0 <= free < limit characters",
                "free=4000 limit=8000",
            )
        self.free, self.limit = free, limit

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        """Judge the length of one response."""
        over = (len(completion) - self.free) / (self.limit - self.free)
        penalty = min(max(over, 0.0), 1.0)
        return Verdict(
            -penalty, correct=penalty == 0.0, answer=None, reason="too long" if penalty else "short"
        )


class Weighted:
    """Weighted sum of the rewards of several verifiers, of which the first alone decides what is correct.

    Where the first has no verdict ("verifier error"), there is no reward for form either.

    Args:
        verifiers: at least one.
        weights: of their rewards, in their order.

    Raises:
        ConfigError: where there is not one finite weight for each verifier.
    """

    def __init__(self, verifiers: Sequence[Verifier], weights: Sequence[float]) -> None:
        if not verifiers or len(verifiers) != len(weights) or not all(map(math.isfinite, weights)):
            raise ConfigError(
                f"verifier.weights={list(weights)}",
                f"one finite weight for each of the {len(verifiers)} verifiers",
                f"verifier.weights={[1.0] * len(verifiers)}",
            )
        self.main, *self.others = verifiers
        self.weights = list(weights)

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        """Judge one response."""
        return self._sum(self.main(prompt, completion), prompt, completion)

    def submit(self, prompt: Prompt, completion: str) -> Future[Verdict]:
        """Judge one response while the caller goes on, where the first verifier can."""
        if not isinstance(self.main, AsyncVerifier):
            future: Future[Verdict] = Future()
            future.set_result(self(prompt, completion))
            return future
        main = self.main.submit(prompt, completion)
        return then(main, lambda done: self._sum(done.result(), prompt, completion))

    def close(self) -> None:
        """Close the verifiers that can be."""
        for verifier in (self.main, *self.others):
            if isinstance(verifier, AsyncVerifier):
                verifier.close()

    def _sum(self, main: Verdict, prompt: Prompt, completion: str) -> Verdict:
        if main.reason.startswith("verifier error"):
            return main
        rewards = [main.reward] + [verifier(prompt, completion).reward for verifier in self.others]
        total = sum(weight * reward for weight, reward in zip(self.weights, rewards, strict=True))
        return Verdict(total, correct=main.correct, answer=main.answer, reason=main.reason)
