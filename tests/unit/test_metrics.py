"""mean@k, pass@k, maj@k against exact enumeration and hand-made votes."""

import math
from fractions import Fraction
from itertools import combinations, permutations
from statistics import fmean

import pytest
import torch
from torchmetrics import Metric

from rlvr.metrics import MajAtK, MeanAtK, PassAtK, pass_at_k


def enumerated_pass_at_k(num_samples: int, num_correct: int, k: int) -> Fraction:
    """Share of all size-k subsets of the samples that hold a correct one."""
    draws = list(combinations([True] * num_correct + [False] * (num_samples - num_correct), k))
    return Fraction(sum(map(any, draws)), len(draws))


def flags(*rows: str) -> torch.Tensor:
    """Return [P, n] bool from strings such as "1001"."""
    return torch.tensor([[sample == "1" for sample in row] for row in rows], dtype=torch.bool)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 8])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_sample(num_samples: int) -> None:
    for k in range(1, num_samples + 1):
        for num_correct in range(num_samples + 1):
            expected = float(enumerated_pass_at_k(num_samples, num_correct, k))
            assert pass_at_k(num_samples, num_correct, k).item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("num_samples", [32, 256, 10_000])
def test_pass_at_k_does_not_overflow(num_samples: int) -> None:
    """Against exact integers, where the binomials have up to thousands of digits."""
    for k in (1, 2, num_samples // 2, num_samples):
        for num_correct in (0, 1, 3, num_samples // 3, num_samples):
            exact = 1 - Fraction(math.comb(num_samples - num_correct, k), math.comb(num_samples, k))
            actual = pass_at_k(num_samples, num_correct, k).item()
            assert actual == pytest.approx(float(exact), abs=1e-13)


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [
        pytest.param(4, 0, 4, 0.0, id="none correct: exactly 0"),
        pytest.param(4, 1, 4, 1.0, id="k = n and one correct: exactly 1"),
        pytest.param(8, 4, 5, 1.0, id="fewer wrong ones than k: exactly 1"),
        pytest.param(3, 3, 1, 1.0, id="all correct: exactly 1"),
        pytest.param(4, 1, 1, 0.25, id="k = 1: c/n"),
        pytest.param(4, 2, 2, 5 / 6, id="2 of 4, k = 2: 1 - 1/6, not 1 - (1/2)^2"),
    ],
)
def test_pass_at_k_by_hand(num_samples: int, num_correct: int, k: int, expected: float) -> None:
    value = pass_at_k(num_samples, num_correct, k)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, abs=0.0 if expected in (0.0, 1.0) else 1e-15)


def test_pass_at_k_takes_counts_of_any_shape() -> None:
    counts = torch.tensor([[0, 1, 2], [3, 4, 5]])
    values = pass_at_k(5, counts, 2)
    assert values.shape == counts.shape
    for value, count in zip(values.flatten().tolist(), counts.flatten().tolist(), strict=True):
        assert value == pytest.approx(float(enumerated_pass_at_k(5, count, 2)))
    assert pass_at_k(5, torch.empty(0, dtype=torch.long), 2).shape == (0,)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over all ways to draw n of N samples is pass@k of the N themselves; c/n put in is not."""
    population, num_samples, k = [True, True, False, False, False, False], 4, 2
    truth = float(enumerated_pass_at_k(6, 2, k))
    counts = [sum(draw) for draw in combinations(population, num_samples)]
    assert fmean(pass_at_k(num_samples, count, k).item() for count in counts) == pytest.approx(truth)
    assert fmean(1 - (1 - count / num_samples) ** k for count in counts) != pytest.approx(truth, abs=1e-3)


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "named"),
    [
        pytest.param(4, 1, 5, "k = 5 for n = 4", id="k above n"),
        pytest.param(4, 1, 0, "k = 0", id="k of 0"),
        pytest.param(4, 5, 2, "5", id="more correct than samples"),
        pytest.param(4, -1, 2, "-1", id="negative count"),
    ],
)
def test_pass_at_k_refuses(num_samples: int, num_correct: int, k: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        pass_at_k(num_samples, num_correct, k)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        pytest.param(MeanAtK(1), Fraction(1, 3), id="mean@1: the first sample alone"),
        pytest.param(MeanAtK(2), (Fraction(1, 2) + 0 + Fraction(1, 2)) / 3, id="mean@2: the first two"),
        pytest.param(MeanAtK(4), (Fraction(1, 2) + 0 + Fraction(3, 4)) / 3, id="mean@4: all"),
        pytest.param(PassAtK(1), (Fraction(1, 2) + 0 + Fraction(3, 4)) / 3, id="pass@1: all four, c/n"),
        pytest.param(PassAtK(2), (Fraction(5, 6) + 0 + 1) / 3, id="pass@2: all four"),
        pytest.param(PassAtK(4), Fraction(2, 3), id="pass@4: solved at all"),
    ],
)
def test_metrics_by_hand(metric: Metric, expected: Fraction) -> None:
    metric.reset()
    metric.update(flags("1001", "0000", "0111"))
    assert metric.compute().item() == pytest.approx(float(expected), abs=1e-15)
    assert metric.compute().dtype == torch.float64


@pytest.mark.parametrize(
    ("answers", "correct", "k", "expected"),
    [
        pytest.param("7 7 5", "110", 3, 1.0, id="the majority is right"),
        pytest.param("7 5 5", "100", 3, 0.0, id="the majority is wrong"),
        pytest.param("7 5 5", "100", 1, 1.0, id="only the first k vote"),
        pytest.param("7 5 5 7", "1001", 4, 1.0, id="a tie goes to the first answer: right"),
        pytest.param("5 7 7 5", "0110", 4, 0.0, id="a tie goes to the first answer: wrong"),
        pytest.param("5 7 9", "010", 3, 0.0, id="all different: the first"),
        pytest.param("- - 7", "001", 3, 1.0, id="no answer, no vote"),
        pytest.param("- - -", "000", 3, 0.0, id="no vote at all: wrong"),
        pytest.param("- 7", "01", 1, 0.0, id="no vote among the first k: wrong"),
        pytest.param("7 7 7", "100", 3, 1.0, id="judged differently: the first judgement"),
    ],
)
def test_maj_at_k_by_hand(answers: str, correct: str, k: int, expected: float) -> None:
    metric = MajAtK(k)
    metric.update(flags(correct), [[None if answer == "-" else answer for answer in answers.split()]])
    assert metric.compute().item() == expected


METRICS = [
    pytest.param(MeanAtK(2), id="mean@2"),
    pytest.param(PassAtK(2), id="pass@2"),
    pytest.param(MajAtK(3), id="maj@3"),
]
ROWS = ["1101", "0000", "0110", "0001", "1111"]
ANSWERS = [["a", "a", "b", "a"], [None] * 4, ["x", "y", "y", "x"], ["p", "q", "r", "s"], ["z"] * 4]


def add(metric: Metric, chosen: list[int]) -> Metric:
    """Update with the given problems of ROWS as one batch."""
    correct = flags(*[ROWS[row] for row in chosen]).reshape(len(chosen), 4)
    metric.update(correct, *([[ANSWERS[row] for row in chosen]] if isinstance(metric, MajAtK) else []))
    return metric


@pytest.mark.parametrize("metric", METRICS)
def test_batches_and_order_change_nothing(metric: Metric) -> None:
    metric.reset()
    whole = add(metric, [0, 1, 2, 3, 4]).compute()
    for order in permutations(range(5)):
        metric.reset()
        for row in order:
            add(metric, [row])
        assert metric.compute().item() == pytest.approx(whole.item(), abs=1e-15)


@pytest.mark.parametrize("metric", METRICS)
def test_ranks_of_unequal_size_merge_by_sum(metric: Metric) -> None:
    """The mean of the ranks' means would be another number."""
    metric.reset()
    whole = add(metric.clone(), [0, 1, 2, 3, 4]).compute().item()
    first, second = add(metric.clone(), [0, 1, 2, 3]), add(metric.clone(), [4])
    own = [rank.clone().compute().item() for rank in (first, second)]
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(whole, abs=1e-15)
    assert fmean(own) != pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize("metric", METRICS)
def test_a_rank_without_problems_counts_for_nothing(metric: Metric) -> None:
    metric.reset()
    first, empty = add(metric.clone(), [0, 4]), add(metric.clone(), [])
    alone = first.clone().compute().item()
    first.merge_state(empty)
    assert first.compute().item() == alone
    assert math.isnan(empty.compute().item())


@pytest.mark.parametrize("metric", METRICS)
def test_states_are_float64_sums_and_reset_to_nothing(metric: Metric) -> None:
    metric.reset()
    add(metric, [0, 4])
    assert {name: value.dtype for name, value in metric.metric_state.items()} == {
        "total": torch.float64,
        "count": torch.float64,
    }
    assert {reduction.__name__ for reduction in metric._reductions.values()} == {"dim_zero_sum"}
    metric.reset()
    assert [value.item() for value in metric.metric_state.values()] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "correct", "named"),
    [
        pytest.param(MeanAtK, torch.zeros(2, 3).bool(), "k = 4 for n = 3", id="mean@4 of 3 samples"),
        pytest.param(PassAtK, torch.zeros(2, 3).bool(), "k = 4 for n = 3", id="pass@4 of 3 samples"),
        pytest.param(PassAtK, torch.zeros(2, 0).bool(), "k = 4 for n = 0", id="no samples"),
        pytest.param(MeanAtK, torch.zeros(8, dtype=torch.bool), r"\[8\]", id="one row without [P, n]"),
        pytest.param(MeanAtK, torch.full((2, 8), 0.5), "float32", id="rewards instead of flags"),
    ],
)
def test_updates_refused(kind: type[Metric], correct: torch.Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kind(4).update(correct)


@pytest.mark.parametrize(
    ("k", "answers", "named"),
    [
        pytest.param(4, [["a"] * 3] * 2, "k = 4 for n = 3", id="more votes than samples"),
        pytest.param(2, [["a"] * 3], "1 rows", id="fewer rows than problems"),
        pytest.param(2, [["a"] * 3, ["a"] * 2], r"\[2, 3\]", id="a row too short"),
    ],
)
def test_maj_at_k_refuses(k: int, answers: list[list[str | None]], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MajAtK(k).update(flags("000", "111"), answers)


@pytest.mark.parametrize("kind", [MeanAtK, PassAtK, MajAtK])
def test_k_below_one_refused(kind: type[Metric]) -> None:
    with pytest.raises(ValueError, match="k >= 1, got 0"):
        kind(0)
