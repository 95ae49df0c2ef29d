"""What a loss asks of the one who calls it, and which thresholds it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from rlvr.clipping import ClipRange
from rlvr.errors import ConfigError
from rlvr.losses.inputs import Loss, LossInputs, LossOutputs

BoundsUse = Literal["clip", "weight", "none"]
DEFAULT_CLIP = ClipRange.fixed(0.2, 0.2)
"""What ``conf/clip/constant.yaml`` gives: nobody has asked for bounds."""


@dataclass(frozen=True)
class Needs:
    """Properties of a loss; one without them is token-local and clips by any thresholds, as PPO does.

    Args:
        bounds: ``clip``: a token beyond its bound loses its gradient; ``weight``: a bound caps a weight and
            every token keeps its gradient; ``none``: the thresholds are not read.
        constant: the thresholds may not depend on the token's probability.
        sequence_stats: the loss reads ``sequence_log_ratio``, which takes a pass over the head of its own.
        judge: of thresholds that would make it another loss: raises :class:`ConfigError`, or returns a
            warning, or None.
    """

    bounds: BoundsUse = "clip"
    constant: bool = False
    sequence_stats: bool = False
    judge: Callable[[ClipRange], str | None] = lambda clip: None


@runtime_checkable
class SelectingLoss(Protocol):
    """A loss that treats a few tokens of the whole mini-batch, over all ranks, in another way.

    Before the micro-batches of an update, a pass without gradient asks for every token's score;
    ``max(1, int(fraction * tokens))`` of the best arrive as ``LossInputs.selected``, all if there are fewer.
    """

    @property
    def fraction(self) -> float:
        """Share of the mini-batch's valid tokens."""
        ...

    def scores(self, inputs: LossInputs, covariance: Tensor) -> Tensor:
        """Rank of each token, [N] float64, higher first; -inf: never selected. Equal ones are drawn."""
        ...

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """As any loss."""
        ...


Function = TypeVar("Function", bound=Callable[..., LossOutputs])


def needing(needs: Needs) -> Callable[[Function], Function]:
    """Mark a loss function with its needs; a loss that is a class has them as an attribute ``needs``."""

    def mark(function: Function) -> Function:
        function.needs = needs  # type: ignore[attr-defined]
        return function

    return mark


def needs_of(loss: Loss) -> Needs:
    """Needs of a loss, through ``functools.partial``; of one from outside that says nothing, the defaults."""
    needs = getattr(getattr(loss, "func", loss), "needs", None)
    return needs if isinstance(needs, Needs) else Needs()


def name_of(part: Callable[..., object]) -> str:
    """How a loss, or another callable part, is called in messages and in the objective line."""
    function = getattr(part, "func", part)
    return str(getattr(function, "__name__", type(function).__name__))


def check_clip(loss: Loss, clip: ClipRange) -> str | None:
    """Refuse thresholds that a loss cannot use.

    Args:
        loss: of :mod:`rlvr.losses`, or from outside.
        clip: what it is to be given.

    Returns:
        A warning where they are legal but not what the loss was made for, or None.

    Raises:
        ConfigError: where they would have no effect, or would make it another loss.
    """
    needs, name = needs_of(loss), name_of(loss)
    if needs.bounds == "none" and clip != DEFAULT_CLIP:
        raise ConfigError(
            f"clip: {clip}", f"the default, for {name} has no bounds: these would do nothing", "clip=constant"
        )
    if needs.constant and (clip.lower.slope or clip.upper.slope):
        raise ConfigError(
            f"clip: {clip}",
            f"constants: the thresholds of {name} cannot depend on a token's probability",
            f"clip={name.removesuffix('_clip')}",
        )
    return needs.judge(clip)
