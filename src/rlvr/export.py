"""``rlvr-export``: a Hugging Face folder from any checkpoint."""

import argparse
import sys
from pathlib import Path

from rlvr.errors import ConfigError


def export(source: Path, out: Path) -> None:
    """Write the policy of a checkpoint as a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    Args:
        source: a ``.ckpt`` file, or a run folder, whose last checkpoint is taken.
        out: the folder to write; must not hold anything yet.

    Raises:
        ConfigError: where there is no checkpoint, or something is in the way.
    """
    from rlvr.policy import Policy
    from rlvr.sources import checkpoint_of, load_policy

    if checkpoint_of(str(source)) is None:
        raise ConfigError(f"{source}", "a run folder or a .ckpt file", "rlvr-export RUN_FOLDER OUT")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"{out}", "an empty folder, or none yet", "another OUT")
    load_policy(str(source), lambda path, dtype: Policy(path, dtype=dtype)).save(out)


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
