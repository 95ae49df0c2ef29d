"""Callbacks: clip schedulers, diagnostics, and what keeps a run's folder."""

from rlvr.callbacks.adaptive_entropy import AdaptiveEntropyCoef
from rlvr.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints, StopRequest
from rlvr.callbacks.clip_schedulers import (
    ClipScheduler,
    DecreaseIncreaseDecrease,
    IncreaseThenDecrease,
    OscillatoryDecay,
)
from rlvr.callbacks.entropy_probe import EntropyProbe
from rlvr.callbacks.entropy_regions import EntropyRegions
from rlvr.callbacks.histograms import Histograms
from rlvr.callbacks.run_record import RunRecord
from rlvr.callbacks.samples import Samples

__all__ = [
    "AdaptiveEntropyCoef",
    "AtomicCheckpointIO",
    "Checkpoints",
    "ClipScheduler",
    "DecreaseIncreaseDecrease",
    "EntropyProbe",
    "EntropyRegions",
    "Histograms",
    "IncreaseThenDecrease",
    "OscillatoryDecay",
    "RunRecord",
    "Samples",
    "StopRequest",
]
