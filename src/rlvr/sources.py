"""A policy from wherever its weights are: a run, a checkpoint, a model folder, the hub, a .gguf file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

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
        path: a run folder, whose last checkpoint is taken, or a checkpoint of one; else whatever
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
        raise ConfigError(f"policy.path={path}", f"a checkpoint at {found}", "policy.path=RUN_FOLDER")
    return found


def run_folder(path: str | None) -> Path | None:
    """The run that a run folder or a checkpoint in one belongs to; None for other policies."""
    found = checkpoint_of(path)
    return None if found is None or found.parent.name != "checkpoints" else found.parent.parent


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the policy of a checkpoint that ``rlvr-train`` has written.

    Raises:
        ConfigError: for any other.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        facts = state["rlvr"]
    except Exception as error:  # no zip file, a pickle of something else, a folder, another framework's
        raise ConfigError(
            f"{path}", "a checkpoint that rlvr-train has written", "policy.path=RUN_FOLDER"
        ) from error
    prefix = "policy."
    weights = {
        key.removeprefix(prefix): value
        for key, value in state["state_dict"].items()
        if key.startswith(prefix)
    }
    return Checkpoint(facts["policy_path"], facts["policy_dtype"], weights)
