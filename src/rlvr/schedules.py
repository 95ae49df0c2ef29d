r"""The three entropy schedules as pure functions of training progress (arXiv:2602.09782, sec. 4.2).

Progress is k/T, the share of iterations done, in [0, 1). Phase II starts at the first integer k >= turn * T:
both k/T and a turn written as a decimal are the floats nearest to their exact values, rounding keeps order,
so ``k / T >= turn`` decides this exactly.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from rlvr.clipping import ClipRange, LinearThreshold

SecondPhase = Literal["text", "printed"]

EPS_STD = LinearThreshold(0.0, 0.2)
"""PPO's constant threshold, the paper's eps_std."""
DYNAMIC_UPPER = LinearThreshold(-0.25, 0.5)
"""U(p), the paper's dynamic upper threshold: looser than 0.2 everywhere, loosest for improbable tokens."""
DYNAMIC_LOWER = LinearThreshold(-0.13, 0.3)
"""M(p), the paper's dynamic lower threshold: tighter than 0.2 only for p > 0.769."""


def _check_progress(progress: float) -> None:
    if not 0 <= progress < 1:
        raise ValueError(f"progress is the share of training done, in [0, 1), got {progress}")


def _phase(progress: float, turn: float, second_phase: str) -> tuple[int, float]:
    """Phase 1 or 2, and the share of it that is done: u = k/(turn T), or v = (k - turn T)/((1 - turn) T)."""
    _check_progress(progress)
    if not 0 < turn < 1:
        raise ValueError(f"turn must be in (0, 1), got {turn}")
    if second_phase not in get_args(SecondPhase):  # at once, not when phase II begins
        raise ValueError(f"second_phase {second_phase!r} is none of {', '.join(get_args(SecondPhase))}")
    return (1, progress / turn) if progress < turn else (2, (progress - turn) / (1 - turn))


def _second_phase_lower(
    done: float, low: LinearThreshold, base: LinearThreshold, second_phase: str
) -> LinearThreshold:
    """Phase II's lower threshold as the paper's text has it (eps to M) or its printed formula (M to eps)."""
    return base.mix(low, done) if second_phase == "text" else low.mix(base, done)


def increase_then_decrease(
    progress: float,
    *,
    high: LinearThreshold = DYNAMIC_UPPER,
    low: LinearThreshold = DYNAMIC_LOWER,
    base: LinearThreshold = EPS_STD,
    turn: float = 0.5,
    second_phase: SecondPhase = "text",
) -> ClipRange:
    """ID: entropy is raised in phase I by a loose upper threshold that tightens, and lowered in phase II.

    Args:
        progress: share of training done, k/T, in [0, 1).
        high: dynamic upper threshold that phase I starts from.
        low: dynamic lower threshold of phase II.
        base: constant threshold used everywhere else, dimensionless.
        turn: share of training in phase I, in (0, 1).
        second_phase: ``text``: the lower threshold goes from ``base`` to ``low``, as the paper's text says
            twice; ``printed``: it jumps to ``low`` and decays back, as its formula says.
    """
    phase, done = _phase(progress, turn, second_phase)
    if phase == 1:
        return ClipRange(lower=base, upper=high.mix(base, done))
    return ClipRange(lower=_second_phase_lower(done, low, base, second_phase), upper=base)


def decrease_increase_decrease(
    progress: float,
    *,
    high: LinearThreshold = DYNAMIC_UPPER,
    low: LinearThreshold = DYNAMIC_LOWER,
    base: LinearThreshold = EPS_STD,
    turn: float = 0.5,
    second_phase: SecondPhase = "text",
) -> ClipRange:
    """DID: GRPO's fall, a rise as the upper threshold loosens in phase I, a fall in phase II under ``high``.

    Args: as :func:`increase_then_decrease`, with ``high`` what phase I moves to and phase II keeps.
    """
    phase, done = _phase(progress, turn, second_phase)
    if phase == 1:
        return ClipRange(lower=base, upper=base.mix(high, done))
    return ClipRange(lower=_second_phase_lower(done, low, base, second_phase), upper=high)


@dataclass
class OscillatoryDecay:
    r"""OD: entropy is kept inside a corridor that narrows, by switching between raising and lowering it.

    With :math:`\tau_{low} = H_{min} = f H_{init}` and :math:`\tau_{high}(k) = H_{min} + (H_{init} -
    H_{min})(1 - k/T)`: raise (``high`` above, ``base`` below) once :math:`H_k \le \tau_{low}`; lower
    (``base`` above, ``low`` below) once :math:`H_k > \tau_{high}(k)`; in between, go on as before. Starts by
    lowering.

    Args:
        high: dynamic upper threshold while entropy is raised.
        low: dynamic lower threshold while entropy is lowered.
        base: constant threshold of the other side.
        floor: :math:`f`, the corridor's floor as a share of the initial entropy, in [0, 1).
        initial_entropy: :math:`H_{init}` in nats; taken from the first iteration where None.
        raising: the state s: True raises entropy.
        switches: how often the state has changed; a run of OD is evidence only if it did.
    """

    high: LinearThreshold = DYNAMIC_UPPER
    low: LinearThreshold = DYNAMIC_LOWER
    base: LinearThreshold = EPS_STD
    floor: float = 0.2
    initial_entropy: float | None = None
    raising: bool = False
    switches: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor must be in [0, 1), got {self.floor}")
        if self.initial_entropy is not None and not 0 < self.initial_entropy < math.inf:
            raise ValueError(f"initial_entropy must be > 0 nats and finite, got {self.initial_entropy}")

    def corridor(self, progress: float) -> tuple[float, float]:
        """The two switching entropies (tau_low, tau_high) in nats; needs the initial entropy."""
        if self.initial_entropy is None:
            raise ValueError("the corridor is known once the initial entropy is")
        _check_progress(progress)
        lowest = self.floor * self.initial_entropy
        return lowest, lowest + (self.initial_entropy - lowest) * (1 - progress)

    def step(self, entropy: float, progress: float) -> ClipRange:
        """Decide this iteration's thresholds from its entropy, in nats, under the weights it starts from."""
        if not math.isfinite(entropy):
            raise ValueError(f"the iteration's entropy must be a finite number of nats, got {entropy}")
        if self.initial_entropy is None:
            self.initial_entropy = entropy
        lowest, highest = self.corridor(progress)
        raising = True if entropy <= lowest else False if entropy > highest else self.raising
        self.switches += raising != self.raising
        self.raising = raising
        if raising:
            return ClipRange(lower=self.base, upper=self.high)
        return ClipRange(lower=self.low, upper=self.base)

    def state_dict(self) -> dict[str, float | bool | int | None]:
        """What a resumed run needs: initial entropy, direction, number of switches."""
        state = asdict(self)
        return {key: state[key] for key in ("initial_entropy", "raising", "switches")}

    def load_state_dict(self, state: dict[str, float | bool | int | None]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if set(state) != set(self.state_dict()):
            raise ValueError(f"OD's state has {sorted(self.state_dict())}, got {sorted(state)}")
        for key, value in state.items():
            setattr(self, key, value)
