r"""Metamorphic tests of the math verifier on gold answers of real data and on families of notations.

A value written otherwise is the same; one that is changed by little is not.
"""

import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise

import pytest
import shared_data
from math_notations import DIFFERENT, SAME
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
    """Gold answers of a set, each once; of a long set, some from everywhere."""
    found = list(dict.fromkeys(str(row["answer"]) for row in shared_data.rows(f"eval/{name}.jsonl")))
    return found[:: len(found) // 150 or 1]


def test_families_are_one_value(verifier: MathVerifier) -> None:
    """Each notation in a family means the gold answer."""
    pairs = [(gold, answer) for gold, answers in SAME.items() for answer in answers]
    wrong = [pair for pair, same in zip(pairs, judged(verifier, pairs), strict=True) if not same]
    assert not wrong


def test_near_misses_are_wrong(verifier: MathVerifier) -> None:
    """Another sign, digit, order, bracket, unit, base or name is another answer; so is one element more."""
    pairs = [(gold, answer) for gold, answers in DIFFERENT.items() for answer in answers]
    wrong = [pair for pair, same in zip(pairs, judged(verifier, pairs), strict=True) if same]
    assert not wrong


@pytest.mark.parametrize(
    "gold",
    [
        r"-3/2",
        r"2/3",
        r"41/333",
        r"16",
        r"\pm 2",
        r"(1,2),(3,4)",
        r"(0,1)",
        r"(0,\infty)",
        r"k \geqslant 2",
        r"x \in [-2,7]",
        r"15\mbox{ cm}^2",
        r"\$18.90",
        r".0000672",
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        r"8.7e8",
        r"3.0 \times 10^{8} \mathrm{~m} / \mathrm{s}",
    ],
)
def test_one_vote_for_one_value(verifier: MathVerifier, gold: str) -> None:
    """What is the same by structure and exact numbers is one answer to a majority vote."""
    votes = {
        verifier(Prompt(0, "p", "", "0"), rf"\boxed{{{answer}}}").answer for answer in [gold, *SAME[gold]]
    }
    assert len(votes) == 1, votes


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
    pairs = [(gold, another_digit(gold, draw)) for gold in golds(name) if re.search(r"\d", gold)]
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
    assert len(pairs) > 50
    wrong = [pair for pair, same in zip(pairs, judged(verifier, pairs), strict=True) if same]
    assert not wrong, f"{len(wrong)} of {len(pairs)}: {wrong[:60]}"


def turned(gold: str) -> str:
    parts = gold.strip("$()").split(",")
    return f"({', '.join(parts[::-1])})" if re.fullmatch(r"\$?\([^()]+,[^()]+\)\$?", gold) else gold


CHANGES: dict[str, Callable[[str], str]] = {
    "another sign": lambda gold: f"-({gold.strip('$. ')})" if re.search("[1-9]", gold) else gold,
    "one more": lambda gold: f"{gold.strip('$. ')}, 12345",
    "a thousand times": lambda gold: rf"1000\cdot({gold.strip('$. ')})" if re.search("[1-9]", gold) else gold,
    "order": turned,
    "bracket": lambda gold: re.sub(r"^\$?(?:\\left)? ?\((?!-\\infty)(?=.*,)", "[", gold),
}


@pytest.mark.parametrize("name", SETS)
def test_golds_changed(verifier: MathVerifier, name: str) -> None:
    """Another sign, size, order or bracket, or one element more, makes a gold answer wrong."""
    pairs = [
        (gold, answer)
        for gold in golds(name)
        if not re.search(r"=|\\pm|\\text|^\\left|[a-zA-Z]{4} ", gold)
        for change in CHANGES.values()
        if (answer := change(gold)) != gold
    ]
    wrong = [pair for pair, same in zip(pairs, judged(verifier, pairs), strict=True) if same]
    assert not wrong, f"{len(wrong)} of {len(pairs)}: {wrong[:60]}"


TOLERANCE = 0.01


@pytest.fixture(scope="module")
def tolerant() -> Iterator[MathVerifier]:
    made = MathVerifier(workers=1, deadline_s=10.0, rel_tol=TOLERANCE)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("share", "right"),
    [
        pytest.param("0", True, id="exactly"),
        pytest.param("0.009", True, id="above, within"),
        pytest.param("-0.009", True, id="below, within"),
        pytest.param("0.011", False, id="above, beyond"),
        pytest.param("-0.011", False, id="below, beyond"),
        pytest.param("-2", False, id="other sign"),
    ],
)
def test_tolerance_on_minerva(
    tolerant: MathVerifier, verifier: MathVerifier, share: str, right: bool
) -> None:
    """A number within the tolerance of a gold one is right; without one, only the number itself."""
    pairs = []
    for gold in golds("minerva_math"):
        if re.fullmatch(r"-?\d*\.?\d+(e-?\d+)?", gold) and (exact := Fraction(gold)):
            answer = f"{float(exact * (1 + Fraction(share))):.12e}".replace("e", r" \times 10^{") + "}"
            pairs.append((gold, answer.replace("{+", "{")))
    assert len(pairs) > 80
    assert set(judged(tolerant, pairs)) == {right}
    assert set(judged(verifier, pairs)) == {share == "0"}


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        pytest.param("1000", "1009", True, id="integers, within"),
        pytest.param("1000", "1011", False, id="integers, beyond"),
        pytest.param("1000", "-1000", False, id="sign"),
        pytest.param("0", "0.001", False, id="of zero nothing is a share"),
        pytest.param("np.arcsin(10/13)", "0.88", True, id="formula and decimal, within"),
        pytest.param("np.arcsin(10/13)", "0.89", False, id="formula and decimal, beyond"),
        pytest.param(r"\sqrt{2}", r"\frac{7}{5}+0.01", True, id="two formulas"),
        pytest.param("2x", "2.001x", False, id="formulas with variables stay exact"),
        pytest.param("(1,2)", "(1.001,2)", True, id="in a tuple"),
        pytest.param("5 cm", "5.01 m", False, id="units stay"),
    ],
)
def test_tolerance(tolerant: MathVerifier, gold: str, answer: str, right: bool) -> None:
    assert judged(tolerant, [(gold, answer)]) == [right]
