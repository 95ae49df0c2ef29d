r"""Metamorphic tests of the math verifier on gold answers of real data and on families of notations.

A value written otherwise is the same; one that is changed by little is not.
"""

import random
import re
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import shared_data
from math_verify import parse

from rlvr.batch import Prompt
from rlvr.verifiers import MathVerifier

SETS = ["math500", "olympiadbench_maths_en", "hmmt_24_25", "minerva_math", "gsm8k_test"]


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    made = MathVerifier(workers=2, deadline_s=10.0)
    yield made
    made.close()


def judged(verifier: MathVerifier, pairs: list[tuple[str, str]]) -> list[bool]:
    """Whether each answer, in a box, is right by its gold one; no worker may fail on any."""
    futures = [
        verifier.submit(Prompt(index=0, id="p", text="", answer=gold), rf"Thus \boxed{{{answer}}}.")
        for gold, answer in pairs
    ]
    verdicts = [future.result() for future in futures]
    failed = [pair for pair, v in zip(pairs, verdicts, strict=True) if v.reason.startswith("verifier error")]
    assert not failed
    return [verdict.correct for verdict in verdicts]


def golds(name: str) -> list[str]:
    return list(dict.fromkeys(str(row["answer"]) for row in shared_data.rows(f"eval/{name}.jsonl")))[:400]


UNICODE = {
    r"\\pi(?![a-z])": "π", r"\\infty(?![a-z])": "∞", r"\\cup(?![a-z])": "∪", r"\\pm(?![a-z])": "±", "-": "−",
    r"\^\{?\\circ\}?": "°", r"\\geq?(?![a-z])|\\geqslant": "≥", r"\\omega(?![a-z_])": "ω",
    r"\\cdot(?![a-z])": "·",
    r"\\sqrt\{(\d+)\}": r"√\1", r"\^(?:2|\{2\})(?!\d)": "²", r"\\lfloor": "⌊", r"\\rfloor": "⌋",
}  # fmt: skip


def in_unicode(gold: str) -> str:
    for command, character in UNICODE.items():
        gold = re.sub(command, character, gold)
    return gold


def slashed(gold: str) -> str:
    return re.sub(r"(?<![\d}])(?<![\d}] )\\d?frac\{(-?\d+)\}\{(\d+)\}(?=[$,)\]. ]|$)", r"(\1/\2)", gold)


def spaced(gold: str) -> str:
    """Thin spaces around signs."""
    return re.sub(r"(?<=[\d})])([-+=])(?=[\d\\(])", r"\\,\1\\ ", gold)


REWRITES: dict[str, Callable[[str], str]] = {
    "dollars": lambda gold: f"${gold}$" if "$" not in gold else gold,
    "period": lambda gold: gold + ".",
    "braces": lambda gold: f"{{{gold}}}" if "$" not in gold else gold,
    "display style": lambda gold: r"\displaystyle " + gold,
    "dfrac": lambda gold: re.sub(r"\\frac(?![a-z])", r"\\dfrac", gold),
    "tfrac": lambda gold: re.sub(r"\\d?frac(?![a-z])", r"\\tfrac", gold),
    "left and right": lambda gold: (
        re.sub(r"(?<!\\left)\(([^()]*)\)(?!\))", r"\\left(\1\\right)", gold) if "left" not in gold else gold
    ),
    "without left and right": lambda gold: (
        re.sub(r"\\left(?![a-z])|\\right(?![a-z.])", "", gold) if r"\right." not in gold else gold
    ),
    "Unicode": in_unicode,
    "slash": slashed,
    "spaces": spaced,
    "no spaces": lambda gold: (
        re.sub(r"(?<=[\d,+=}-]) +(?=[\d+=-])", "", gold) if "text" not in gold else gold
    ),
    "text as mbox": lambda gold: gold.replace(r"\text", r"\mbox"),
    "bare indices": lambda gold: re.sub(r"_\{(\w)\}", r"_\1", gold),
    "braced powers": lambda gold: re.sub(r"\^(\w)(?!\w)", r"^{\1}", gold),
    "doubled backslashes": lambda gold: gold.replace("\\", r"\\") if "begin" not in gold else gold,
}


@pytest.mark.parametrize("name", SETS)
def test_golds_written_otherwise(verifier: MathVerifier, name: str) -> None:
    """Looks do not matter: each gold answer of real data is itself in every rewriting."""
    pairs = [(gold, rewrite(gold)) for gold in golds(name) for rewrite in REWRITES.values()]
    pairs = [pair for pair in dict.fromkeys(pairs) if pair[0] != pair[1]]
    wrong = [pair for pair, same in zip(pairs, judged(verifier, pairs), strict=True) if not same]
    assert not wrong, f"{len(wrong)} of {len(pairs)}: {wrong[:60]}"


def another_digit(gold: str, draw: random.Random) -> str:
    place = draw.choice([match.start() for match in re.finditer(r"\d", gold)])
    digit = draw.choice([d for d in "123456789" if d != gold[place]])
    return gold[:place] + digit + gold[place + 1 :]


@pytest.mark.parametrize("name", SETS)
def test_golds_with_another_digit(verifier: MathVerifier, name: str) -> None:
    """One digit that is another one is a wrong answer, wherever it stands."""
    draw = random.Random(4)
    pairs = [
        (gold, another_digit(gold, draw)) for gold in golds(name) if re.search(r"\d", gold) for _ in "123"
    ]
    wrong = [pair for pair, same in zip(pairs, judged(verifier, pairs), strict=True) if same]
    assert not wrong, f"{len(wrong)} of {len(pairs)}: {wrong[:60]}"


def value(gold: str) -> float | None:
    """What math-verify makes of a gold answer that is one number."""
    found = parse(gold if "$" in gold else f"${gold}$", parsing_timeout=None)
    try:
        return float(found[0].evalf()) if found else None
    except (AttributeError, TypeError):
        return None


@pytest.mark.parametrize("name", SETS)
def test_golds_are_told_apart(verifier: MathVerifier, name: str) -> None:
    """A gold answer that is a number is unlike the next larger one of its set, and unlike any other."""
    numbers = sorted(
        (size, gold) for gold in golds(name) if "," not in gold and (size := value(gold)) is not None
    )
    draw = random.Random(5)
    others = [draw.choice(numbers) for _ in numbers]
    pairs = [
        (one, other)
        for (x, one), (y, other) in [*pairwise(numbers), *zip(numbers, others, strict=True)]
        if abs(x - y) > 1e-9 * abs(x)
    ]
    assert len(pairs) > 100
    wrong = [pair for pair, same in zip(pairs, judged(verifier, pairs), strict=True) if same]
    assert not wrong, f"{len(wrong)} of {len(pairs)}: {wrong[:60]}"
