"""Aggregations: what must change nothing changes nothing (method.md, section 6)."""

from functools import partial
from statistics import fmean

import oracles
import pytest
import torch
from torch import Tensor

from rlvr.clipping import ClipRange
from rlvr.losses import (
    Aggregation,
    LossInputs,
    Totals,
    constant_length,
    ppo_clip,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
)

LENGTHS = [5, 1, 7, 0, 3, 4]
AGGREGATIONS: dict[str, Aggregation] = {
    "token_mean": token_mean,
    "sequence_mean_token_sum": sequence_mean_token_sum,
    "sequence_mean_token_mean": sequence_mean_token_mean,
    "constant_length": partial(constant_length, length=9),
}


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def totals_of(mask: Tensor) -> Totals:
    return Totals(tokens=int(mask.sum()), sequences=int(mask.any(dim=1).sum()))


def batch(width: int = 7) -> dict[str, Tensor]:
    """Six rows in float64, one of them without a valid token, NaN in the padding."""
    draws = torch.Generator().manual_seed(11)
    old = -2 * torch.rand(6, width, generator=draws, dtype=torch.float64)
    fields = {
        "logprobs": (old + 0.3 * torch.randn(6, width, generator=draws, dtype=torch.float64)).clamp(max=0),
        "old_logprobs": old,
        "advantages": torch.randn(6, 1, generator=draws, dtype=torch.float64).expand(6, width).clone(),
        "mask": mask_of(LENGTHS, width),
    }
    for name in ("logprobs", "old_logprobs", "advantages"):
        fields[name] = fields[name].masked_fill(~fields["mask"], torch.nan)
    return fields


def reduced(
    fields: dict[str, Tensor], totals: Totals, aggregation: Aggregation = token_mean
) -> tuple[Tensor, Tensor]:
    """The loss of these rows as their share of the mini-batch, and its gradient by ln p."""
    leaf = fields["logprobs"].clone().requires_grad_()
    inputs = LossInputs(**{**fields, "logprobs": leaf}, clip=ClipRange.fixed(0.2, 0.28))
    token_losses = torch.where(inputs.mask, ppo_clip(inputs).loss, 0.0)
    loss = (aggregation(inputs.mask, totals) * token_losses).sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def test_weights_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [False, True, False]])
    weights = token_mean(mask, totals_of(mask))
    assert weights.dtype == torch.float64
    assert weights.tolist() == [[0.25, 0.25, 0.0], [0.25, 0.0, 0.0], [0.0, 0.25, 0.0]]


def test_it_is_the_mean_over_valid_tokens_not_a_mean_of_means() -> None:
    fields = batch()
    losses = ppo_clip(LossInputs(**fields, clip=ClipRange.fixed(0.2, 0.28))).loss
    rows = [row[:length].tolist() for row, length in zip(losses, LENGTHS, strict=True)]
    loss, _ = reduced(fields, totals_of(fields["mask"]))
    assert loss.item() == pytest.approx(fmean([value for row in rows for value in row]), rel=1e-13)
    assert loss.item() != pytest.approx(fmean(fmean(row) for row in rows if row), rel=1e-3)


@pytest.mark.parametrize("name", list(AGGREGATIONS))
def test_weights_are_the_definition_s(name: str) -> None:
    """A row without a token is no sequence, and the constant is not the longest row."""
    mask = mask_of(LENGTHS, 7)
    weights = AGGREGATIONS[name](mask, totals_of(mask))
    assert weights.dtype == torch.float64
    for row, length in enumerate(LENGTHS):
        expected = oracles.weight(name, mask.tolist(), row, length=9)
        assert weights[row].tolist() == pytest.approx([expected] * length + [0.0] * (7 - length), rel=1e-15)


def test_a_constant_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="length must be at least 1"):
        constant_length(mask_of(LENGTHS, 7), Totals(tokens=20, sequences=5), length=0)


@pytest.mark.parametrize("name", list(AGGREGATIONS))
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([[0, 1, 2, 3, 4, 5]], id="whole"),
        pytest.param([[0, 1, 2], [3, 4, 5]], id="halves"),
        pytest.param([[0], [1], [2], [3], [4], [5]], id="row by row, one of them empty"),
        pytest.param([[0, 1, 2, 3, 4], [5]], id="a last one that is smaller"),
        pytest.param([[4, 2], [5, 0, 3], [1]], id="in another order"),
    ],
)
def test_micro_batches_and_ranks_change_nothing(parts: list[list[int]], name: str) -> None:
    """Each part divided by the whole mini-batch's counts; losses and gradients add up to the whole's."""
    fields = batch()
    totals = totals_of(fields["mask"])
    whole, whole_grad = reduced(fields, totals, AGGREGATIONS[name])
    results = [
        reduced({key: value[rows] for key, value in fields.items()}, totals, AGGREGATIONS[name])
        for rows in parts
    ]
    assert sum(loss.item() for loss, _ in results) == pytest.approx(whole.item(), rel=1e-13)
    for rows, (_, grad) in zip(parts, results, strict=True):
        torch.testing.assert_close(grad, whole_grad[rows], rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", list(AGGREGATIONS))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str, name: str) -> None:
    fields = batch()
    totals = totals_of(fields["mask"])
    amount = (4, 0) if side == "left" else (0, 4)
    padded = {
        key: torch.nn.functional.pad(value, amount, value=False if key == "mask" else torch.nan)
        for key, value in fields.items()
    }
    loss, grad = reduced(fields, totals, AGGREGATIONS[name])
    padded_loss, padded_grad = reduced(padded, totals, AGGREGATIONS[name])
    columns = slice(4, None) if side == "left" else slice(0, 7)
    assert padded_loss.item() == pytest.approx(loss.item(), rel=1e-13)
    torch.testing.assert_close(padded_grad[:, columns], grad, rtol=1e-13, atol=0)
    assert not torch.where(padded["mask"], 0.0, padded_grad).any()


def test_packing_changes_nothing() -> None:
    """All valid tokens in one row without padding."""
    fields = batch()
    totals = totals_of(fields["mask"])
    packed = {name: value[fields["mask"]][None] for name, value in fields.items()}
    (loss, grad), (packed_loss, packed_grad) = reduced(fields, totals), reduced(packed, totals)
    assert packed_loss.item() == pytest.approx(loss.item(), rel=1e-13)
    torch.testing.assert_close(packed_grad[0], grad[fields["mask"]], rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["token_mean", "sequence_mean_token_mean"])
def test_weights_of_all_parts_sum_to_one(name: str) -> None:
    mask = mask_of(LENGTHS, 7)
    totals = totals_of(mask)
    assert sum(AGGREGATIONS[name](part, totals).sum().item() for part in mask.split(2)) == pytest.approx(1.0)


@pytest.mark.parametrize("name", list(AGGREGATIONS))
def test_a_mini_batch_without_a_token_weighs_nothing(name: str) -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert AGGREGATIONS[name](mask, totals_of(mask)).tolist() == [[0.0] * 3] * 2
