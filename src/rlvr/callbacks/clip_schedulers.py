"""Clip schedulers: once an iteration, one setter of the module."""

from abc import abstractmethod
from dataclasses import replace
from typing import Any

from lightning import Callback, LightningModule, Trainer

from rlvr import schedules
from rlvr.batch import Batch, IterationFacts
from rlvr.clipping import ClipRange, LinearThreshold, Mode
from rlvr.errors import ConfigError
from rlvr.module import RLVRModule
from rlvr.schedules import DYNAMIC_LOWER, DYNAMIC_UPPER, EPS_STD, SecondPhase


class ClipScheduler(Callback):
    """Sets the clip range before the first update of every iteration; subclasses say to what.

    A schedule is a function of the share of training done, so the number of iterations is part of it:
    resuming with another one is refused unless ``allow_new_length``.

    Args:
        mode: which probability the thresholds see, see :class:`ClipRange`.
        allow_new_length: resume although ``trainer.max_epochs`` has changed, stretching the rest of the
            schedule.
    """

    def __init__(self, *, mode: Mode = "current", allow_new_length: bool = False) -> None:
        self.mode: Mode = mode
        self.allow_new_length = allow_new_length
        self._total: int | None = None
        self._resumed_total: int | None = None

    @abstractmethod
    def clip_range(self, progress: float, facts: IterationFacts) -> ClipRange:
        """Return the thresholds at ``progress``, the share of training done in [0, 1)."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run without an end, or one whose end has moved."""
        total = self._total = trainer.max_epochs
        if total is None or total < 1:
            raise ConfigError(
                f"trainer.max_epochs={total}",
                "a number of iterations, which a schedule needs",
                "trainer.max_epochs=100",
            )
        if self._resumed_total not in (None, total) and not self.allow_new_length:
            raise ConfigError(
                f"trainer.max_epochs={total}",
                f"{self._resumed_total}, as in the checkpoint: the schedule would change under the run",
                f"trainer.max_epochs={self._resumed_total}, or ++clip.allow_new_length=true",
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Set the iteration's clip range before its first update."""
        if batch_idx:
            return
        assert isinstance(pl_module, RLVRModule)
        assert trainer.max_epochs
        progress = batch.facts.iteration / trainer.max_epochs
        pl_module.set_clip_range(replace(self.clip_range(progress, batch.facts), mode=self.mode), writer=self)

    def state_dict(self) -> dict[str, Any]:
        """The number of iterations that the schedule runs over."""
        return {"total": self._total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember it, to be compared when training starts."""
        self._resumed_total = state_dict["total"]


class IncreaseThenDecrease(ClipScheduler):
    """Raise entropy in the first phase, lower it in the second (arXiv:2602.09782, sec. 4.2, "ID").

    .. code-block:: yaml

        # conf/clip/id.yaml          rlvr-train clip=id clip.turn=0.4
        _target_: rlvr.callbacks.IncreaseThenDecrease

    Args:
        high: dynamic upper threshold that phase I starts from.
        low: dynamic lower threshold of phase II.
        base: constant threshold, the paper's eps_std, dimensionless.
        turn: share of training in phase I, in (0, 1).
        second_phase: the paper's ``text`` or its ``printed`` formula, see
            :func:`rlvr.schedules.increase_then_decrease`.
        mode: see :class:`ClipScheduler`.
        allow_new_length: see :class:`ClipScheduler`.
    """

    schedule = staticmethod(schedules.increase_then_decrease)

    def __init__(
        self,
        *,
        high: LinearThreshold = DYNAMIC_UPPER,
        low: LinearThreshold = DYNAMIC_LOWER,
        base: LinearThreshold = EPS_STD,
        turn: float = 0.5,
        second_phase: SecondPhase = "text",
        mode: Mode = "current",
        allow_new_length: bool = False,
    ) -> None:
        super().__init__(mode=mode, allow_new_length=allow_new_length)
        self.high, self.low, self.base = high, low, base
        self.turn = turn
        self.second_phase: SecondPhase = second_phase
        # Both phases at once: what cannot work must not wait for half of the run.
        self._ends = [replace(self.clip_range(at, _NOTHING), mode=mode) for at in (0.0, turn, 1 - 1e-9)]

    def clip_range(self, progress: float, facts: IterationFacts) -> ClipRange:
        """A function of progress alone: no state, and a resumed run sees the same bounds."""
        return self.schedule(
            progress,
            high=self.high,
            low=self.low,
            base=self.base,
            turn=self.turn,
            second_phase=self.second_phase,
        )

    def __str__(self) -> str:
        first, turn, last = self._ends
        return f"{type(self).__name__}: {first} -> at {self.turn:.0%} {turn} -> {last}"


class DecreaseIncreaseDecrease(IncreaseThenDecrease):
    """Let entropy fall as in GRPO, raise it, lower it after (arXiv:2602.09782, sec. 4.2, "DID").

    Args: as :class:`IncreaseThenDecrease`, with ``high`` what phase I moves to and phase II keeps.
    """

    schedule = staticmethod(schedules.decrease_increase_decrease)


class OscillatoryDecay(ClipScheduler):
    """Keep entropy inside a corridor that narrows (arXiv:2602.09782, sec. 4.2, "OD").

    Args:
        high: dynamic upper threshold while entropy is raised.
        low: dynamic lower threshold while entropy is lowered.
        base: constant threshold of the other side.
        floor: the corridor's floor as a share of the initial entropy, in [0, 1).
        initial_entropy: nats; null takes the first iteration's.
        mode: see :class:`ClipScheduler`.
        allow_new_length: see :class:`ClipScheduler`.
    """

    def __init__(
        self,
        *,
        high: LinearThreshold = DYNAMIC_UPPER,
        low: LinearThreshold = DYNAMIC_LOWER,
        base: LinearThreshold = EPS_STD,
        floor: float = 0.2,
        initial_entropy: float | None = None,
        mode: Mode = "current",
        allow_new_length: bool = False,
    ) -> None:
        super().__init__(mode=mode, allow_new_length=allow_new_length)
        self.machine = schedules.OscillatoryDecay(
            high=high, low=low, base=base, floor=floor, initial_entropy=initial_entropy
        )
        # Both states at once: what cannot work must not wait for the first switch.
        ClipRange(lower=base, upper=high, mode=mode)
        ClipRange(lower=low, upper=base, mode=mode)

    def clip_range(self, progress: float, facts: IterationFacts) -> ClipRange:
        """Decide from the entropy of this iteration's responses, which is the same on every rank."""
        return self.machine.step(facts.entropy, progress)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Set the clip range, and log the state: a run of OD is evidence only if it switched."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0:
            assert isinstance(pl_module, RLVRModule)
            assert trainer.max_epochs
            low, high = self.machine.corridor(batch.facts.iteration / trainer.max_epochs)
            pl_module.ledger.add("clip/od_raising", float(self.machine.raising))
            pl_module.ledger.add("clip/od_switches", float(self.machine.switches))
            pl_module.ledger.add("clip/od_low", low)
            pl_module.ledger.add("clip/od_high", high)

    def state_dict(self) -> dict[str, Any]:
        """The schedule's length, the initial entropy, the direction."""
        return {**super().state_dict(), "machine": self.machine.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        self.machine.load_state_dict(state_dict["machine"])

    def __str__(self) -> str:
        machine = self.machine
        return (
            f"OscillatoryDecay: raising upper {machine.high}, lower {machine.base}; "
            f"lowering upper {machine.base}, lower {machine.low}; floor {machine.floor:g}"
        )


_NOTHING = IterationFacts(iteration=0, entropy=0.0, reward_mean=0.0)
