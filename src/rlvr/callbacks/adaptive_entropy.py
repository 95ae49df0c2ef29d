"""An entropy bonus whose weight follows a target entropy."""

import math
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from rlvr.batch import Batch
from rlvr.errors import ConfigError
from rlvr.module import RLVRModule


class AdaptiveEntropyCoef(Callback):
    """Raises the weight of the entropy bonus while entropy is below a target, lowers it while it is above.

    Entropy is the token-mean over all updates of an iteration and all ranks; the weight that follows from it
    holds for the next iteration. It starts at ``algorithm.entropy_coef``, and is in the checkpoint.

    Key: ``train/entropy_coef``, the weight that the iteration used.

    Args:
        target: entropy to be held, nats, > 0.
        step: change of the weight in one iteration, > 0.
        highest: largest weight; the smallest is 0.

    Raises:
        ConfigError: for a value out of range, naming its override.

    References:
        He et al. 2025, arXiv:2505.22312, sec. 4 (adaptive entropy control), with the weight itself moved
        where they switch it off above the target.
    """

    def __init__(self, *, target: float, step: float = 1e-4, highest: float = 0.05) -> None:
        for name, value in (("target", target), ("step", step), ("highest", highest)):
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(
                    f"callbacks.entropy_coef.{name}={value}",
                    "a number > 0",
                    f"callbacks.entropy_coef.{name}={'0.5' if name == 'target' else '0.01'}",
                )
        self.target, self.step, self.highest = target, step, highest
        self._coef: float | None = None
        self._entropy, self._tokens = 0.0, 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with a checkpoint's weight."""
        assert isinstance(pl_module, RLVRModule)
        if self._coef is not None:
            pl_module.entropy_coef = self._coef

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Measure one update."""
        self._entropy += outputs["entropy"][outputs["mask"]].double().sum().item()
        self._tokens += outputs["mask"].sum().item()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the weight that was used, and set the next iteration's."""
        assert isinstance(pl_module, RLVRModule)
        pl_module.ledger.add("train/entropy_coef", pl_module.entropy_coef)
        measured = torch.tensor([self._entropy, self._tokens], dtype=torch.float64, device=pl_module.device)
        entropy, tokens = trainer.strategy.reduce(measured, reduce_op="sum").tolist()
        self._entropy, self._tokens = 0.0, 0.0
        if not (tokens and math.isfinite(entropy)):
            return
        mean = entropy / tokens
        change = self.step * ((mean < self.target) - (mean > self.target))
        self._coef = pl_module.entropy_coef = min(max(pl_module.entropy_coef + change, 0.0), self.highest)

    def state_dict(self) -> dict[str, Any]:
        """The next iteration's weight."""
        return {"coef": self._coef}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._coef = state_dict["coef"]

    def __str__(self) -> str:
        return f"adapted by {self.step:g} an iteration towards {self.target:g} nats, at most {self.highest:g}"
