"""The embedded task: any M of the given letters, in alphabetical order; many answers are right."""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from rlvr.batch import Prompt, Verdict
from rlvr.keyed import generator


@dataclass(frozen=True)
class Level:
    """How many letters are given, and how many are asked for: C(given, asked) right answers."""

    given: int
    asked: int


LEVELS = (Level(6, 3), Level(8, 4), Level(10, 5), Level(12, 6))
"""20, 70, 252 and 924 right answers."""


MOST_PROMPTS = 1_000_000
"""They are drawn and held in memory; even the easiest level has 165 times as many."""


class LettersTask:
    """Prompts such as ``4:qbzkmtae>``, answered for instance by ``abkq``.

    What there is to learn: to choose among the letters given, to go up the alphabet, to stop in time. What
    there is to lose: the many other right answers, which is what makes it a task for entropy control.

    Args:
        train: number of training prompts.
        heldout: number of held-out prompts, which no training prompt repeats.
        levels: difficulties to draw from, 1 to 4; see :data:`LEVELS`.
        seed: of the prompts; independent of the run's seed, so that runs share their held-out prompts.

    Raises:
        ValueError: for sizes below 1, or a level that is not there.
    """

    chat = False

    def __init__(
        self, *, train: int = 4096, heldout: int = 96, levels: Sequence[int] = (1, 2, 3, 4), seed: int = 0
    ) -> None:
        if train < 1 or heldout < 1:
            raise ValueError(f"train={train} and heldout={heldout} must both be at least 1")
        if not levels or not set(levels) <= set(range(1, len(LEVELS) + 1)):
            raise ValueError(f"levels={list(levels)} must be some of 1 to {len(LEVELS)}")
        if train + heldout > MOST_PROMPTS:
            raise ValueError(f"train={train} and heldout={heldout} exceed {MOST_PROMPTS} prompts in all")
        chosen = [LEVELS[level - 1] for level in levels]
        seen: set[str] = set()
        self._heldout = _draw(chosen, heldout, "heldout", seed, seen)
        self._train = _draw(chosen, train, "train", seed, seen)

    def train(self) -> Sequence[Prompt]:
        """Prompts to train on."""
        return self._train

    def heldout(self) -> Sequence[Prompt]:
        """Prompts kept from training."""
        return self._heldout


class LettersVerifier:
    """Reward 1 for exactly the letters asked for: given ones, none twice, in alphabetical order; else 0."""

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        """Judge one response."""
        given, asked = set(prompt.meta["letters"]), prompt.meta["asked"]
        if len(completion) != asked:
            reason = "wrong number of letters"
        elif not set(completion) <= given:
            reason = "letter not given"
        elif any(left >= right for left, right in zip(completion, completion[1:], strict=False)):
            reason = "not in alphabetical order"
        else:
            return Verdict(1.0, correct=True, answer=completion, reason="right")
        return Verdict(0.0, correct=False, answer=completion or None, reason=reason)


def _draw(levels: list[Level], number: int, split: str, seed: int, seen: set[str]) -> list[Prompt]:
    """``number`` prompts that are not in ``seen``, levels in turn."""
    random = generator(seed, f"letters {split}")
    prompts: list[Prompt] = []
    while len(prompts) < number:
        level = levels[len(prompts) % len(levels)]
        letters = "".join(random.permutation(list(ascii_lowercase))[: level.given])
        text = f"{level.asked}:{letters}>"
        if text in seen:
            continue
        seen.add(text)
        # Any right answer would do; this one shows the form.
        example = "".join(sorted(letters)[: level.asked])
        meta = {"letters": letters, "asked": level.asked, "level": LEVELS.index(level) + 1}
        index = len(prompts)
        prompts.append(
            Prompt(index=index, id=f"letters-{split}-{index}", text=text, answer=example, meta=meta)
        )
    return prompts
