"""Which rows go into which micro-batch: every one once, within the budget, as many parts as agreed."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr.packing import balanced, micro_batches

Lengths = list[tuple[int, int]]
lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), max_size=24)
BUDGET = 90  # the longest row that there can be
many = settings(max_examples=150, deadline=None, derandomize=True)


def alone(parts: int) -> int:
    """A run of one rank."""
    return parts


def size(rows: Lengths, part: list[int], packed: bool) -> int:
    """Tokens that a forward pass of these rows computes."""
    chosen = [rows[row] for row in part]
    if packed or not chosen:
        return sum(map(sum, chosen))
    return len(chosen) * (max(prompt for prompt, _ in chosen) + max(response for _, response in chosen))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("tokens", [None, BUDGET, 200], ids=["by rows", "tight", "wide"])
@given(rows=lengths, most=st.integers(1, 9), others=st.integers(0, 30))
@many
def test_every_row_once_in_as_many_parts_as_the_ranks_agree_on(
    packed: bool, tokens: int | None, rows: Lengths, most: int, others: int
) -> None:
    agreed: list[int] = []

    def agree(parts: int) -> int:
        agreed.append(max(parts, others))
        return agreed[-1]

    parts = micro_batches(rows, rows=most, tokens=tokens, packed=packed, agree=agree)
    assert [len(parts)] == agreed, "asked once, and held to it"
    assert sorted(row for part in parts for row in part) == list(range(len(rows)))
    if tokens is None:
        assert max(map(len, parts)) <= most
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    else:
        assert max(size(rows, part, packed) for part in parts) <= tokens


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_rank_without_rows_has_one_empty_part(packed: bool) -> None:
    for tokens in (None, 10):
        assert micro_batches([], rows=4, tokens=tokens, packed=packed, agree=alone) == [[]]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_row_longer_than_the_budget_has_a_part_of_its_own(packed: bool) -> None:
    parts = micro_batches([(1, 1), (5, 9), (1, 1)], rows=4, tokens=6, packed=packed, agree=alone)
    assert sorted(sorted(part) for part in parts if 1 in part) == [[1]]


@given(rows=lengths)
@many
def test_the_budget_takes_as_few_parts_as_balancing_allows(rows: Lengths) -> None:
    count = len(micro_batches(rows, rows=1, tokens=BUDGET, packed=True, agree=alone))
    sizes = [prompt + response for prompt, response in rows]
    assert count >= sum(sizes) / BUDGET
    if count > 1:
        fewer = balanced(sizes, count - 1)
        assert max(sum(sizes[row] for row in part) for part in fewer) > BUDGET


def test_rows_without_padding_keep_their_order_and_padded_ones_stand_beside_their_like() -> None:
    rows = [(2, 9), (2, 1), (2, 8), (2, 2)]
    assert micro_batches(rows, rows=2, tokens=None, packed=True, agree=alone) == [[0, 1], [2, 3]]
    assert micro_batches(rows, rows=2, tokens=None, packed=False, agree=alone) == [[0, 2], [3, 1]]
    assert micro_batches(rows, rows=2, tokens=22, packed=False, agree=alone) == [[0, 2], [3, 1]]


# Balance
# ------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "parts", "expected"),
    [
        pytest.param([5, 4, 3, 2], 2, [[0, 3], [1, 2]], id="equal"),
        pytest.param([1, 9, 1, 1], 2, [[1], [0, 2, 3]], id="a long one alone"),
        pytest.param([3, 3], 3, [[0], [1], []], id="fewer rows than parts"),
        pytest.param([], 2, [[], []], id="no rows"),
    ],
)
def test_balanced_by_hand(sizes: list[int], parts: int, expected: list[list[int]]) -> None:
    assert balanced(sizes, parts) == expected


def loads(sizes: list[int], parts: int) -> list[int]:
    return [sum(sizes[row] for row in part) for part in balanced(sizes, parts)]


@given(sizes=st.lists(st.integers(1, 50), max_size=20), parts=st.integers(1, 8))
@many
def test_parts_are_nearly_equal_the_largest_first(sizes: list[int], parts: int) -> None:
    found = loads(sizes, parts)
    assert found == sorted(found, reverse=True)
    assert found[0] - found[-1] <= max(sizes, default=0)
    assert loads(sizes, parts + 1)[0] <= found[0], "another part makes the largest no larger"


def smallest_maximum(sizes: list[int], parts: int) -> int:
    """By trying everything."""

    def place(left: list[int], full: tuple[int, ...]) -> int:
        if not left:
            return max(full)
        return min(
            place(left[1:], tuple(sorted((*full[:part], full[part] + left[0], *full[part + 1 :]))))
            for part in range(parts)
        )

    best: Callable[[list[int], tuple[int, ...]], int] = place
    return best(sizes, (0,) * parts)


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=7), parts=st.integers(1, 3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_largest_part_is_at_most_a_third_above_the_best(sizes: list[int], parts: int) -> None:
    assert 3 * parts * loads(sizes, parts)[0] <= (4 * parts - 1) * smallest_maximum(sizes, parts)
