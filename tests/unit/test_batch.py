"""Padding, trimming and splitting lose nothing and add nothing."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr.batch import Batch, Evaluation, IterationFacts, Prompt, Rollout, Sequences
from rlvr.losses import Totals

PAD = 0
tokens = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def rollouts_of(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Rollout]:
    return [
        Rollout(Prompt(i, str(i), "", "", token_ids=tuple(prompt)), 0, tuple(response), (), "stop", "")
        for i, (prompt, response) in enumerate(rows)
    ]


def read_back(sequences: Sequences) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of every row."""
    width = sequences.input_ids.shape[1] - sequences.loss_mask.shape[1]
    rows = zip(sequences.input_ids, sequences.attention_mask, strict=True)
    return [(ids[:width][at[:width]].tolist(), ids[width:][at[width:]].tolist()) for ids, at in rows]


def test_sequences_by_hand() -> None:
    sequences = Sequences.of(rollouts_of([([5, 6, 7], [8]), ([9], [10, 11])]), PAD)
    assert sequences.input_ids.tolist() == [[5, 6, 7, 8, 0], [0, 0, 9, 10, 11]]
    assert sequences.attention_mask.int().tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert sequences.loss_mask.int().tolist() == [[1, 0], [1, 1]]
    assert sequences.targets.tolist() == [8, 10, 11]


@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rows_come_back_in_as_few_columns_as_they_need(
    rows: list[tuple[list[int], list[int]]], data: st.DataObject
) -> None:
    sequences = Sequences.of(rollouts_of(rows), PAD)
    assert read_back(sequences) == rows
    index = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, max_size=8))
    chosen = [rows[i] for i in index]
    trimmed = sequences.rows(torch.tensor(index))
    assert read_back(trimmed) == chosen
    longest = [max(len(row[part]) for row in chosen) for part in (0, 1)]
    assert trimmed.input_ids.shape[1] == sum(longest)
    assert trimmed.loss_mask.shape[1] == longest[1]
    assert trimmed.targets.tolist() == [token for _, response in chosen for token in response]


def as_parts(parts: list[list[int]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(part, dtype=torch.long) for part in parts)


def batch_of(rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, ref: bool = True) -> Batch:
    sequences = Sequences.of(rollouts_of(rows), PAD)
    numbered = torch.arange(sequences.loss_mask.numel(), dtype=torch.float32).view_as(sequences.loss_mask)
    return Batch(
        sequences=sequences,
        advantages=torch.arange(len(rows), dtype=torch.float32),
        old_logprobs=-numbered,
        ref_logprobs=numbered if ref else None,
        rho=None,
        totals=Totals(tokens=int(sequences.loss_mask.sum()), sequences=len(rows)),
        parts=torch.arange(len(rows)).split(2),
        facts=IterationFacts(iteration=3, entropy=1.0, reward_mean=0.5),
        keys=torch.tensor([(row, 10 + row) for row in range(len(rows))]),
        selected=numbered % 2 == 1,
    )


ROWS = [([1, 2], [3]), ([4], [5, 6, 7]), ([8, 9, 10], [11, 12]), ([13], [14]), ([15], [16])]


PARTS = [
    pytest.param(None, id="all at once"),
    pytest.param([[0], [1], [2], [3], [4]], id="rows alone"),
    pytest.param([[3, 1], [4, 0, 2]], id="another order"),
    pytest.param([[2, 4, 0], [], [1, 3], []], id="empty parts"),
]


@pytest.mark.parametrize("parts", PARTS)
def test_micro_batches_are_the_parts_and_join_puts_them_back(parts: list[list[int]] | None) -> None:
    batch = batch_of(ROWS)
    batch = replace(batch, parts=None if parts is None else as_parts(parts))
    micros = list(batch.micro_batches())
    order = list(range(5)) if parts is None else [row for part in parts for row in part]
    assert [len(micro.advantages) for micro in micros] == ([5] if parts is None else list(map(len, parts)))
    assert [row for micro in micros for row in read_back(micro.sequences)] == [ROWS[row] for row in order]
    assert torch.cat([micro.advantages for micro in micros]).equal(batch.advantages[order])
    assert torch.cat([micro.keys for micro in micros]).equal(batch.keys[order])
    for key in ("old_logprobs", "ref_logprobs", "selected"):
        joined = batch.join([getattr(micro, key)[micro.loss_mask] for micro in micros])
        assert joined.equal(torch.where(batch.loss_mask, getattr(batch, key), 0))
    assert all(micro.totals == batch.totals and micro.facts == batch.facts for micro in micros)
    assert all(micro.parts is None for micro in micros)


def test_rows_of_no_part_are_joined_as_zeros() -> None:
    batch = replace(batch_of(ROWS), parts=as_parts([[4], [1]]))
    joined = batch.join(
        [micro.advantages.repeat_interleave(micro.loss_mask.sum(1)) for micro in batch.micro_batches()]
    )
    assert joined.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0], [4, 0, 0]]


def test_batch_without_reference_stays_without() -> None:
    batch = batch_of(ROWS, ref=False)
    assert batch.rows(slice(1, 3)).ref_logprobs is None
    assert batch.to(torch.device("cpu")).ref_logprobs is None


@pytest.mark.parametrize("ref", [True, False])
def test_to_a_device_moves_every_tensor(ref: bool) -> None:
    """The meta device stands in for one that is not here."""
    moved = batch_of(ROWS, ref=ref).to(torch.device("meta"))
    assert moved.parts is not None
    held = [*vars(moved).values(), *vars(moved.sequences).values(), *moved.parts]
    tensors = [value for value in held if isinstance(value, torch.Tensor)]
    assert len(tensors) == (11 if ref else 10)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_evaluation_moves_and_keeps_answers() -> None:
    evaluation = Evaluation("heldout", torch.tensor([[True, False]]), [["a", None]])
    moved = evaluation.to(torch.device("meta"))
    assert moved.correct.device.type == "meta"
    assert moved.answers == evaluation.answers


def test_values_outside_the_mask_do_not_matter_to_rows() -> None:
    batch = batch_of(ROWS)
    spoilt = replace(batch, old_logprobs=batch.old_logprobs.masked_fill(~batch.loss_mask, math.nan))
    part = spoilt.rows(slice(0, 2))
    assert part.old_logprobs[part.loss_mask].isfinite().all()
