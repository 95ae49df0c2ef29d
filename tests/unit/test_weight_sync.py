"""The probe after every sync catches an engine that generates with other weights than the trainer's."""

from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

from rlvr.engines.transformers import TransformersEngine
from rlvr.errors import RunError
from rlvr.policy import Policy
from rlvr.weight_sync import WeightSync

Weights = Iterable[tuple[str, Tensor]]


class Skipping(TransformersEngine):
    """Takes the first weights only."""

    taken = False

    def load_weights(self, weights: Weights) -> None:
        if not self.taken:
            super().load_weights(weights)
        self.taken = True


class Altering(TransformersEngine):
    """Gets one layer wrong."""

    def load_weights(self, weights: Weights) -> None:
        super().load_weights(self._altered(weights))

    def _altered(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            yield name, tensor * 1.05 if name.endswith("layers.1.mlp.down_proj.weight") else tensor


def moved(policy: Policy, by: float) -> None:
    """One step of every weight, in a keyed direction."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=noise))


def sync_of(policy: Policy, engine: TransformersEngine) -> WeightSync:
    return WeightSync(policy, engine)


@pytest.mark.parametrize("step", [1e-4, 1e-2])
def test_a_right_sync_passes(step: float) -> None:
    policy = Policy()
    sync = sync_of(policy, TransformersEngine(policy, own_copy=True))
    for _ in range(3):
        gap = sync()
        assert gap is not None
        assert gap < 1e-5
        moved(policy, step)


def test_an_engine_on_the_trainers_weights_has_nothing_to_probe() -> None:
    policy = Policy()
    assert sync_of(policy, TransformersEngine(policy))() is None


def test_a_wrong_layer_stops_the_run() -> None:
    policy = Policy()
    with pytest.raises(RunError, match="it generates with other weights"):
        sync_of(policy, Altering(policy, own_copy=True))()


@pytest.mark.parametrize(
    ("step", "said"),
    [
        pytest.param(1e-2, "it generates with other weights", id="beyond the tolerance"),
        pytest.param(1e-5, "it kept the old weights", id="a step so small that the tolerance would hide it"),
    ],
)
def test_a_skipped_sync_stops_the_run(step: float, said: str) -> None:
    policy = Policy()
    sync = sync_of(policy, Skipping(policy, own_copy=True))
    sync()
    moved(policy, step)
    with pytest.raises(RunError, match=said):
        sync()
