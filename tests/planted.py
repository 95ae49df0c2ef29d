"""Faults planted into a vLLM engine; its process imports this file."""

from typing import Any

from rlvr.engines.vllm import VllmEngine
from rlvr.engines.vllm_server import WeightWorker


class StaleHeadWorker(WeightWorker):
    """Forgets to pack the tied head again."""

    def rlvr_repack(self, model: Any) -> None:
        pass


class StaleHeadEngine(VllmEngine):
    """As vLLM alone would be after a reload."""

    WORKER = "planted.StaleHeadWorker"
