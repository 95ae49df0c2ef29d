"""Choosing tokens of a mini-batch, against sorting in Python; however it is split."""

import math
import threading
from collections.abc import Callable
from statistics import fmean

import oracles
import pytest
import torch
from torch import Tensor

from rlvr.clipping import ClipRange
from rlvr.keyed import hashes
from rlvr.losses import ClipCov, KLCov, LossInputs
from rlvr.losses.selection import count_of, select, token_covariance


class Ranks:
    """Threads in the place of processes: every collective waits for all."""

    def __init__(self, number: int) -> None:
        self.number, self.barrier = number, threading.Barrier(number)
        self.held: list[Tensor] = [torch.empty(0)] * number

    def run(self, work: Callable[[int], Tensor]) -> list[Tensor]:
        results = [torch.empty(0)] * self.number

        def rank(number: int) -> None:
            results[number] = work(number)

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(self.number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        return results

    def collect(self, rank: int, values: Tensor) -> list[Tensor]:
        self.held[rank] = values
        self.barrier.wait(timeout=20)
        everyone = list(self.held)
        self.barrier.wait(timeout=20)
        return everyone


def alone(values: Tensor) -> Tensor:
    return values


@pytest.mark.parametrize(
    ("fraction", "tokens", "count"),
    [
        pytest.param(2e-4, 4999, 1, id="rounded down, but one at least"),
        pytest.param(2e-4, 5000, 1, id="exactly one"),
        pytest.param(2e-4, 9999, 1, id="still one"),
        pytest.param(2e-4, 10000, 2, id="two"),
        pytest.param(2e-3, 100, 1, id="a small mini-batch"),
        pytest.param(1.0, 7, 7, id="all"),
    ],
)
def test_counts(fraction: float, tokens: int, count: int) -> None:
    assert count_of(fraction, tokens) == count


SCORES = [1.0, 3.0, -math.inf, 2.0, 3.0, 3.0, -math.inf, 0.5, -4.0, 3.0, 1.0]
DRAWS = [5, 9, 0, 1, 2, 7, 3, -8, 4, -6, -1]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 9, 10, 40])
@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param([list(range(11))], id="one rank"),
        pytest.param([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]], id="two ranks"),
        pytest.param([[10, 3, 2], [], [9, 0, 6, 4], [1, 5, 8, 7]], id="four, one of them without a token"),
    ],
)
def test_the_best_over_all_ranks(ranks: list[list[int]], count: int) -> None:
    scores, draws = torch.tensor(SCORES, dtype=torch.float64), torch.tensor(DRAWS)
    world = Ranks(len(ranks))
    parts = world.run(
        lambda rank: select(
            scores[ranks[rank]],
            draws[ranks[rank]],
            count,
            lambda values: torch.cat(world.collect(rank, values)),
        )
    )
    got = torch.zeros(11, dtype=torch.bool)
    for rows, part in zip(ranks, parts, strict=True):
        got[rows] = part
    able = [None if score == -math.inf else score for score in SCORES]
    assert got.tolist() == oracles.chosen(1.0, able, DRAWS, tokens=count)


def test_no_token_can_be_chosen() -> None:
    scores, draws = torch.full((3,), -math.inf, dtype=torch.float64), torch.arange(3)
    assert not select(scores, draws, 2, alone).any()
    assert select(scores[:0], draws[:0], 2, alone).tolist() == []


@pytest.mark.parametrize("parts", [[12], [5, 7], [1, 0, 11]])
def test_covariance_is_about_the_means_of_all_ranks(parts: list[int]) -> None:
    noise = torch.Generator().manual_seed(2)
    advantages = torch.randn(12, generator=noise)
    logprobs = -3 * torch.rand(12, generator=noise)
    mean_a, mean_l = fmean(advantages.tolist()), fmean(logprobs.tolist())
    expected = [
        (a - mean_a) * (b - mean_l) for a, b in zip(advantages.tolist(), logprobs.tolist(), strict=True)
    ]
    pieces = list(zip(advantages.split(parts), logprobs.split(parts), strict=True))
    world = Ranks(len(parts))
    got = world.run(
        lambda rank: token_covariance(
            *pieces[rank], lambda sums: torch.stack(world.collect(rank, sums)).sum(dim=0)
        )
    )
    assert torch.cat(got).dtype == torch.float64
    assert torch.cat(got).tolist() == pytest.approx(expected, rel=1e-12)


def test_clip_cov_takes_tokens_inside_the_interval_that_ppo_has_not_clipped() -> None:
    covariance = torch.tensor([0.5, 1.0, 1.1, 4.9, 5.0, 6.0, 2.0, 2.0])
    ratio = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.5, 0.5])
    inputs = LossInputs(
        logprobs=ratio.log() - 1,
        old_logprobs=torch.full((8,), -1.0),
        advantages=torch.ones(8),
        mask=torch.ones(8, dtype=torch.bool),
        clip=ClipRange.fixed(0.2, 0.2),
    )
    scores = ClipCov().scores(inputs, covariance)
    assert (scores > -math.inf).tolist() == [False, False, True, True, False, False, False, True]
    assert scores.dtype == torch.float64
    assert torch.equal(KLCov().scores(inputs, covariance), covariance)


# Draws
# ------------------------------------------------------------


def test_draws_depend_on_their_keys_alone() -> None:
    prompt, sample, position = torch.meshgrid(*(torch.arange(n) for n in (5, 4, 30)), indexing="ij")
    whole = hashes(7, "select", 3, 1, prompt, sample, position)
    assert (whole.shape, whole.dtype) == ((5, 4, 30), torch.int64)
    part = hashes(7, "select", 3, 1, prompt[2, 1:3], sample[2, 1:3], position[2, 1:3])
    assert torch.equal(part, whole[2, 1:3])
    assert hashes(7, "select", 3, 1, 4, 2, 9).item() == whole[4, 2, 9].item()
    assert len(set(whole.flatten().tolist())) == whole.numel()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((8, "select", 3, 1, 0), id="seed"),
        pytest.param((7, "other", 3, 1, 0), id="purpose"),
        pytest.param((7, "select", 4, 1, 0), id="iteration"),
        pytest.param((7, "select", 3, 2, 0), id="update"),
        pytest.param((7, "select", 1, 3, 0), id="iteration and update exchanged"),
    ],
)
def test_another_key_draws_others(other: tuple[int, str, int, int, int]) -> None:
    tokens = torch.arange(200)
    seed, purpose, iteration, update, prompt = other
    first = hashes(7, "select", 3, 1, 0, tokens)
    second = hashes(seed, purpose, iteration, update, prompt, tokens)
    assert not set(first.tolist()) & set(second.tolist())
    both = (first < 0) == (second < 0)
    assert 60 <= both.sum() <= 140, "independent"


def test_draws_are_even() -> None:
    """Neighbouring positions fall into sixteen equal parts of the range as chance would have it."""
    draws = hashes(0, "select", 0, 0, torch.arange(40)[:, None], 0, torch.arange(400))
    counts = torch.bincount((draws.flatten() >> 60) + 8, minlength=16).double()
    assert ((counts - 1000).square() / 1000).sum().item() < 45  # chi square, 15 degrees of freedom, p < 1e-4


def test_draws_are_the_same_on_every_machine_and_version() -> None:
    draws = hashes(0, "select", 0, 0, torch.tensor([0, 1]), 2, 3)
    assert draws.tolist() == [-3909526868533833079, -6466821923098703675]
