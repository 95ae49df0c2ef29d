"""Engine corrections against plain Python, and what a run does with them."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import torch
from torch import Tensor

from rlvr.errors import ConfigError
from rlvr.mismatch import log_rho, sequence_mask, token_mask, token_truncation

TRAINER = [[-1.0, -2.0, -0.1, -30.0], [-0.5, -0.7, -3.0, -4.0], [-1.0, -1.0, -1.0, -1.0]]
ENGINE = [[-1.0, -2.5, -1.2, -0.1], [-0.4, -0.7, -2.4, -4.2], [-1.0, -1.0, -1.0, -1.0]]
MASK = [[True, True, True, True], [True, True, True, False], [False, False, False, False]]


def truncated(rhos: list[float]) -> list[float]:
    return [min(rho, 2.0) for rho in rhos]


def masked(rhos: list[float]) -> list[float]:
    return [rho if 0.5 <= rho <= 2.0 else 0.0 for rho in rhos]


def masked_whole(rhos: list[float]) -> list[float]:
    product = math.prod(rhos)
    return [product if 0.5 <= product <= 2.0 else 0.0] * len(rhos)


@pytest.mark.parametrize(
    ("correction", "oracle"),
    [
        pytest.param(token_truncation, truncated, id="token truncation"),
        pytest.param(token_mask, masked, id="token mask"),
        pytest.param(sequence_mask, masked_whole, id="sequence mask"),
    ],
)
def test_weights_row_by_row(
    correction: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    oracle: Callable[[list[float]], list[float]],
) -> None:
    """An empty row and tokens outside the mask get 0, whatever stands there; what is not rho was cut."""
    mask = torch.tensor(MASK)
    trainer, engine = (torch.tensor(x, dtype=torch.float64) for x in (TRAINER, ENGINE))
    trainer[~mask] = math.nan
    weights, cut = correction(log_rho(trainer, engine, mask), mask)
    for row, (p, q, valid) in enumerate(zip(TRAINER, ENGINE, MASK, strict=True)):
        gaps = [a - b for a, b, inside in zip(p, q, valid, strict=True) if inside]
        rhos = [math.exp(max(-20.0, min(20.0, gap))) for gap in gaps]
        wanted = oracle(rhos)
        uncut = rhos if correction is not sequence_mask else [math.prod(rhos)] * len(rhos)
        assert cut[row, : len(rhos)].tolist() == [a != b for a, b in zip(wanted, uncut, strict=True)]
        assert not cut[row, len(rhos) :].any()
        wanted += [0.0] * (4 - len(wanted))
        assert weights[row].tolist() == pytest.approx(wanted, rel=1e-12)


def test_equal_log_probs_weigh_one() -> None:
    mask = torch.tensor(MASK)
    zero = log_rho(torch.tensor(TRAINER), torch.tensor(TRAINER), mask)
    for correction in (token_truncation, token_mask, sequence_mask):
        weights, cut = correction(zero, mask)
        assert torch.equal(weights, mask.float())
        assert not cut.any()


@pytest.mark.parametrize(
    ("correction", "arguments"),
    [
        pytest.param(token_truncation, {"cap": 0.9}, id="cap below 1"),
        pytest.param(token_mask, {"low": 1.1}, id="low above 1"),
        pytest.param(sequence_mask, {"high": 0.9}, id="high below 1"),
        pytest.param(token_mask, {"low": -0.1}, id="low below 0"),
    ],
)
def test_bounds_that_exclude_agreement_are_refused(
    correction: Callable[..., tuple[Tensor, Tensor]], arguments: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match=r"must"):
        correction(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), **arguments)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        pytest.param(["data.top_p=0.9", "correction=token_mask"], "top_p=1.0", id="top-p and a correction"),
        pytest.param(["data.top_k=5", "data.old_logprobs=engine"], "top_k=0", id="top-k and engine ratios"),
        pytest.param(
            ["correction=token_mask", "data.old_logprobs=engine"], "correction=none", id="corrected twice"
        ),
        pytest.param(["data.lookahead=1"], "correction=token_truncation", id="lookahead uncorrected"),
        pytest.param(
            ["data.lookahead=1", "correction=token_mask"], "own_copy=true", id="lookahead on shared weights"
        ),
        pytest.param(["data.lookahead=2"], "0 or 1", id="lookahead too far"),
        pytest.param(["data.old_logprobs=both"], "policy or engine", id="old log-probs of nobody"),
        pytest.param(["correction=token_truncation", "correction.cap=0.5"], "at least 1", id="cap"),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(overrides: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        runs.train(tmp_path, *overrides)


def test_with_the_trainers_own_weights_nothing_is_corrected(tmp_path: Path) -> None:
    """The two disagree by rounding alone; the weights are 1, and training goes as without."""
    plain = runs.train_only(tmp_path / "plain", "trainer.max_epochs=2")
    corrected = runs.train_only(tmp_path / "corrected", "trainer.max_epochs=2", "correction=token_mask")
    assert runs.column(tmp_path / "corrected", "rollout/rho_cut_frac") == [0.0, 0.0]
    assert runs.column(tmp_path / "corrected", "rollout/rho_cut_mean") == pytest.approx([1.0] * 2, abs=1e-5)
    assert max(runs.column(tmp_path / "plain", "rollout/engine_kl")) < 1e-9
    for name, weights in plain["state_dict"].items():
        assert torch.allclose(weights, corrected["state_dict"][name], atol=2e-4)


def test_the_engines_log_probs_as_old_ones(tmp_path: Path) -> None:
    """With the trainer's own weights they are the policy's up to rounding."""
    runs.train_only(tmp_path / "policy", "trainer.max_epochs=1")
    runs.train_only(tmp_path / "engine", "trainer.max_epochs=1", "data.old_logprobs=engine")
    for key in ("train/ratio_mean", "train/approx_kl", "rollout/entropy"):
        values = [runs.column(tmp_path / name, key) for name in ("policy", "engine")]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert runs.column(tmp_path / "policy", "train/loss") != runs.column(tmp_path / "engine", "train/loss")
