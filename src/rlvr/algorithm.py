"""The algorithm: which loss, how it is averaged, and how the optimizer steps."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.optim.lr_scheduler import LambdaLR

from rlvr.advantages import group_relative
from rlvr.errors import ConfigError, require_numbers
from rlvr.losses import Aggregation, Loss, ppo_clip, token_mean

LearningRate = Literal["constant", "cosine"]


@dataclass(frozen=True)
class Algorithm:
    """Everything between rollouts and weights but for the clip range; made from ``conf/algorithm``.

    Args:
        loss: per-token loss, see :mod:`rlvr.losses`.
        aggregation: weights of the tokens, see :mod:`rlvr.losses.aggregation`.
        normalize_std: divide advantages by their group's standard deviation.
        entropy_coef: weight of the entropy bonus; 0 is off.
        kl_coef: weight of the divergence from the initial policy; 0 is off, and then no reference is kept.
        kl_estimator: ``k2`` or ``k3``, see :mod:`rlvr.losses.kl`.
        lr: AdamW's learning rate after the warm-up.
        lr_schedule: ``constant``, or ``cosine`` down to 0 at the last update.
        warmup: share of all updates over which the learning rate rises linearly, in [0, 1).
        betas: AdamW's.
        weight_decay: AdamW's, decoupled.
        gradient_clip: largest gradient norm; null is off.
        max_skipped: updates skipped for a loss or gradient that is not finite before the run stops.

    Raises:
        ConfigError: for a value out of range, naming its override.
    """

    loss: Loss = ppo_clip
    aggregation: Aggregation = token_mean
    normalize_std: bool = True
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    lr: float = 1e-6
    lr_schedule: LearningRate = "constant"
    warmup: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.1
    gradient_clip: float | None = 1.0
    max_skipped: int = 10

    def __post_init__(self) -> None:
        if self.kl_estimator not in ("k2", "k3"):
            raise ConfigError(
                f"algorithm.kl_estimator={self.kl_estimator}",
                "k2 or k3 (k1 has zero expected gradient as a loss)",
                "algorithm.kl_estimator=k3",
            )
        if self.lr_schedule not in get_args(LearningRate):
            raise ConfigError(
                f"algorithm.lr_schedule={self.lr_schedule}",
                "constant or cosine",
                "algorithm.lr_schedule=constant",
            )
        names = ("lr", "warmup", "kl_coef", "entropy_coef", "weight_decay", "gradient_clip", "max_skipped")
        numbers = {name: getattr(self, name) for name in names}
        require_numbers("algorithm", optional=("gradient_clip",), **numbers)
        for name, value, least, below in (
            ("lr", self.lr, 0.0, math.inf),
            ("warmup", self.warmup, 0.0, 1.0),
            ("kl_coef", self.kl_coef, 0.0, math.inf),
            ("weight_decay", self.weight_decay, 0.0, math.inf),
            ("max_skipped", self.max_skipped, 1, math.inf),
            ("betas[0]", self.betas[0], 0.0, 1.0),
            ("betas[1]", self.betas[1], 0.0, 1.0),
        ):
            if not least <= value < below:
                raise ConfigError(
                    f"algorithm.{name}={value}",
                    f"a number in [{least:g}, {below:g})",
                    f"algorithm.{name}={least:g}",
                )
        if not math.isfinite(self.entropy_coef):
            raise ConfigError(
                f"algorithm.entropy_coef={self.entropy_coef}", "a finite number", "algorithm.entropy_coef=0"
            )
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ConfigError(
                f"algorithm.gradient_clip={self.gradient_clip}", "> 0, or null", "algorithm.gradient_clip=1.0"
            )

    def advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        """Group-relative advantages: [P, G] -> [P, G]."""
        return group_relative(rewards, normalize_std=self.normalize_std)

    def optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
        """AdamW over the given parameters."""
        return torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)

    def learning_rate(self, optimizer: torch.optim.Optimizer, updates: int) -> LambdaLR:
        """Schedule over ``updates``, the number of optimizer steps of the whole run."""
        warmup = math.ceil(self.warmup * updates)

        def factor(update: int) -> float:
            if update < warmup:
                return (update + 1) / warmup
            if self.lr_schedule == "constant":
                return 1.0
            done = (update - warmup) / max(updates - warmup, 1)
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

        return LambdaLR(optimizer, factor)
