r"""Scores of n sampled responses a problem: mean@k, pass@k, maj@k, averaged over problems.

Every state is a sum, in float64, so that ranks, batches and their order change nothing.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def pass_at_k(num_samples: int, num_correct: Tensor | int, k: int) -> Tensor:
    r"""Probability that at least one of k samples, drawn without replacement from n, is correct.

    .. math:: 1 - \binom{n-c}{k} / \binom{n}{k} = 1 - \prod_{i=n-c+1}^{n} (1 - k/i)

    Unbiased for the chance that k fresh samples hold a correct one, which :math:`1 - (1 - c/n)^k` is not. The
    product is taken in float64: no binomial overflows.

    Args:
        num_samples: n, samples of a problem.
        num_correct: c, how many of them are correct: integers of any shape, in [0, n].
        k: size of the draw, in [1, n].

    Returns:
        Probabilities in float64, in the shape of ``num_correct``.

    Raises:
        ValueError: for k outside [1, n], or a count outside [0, n].

    References:
        Chen et al. 2021, arXiv:2107.03374, eq. 1 and its fig. 3.
    """
    _check_k(k, num_samples)
    correct = torch.as_tensor(num_correct)
    if correct.numel() and not 0 <= int(correct.min()) <= int(correct.max()) <= num_samples:
        raise ValueError(
            f"num_correct must be in [0, num_samples={num_samples}], "
            f"got {int(correct.min())} to {int(correct.max())}"
        )
    # misses[c]: probability that all k miss. The factor at i = k is 0, so that c > n - k gives exactly 1.
    factors = 1 - k / torch.arange(num_samples, 0, -1, dtype=torch.float64, device=correct.device)
    misses = torch.cat([factors.new_ones(1), factors.cumprod(dim=0)])
    return 1 - misses[correct.long()]


def majority(correct: Sequence[bool], answers: Sequence[str | None]) -> bool:
    """Whether the most frequent answer to one problem is a correct one.

    A sample without an answer does not vote; a tie goes to the answer given first; without any vote it is
    not. Where equal answers were judged differently, the first judgement holds.

    Args:
        correct: judgements of n samples.
        answers: of the same samples, normalised so that equal ones are equal strings.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    (winner, _), *_ = votes.most_common(1)
    return correct[list(answers).index(winner)]


class _ProblemMean(Metric):
    """Mean over problems of a score made of each one's samples.

    Args:
        k: samples of a problem that the score is about.

    Raises:
        ValueError: for k below 1.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    total: Tensor
    count: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"{type(self).__name__} needs k >= 1, got {k}")
        self.k = k
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("count", zero.clone(), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Mean over all problems of all ranks: scalar in float64, in [0, 1]; NaN where there were none."""
        return self.total / self.count

    def _add(self, scores: Tensor) -> None:
        self.total += scores.double().sum().to(self.total.device)
        self.count += len(scores)

    def _check(self, correct: Tensor) -> None:
        if correct.ndim != 2 or correct.dtype != torch.bool:
            raise ValueError(f"correct must be bool [P, n], got {correct.dtype} {list(correct.shape)}")
        _check_k(self.k, correct.shape[1])


class MeanAtK(_ProblemMean):
    """mean@k: mean over problems of the share of correct ones among the first k samples.

    It estimates pass@1; more samples only make it less noisy.

    Args:
        k: samples of a problem that count, at least 1.
    """

    def update(self, correct: Tensor) -> None:
        """Add problems.

        Args:
            correct: [P, n] bool, n >= k samples of each problem.

        Raises:
            ValueError: for another shape or dtype, or n < k.
        """
        self._check(correct)
        self._add(correct[:, : self.k].double().mean(dim=1))


class PassAtK(_ProblemMean):
    """pass@k: chance that one of k samples is correct, from all n samples; see :func:`pass_at_k`.

    Args:
        k: size of the draw, at least 1.
    """

    def update(self, correct: Tensor) -> None:
        """Add problems.

        Args:
            correct: [P, n] bool, n >= k samples of each problem.

        Raises:
            ValueError: for another shape or dtype, or n < k.
        """
        self._check(correct)
        self._add(pass_at_k(correct.shape[1], correct.sum(dim=1), self.k))


class MajAtK(_ProblemMean):
    """maj@k: share of problems whose most frequent answer among the first k samples is a correct one.

    How votes are counted: :func:`majority`.

    Args:
        k: samples of a problem that vote, at least 1.

    References:
        Wang et al. 2022, arXiv:2203.11171 ("self-consistency").
    """

    def update(self, correct: Tensor, answers: Sequence[Sequence[str | None]]) -> None:
        """Add problems.

        Args:
            correct: [P, n] bool, n >= k samples of each problem.
            answers: P sequences of n extracted answers, normalised so that equal ones are equal strings;
                None where there was none. Where equal strings were judged differently, the first judgement
                holds.

        Raises:
            ValueError: for another shape or dtype, n < k, or answers of another shape.
        """
        self._check(correct)
        lengths = {len(row) for row in answers}
        if len(answers) != len(correct) or not lengths <= {correct.shape[1]}:
            raise ValueError(
                f"answers must be as many as correct {list(correct.shape)}, "
                f"got {len(answers)} rows of length {sorted(lengths)}"
            )
        rows = zip(correct.tolist(), answers, strict=True)
        self._add(torch.tensor([majority(row[: self.k], given[: self.k]) for row, given in rows]))


def _check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be in [1, n], got k = {k} for n = {num_samples} samples a problem")
