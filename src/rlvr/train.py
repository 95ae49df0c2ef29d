"""``rlvr-train``: compose, check, train, report."""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlvr.errors import ConfigError
from rlvr.instantiate import CONF

WANTS_TRACEBACK = "HYDRA_FULL_ERROR" in os.environ


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _job(cfg: DictConfig) -> None:
    # Imported here, so that --help and a wrong key answer at once.
    from rlvr.run import train

    hydra_config = HydraConfig.get()
    try:
        code = train(cfg, hydra_config.runtime.output_dir, list(hydra_config.overrides.task))
    except ConfigError as error:
        if WANTS_TRACEBACK:
            raise
        # Said here: out of the job, Hydra would print a line of its own above it.
        print(f"rlvr-train: {error}", file=sys.stderr)
        code = 2
    if code:
        sys.exit(code)


def main() -> None:
    """Entry point of ``rlvr-train``."""
    # Otherwise Hydra prints every exception in its own way, the composer's on several lines.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        _job()
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        if WANTS_TRACEBACK:
            raise
        print(f"rlvr-train: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _one_line(error: BaseException) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    said = " ".join(str(error).split())
    if error.__cause__ is not None:
        said += " " + " ".join(str(error.__cause__).split())
    return f"{said}; expected a key or choice of the configuration; `rlvr-train --cfg job` shows them"


if __name__ == "__main__":
    main()
