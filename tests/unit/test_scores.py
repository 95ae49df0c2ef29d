"""Scores problem by problem, and the bootstrap over problems."""

import math

import numpy as np
import pytest
import torch

from rlvr.metrics import MajAtK, MeanAtK, PassAtK
from rlvr.scores import RESAMPLES, Estimate, estimate, estimates, problem_scores, resampled_means

CORRECT = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
ANSWERS = [["7", "5", "5", "7", None, "5"], [None] * 6, ["1"] * 6]


def test_scores_of_six_samples_by_hand() -> None:
    """pass@k is 1 - C(4, k) / C(6, k) for two right ones of six."""
    scores = problem_scores(CORRECT, ANSWERS)
    by_hand = {
        "mean_at_6": [2 / 6, 0, 1],
        "maj_at_6": [0, 0, 1],
        "pass_at_1": [2 / 6, 0, 1],
        "pass_at_2": [1 - 6 / 15, 0, 1],
        "pass_at_4": [1 - 1 / 15, 0, 1],
        "pass_at_6": [1, 0, 1],
    }
    assert scores.keys() == by_hand.keys()
    for name, values in by_hand.items():
        np.testing.assert_allclose(scores[name], values, rtol=1e-12, err_msg=name)


def test_their_means_are_the_metrics_of_training() -> None:
    scores = problem_scores(CORRECT, ANSWERS)
    for name, metric in (("mean_at_6", MeanAtK(6)), ("pass_at_4", PassAtK(4)), ("maj_at_6", MajAtK(6))):
        metric.update(CORRECT, *([ANSWERS] if name.startswith("maj") else []))
        assert scores[name].mean() == pytest.approx(metric.compute().item(), abs=1e-15)


def test_resamples_depend_on_seed_and_purpose_alone() -> None:
    scores = {"a": np.array([0.0, 0.5, 1.0, 1.0])}
    first, again = (resampled_means(scores, seed=3, purpose="x")["a"] for _ in range(2))
    assert first.shape == (RESAMPLES,)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, resampled_means(scores, seed=4, purpose="x")["a"])
    assert not np.array_equal(first, resampled_means(scores, seed=3, purpose="y")["a"])
    assert np.array_equal(first, resampled_means({**scores, "b": scores["a"]}, seed=3, purpose="x")["b"])


@pytest.mark.parametrize(
    "values", [pytest.param([0.25] * 7, id="all the same"), pytest.param([1.0], id="one")]
)
def test_without_variance_the_interval_is_a_point(values: list[float]) -> None:
    scores = {"a": np.array(values)}
    found = estimates(scores, resampled_means(scores, seed=0, purpose="x"))["a"]
    assert (found.low, found.high) == pytest.approx((values[0], values[0]))
    assert found.value == values[0]


def test_the_interval_of_many_problems_is_the_normal_one() -> None:
    values = np.random.default_rng(0).random(400)
    found = estimate(values.mean(), resampled_means({"a": values}, seed=0, purpose="x")["a"])
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """Of 30 problems with solve rates of mean 0.4; the percentile interval is a little too narrow."""
    draws = np.random.default_rng(1).beta(2, 3, size=(100, 30))
    covered = 0
    for number, values in enumerate(draws):
        found = estimate(values.mean(), resampled_means({"a": values}, seed=number, purpose="x")["a"])
        covered += found.low <= 0.4 <= found.high
    assert 88 <= covered <= 99


def test_estimates_are_shown_in_per_cent() -> None:
    assert str(Estimate(0.3125, 0.28, 0.345)) == "31.2 [28.0, 34.5]"
