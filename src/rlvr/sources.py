"""A policy from wherever its weights are: a run, a checkpoint, a model folder, the hub, a .gguf file."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from rlvr.errors import ConfigError
from rlvr.policy import Policy

MakePolicy = Callable[[str | None, str], Policy]
"""From what :class:`Policy` takes as its path, and the dtype of the weights, to the policy."""


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


def load_policy(path: str | None, make: MakePolicy) -> Policy:
    """A policy with its weights.

    Args:
        path: a run folder, whose last checkpoint is taken, or a checkpoint, sharded or not; else whatever
            :class:`Policy` takes: a Hugging Face folder, a hub id, a ``.gguf`` file, None.
        make: makes a policy of what :class:`Policy` takes; a checkpoint's weights then replace its own.

    Raises:
        ConfigError: where there is no such policy, or the checkpoint is not of this package.
    """
    found = checkpoint_of(path)
    if found is None:
        return make(path, "float32")
    saved = read_checkpoint(found)
    policy = make(saved.path, saved.dtype)
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


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the policy of a checkpoint that ``rlvr-train`` has written: a file, or a folder of shards.

    Raises:
        ConfigError: for any other.
    """
    try:
        state = torch.load(
            path / "meta.pt" if path.is_dir() else path, map_location="cpu", weights_only=True, mmap=True
        )
        facts = state["rlvr"]
        everything = _read_shards(path) if path.is_dir() else state["state_dict"]
    except Exception as error:  # no zip file, a pickle of something else, another framework's folder
        raise ConfigError(
            f"{path}", "a checkpoint that rlvr-train has written", "another run folder or .ckpt"
        ) from error
    weights = {
        key.removeprefix(_PREFIX): value for key, value in everything.items() if key.startswith(_PREFIX)
    }
    return Checkpoint(facts["policy_path"], facts["policy_dtype"], weights)


_PREFIX = "policy."


def _read_shards(path: Path) -> dict[str, Tensor]:
    """The policy's tensors, whole; in one process, however many wrote them."""
    reader, prefix = FileSystemReader(path), f"state_dict.{_PREFIX}"
    found = reader.read_metadata().state_dict_metadata
    weights = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in found.items()
        if key.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is meant
        load(weights, storage_reader=reader, no_dist=True)
    return {key.removeprefix("state_dict."): value for key, value in weights.items()}
