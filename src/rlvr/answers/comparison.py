r"""Whether two answers are the same, by structure; single formulas are left to a ``Leaf``.

Lists and sets match in any order, tuples and intervals place by place. ``x = 5`` is 5 where the other side
has no name; two names must be one. Of ``x = 2 + 3 = 5`` every number must agree. A unit on one side is left
out, two must be one. A false positive teaches a policy to cheat and a false negative costs one sample: in
doubt, different.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any

from rlvr.answers.notation import Number, normal_form, number, plain_text, split_unit

Leaf = Callable[[str, str], bool]
"""Compares two formulas, equations or sets in normal form."""

_TOKEN = re.compile(r"\\begin\{[a-z]*\}|\\end\{[a-z]*\}|\\[{}]|\\[a-zA-Z]+|[A-Za-z]+|.", re.DOTALL)
_DEPTH = {"(": 1, "[": 1, "{": 1, "\\{": 1, ")": -1, "]": -1, "}": -1, "\\}": -1}
_SEPARATORS = {",", ";", "and", "or"}
_RELATIONS = {"<", ">", "\\le", "\\ge", "\\ne"}
_LETTER = (
    r"(?:\\text\{[^{}]*\}|\\[A-Za-z]+|[A-Z]+[a-z]*|[a-z](?![a-z])|[a-z]{4,})"
    r"(?:_(?:\{[^{}]*\}|\\?[A-Za-z0-9]+))?'*"
)
_NAME = re.compile(
    rf"(?:(?:\\(?:Delta|delta|angle|triangle) ?)?{_LETTER}"
    rf"|\\frac\{{[A-Z]+\}}\{{[A-Z]+\}}|\|[A-Z]+\||\\[a-z]+\{{?[A-Z]+\}}?)"
    rf"(?:\([A-Za-z0-9_,\\{{}} ]*\)|:{_LETTER})?|\({_LETTER}(?:,{_LETTER})+\)"
)
_FUNCTION = re.compile(
    r"\\(?:pi|infty|sqrt|frac|sin|cos|tan|cot|sec|csc|log|ln|exp|times|cdot|text\{[^{}]*\})"
    r"|(?<![A-Za-z\\])[ei](?![A-Za-z])"
)
_MOST = 64
"""Longest list that is compared element by element."""


def equivalent(gold: str, answer: str, leaf: Leaf) -> bool:
    """Compare two answers as written.

    Args:
        gold: the right answer.
        answer: a response's.
        leaf: compares what structure and exact numbers leave open.
    """
    gold, answer = normal_form(gold), normal_form(answer)
    if not gold or not answer:
        return False
    try:
        return gold == answer or _Comparison(leaf).whole(gold, answer)
    except RecursionError:  # brackets in brackets without end
        return False


@dataclass(frozen=True)
class _Statement:
    """An element of a list: an equation, or one value under a name or none, with the steps that led to it."""

    text: str
    name: str | None
    values: tuple[str, ...]
    equation: bool


class _Comparison:
    def __init__(self, leaf: Leaf) -> None:
        self.leaf = leaf

    def whole(self, gold: str, answer: str) -> bool:
        """Compare lists of one element or more."""
        gold, answer = _as_relation(gold), _as_relation(answer)
        golds = [_statement(part) for part in _elements(gold)]
        answers = [_statement(part) for part in _elements(answer)]
        if max(len(golds), len(answers)) > _MOST:
            return False
        if len(golds) > 1 or len(answers) > 1:
            golds, answers = _tuples(golds, answers)
            # Solutions are a set: one that is said twice is one.
            golds, answers = list(dict.fromkeys(golds)), list(dict.fromkeys(answers))
        if len(golds) != len(answers):
            if len(golds) == 1 and golds[0].name:  # x in {1, 2}
                return self.whole(golds[0].values[-1], answer)
            if len(answers) == 1 and answers[0].name:
                return self.whole(gold, answers[0].values[-1])
            return self._sets(gold, answer)
        if not (all(s.name for s in golds) and all(s.name for s in answers)) and len(golds) > 1:
            golds, answers = [_nameless(s) for s in golds], [_nameless(s) for s in answers]
        left = list(answers)
        for ours in golds:
            theirs = next((s for s in left if s == ours), None) or next(
                (s for s in left if self._statements(ours, s)), None
            )
            if theirs is None:
                return False
            left.remove(theirs)
        return True

    def _statements(self, gold: _Statement, answer: _Statement) -> bool:
        if gold.text == answer.text:
            return True
        if gold.equation or answer.equation or (gold.name and answer.name and gold.name != answer.name):
            both = (gold.equation or gold.name) and (answer.equation or answer.name)
            return bool(both) and self.leaf(gold.text, answer.text)
        stated = [value for value in answer.values if not _variables(value)] or [answer.values[-1]]
        if not any(self._values(value, stated[0]) for value in gold.values):
            return False
        return all(
            _rounding(value, stated[0]) or any(self._values(ours, value) for ours in gold.values)
            for value in stated[1:]
        )

    def _values(self, gold: str, answer: str) -> bool:
        gold, answer = _as_relation(gold), _as_relation(answer)
        if gold == answer:
            return True
        if len(_elements(gold)) > 1 or len(_elements(answer)) > 1:
            return self.whole(gold, answer)
        ours, theirs = _matrix(gold), _matrix(answer)
        if ours and theirs:
            return [len(row) for row in ours] == [len(row) for row in theirs] and self._ordered(
                list(chain(*ours)), list(chain(*theirs))
            )
        if _split(gold, _RELATIONS)[1:] or _split(answer, _RELATIONS)[1:]:
            return self._relations(gold, answer)
        ours_, theirs_ = _split(gold, {"\\cup"}), _split(answer, {"\\cup"})
        if len(ours_) > 1 or len(theirs_) > 1:
            if len(ours_) == len(theirs_):
                return self._unordered(ours_, theirs_)
            return _set_like(gold) and _set_like(answer) and self.leaf(gold, answer)
        kind, parts = _brackets(gold)
        other, others = _brackets(answer)
        if kind or other:
            return kind == other and self._ordered(parts, others)
        if (parts[0], others[0]) != (gold, answer):
            return self.whole(parts[0], others[0])
        ours_, theirs_ = _split(gold, {":"}), _split(answer, {":"})
        if len(ours_) == len(theirs_) > 1:
            return self._ordered(ours_, theirs_)
        gold, answer = (
            rf"\frac{{{r[0]}}}{{{r[1]}}}" if len(r) == 2 else ":".join(r) for r in (ours_, theirs_)
        )
        return self._formula(gold, answer)

    def _sets(self, gold: str, answer: str) -> bool:
        """Compare unlike numbers of elements: a set and a union, alternatives, a decimal comma."""
        ours, theirs = _alternatives(gold), _alternatives(answer)
        if (ours, theirs) != (gold, answer):
            return self._values(ours, theirs)
        numbers = [number(re.sub(r"^(-?\d+),(\d+)$", r"\1.\2", text)) for text in (gold, answer)]
        if numbers[0] is not None or numbers[1] is not None:
            return numbers[0] == numbers[1]
        unions = _split(gold, {"\\cup"})[1:] or _split(answer, {"\\cup"})[1:]
        braces = all(_set_like(text) or _inside(text, "{}") is not None for text in (gold, answer))
        return bool(unions) and braces and self.leaf(gold, answer)

    def _ordered(self, golds: Sequence[str], answers: Sequence[str]) -> bool:
        return len(golds) == len(answers) and all(map(self.whole, golds, answers))

    def _unordered(self, golds: Sequence[str], answers: Sequence[str]) -> bool:
        left = list(answers)
        for gold in golds:
            match = next((answer for answer in left if self._values(gold, answer)), None)
            if match is None:
                return False
            left.remove(match)
        return not left

    def _relations(self, gold: str, answer: str) -> bool:
        """Relations compare with relations and with sets, never with numbers."""
        if not (_set_like(gold) and _set_like(answer)):
            return False
        (variable, ours), (name, theirs) = _interval(gold), _interval(answer)
        if ours and theirs:
            return (not variable or not name or variable == name) and self.whole(ours, theirs)
        return self.leaf(gold, answer)

    def _formula(self, gold: str, answer: str) -> bool:
        gold, unit = split_unit(gold)
        answer, other = split_unit(answer)
        if (unit and other and unit != other) or not (gold and answer):
            return False
        if gold == answer:
            return True
        ours, theirs = number(gold), number(answer)
        if ours and theirs:
            if _terminates(ours.value) and _terminates(theirs.value):
                return _same_number(ours, theirs)
            return _same_number(ours, theirs) or rounds(gold, theirs.value) or rounds(answer, ours.value)
        if plain_text(gold) is not None or plain_text(answer) is not None:
            return plain_text(gold, short=True) == plain_text(answer, short=True)
        return self.leaf(gold, answer)


def _rounding(decimal: str, exact: str) -> bool:
    """Whether a decimal is an exact number rounded, as in x = 1/3 = 0.33."""
    ours, theirs = number(decimal), number(exact)
    match = re.fullmatch(r"-?\d*\.(\d{2,})", decimal)
    if match is None or ours is None or theirs is None:
        return False
    return abs(ours.value - theirs.value) <= Fraction(1, 2 * 10 ** len(match[1]))


def rounds(decimal: str, exact: Fraction | Any) -> bool:
    """Whether a decimal of six significant digits or more is a number rounded or cut; fewer may be a guess.

    Args:
        decimal: in normal form.
        exact: a fraction, or a number of sympy.
    """
    match = re.fullmatch(r"-?(\d*)\.(\d+)", decimal)
    if match is None or len((match[1] + match[2]).lstrip("0")) < 6:
        return False
    unit, size = Fraction(1, 10 ** len(match[2])), abs(Fraction(decimal))
    if bool(exact < 0) != decimal.startswith("-"):
        return False
    return bool(size - unit / 2 <= abs(exact) < size + unit)


def _terminates(value: Fraction) -> bool:
    """Whether a number is a decimal of its own, so that no other decimal is it, rounded."""
    under = value.denominator
    for prime in (2, 5):
        while under % prime == 0:
            under //= prime
    return under == 1


def _same_number(gold: Number, answer: Number) -> bool:
    """28% is 0.28; it is 28 too where the answer leaves out the gold one's unit, or adds it to an integer."""
    if gold.value == answer.value:
        return True
    if gold.percent:
        return not answer.percent and gold.value * 100 == answer.value
    return answer.percent and gold.value.denominator == 1 and gold.value == answer.value * 100


def _depth(token: str) -> int:
    return _DEPTH.get(token, 0) + token.startswith("\\begin{") - token.startswith("\\end{")


def _split(text: str, separators: set[str]) -> list[str]:
    """Split where a separator stands outside all brackets."""
    parts, depth, begin = [], 0, 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        depth += _depth(token)
        if depth <= 0 and token in separators:
            parts.append(text[begin : match.start()].strip())
            begin = match.end()
    parts.append(text[begin:].strip())
    return parts


def _elements(text: str) -> list[str]:
    """The elements of a list or finite set, a plus-minus as two of them."""
    inner = _inside(text, "{}")
    parts = [part for part in _split(text if inner is None else inner, _SEPARATORS) if part]
    signed: list[str] = []
    for part in parts:
        both = [part.replace("\\pm", sign).replace("\\mp", other) for sign, other in ("+-", "-+")]
        signed += [re.sub(r"(^|[=({])\+", r"\1", one) for one in both] if "\\pm" in part else [part]
    return signed or [text]


def _inside(text: str, kind: str) -> str | None:
    """What stands between one pair of brackets that holds the whole text."""
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        depth += _depth(token)
        if match.start() == 0 and token.lstrip("\\") != kind[0]:
            return None
        if depth <= 0:
            whole = match.end() == len(text) and token.lstrip("\\") == kind[1]
            return text[1 + text.startswith("\\") : match.start()] if whole else None
    return None


def _brackets(text: str) -> tuple[str, list[str]]:
    """The kind and the parts of a tuple or an interval; what stands in brackets alone is no tuple."""
    for kind in ("()", "[]", "[)", "(]"):
        inner = _inside(text, kind)
        if inner is not None:
            parts = _split(inner, {",", ";"})
            return (kind, parts) if len(parts) > 1 else ("", [inner])
    return "", [text]


def _as_relation(text: str) -> str:
    """What a set-builder demands of its variable, and the real line as an interval."""
    if text == "\\mathbb{R}":
        return "(-\\infty,\\infty)"
    builder = re.fullmatch(rf"\\\{{({_LETTER})(?:\\in ?\\mathbb\{{R\}})?[|:](.+)\\\}}", text)
    return builder[2] if builder and _split(builder[2], _RELATIONS)[1:] else text


def _alternatives(text: str) -> str:
    """Several inequalities of one variable, none joined by "and", as a union of intervals."""
    parts = _elements(text)
    intervals = [_interval(part) for part in parts]
    names = {name for name, _ in intervals}
    if len(parts) < 2 or "" in names or len(names) > 1 or "and" in _split_words(text):
        return text
    return "\\cup ".join(str(interval) for _, interval in intervals)


def _split_words(text: str) -> set[str]:
    return {match.group() for match in _TOKEN.finditer(text)}


def _set_like(text: str) -> bool:
    return bool(_brackets(text)[0] or _split(text, _RELATIONS | {"\\cup", "\\cap", "\\setminus"})[1:])


def _matrix(text: str) -> list[list[str]] | None:
    body = text.removeprefix("\\begin{matrix}").removesuffix("\\end{matrix}")
    if len(body) + len("\\begin{matrix}\\end{matrix}") != len(text) or "matrix" in body:
        return None
    return [[cell.strip() for cell in row.split("&")] for row in body.strip("; ").split(";")]


def _statement(text: str) -> _Statement:
    """Read one element: what precedes the sign of equality or of membership may be a name."""
    before, *_ = about = _split(text, {"\\approx"})
    if len(about) > 1:
        text = f"{before}={about[1]}" if _NAME.fullmatch(before) else before or about[1]
    sides = [side for side in _split(text, {"=", "\\in"}) if side]
    if len(sides) > 1 and _NAME.fullmatch(sides[0]):
        return _Statement(text, re.sub(r"\\text|[{} ]", "", sides[0]), tuple(sides[1:]), equation=False)
    equation = len(sides) == 2 and any(map(_variables, sides))
    return _Statement(text, None, tuple(sides) or (text,), equation)


def _nameless(statement: _Statement) -> _Statement:
    if statement.equation:
        return statement
    return _Statement(statement.values[-1], None, statement.values, equation=False)


def _tuples(golds: list[_Statement], answers: list[_Statement]) -> tuple[list[_Statement], list[_Statement]]:
    """Tuples of what comes under several names in turn, as in ``p=5, q=2; p=7, q=2``.

    Where both sides have names, these order the places; where one has, plain values are taken in its order.
    """
    period, other = _period(golds), _period(answers)
    if period and other:
        if {s.name for s in golds} != {s.name for s in answers}:
            return golds, answers
        return _in_tuples(golds, period, by_name=True), _in_tuples(answers, other, by_name=True)
    plain = len(golds) == len(answers) and not any(_brackets(s.text)[0] for s in (*golds, *answers))
    if period or plain and other:
        golds = _in_tuples(golds, period or other)
    if other or plain and period:
        answers = _in_tuples(answers, period or other)
    return golds, answers


def _period(statements: list[_Statement]) -> int:
    names = [s.name for s in statements]
    period = len(set(names))
    whole = None not in names and period > 1 and len(names) % period == 0
    return period if whole and names == names[:period] * (len(names) // period) else 0


def _in_tuples(statements: list[_Statement], period: int, *, by_name: bool = False) -> list[_Statement]:
    groups = [statements[i : i + period] for i in range(0, len(statements), period)]
    return [_tuple(sorted(group, key=lambda s: str(s.name)) if by_name else group) for group in groups]


def _tuple(statements: Sequence[_Statement]) -> _Statement:
    text = "(" + ",".join(s.values[-1] for s in statements) + ")"
    return _Statement(text, None, (text,), equation=False)


def _variables(text: str) -> bool:
    """Whether letters are left when constants and functions are taken away."""
    return re.search(r"[A-Za-z]", _FUNCTION.sub("", text)) is not None


def _interval(text: str) -> tuple[str, str | None]:
    r"""The variable and the interval of ``a < x \le b`` or ``x \ge a``; a set has no variable."""
    sides = _split(text, _RELATIONS)
    signs = [m.group() for m in _TOKEN.finditer(text) if m.group() in _RELATIONS]
    if len(sides) == 1:
        return "", text
    if set(signs) <= {">", "\\ge"}:
        turned = {">": "<", "\\ge": "\\le"}
        sides, signs = sides[::-1], [turned[sign] for sign in signs[::-1]]
    places = [i for i, side in enumerate(sides) if _variables(side)]
    known = len(sides) == len(signs) + 1 and set(signs) <= {"<", "\\le"} and len(places) == 1
    if not known or not re.fullmatch(_LETTER, sides[places[0]]):
        return "", None
    match sides, places[0]:
        case [_, high], 0:
            return sides[0], f"(-\\infty,{high}{_bracket(signs[0], ')]')}"
        case [low, _], 1:
            return sides[1], f"{_bracket(signs[0], '([')}{low},\\infty)"
        case [low, _, high], 1:
            return sides[1], f"{_bracket(signs[0], '([')}{low},{high}{_bracket(signs[1], ')]')}"
    return "", None


def _bracket(sign: str, brackets: str) -> str:
    return brackets[sign == "\\le"]
