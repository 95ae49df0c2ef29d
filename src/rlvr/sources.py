"""A policy from wherever its weights are: a run, a checkpoint, a model folder, the hub, a .gguf file."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from rlvr.errors import ConfigError
from rlvr.policy import Policy


@dataclass(frozen=True)
class Checkpoint:
    """What a policy is made of, as ``rlvr-train`` left it.

    Args:
        path: of the policy's shape and tokenizer, as :class:`Policy` takes it.
        dtype: of the weights.
        weights: under the policy's names.
    """

    path: str | None
    dtype: str
    weights: dict[str, Tensor]


def load_policy(path: str | None, make: Callable[[str | None], Policy]) -> Policy:
    """A policy with its weights.

    Args:
        path: a run folder, whose last checkpoint is taken, or a checkpoint, sharded or not; else whatever
            :class:`Policy` takes: a Hugging Face folder, a hub id, a ``.gguf`` file, None.
        make: makes a policy of what :class:`Policy` takes as its path; a checkpoint's weights then replace
            its own, in its dtype.

    Raises:
        ConfigError: where there is no such policy, or the checkpoint is not of this package.
    """
    found = checkpoint_of(path)
    if found is None:
        return make(path)
    saved = read_checkpoint(found)
    policy = make(saved.path)
    policy.load_state_dict(saved.weights)
    return policy


def checkpoint_of(path: str | None) -> Path | None:
    """The checkpoint that a run folder or a ``.ckpt`` path names; None where it names none.

    Raises:
        ConfigError: for a run folder without a checkpoint, or a ``.ckpt`` path where nothing is.
    """
    if path is None:
        return None
    place = Path(path).expanduser()
    in_run = place / "checkpoints" / "last.ckpt"
    if place.suffix == ".ckpt":
        found = place
    elif in_run.exists() or (place / "metrics.csv").exists():
        found = in_run
    else:
        return None
    if not found.exists():
        raise ConfigError(f"{path}", f"a checkpoint at {found}", "another run folder or .ckpt")
    return found


def run_folder(path: str | None) -> Path | None:
    """The run that a run folder or a checkpoint in one belongs to; None for other policies."""
    found = checkpoint_of(path)
    return None if found is None or found.parent.name != "checkpoints" else found.parent.parent


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds beside weights and optimizer state: a file's tensors are left on the disk."""
    path = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    facts: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return facts


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the policy of a checkpoint that ``rlvr-train`` has written: a file, or a folder of shards.

    Raises:
        ConfigError: for any other.
    """
    try:
        state = facts_of(path)
        facts = state["rlvr"]
        if path.is_dir():
            weights = read_shards(path, stored_tensors(path))
        else:
            everything = state["state_dict"]
            weights = {k.removeprefix(_PREFIX): v for k, v in everything.items() if k.startswith(_PREFIX)}
    except Exception as error:  # no zip file, a pickle of something else, another framework's folder
        raise ConfigError(
            f"{path}", "a checkpoint that rlvr-train has written", "another run folder or .ckpt"
        ) from error
    return Checkpoint(facts["policy_path"], facts["policy_dtype"], weights)


_PREFIX = "policy."


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """The policy's tensors in a folder of shards, without their data: on the meta device, under its names."""
    prefix = f"state_dict.{_PREFIX}"
    return {
        key.removeprefix(prefix): torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")
        for key, stored in FileSystemReader(path).read_metadata().state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }


def read_shards(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some of :func:`stored_tensors`, whole; in one process, however many wrote them."""
    prefix = f"state_dict.{_PREFIX}"
    weights = {f"{prefix}{name}": torch.empty_like(tensor, device="cpu") for name, tensor in wanted.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is meant
        load(weights, storage_reader=FileSystemReader(path), no_dist=True)
    return {key.removeprefix(prefix): value for key, value in weights.items()}
