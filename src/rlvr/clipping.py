r"""Probability-dependent clip thresholds: the method's one new object (arXiv:2602.09782, sec. 4.1).

PPO keeps a token's gradient while its ratio :math:`r = p/q` stays in :math:`[1 - E^-,\ 1 + E^+]`. Here both
thresholds are linear in the token's current probability, :math:`E(p) = \mathrm{slope} \cdot p +
\mathrm{intercept}`, so that a clip scheme is a value, :class:`ClipRange`, and a schedule is a function that
returns one.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from torch import Tensor

Mode = Literal["current", "closed_form", "old"]
Probability = TypeVar("Probability", float, Tensor)

ROUNDING = 1e-12
"""How far a threshold may leave its range: mixtures of valid thresholds stay valid."""


@dataclass(frozen=True)
class LinearThreshold:
    r"""A clip threshold linear in a probability: :math:`E(p) = \mathrm{slope} \cdot p + \mathrm{intercept}`.

    Args:
        slope: change from p = 0 to p = 1, dimensionless.
        intercept: the threshold at p = 0, dimensionless.

    Raises:
        ValueError: where the threshold is not a number, or negative for some p in [0, 1].
    """

    slope: float
    intercept: float

    def __post_init__(self) -> None:
        if math.isnan(self.slope) or math.isinf(self.slope) or math.isnan(self.intercept):
            raise ValueError(
                f"a threshold needs a finite slope and a number, got {self.slope}p+{self.intercept}"
            )
        if min(self(0.0), self(1.0)) < -ROUNDING:
            raise ValueError(
                f"a threshold must be >= 0 for every p in [0, 1], got {self} ({self(1.0):g} at p = 1)"
            )

    def __call__(self, probs: Probability) -> Probability:
        """Evaluate the threshold: a float for a float, a tensor of any shape for a tensor."""
        return self.slope * probs + self.intercept

    def mix(self, other: "LinearThreshold", share: float) -> "LinearThreshold":
        """Return ``(1 - share) * self + share * other``, which is linear again; ``share`` in [0, 1]."""
        if not 0 <= share <= 1:
            raise ValueError(f"thresholds are mixed by a share in [0, 1], got {share}")
        return LinearThreshold(
            slope=(1 - share) * self.slope + share * other.slope,
            intercept=(1 - share) * self.intercept + share * other.intercept,
        )

    def __str__(self) -> str:
        return f"{self.slope:.4g}p+{self.intercept:.4g}" if self.slope else f"{self.intercept:.4g}"


@dataclass(frozen=True)
class ClipRange:
    r"""A clip scheme: a lower and an upper threshold, fixed for one iteration.

    Args:
        lower: :math:`E^-`; tokens with A < 0 are clipped where :math:`r < 1 - E^-`. At most 1 everywhere.
        upper: :math:`E^+`; tokens with A > 0 are clipped where :math:`r > 1 + E^+`.
        mode: which probability the thresholds see. ``current``: p, detached. ``closed_form``: p eliminated by
            :math:`p = r q` (eq. 8); keeps the same tokens with the same gradient. ``old``: q put in for p,
            another rule (at q = 0.5 the paper's upper bound is 1.375 instead of 1.3333), for ablation.

    Raises:
        ValueError: where a bound would be no ratio (lower threshold above 1), or eq. 8 has no solution.
    """

    lower: LinearThreshold
    upper: LinearThreshold
    mode: Mode = "current"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"clip mode {self.mode!r} is none of {', '.join(get_args(Mode))}")
        if max(self.lower(0.0), self.lower(1.0)) > 1 + ROUNDING:
            raise ValueError(
                f"the lower threshold must stay <= 1 (a ratio is never negative), got {self.lower}"
            )
        if self.mode == "closed_form" and (self.upper.slope >= 1 or self.lower.slope <= -1):
            raise ValueError(
                f"closed_form needs an upper slope < 1 and a lower slope > -1, "
                f"got upper {self.upper}, lower {self.lower}"
            )

    @classmethod
    def fixed(cls, low: float, high: float) -> "ClipRange":
        """Constant thresholds: PPO's and GRPO's ``fixed(0.2, 0.2)``, Clip-Higher's ``fixed(0.2, 0.28)``."""
        return cls(lower=LinearThreshold(0.0, low), upper=LinearThreshold(0.0, high))

    @classmethod
    def unclipped(cls) -> "ClipRange":
        """Every ratio allowed."""
        return cls.fixed(1.0, math.inf)

    def ratio_bounds(self, logprobs: Tensor, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        r"""Smallest and largest ratio that keep a token's gradient (eq. 8 for ``closed_form``).

        Args:
            logprobs: :math:`\ln p`, any shape, in nats; detached here.
            old_logprobs: :math:`\ln q`, same shape.

        Returns:
            ``(min_ratio, max_ratio)`` of that shape, dimensionless, without gradient.
        """
        if self.mode == "closed_form":
            old_probs = old_logprobs.detach().exp()
            return (
                (1 - self.lower.intercept) / (1 + self.lower.slope * old_probs),
                (1 + self.upper.intercept) / (1 - self.upper.slope * old_probs),
            )
        probs = (logprobs if self.mode == "current" else old_logprobs).detach().exp()
        return 1 - self.lower(probs), 1 + self.upper(probs)

    def __str__(self) -> str:
        mode = "" if self.mode == "current" else f" ({self.mode})"
        return f"upper {self.upper}, lower {self.lower}{mode}"
