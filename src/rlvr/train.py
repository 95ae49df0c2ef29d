"""``rlvr-train``: compose, check, train, report."""

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rlvr import command
from rlvr.instantiate import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _job(cfg: DictConfig) -> None:
    # Imported here, so that --help and a wrong key answer at once.
    from rlvr.run import train

    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    command.leave("rlvr-train", lambda: train(cfg, hydra_config.runtime.output_dir, overrides))


def main() -> None:
    """Entry point of ``rlvr-train``."""
    command.run("rlvr-train", _job)


if __name__ == "__main__":
    main()
