"""Which rows go through the trainer together: micro-batches of like sizes, as many on every rank."""

import heapq
from collections.abc import Callable, Sequence


def micro_batches(
    lengths: Sequence[tuple[int, int]],
    *,
    rows: int,
    tokens: int | None,
    packed: bool,
    agree: Callable[[int], int],
) -> list[list[int]]:
    """Split rows into micro-batches.

    Without a budget of tokens these are ``rows`` rows or fewer each. Under a budget, rows that are computed
    without padding are balanced (:func:`balanced`), and padded ones are put beside others of their length.

    A sharded model wants the same number of passes of every rank, so that is agreed first; a rank with fewer
    rows gets empty micro-batches.

    Args:
        lengths: prompt and response tokens of each row.
        rows: most rows in a micro-batch where ``tokens`` is None.
        tokens: most tokens in a micro-batch, padding included; a longer row gets one of its own.
        packed: whether rows are computed without padding.
        agree: the largest of a number over all ranks.

    Returns:
        Row indices of each micro-batch, at least one; every row is in exactly one.
    """
    sizes = [sum(row) for row in lengths]
    if tokens is not None and packed:
        return balanced(sizes, agree(_fewest(sizes, tokens)))
    order = list(range(len(sizes))) if packed else sorted(range(len(sizes)), key=lambda row: -sizes[row])
    if tokens is not None:
        runs = _runs([lengths[row] for row in order], tokens)
        runs += [0] * (agree(max(len(runs), 1)) - len(runs))
        cuts = iter(order)
        return [[next(cuts) for _ in range(run)] for run in runs]
    parts = agree(max(-(-len(order) // rows), 1))
    share, more = divmod(len(order), parts)
    ends = [share * (i + 1) + min(i + 1, more) for i in range(parts)]
    return [order[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def balanced(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Split rows into ``parts`` of nearly equal sums: the longest first, each into the smallest part yet.

    The largest exceeds the smallest possible by a third at most (Graham 1969, "Bounds on multiprocessing
    timing anomalies"), and more parts never make it larger.

    Args:
        sizes: of each row, in tokens.
        parts: how many, at least 1; some are empty where there are fewer rows.

    Returns:
        Row indices, ascending in each part; the largest part first, so that those of all ranks meet.
    """
    heap: list[tuple[int, int, list[int]]] = [(0, part, []) for part in range(parts)]
    for row in sorted(range(len(sizes)), key=lambda row: (-sizes[row], row)):
        load, part, members = heap[0]
        members.append(row)
        heapq.heapreplace(heap, (load + sizes[row], part, members))
    return [sorted(members) for _, _, members in sorted(heap, key=lambda part: (-part[0], part[1]))]


def _fewest(sizes: Sequence[int], budget: int) -> int:
    """The fewest parts, at least 1, with which :func:`balanced` keeps each within ``budget``."""
    for parts in range(max(-(-sum(sizes) // budget), 1), len(sizes)):
        if max(sum(sizes[row] for row in part) for part in balanced(sizes, parts)) <= budget:
            return parts
    return max(len(sizes), 1)


def _runs(lengths: Sequence[tuple[int, int]], budget: int) -> list[int]:
    """Numbers of consecutive rows whose padded size, rows x (longest prompt + response), fits ``budget``."""
    runs: list[int] = []
    prompt = response = 0
    for row in lengths:
        prompt, response = max(prompt, row[0]), max(response, row[1])
        if runs and (runs[-1] + 1) * (prompt + response) <= budget:
            runs[-1] += 1
        else:
            runs.append(1)
            prompt, response = row
    return runs
