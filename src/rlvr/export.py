"""``rlvr-export``: a Hugging Face folder from any checkpoint."""

import argparse
import json
import sys
from pathlib import Path

from rlvr.errors import ConfigError

FILE_SIZE = "4GB"


def export(source: Path, out: Path, *, file_size: str = FILE_SIZE) -> None:
    """Write the policy of a checkpoint as a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    Args:
        source: a ``.ckpt`` file, or a run folder, whose last checkpoint is taken.
        out: the folder to write; must not hold anything yet.
        file_size: of one file of weights, at most, and of what the export of shards holds in memory.

    Raises:
        ConfigError: where there is no checkpoint, or something is in the way.
    """
    from rlvr.policy import Policy
    from rlvr.sources import checkpoint_of, read_checkpoint

    checkpoint = checkpoint_of(str(source))
    if checkpoint is None:
        raise ConfigError(f"{source}", "a run folder or a .ckpt file", "rlvr-export RUN_FOLDER OUT")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"{out}", "an empty folder, or none yet", "another OUT")
    if checkpoint.is_dir():
        _export_shards(checkpoint, out, file_size)
        return
    saved = read_checkpoint(checkpoint)
    policy = Policy(saved.path, dtype=saved.dtype)
    policy.load_state_dict(saved.weights)
    policy.save(out)


def _export_shards(checkpoint: Path, out: Path, file_size: str) -> None:
    """Write a folder of shards file by file, so that never more than one file's weights are in memory."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    from rlvr.policy import Policy
    from rlvr.sources import facts_of, read_shards, stored_tensors

    facts = facts_of(checkpoint)["rlvr"]
    policy = Policy(facts["policy_path"], dtype=facts["policy_dtype"], deferred=True)
    stored = stored_tensors(checkpoint)
    # The model's own names, tied weights once.
    weights = {name: stored[f"model.{name}"] for name, _ in policy.named_weights()}
    plan = split_torch_state_dict_into_shards(
        weights, filename_pattern="model{suffix}.safetensors", max_shard_size=file_size
    )
    out.mkdir(parents=True, exist_ok=True)
    for file, names in plan.filename_to_tensors.items():
        tensors = read_shards(checkpoint, {f"model.{name}": weights[name] for name in names})
        save_file(
            {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
            out / file,
            metadata={"format": "pt"},
        )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    policy.model.config.save_pretrained(out)
    policy.model.generation_config.save_pretrained(out)
    policy.tokenizer.save_pretrained(out)


def main() -> None:
    """Entry point of ``rlvr-export``."""
    parser = argparse.ArgumentParser(
        prog="rlvr-export", description="Write a checkpoint's policy as a Hugging Face folder."
    )
    parser.add_argument("source", type=Path, help="a run folder, or a .ckpt file")
    parser.add_argument("out", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    try:
        export(arguments.source, arguments.out)
    except ConfigError as error:
        print(f"rlvr-export: {error}", file=sys.stderr)
        sys.exit(2)
    print(arguments.out)


if __name__ == "__main__":
    main()
