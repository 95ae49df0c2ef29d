"""Losses: pure functions from per-token inputs to per-token losses, one a file; aggregation is separate."""

from rlvr.losses.aggregation import Aggregation, Totals, token_mean
from rlvr.losses.inputs import BAND, Loss, LossInputs, LossOutputs
from rlvr.losses.ppo_clip import ppo_clip

__all__ = ["BAND", "Aggregation", "Loss", "LossInputs", "LossOutputs", "Totals", "ppo_clip", "token_mean"]
