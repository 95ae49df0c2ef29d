"""The entropy change that a step should make, beside the one that it makes."""

from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from rlvr.batch import Batch, Sequences
from rlvr.module import RLVRModule
from rlvr.sharding import is_sharded, local
from rlvr.strategies import gathered_at_zero


class EntropyProbe(Callback):
    r"""Predicts the entropy change of an optimizer step in parameter space, and measures it.

    The prediction is :math:`\langle \nabla_\theta \bar H, \Delta\theta \rangle` with the actual step
    :math:`\Delta\theta` of an iteration's first update and the mean entropy of fixed, teacher-forced
    responses: the first rows of the run's first mini-batch. Unlike the entropy flow, which takes every
    token's logits for free, it knows what parameters share.

    Keys: ``probe/predicted_change``, ``probe/measured_change`` and ``probe/entropy``, nats a token. Costs a
        copy of the
    parameters and one backward pass over the probe.

    Args:
        every: iterations between two probes.
        rows: responses in the probe.
    """

    def __init__(self, *, every: int = 10, rows: int = 32) -> None:
        if every < 1 or rows < 1:
            raise ValueError(f"every={every} and rows={rows} must both be at least 1")
        self.every, self.rows = every, rows
        self._probe: Sequences | None = None
        self._before: tuple[float, list[Tensor], list[Tensor]] | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Entropy, its gradient and the parameters before the step."""
        assert isinstance(pl_module, RLVRModule)
        if self._probe is None:
            self._probe = batch.sequences.rows(slice(0, self.rows))
        if batch_idx or batch.facts.iteration % self.every:
            return
        parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        entropy = self._entropy(trainer, pl_module)
        if is_sharded(pl_module.policy):
            entropy.backward()  # through its hooks, which average over the ranks and leave shards
            gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
            pl_module.zero_grad(set_to_none=True)
        else:
            gradients = list(torch.autograd.grad(entropy, parameters))
        before = [local(parameter.detach()).clone() for parameter in parameters]
        self._before = entropy.item(), gradients, before

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """The step itself, and the entropy after it."""
        if self._before is None:
            return
        assert isinstance(pl_module, RLVRModule)
        entropy, gradients, before = self._before
        self._before = None
        parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        products = [
            (gradient * (local(parameter.detach()) - old)).sum(dtype=torch.float64)
            for gradient, parameter, old in zip(gradients, parameters, before, strict=True)
        ]
        with torch.no_grad():
            change = self._entropy(trainer, pl_module).item() - entropy
        # Of shards the ranks' sums add up; of replicas they are means already.
        parts = trainer.world_size if is_sharded(pl_module.policy) else 1
        pl_module.ledger.add("probe/predicted_change", parts * torch.stack(products).sum())
        pl_module.ledger.add("probe/measured_change", change)
        pl_module.ledger.add("probe/entropy", entropy)

    def _entropy(self, trainer: Trainer, module: RLVRModule) -> Tensor:
        assert self._probe is not None
        with trainer.precision_plugin.forward_context():
            stats = module.policy.logprobs(self._probe.to(module.device), temperature=module.temperature)
        # The ranks' mean is then the mean over the tokens of all ranks.
        tokens = trainer.strategy.reduce(torch.tensor(float(len(stats.entropy))), reduce_op="sum")
        return stats.entropy.sum() * (trainer.world_size / tokens)

    def state_dict(self) -> dict[str, Any]:
        """The tokens that every rank probes."""
        mine = None if self._probe is None else vars(self._probe.to(torch.device("cpu")))
        return {"probes": gathered_at_zero(mine)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore this rank's; on another number of ranks, the probe is taken anew."""
        probes = state_dict.get("probes", [])
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        if len(probes) == world and probes[rank] is not None:
            self._probe = Sequences(**probes[rank])
