"""Which GPUs an engine gets, as the trainer counts them."""

import pytest

from rlvr.engines.vllm import _visible
from rlvr.errors import ConfigError


def test_gpus_are_counted_within_those_that_the_trainer_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert _visible(0, 1, "engine") == "4"
    assert _visible(2, 2, "engine") == "6,7"
    with pytest.raises(
        ConfigError, match="engine.engine.tensor_parallel_size=2 from cuda:3 on: expected some of "
    ):
        _visible(3, 2, "engine.engine")
