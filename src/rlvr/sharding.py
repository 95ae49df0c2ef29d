"""A policy over many ranks: parameters sharded by layer (FSDP2), loaded and gathered one at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from rlvr.context import ContextGroup
from rlvr.errors import ConfigError
from rlvr.policy import Policy

METHODS = ("logprobs", "objective", "check")
"""Of the policy, which run it: the sharding gathers parameters around each of them."""


def shard(
    policy: Policy,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    compute_dtype: torch.dtype | None = None,
    offload: bool = False,
    context: ContextGroup | None = None,
) -> None:
    """Shard a deferred policy over the ranks of ``mesh``, layer by layer, and load its weights.

    Rank 0 reads the weights into host memory and broadcasts them tensor by tensor; every other rank goes from
    the meta device to its shards. A device never holds more than its shards, the embedding and head, and two
    layers.

    Args:
        policy: made with ``deferred=True``; changed in place.
        mesh: one dimension.
        device: of this rank.
        compute_dtype: what parameters are gathered as, and layers compute in; None: their own. Gradients are
            reduced in float32, or float64 for float64 parameters.
        offload: parameters, gradients and optimizer state live in host memory between uses.
        context: ranks that compute each packed row together; None: this one alone.

    Raises:
        ConfigError: where the model names no layers, or as :class:`Policy` does.
    """
    names = set(policy.model._no_split_modules or ())
    layers = [module for module in policy.model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(
            f"policy.path={policy.path}",
            "a model whose class names its layers",
            "trainer=ddp, or another model",
        )
    weights = policy.read() if dist.get_rank() == 0 else None
    reduce_dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    mixed = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype)
    offloading = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    # The root frees its parameters too: outside a pass every parameter is this rank's shard of it.
    for module in [*layers, policy]:
        fully_shard(module, mesh=mesh, mp_policy=mixed, offload_policy=offloading, reshard_after_forward=True)
    home = torch.device("cpu") if offload else device
    policy.to_empty(device=home)
    policy.model.tie_weights()  # moving off the meta device took them apart
    set_model_state_dict(
        policy.model,
        weights.state_dict() if weights is not None else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offload),
    )
    # Rotary frequencies and the like, which no checkpoint holds.
    theirs = dict(weights.named_buffers()) if weights is not None else {}
    for name, buffer in list(policy.model.named_buffers()):
        module, _, key = name.rpartition(".")
        value = buffer.to(device)
        if weights is not None:
            value.copy_(theirs[name])
        dist.broadcast(value, src=0)
        setattr(policy.model.get_submodule(module), key, value)
    for method in METHODS:
        register_fsdp_forward_method(policy, method)
    policy.compute_dtype, policy.context = compute_dtype, context
    policy.check(device)


def is_sharded(policy: nn.Module) -> bool:
    """Whether :func:`shard` has been here."""
    return isinstance(policy, FSDPModule)


def full_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """All of a tensor that may be sharded, on ``device``; every rank has to ask."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    full: Tensor = cast(DTensor, tensor.detach().to(device)).full_tensor()
    return full


def full_weights(policy: Policy, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Stream ``(name, full tensor)`` of a policy that may be sharded, one gathered at a time."""
    for name, weight in policy.named_weights():
        yield name, full_tensor(weight, device)


def save(policy: Policy, folder: Path, device: torch.device) -> None:
    """Write a Hugging Face folder of a policy that may be sharded: every rank comes, rank 0 writes.

    Its weights pass through the device one at a time and gather in rank 0's host memory.
    """
    writes = not dist.is_initialized() or dist.get_rank() == 0
    weights = {}
    if is_sharded(policy):
        for name, weight in full_weights(policy, device):
            if writes:
                weights[name] = weight.cpu()
    if writes:
        policy.save(folder, weights or None)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
