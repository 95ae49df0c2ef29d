"""Every loss written down from its formula, a token at a time in Python floats; no torch, no autograd.

    python tests/oracles.py     # per loss, the largest relative error of value and gradient against these

A number carries its derivative by the token's ln p (forward mode); ``sg`` drops it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CAP = 20.0


@dataclass(frozen=True)
class Dual:
    """A value and its derivative by ln p of one token."""

    value: float
    slope: float = 0.0

    def __add__(self, other: "Dual | float") -> "Dual":
        other = dual(other)
        return Dual(self.value + other.value, self.slope + other.slope)

    def __neg__(self) -> "Dual":
        return Dual(-self.value, -self.slope)

    def __sub__(self, other: "Dual | float") -> "Dual":
        return self + -dual(other)

    def __mul__(self, other: "Dual | float") -> "Dual":
        other = dual(other)
        return Dual(self.value * other.value, self.slope * other.value + self.value * other.slope)

    __radd__, __rmul__ = __add__, __mul__

    def __abs__(self) -> "Dual":
        return self if self.value > 0 else -self if self.value < 0 else Dual(0.0)


def dual(number: "Dual | float") -> Dual:
    return number if isinstance(number, Dual) else Dual(number)


def sg(x: Dual) -> float:
    return x.value


def exp(x: Dual) -> Dual:
    """With the exponent capped at 20 in value, and the slope of the capped value."""
    value = math.exp(min(x.value, CAP))
    return Dual(value, value * x.slope)


def sigmoid(x: Dual) -> Dual:
    small = math.exp(-abs(x.value))
    return Dual((1 if x.value >= 0 else small) / (1 + small), small / (1 + small) ** 2 * x.slope)


def clip(x: Dual, low: float, high: float) -> Dual:
    return x if low <= x.value <= high else Dual(min(max(x.value, low), high))


def larger(x: Dual, y: Dual) -> Dual:
    """The first where they are equal: a ratio on its bound keeps its gradient."""
    return x if x.value >= y.value else y


def smaller(x: Dual, y: Dual) -> Dual:
    return x if x.value <= y.value else y


@dataclass(frozen=True)
class Token:
    """What a loss may look at; ``lnp`` carries the derivative."""

    lnp: Dual
    lnq: float
    A: float
    lo: float = 0.2
    hi: float = 0.2
    mean_d: float = 0.0
    selected: bool = False

    @property
    def r(self) -> Dual:
        return exp(self.lnp - self.lnq)


def ppo(r: Dual, A: float, low: float, high: float) -> Dual:
    return larger(-A * r, -A * clip(r, low, high))


def ppo_clip(t: Token) -> Dual:
    return ppo(t.r, t.A, 1 - t.lo, 1 + t.hi)


def ppo_dual_clip(t: Token) -> Dual:
    loss = ppo_clip(t)
    return smaller(loss, Dual(-t.A * 3.0)) if t.A < 0 else loss


def clip_cov(t: Token) -> Dual:
    return Dual(sg(ppo_clip(t))) if t.selected else ppo_clip(t)


def kl_cov(t: Token) -> Dual:
    return -t.A * t.r + (0.5 * abs(t.lnp - t.lnq) if t.selected else 0.0)


def gspo(t: Token) -> Dual:
    s = exp(Dual(t.mean_d) + (t.lnp - sg(t.lnp)))
    return ppo(s, t.A, 1 - t.lo, 1 + t.hi)


def sapo(t: Token) -> Dual:
    tau = 1.0 if t.A > 0 else 1.05
    return -t.A * (4 / tau) * sigmoid(tau * (t.r - 1))


def cispo(t: Token) -> Dual:
    return -sg(clip(t.r, 1 - t.lo, 1 + t.hi)) * t.A * t.lnp


def ce_gppo(t: Token) -> Dual:
    one = Dual(1.0, t.lnp.slope)  # r / sg(r)
    if t.A < 0 and t.r.value < 1 - t.lo:
        loss = -0.75 * (1 - t.lo) * t.A * one
    elif t.A > 0 and t.r.value > 1 + t.hi:
        loss = -1.0 * (1 + t.hi) * t.A * one
    else:
        loss = -t.A * t.r
    return smaller(loss, Dual(-t.A * 10.0)) if t.A < 0 else loss


def dcpo_clip(t: Token) -> Dual:
    q = max(math.exp(t.lnq), 1e-300)
    low = 0.5 + 0.5 * math.sqrt(max(1 - 4 * t.lo / q, 0.0))
    high = min(0.5 + 0.5 * math.sqrt(1 + 4 * t.hi / q), 10.0)
    return ppo(t.r, t.A, low, high)


def reinforce(t: Token) -> Dual:
    return -t.A * t.lnp


ORACLES: dict[str, Callable[[Token], Dual]] = {
    "ppo_clip": ppo_clip,
    "ppo_clip, dual clip": ppo_dual_clip,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "gspo": gspo,
    "sapo": sapo,
    "cispo": cispo,
    "ce_gppo": ce_gppo,
    "dcpo_clip": dcpo_clip,
    "reinforce": reinforce,
}


def weight(name: str, mask: Sequence[Sequence[bool]], row: int, length: int = 0) -> float:
    """Of a valid token of ``row`` in the whole mini-batch, by the name of its aggregation."""
    lengths = [sum(valid) for valid in mask]
    sequences = sum(1 for valid in lengths if valid)
    return {
        "token_mean": 1 / sum(lengths),
        "sequence_mean_token_sum": 1 / sequences,
        "sequence_mean_token_mean": 1 / sequences / max(lengths[row], 1),
        "constant_length": 1 / sequences / max(length, 1),
    }[name]


def chosen(
    fraction: float, scores: Sequence[float | None], draws: Sequence[int], tokens: int | None = None
) -> list[bool]:
    """By sorting: the ``max(1, int(fraction N))`` highest, equal ones by their draw; None: never."""
    able = [i for i, score in enumerate(scores) if score is not None]
    able.sort(key=lambda i: (-scores[i], draws[i]))
    best = set(able[: max(1, int(fraction * (len(scores) if tokens is None else tokens)))])
    return [i in best for i in range(len(scores))]


if __name__ == "__main__":
    from unit.test_losses import largest_errors

    print(f"{'loss':<22}{'value':>10}{'gradient':>10}")
    for name in ORACLES:
        print(f"{name:<22}{largest_errors(name)[0]:>10.1e}{largest_errors(name)[1]:>10.1e}")
