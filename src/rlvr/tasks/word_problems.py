"""Graded word problems for very small language models: one or two steps of whole-number arithmetic."""

from collections.abc import Callable, Sequence

import numpy as np

from rlvr.batch import Prompt
from rlvr.keyed import generator

NAMES = ("Anna", "Ben", "Clara", "David", "Ella", "Frank", "Grace", "Henry", "Ida", "Jack", "Kim", "Leo")
THINGS = ("apples", "books", "coins", "pens", "shells", "stamps", "cards", "stones", "cups", "balls")


def _add(name: str, thing: str, a: int, b: int, c: int) -> tuple[str, int]:
    return f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", a + b


def _take(name: str, thing: str, a: int, b: int, c: int) -> tuple[str, int]:
    return f"{name} has {a + b} {thing} and gives away {b}. How many {thing} are left?", a


def _sum(name: str, thing: str, a: int, b: int, c: int) -> tuple[str, int]:
    return f"What is {a} + {b}?", a + b


def _groups(name: str, thing: str, a: int, b: int, c: int) -> tuple[str, int]:
    return f"{name} has {a} boxes with {b} {thing} in each. How many {thing} are there?", a * b


def _two_steps(name: str, thing: str, a: int, b: int, c: int) -> tuple[str, int]:
    return (
        f"{name} has {a + b} {thing}, gives away {b} and finds {c}. How many {thing} does {name} have now?",
        a + c,
    )


Kind = Callable[[str, str, int, int, int], tuple[str, int]]
LEVELS: tuple[tuple[int, tuple[Kind, ...]], ...] = (
    (9, (_sum,)),
    (9, (_add, _take)),
    (30, (_add, _take, _sum)),
    (12, (_groups, _two_steps)),
)
"""Largest number, and the kinds of problem."""


class WordProblemsTask:
    """Word problems of chosen difficulties, levels in turn, for ``verifier=integer``.

    Args:
        train: number of training prompts.
        heldout: number of held-out prompts, which no training prompt repeats.
        levels: difficulties to draw from, 1 to 4; see :data:`LEVELS`.
        seed: of the prompts, independent of the run's seed.
        instruction: put after the problem.
        chat: put prompts through the tokenizer's chat template.

    Raises:
        ValueError: for sizes below 1, a level that is not there, or more prompts than there are problems.
    """

    def __init__(
        self,
        *,
        train: int = 2048,
        heldout: int = 64,
        levels: Sequence[int] = (2,),
        seed: int = 0,
        instruction: str = "",
        chat: bool = True,
    ) -> None:
        if train < 1 or heldout < 1:
            raise ValueError(f"train={train} and heldout={heldout} must both be at least 1")
        if not levels or not set(levels) <= set(range(1, len(LEVELS) + 1)):
            raise ValueError(f"levels={list(levels)} must be some of 1 to {len(LEVELS)}")
        self.chat, self.instruction = chat, instruction
        seen: set[str] = set()
        self._heldout = self._draw("heldout", heldout, levels, seed, seen)
        self._train = self._draw("train", train, levels, seed, seen)

    def train(self) -> Sequence[Prompt]:
        """Prompts to train on."""
        return self._train

    def heldout(self) -> Sequence[Prompt]:
        """Prompts kept from training."""
        return self._heldout

    def _draw(
        self, split: str, number: int, levels: Sequence[int], seed: int, seen: set[str]
    ) -> list[Prompt]:
        """``number`` problems that are not in ``seen``."""
        random = generator(seed, f"word problems {split}")
        prompts: list[Prompt] = []
        while len(prompts) < number:
            index = len(prompts)
            level = levels[index % len(levels)]
            for _ in range(1000):
                problem, answer = _problem(random, level)
                if problem not in seen:
                    break
            else:
                raise ValueError(
                    f"level {level} has no more than {index} problems: lower train={number}, or add levels"
                )
            seen.add(problem)
            text = f"{problem} {self.instruction}".strip()
            prompts.append(Prompt(index, f"words-{split}-{index}", text, str(answer), {"level": level}))
        return prompts


def _problem(random: np.random.Generator, level: int) -> tuple[str, int]:
    largest, kinds = LEVELS[level - 1]
    name, thing = NAMES[random.integers(len(NAMES))], THINGS[random.integers(len(THINGS))]
    a, b, c = random.integers(1, largest, size=3, endpoint=True).tolist()
    return kinds[random.integers(len(kinds))](name, thing, a, b, c)
