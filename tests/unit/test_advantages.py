"""Group-relative advantages against exact fractions and hand-computed values (method.md, section 1)."""

import math
import random
from fractions import Fraction
from itertools import permutations

import pytest
import torch

from rlvr.advantages import group_relative, zero_variance


def exact(rewards: list[float], *, normalize_std: bool = True, delta: float = 1e-6) -> list[float]:
    """(R - mean) / (Bessel std + delta), the sums in fractions; 0 where all rewards are equal."""
    values = [Fraction(reward) for reward in rewards]
    if len(set(values)) == 1:
        return [0.0] * len(values)
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    scale = math.sqrt(variance) + delta if normalize_std else 1.0
    return [float(value - mean) / scale for value in values]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        pytest.param([1, 0], [0.7071058, -0.7071058], id="G=2: +-0.5 over (sqrt(0.5) + 1e-6)"),
        pytest.param([1, 0, 0, 0], [1.499997, -0.499999, -0.499999, -0.499999], id="1 of 4: std 0.5"),
        pytest.param([1, 1, 1, 0], [0.499999, 0.499999, 0.499999, -1.499997], id="3 of 4: the mirror image"),
        pytest.param([1, 1, 0, 0], [0.866024] * 2 + [-0.866024] * 2, id="2 of 4: std sqrt(1/3), Bessel"),
        pytest.param([2, 0, -2], [0.9999995, 0, -0.9999995], id="negative rewards"),
        pytest.param([1e-6, -1e-6], [0.414214, -0.414214], id="delta counts where the std is as small"),
    ],
)
def test_advantages_by_hand(rewards: list[float], expected: list[float]) -> None:
    advantages = group_relative(torch.tensor([rewards], dtype=torch.float64))
    assert advantages.flatten().tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("normalize_std", [True, False], ids=["GRPO", "Dr.GRPO"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group_size", [2, 3, 8, 64])
def test_random_groups_against_fractions(normalize_std: bool, dtype: torch.dtype, group_size: int) -> None:
    draws = random.Random(group_size)
    rewards = torch.tensor([[draws.gauss(0, 3) for _ in range(group_size)] for _ in range(20)], dtype=dtype)
    advantages = group_relative(rewards, normalize_std=normalize_std)
    assert (advantages.shape, advantages.dtype) == ((20, group_size), torch.float32)
    for row, group in zip(advantages.tolist(), rewards.double().tolist(), strict=True):
        assert row == pytest.approx(exact(group, normalize_std=normalize_std), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("normalize_std", [True, False], ids=["GRPO", "Dr.GRPO"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group_size", [2, 3, 5, 7, 8, 16, 63])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, -0.3, 1 / 3, 1e8, 1e-8])
def test_equal_rewards_give_exactly_zero(
    normalize_std: bool, dtype: torch.dtype, group_size: int, reward: float
) -> None:
    """Beside another group, whose advantages they leave alone."""
    equal, mixed = [reward] * group_size, [1.0] + [0.0] * (group_size - 1)
    advantages = group_relative(torch.tensor([equal, mixed], dtype=dtype), normalize_std=normalize_std)
    assert advantages[0].tolist() == [0.0] * group_size
    assert advantages[1].tolist() == pytest.approx(exact(mixed, normalize_std=normalize_std), rel=1e-6)


def test_the_rounding_error_that_selection_avoids_is_there() -> None:
    """In float32 without selection eight rewards of 0.1 would have an advantage of percents of a unit."""
    rewards = torch.tensor([[0.1] * 7, [0.7] * 7])
    naive = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    assert naive.abs().max() > 1e-3
    assert not group_relative(rewards).any()


def test_dr_grpo_leaves_out_the_standard_deviation() -> None:
    advantages = group_relative(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), normalize_std=False)
    assert advantages.tolist() == [[0.75, -0.25, -0.25, -0.25]]


@pytest.mark.parametrize("normalize_std", [True, False], ids=["GRPO", "Dr.GRPO"])
def test_a_shift_of_all_rewards_changes_nothing(normalize_std: bool) -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.25], [0.0, 0.0, 0.0, 2.0]])
    shifted = group_relative(rewards - 1024.0, normalize_std=normalize_std)
    assert torch.equal(shifted, group_relative(rewards, normalize_std=normalize_std))


def test_a_scale_of_all_rewards_changes_only_dr_grpo() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.25]])
    assert torch.allclose(group_relative(8 * rewards), group_relative(rewards), rtol=1e-5)
    without = group_relative(rewards, normalize_std=False)
    assert torch.equal(group_relative(8 * rewards, normalize_std=False), 8 * without)


def test_the_order_of_a_group_changes_nothing() -> None:
    rewards = [1.0, 0.1, 0.7, -0.3]
    by_reward = dict(zip(rewards, group_relative(torch.tensor([rewards])).flatten().tolist(), strict=True))
    for order in permutations(rewards):
        advantages = group_relative(torch.tensor([order])).flatten().tolist()
        assert advantages == pytest.approx([by_reward[reward] for reward in order], rel=1e-6)


def test_groups_do_not_see_each_other() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.3], [100.0, -7.0, 0.1], [0.7, 0.7, 0.7]])
    together = group_relative(rewards)
    for row in range(3):
        assert torch.equal(group_relative(rewards[row : row + 1])[0], together[row])


def test_advantages_of_a_group_sum_to_zero() -> None:
    rewards = torch.rand(10, 8, generator=torch.Generator().manual_seed(0))
    assert group_relative(rewards).sum(dim=1).tolist() == pytest.approx([0.0] * 10, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_verdicts_as_flags_or_integers(dtype: torch.dtype) -> None:
    rewards = torch.tensor([[1, 0, 0, 0]])
    assert torch.equal(group_relative(rewards.to(dtype)), group_relative(rewards.float()))


@pytest.mark.parametrize(
    ("rewards", "named"),
    [
        pytest.param(torch.ones(3, 1), r"G >= 2, got shape \[3, 1\]", id="groups of one"),
        pytest.param(torch.ones(3, 0), r"\[3, 0\]", id="empty groups"),
        pytest.param(torch.ones(4), r"\[4\]", id="no groups"),
        pytest.param(torch.ones(2, 2, 2), r"\[2, 2, 2\]", id="too many dimensions"),
        pytest.param(torch.tensor([[1.0, math.nan]]), "finite", id="not a number"),
        pytest.param(torch.tensor([[1.0, 0.0], [math.inf, math.inf]]), "finite", id="infinite, and equal"),
    ],
)
def test_refused(rewards: torch.Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        group_relative(rewards)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        pytest.param([0.1, 0.1, 0.1], True, id="all equal"),
        pytest.param([1.0, 1.0, 0.0], False, id="mixed"),
        pytest.param([1.0, 1.0, 1.0 + 1e-7], False, id="nearly equal is not equal"),
    ],
)
def test_zero_variance(group: list[float], expected: bool) -> None:
    assert zero_variance(torch.tensor([group])).tolist() == [expected]
