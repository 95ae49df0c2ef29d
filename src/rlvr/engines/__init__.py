"""Rollout engines: who generates the responses."""

from rlvr.engines.protocol import PROBE_LENGTH, Place, RolloutEngine, SamplingParams

__all__ = ["PROBE_LENGTH", "Place", "RolloutEngine", "SamplingParams"]
