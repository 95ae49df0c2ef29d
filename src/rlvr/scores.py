"""Scores of a benchmark's problems one by one, and how sure their means are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rlvr.keyed import generator
from rlvr.metrics import majority, pass_at_k

Scores = dict[str, NDArray[np.float64]]
"""One number a problem under each name, [P]; or one a resample, [RESAMPLES]."""

RESAMPLES = 10_000
LEVEL = 0.95
"""Share of the resampled means that an interval holds."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, and the interval in which 95 % of the resampled means lie.

    Args:
        value: the mean.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """In per cent: ``31.2 [28.0, 34.5]``."""
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def problem_scores(correct: Tensor, answers: Sequence[Sequence[str | None]]) -> Scores:
    """mean@n, maj@n, and pass@k for n and the powers of two below it, of every problem.

    Args:
        correct: [P, n] bool.
        answers: P sequences of n extracted answers, None where there was none.

    Returns:
        [P] each, in [0, 1]: ``mean_at_n``, ``maj_at_n``, ``pass_at_1``, ``pass_at_2``, ... as in ``val/...``.
    """
    n = correct.shape[1]
    counts, powers = correct.sum(dim=1), [1 << i for i in range(n.bit_length())]
    votes = [majority(*row) for row in zip(correct.tolist(), answers, strict=True)]
    return {
        f"mean_at_{n}": correct.double().mean(dim=1).numpy(),
        f"maj_at_{n}": np.array(votes, dtype=np.float64),
        **{f"pass_at_{k}": pass_at_k(n, counts, k).numpy() for k in sorted({*powers, n})},
    }


def resampled_means(scores: Mapping[str, NDArray[np.float64]], *, seed: int, purpose: str) -> Scores:
    """Means over problems drawn anew, with replacement: the bootstrap over problems.

    Samples of one problem stay together: what varies is which problems a benchmark happens to ask.

    Args:
        scores: [P] each; all are resampled alike, so that differences of them are too.
        seed: keys the draws.
        purpose: part of the key, such as the benchmark's name.

    Returns:
        [RESAMPLES] each.

    References:
        Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    problems = len(next(iter(scores.values())))
    draws = generator(seed, f"bootstrap {purpose}")
    counts = draws.multinomial(problems, [1 / problems] * problems, size=RESAMPLES)
    return {name: counts @ values / problems for name, values in scores.items()}


def estimate(value: float, means: NDArray[np.float64]) -> Estimate:
    """The percentile interval of resampled means around the mean that was measured."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))


def estimates(scores: Mapping[str, NDArray[np.float64]], means: Scores) -> dict[str, Estimate]:
    """:func:`estimate` of every score."""
    return {name: estimate(values.mean(), means[name]) for name, values in scores.items()}
