"""``rlvr-eval``: score a policy on benchmarks, or compare two evaluations."""

import argparse
import json
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rlvr import command
from rlvr.errors import ConfigError
from rlvr.instantiate import CONF

OF_A_RUN = "metrics.csv", "checkpoints"
"""What tells a training run's folder."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def _job(cfg: DictConfig) -> None:
    # Imported here, so that --help and a wrong key answer at once.
    from rlvr.evaluation import evaluate

    command.leave("rlvr-eval", lambda: evaluate(cfg, HydraConfig.get().runtime.output_dir))


def main() -> None:
    """Entry point of ``rlvr-eval``."""
    if "--compare" in sys.argv[1:]:
        _compare()
    else:
        command.run("rlvr-eval", _start)


def _start() -> None:
    """Refuse the folder of a run before Hydra writes this command's configuration over the run's."""
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        folder = Path(value.strip("'\""))
        if key.lstrip("+") == "hydra.run.dir" and any((folder / name).exists() for name in OF_A_RUN):
            raise ConfigError(
                argument,
                "a folder of its own, not a training run's",
                f"policy.path={folder} and another hydra.run.dir",
            )
    _job()


def _compare() -> None:
    """Print the differences of two evaluations: a table, and a last line of JSON."""
    parser = argparse.ArgumentParser(prog="rlvr-eval", description="Compare two evaluations, in pairs.")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("FIRST", "SECOND"), help="their folders")
    arguments = parser.parse_args()
    from rlvr.comparison import compare, comparison_table

    try:
        found = compare(*arguments.compare)
    except ConfigError as error:
        print(f"rlvr-eval: {error}", file=sys.stderr)
        sys.exit(2)
    print(comparison_table(found), end="")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
