"""Keyed draws depend on their key alone; the ledger's means are sums over counts."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlvr.keyed import generator, uniforms
from rlvr.ledger import Ledger


def alone(pairs: torch.Tensor) -> torch.Tensor:
    """One rank."""
    return pairs


def test_the_same_key_gives_the_same_draws_whatever_was_drawn_before() -> None:
    first = generator(1, "train", 2, 3).random(5)
    np.random.default_rng(0).random(100)
    torch.rand(7)
    assert (generator(1, "train", 2, 3).random(5) == first).all()


def test_draws_are_those_of_every_earlier_version() -> None:
    """A change here changes every recorded run."""
    draws = uniforms(7, "train", [(3, 11, 2)], 3)
    assert draws[0].tolist() == [0.4123956869922415, 0.3478359110954441, 0.15888203504360332]


def test_keys_that_differ_anywhere_differ() -> None:
    keys = list(itertools.product((0, 1), ("train", "heldout"), (0, 1), (0, 1)))
    draws = {generator(seed, purpose, *rest).random() for seed, purpose, *rest in keys}
    assert len(draws) == len(keys)


@pytest.mark.filterwarnings("error")
def test_no_global_random_state_is_touched() -> None:
    before_numpy, before_torch = np.random.get_state()[1].copy(), torch.get_rng_state()
    uniforms(0, "train", [(0, 1, 2)], 10)
    assert (np.random.get_state()[1] == before_numpy).all()
    assert torch.equal(torch.get_rng_state(), before_torch)


def test_uniforms_are_rows_of_their_own_keys_and_longer_ones_begin_alike() -> None:
    keys = [(0, 4, 0), (0, 4, 1), (0, 5, 0)]
    draws = uniforms(7, "train", keys, 6)
    assert draws.shape == (3, 6)
    assert draws.dtype == torch.float64
    assert ((draws >= 0) & (draws < 1)).all()
    assert torch.equal(uniforms(7, "train", keys[::-1], 6), draws.flip(0))
    assert torch.equal(uniforms(7, "train", keys, 3), draws[:, :3])
    assert uniforms(7, "train", [], 6).shape == (0, 6)


def test_uniforms_are_uniform() -> None:
    draws = uniforms(0, "train", [(0, prompt, sample) for prompt in range(50) for sample in range(20)], 10)
    counts = torch.histc(draws, bins=10, min=0, max=1)
    assert (counts - 1000).abs().max() < 150


# The ledger
# ------------------------------------------------------------


def test_means_are_over_everything_counted() -> None:
    """Not means of means: 1 of 1 and 0 of 3 make 0.25."""
    ledger = Ledger()
    ledger.add("share", 1, 1)
    ledger.add("share", 0, 3)
    assert ledger.close(alone) == {"share": 0.25}


def test_a_key_of_another_rank_has_a_place_in_every_rank_s_row() -> None:
    """Otherwise the ranks would add up different keys."""
    ledger = Ledger()
    ledger.add("b", 3, 4)
    theirs = {"a": [1.0, 2.0], "b": [1.0, 4.0]}

    def gather(keys: list[str]) -> list[list[str]]:
        return [keys, sorted(theirs)]

    def reduce(pairs: Tensor) -> Tensor:
        assert pairs.tolist() == [[0, 0], [3, 4]]
        return pairs + torch.tensor(list(theirs.values()), dtype=torch.float64)

    assert ledger.close(reduce, gather) == {"a": 0.5, "b": 0.5}


def test_ranks_are_summed() -> None:
    ledger = Ledger()
    ledger.add("share", 1, 2)
    assert ledger.close(lambda pairs: pairs + torch.tensor([[3.0, 6.0]], dtype=torch.float64)) == {
        "share": 0.5
    }


@pytest.mark.parametrize(
    ("total", "count", "mean"),
    [
        pytest.param(0.1, 1, 0.1, id="floats keep all their digits"),
        pytest.param(torch.tensor(3), torch.tensor(4), 0.75, id="integer tensors"),
        pytest.param(torch.tensor(True), 2, 0.5, id="truth"),
        pytest.param(torch.tensor(1.5, requires_grad=True), 1, 1.5, id="a tensor with a gradient"),
        pytest.param(0.0, 0, math.nan, id="nothing counted is not a number"),
        pytest.param(math.nan, 1, math.nan, id="not a number stays so"),
    ],
)
def test_what_is_added(total: float, count: float, mean: float) -> None:
    ledger = Ledger()
    ledger.add("key", total, count)
    assert ledger.close(alone)["key"] == pytest.approx(mean, rel=0, abs=0, nan_ok=True)


def test_closing_is_one_reduction_whatever_is_open() -> None:
    """A collective a metric would cost more than the step; none at all where nothing is open."""
    ledger, shapes = Ledger(), []
    for key in ("a", "b", "c"):
        ledger.add(key, 1, 2)

    def counting(pairs: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(pairs.shape))
        return pairs

    assert ledger.close(counting) == {"a": 0.5, "b": 0.5, "c": 0.5}
    assert ledger.close(counting) == {}
    assert shapes == [(3, 2)]


def test_large_sums_keep_small_parts() -> None:
    """2^24 and one more, which float32 cannot tell apart."""
    ledger = Ledger()
    ledger.add("sum", torch.tensor(2.0**24))
    ledger.add("sum", torch.tensor(1.0), 0)
    assert ledger.close(alone) == {"sum": 2.0**24 + 1}


def test_closing_forgets() -> None:
    ledger = Ledger()
    ledger.add("once", 1)
    ledger.close(alone)
    assert ledger.close(alone) == {}


def test_state_comes_back_as_a_copy_without_what_is_open() -> None:
    ledger, other = Ledger(), Ledger()
    ledger.rows.append({"iteration": 0.0, "loss": math.inf})
    ledger.start["val"] = 0.25
    other.add("open", 1)
    other.load_state_dict(ledger.state_dict())
    ledger.rows[0]["loss"] = 0.0
    assert other.rows == [{"iteration": 0.0, "loss": math.inf}]
    assert other.start == {"val": 0.25}
    assert other.close(alone) == {}
