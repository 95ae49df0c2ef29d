"""Losses: pure functions from per-token inputs to per-token losses, one a file; aggregation is separate."""

from rlvr.losses.aggregation import (
    Aggregation,
    Totals,
    constant_length,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
)
from rlvr.losses.ce_gppo import ce_gppo
from rlvr.losses.cispo import cispo
from rlvr.losses.clip_cov import ClipCov
from rlvr.losses.dcpo_clip import dcpo_clip
from rlvr.losses.gspo import gspo
from rlvr.losses.inputs import BAND, Loss, LossInputs, LossOutputs
from rlvr.losses.kl_cov import KLCov
from rlvr.losses.needs import Needs, SelectingLoss, check_clip, name_of, needing, needs_of
from rlvr.losses.ppo_clip import ppo_clip
from rlvr.losses.reinforce import reinforce
from rlvr.losses.sapo import sapo

__all__ = [
    "BAND",
    "Aggregation",
    "ClipCov",
    "KLCov",
    "Loss",
    "LossInputs",
    "LossOutputs",
    "Needs",
    "SelectingLoss",
    "Totals",
    "ce_gppo",
    "check_clip",
    "cispo",
    "constant_length",
    "dcpo_clip",
    "gspo",
    "name_of",
    "needing",
    "needs_of",
    "ppo_clip",
    "reinforce",
    "sapo",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "token_mean",
]
