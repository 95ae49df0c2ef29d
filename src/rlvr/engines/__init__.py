"""Rollout engines: who generates the responses."""

from rlvr.engines.protocol import RolloutEngine, SamplingParams

__all__ = ["RolloutEngine", "SamplingParams"]
