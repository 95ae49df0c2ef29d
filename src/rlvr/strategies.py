"""Many ranks on Lightning: replicated (DDP) or sharded (FSDP2), on GPUs, or on CPUs through gloo."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from rlvr.context import ContextGroup
from rlvr.errors import ConfigError, require_numbers
from rlvr.rank_watch import RankWatch

BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}
"""By the device; metrics and offloaded parameters are on the CPU while models are on GPUs."""


def summed(trainer: Trainer, values: Tensor) -> Tensor:
    """The sum over all ranks, on the CPU; every rank has to ask."""
    total: Tensor = trainer.strategy.reduce(values.to(trainer.strategy.root_device), reduce_op="sum")
    return total.cpu()


def gathered(value: Any) -> list[Any]:
    """The plain values of all ranks, in their order; every rank has to ask."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gathered_at_zero(value: Any) -> list[Any]:
    """The plain values of all ranks on rank 0, and none on the others; every rank has to ask."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def leave_group() -> None:
    """Give the ranks' connections back; only where all of them do, for it waits for what is under way."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _Launcher(_SubprocessScriptLauncher):
    """Starts this node's ranks, and has :class:`RankWatch` end them.

    Lightning's own observer kills the process that it runs in without a word, in the middle of a report too.
    """

    watch: RankWatch

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            self.watch.processes(self.procs)
        return function(*args, **kwargs)


def _watched(strategy: Any) -> tuple[RankWatch, _Launcher | None]:
    """What watches a strategy's ranks, and what starts them, where nothing outside has."""
    watch = RankWatch()
    if strategy.cluster_environment.creates_processes_externally:
        return watch, None
    launcher = _Launcher(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
    launcher.watch = watch
    return watch, launcher


class DDP(DDPStrategy):
    """Every rank holds the whole policy; gradients are reduced once a mini-batch."""

    def _configure_launcher(self) -> None:
        self.watch, self._launcher = _watched(self)

    def _get_process_group_backend(self) -> str:
        return self._process_group_backend or BACKENDS[self.root_device.type]


class FSDP(ModelParallelStrategy):
    """Every rank holds a shard of every parameter, gradient and optimizer state: ``fully_shard``.

    Args:
        offload: keep the shards in host memory between uses: slow, and room for models of several times the
            size.
        reduce_every_micro_batch: reduce gradients after each micro-batch instead of once a mini-batch: more
            traffic, but no rank holds a whole gradient.
        context_parallel_size: consecutive ranks that compute each micro-batch together, a part of its tokens
            each, for sequences that are too long for one; a divisor of their number.
        timeout_s: of a collective operation, in seconds; the longest that one rank may wait for another,
            rollouts included.

    Attributes:
        context: this rank's group where there is context parallelism, once there are processes.

    Raises:
        ConfigError: for a context parallel size that is no whole number from 1.
    """

    def __init__(
        self,
        *,
        offload: bool = False,
        reduce_every_micro_batch: bool = False,
        context_parallel_size: int = 1,
        timeout_s: float = 1800.0,
    ) -> None:
        super().__init__(tensor_parallel_size=1, timeout=timedelta(seconds=timeout_s))
        self.offload, self.reduce_every_micro_batch = offload, reduce_every_micro_batch
        require_numbers("trainer.strategy", context_parallel_size=context_parallel_size)
        if context_parallel_size < 1 or context_parallel_size != int(context_parallel_size):
            raise ConfigError(
                f"trainer.strategy.context_parallel_size={context_parallel_size}",
                "a number of ranks, 1 is off",
                "trainer.strategy.context_parallel_size=1",
            )
        self.context_parallel_size = int(context_parallel_size)
        self.context: ContextGroup | None = None

    def _configure_launcher(self) -> None:
        self.watch, self._launcher = _watched(self)

    def _get_process_group_backend(self) -> str:
        return self._process_group_backend or BACKENDS[self.root_device.type]

    def setup_environment(self) -> None:
        """One data-parallel dimension over all ranks, and groups among them; once, for fit and validate."""
        if self._device_mesh is not None:
            return
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        if self.context_parallel_size > 1:
            group, _ = dist.new_subgroups(self.context_parallel_size, timeout=self._timeout)
            self.context = ContextGroup(group)

    def model_to_device(self) -> None:
        """Shards are where :func:`rlvr.sharding.shard` has put them."""
        if not self.offload:
            super().model_to_device()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep whole gradients on every rank instead of reducing them, as Lightning does for DDP."""
        assert self.lightning_module is not None
        sharded = [module for module in self.lightning_module.modules() if isinstance(module, FSDPModule)]
        root = sharded[0]
        root.set_requires_gradient_sync(self.reduce_every_micro_batch)
        yield
        root.set_requires_gradient_sync(True)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write a folder of shards beside ``filepath``, then let ``filepath`` be a link to it.

        The link is moved in one step when every rank has written and flushed its shard, so that a kill at any
        time leaves the checkpoint before it.
        """
        # A name of its own: an iteration may be saved twice, when a run goes on from an earlier one.
        target, name = self.broadcast((Path(filepath), uuid4().hex[:8]))
        folder = target.parent / f".{target.name}-{name}"
        super().save_checkpoint(checkpoint, folder, storage_options)
        self.barrier()
        if self.is_global_zero:
            for path in (folder / "meta.pt", folder):  # the shards are on the disk already
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            link = folder.with_suffix(".link")
            link.symlink_to(folder.name, target_is_directory=True)
            os.replace(link, target)
            for other in target.parent.glob(f".{target.name}-*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)  # perhaps somebody reads it
        self.barrier()
