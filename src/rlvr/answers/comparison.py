r"""Whether two answers are the same, by structure; single formulas are left to a ``Leaf``.

Lists and sets match in any order, tuples and intervals place by place. ``x = 5`` is 5 where the other side
has no name; two names must be one. Of ``x = 2 + 3 = 5`` the last number counts, of ``2 + 3 = 5`` all must
agree. A unit on one side is left out, two must be one; letters alone in the gold answer, as in ``2s``, may be
variables, and are not left out. A false positive teaches a policy to cheat and a false negative costs one
sample: in doubt, different.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import chain

from rlvr.answers.notation import normal_form, split_condition
from rlvr.answers.quantities import Number, number, plain_text, rounds, split_unit, terminates
from rlvr.answers.structure import (
    RELATIONS,
    Statement,
    alternatives,
    as_relation,
    brackets,
    by_coordinates,
    distinct,
    elements,
    in_tuples,
    inside,
    interval,
    matrix,
    set_like,
    spelled,
    split,
    statement,
    variable,
    variables,
)

Leaf = Callable[[str, str], bool]
"""Compares two formulas, equations or sets in normal form."""

_MOST = 64
"""Longest list that is compared element by element."""
_CHOICE = re.compile(
    r"(?:\\text\{ ?\(?([A-Z])\) ?\}|\(([A-Z])\)(?=[\d\\.-])|([A-Z])(?:\)|[.:] ?(?=.))) ?(.*)"
)
_CONGRUENCE = re.compile(r"(?:((?:(?!\\equiv).)+)\\equiv ?)?((?:(?!\\equiv|\\pmod).)+)\\pmod\{([^{}]+)\}")
_FRACTION = re.compile(r"\\frac\{([^{}]+)\}\{([^{}]+)\}|([^/]+)/([^/]+)")
_DECIMAL_COMMA = re.compile(r"(-?\d+),(\d+)")


def equivalent(gold: str, answer: str, leaf: Leaf, *, rel_tol: float = 0.0) -> bool:
    """Compare two answers as written.

    Args:
        gold: the right answer.
        answer: a response's.
        leaf: compares what structure and exact numbers leave open.
        rel_tol: how far a number may be from the gold one, as a share of it; 0 for exactly.
    """
    gold, answer = normal_form(gold), normal_form(answer)
    if not gold or not answer:
        return False
    if gold == answer:
        return True
    (gold, where), (answer, wherever) = split_condition(gold), split_condition(answer)
    if where and wherever and where != wherever:
        return False
    letters = _CHOICE.fullmatch(gold), _CHOICE.fullmatch(answer)
    if letters[0] and letters[1] and _letter(letters[0]) != _letter(letters[1]):
        return False
    try:
        return _Comparison(leaf, rel_tol).whole(_chosen(gold, answer), _chosen(answer, gold))
    except RecursionError:  # brackets in brackets without end
        return False


def _chosen(one: str, other: str) -> str:
    r"""Of a choice with its text, as in ``\text{(C)} 12``, what the other answer is, letter or text."""
    match = _CHOICE.fullmatch(one)
    if match is None or not match[4] or plain_text(one) is not None:
        return one
    letter = plain_text(other, short=True)
    return _letter(match) if letter and len(letter) == 1 else match[4]


def _letter(choice: re.Match[str]) -> str:
    return str(choice[1] or choice[2] or choice[3])


class _Comparison:
    def __init__(self, leaf: Leaf, rel_tol: float) -> None:
        self.leaf, self.rel_tol = leaf, Fraction(rel_tol)

    def whole(self, gold: str, answer: str) -> bool:
        """Compare lists of one element or more."""
        if (one := _CONGRUENCE.fullmatch(gold)) and (other := _CONGRUENCE.fullmatch(answer)):
            named = one[1] and other[1]
            return one[3] == other[3] and (not named or one[1] == other[1]) and self.whole(one[2], other[2])
        gold, answer = as_relation(gold), as_relation(answer)
        golds = [statement(part) for part in elements(gold)]
        answers = [statement(part) for part in elements(answer)]
        if max(len(golds), len(answers)) > _MOST:
            return False
        named = all(s.name for s in (*golds, *answers))
        if named:
            golds, answers = by_coordinates(golds), by_coordinates(answers)
        if len(golds) > 1 or len(answers) > 1:
            golds, answers = in_tuples(golds, answers)
            once, said = distinct(golds), distinct(answers)
            # Solutions are a set, unless both sides repeat some.
            if len(once) == len(golds) or len(said) == len(answers):
                golds, answers = once, said
        if (len(golds) != len(answers) or not named) and _about_others(golds, answers):
            return False
        if len(golds) != len(answers):
            if len(golds) == 1 and golds[0].name:  # x in {1, 2}
                return self.whole(golds[0].values[-1], answer)
            if len(answers) == 1 and answers[0].name:
                return self.whole(gold, answers[0].values[-1])
            kind, parts = brackets(gold)
            if kind == "()" and inside(answer, "{}") is None and len(parts) == len(answers):
                return self._ordered(parts, [one.text for one in answers])  # a tuple without its brackets
            return self._sets(gold, answer)
        if not (all(s.name for s in golds) and all(s.name for s in answers)) and len(golds) > 1:
            golds, answers = [s.nameless for s in golds], [s.nameless for s in answers]
        left = list(answers)
        for ours in golds:
            theirs = next((s for s in left if s == ours), None) or next(
                (s for s in left if self._statements(ours, s)), None
            )
            if theirs is None:
                return False
            left.remove(theirs)
        return True

    def _statements(self, gold: Statement, answer: Statement) -> bool:
        if gold.text == answer.text:
            return True
        ours, theirs = variable(gold), variable(answer)
        if ours and theirs and ours != theirs and not (_says(gold, theirs) and _says(answer, ours)):
            return False
        if gold.equation or answer.equation or (gold.name and answer.name and gold.name != answer.name):
            both = (gold.equation or gold.name) and (answer.equation or answer.name)
            return bool(both) and self.leaf(gold.text, answer.text)
        stated = [value for value in answer.values if not variables(value)] or [answer.values[-1]]
        while len(stated) > 1 and _rounding(stated[-1], stated[-2]):  # x = 1/3 = 0.33
            stated.pop()
        # Under a name what comes last counts; without one a chain may be a list of guesses.
        final = stated[-1:] if answer.name else stated
        return all(any(self._values(ours, value) for ours in gold.values) for value in final)

    def _values(self, gold: str, answer: str) -> bool:
        gold, answer = as_relation(gold), as_relation(answer)
        if gold == answer:
            return True
        if len(elements(gold)) > 1 or len(elements(answer)) > 1:
            return self.whole(gold, answer)
        ours, theirs = matrix(gold), matrix(answer)
        if ours and theirs:
            return [len(row) for row in ours] == [len(row) for row in theirs] and self._ordered(
                list(chain(*ours)), list(chain(*theirs))
            )
        if split(gold, RELATIONS)[1:] or split(answer, RELATIONS)[1:]:
            return self._relations(gold, answer)
        ours_, theirs_ = split(gold, {"\\cup"}), split(answer, {"\\cup"})
        if len(ours_) > 1 or len(theirs_) > 1:
            if len(ours_) == len(theirs_) and self._unordered(ours_, theirs_):
                return True
            return set_like(gold) and set_like(answer) and self.leaf(gold, answer)
        kind, parts = brackets(gold)
        other_kind, others = brackets(_unlabelled(answer) if kind else answer)
        if kind or other_kind:
            return kind == other_kind and self._ordered(parts, others)
        if (parts[0], others[0]) != (gold, answer):
            return self.whole(parts[0], others[0])
        ours_, theirs_ = split(gold, {":"}), split(answer, {":"})
        if len(ours_) > 1 or len(theirs_) > 1:
            return self._ordered(_ratio(gold, ours_), _ratio(answer, theirs_))
        return self._formula(gold, answer)

    def _sets(self, gold: str, answer: str) -> bool:
        """Compare unlike numbers of elements: a set and a union, alternatives, a decimal comma."""
        ours, theirs = alternatives(gold), alternatives(answer)
        if (ours, theirs) != (gold, answer):
            return self._values(ours, theirs)
        comma = _DECIMAL_COMMA.fullmatch(answer)  # of a gold answer it parts a list
        numbers = number(gold), number(f"{comma[1]}.{comma[2]}" if comma else answer)
        if numbers[0] is not None or numbers[1] is not None:
            return numbers[0] == numbers[1]
        unions = split(gold, {"\\cup"})[1:] or split(answer, {"\\cup"})[1:]
        braces = all(set_like(text) or inside(text, "{}") is not None for text in (gold, answer))
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
        if not (set_like(gold) and set_like(answer)):
            return False
        (variable, ours), (name, theirs) = interval(gold), interval(answer)
        if ours and theirs:
            return (not variable or not name or variable == name) and self.whole(ours, theirs)
        return self.leaf(gold, answer)

    def _formula(self, gold: str, answer: str) -> bool:
        whole = gold
        (gold, unit), (answer, other) = split_unit(gold), split_unit(answer)
        if unit != other:
            gold, unit = split_unit(whole, letters=False)
        if (unit and other and unit != other) or not (gold and answer):
            return False
        if gold.endswith("%") != answer.endswith("%") and (other if gold.endswith("%") else unit):
            return False  # per cent are no km
        if other.startswith("base ") and other != "base 10" and not unit:
            return False  # 1000 in another base is another number
        if unit == "degree" and not other and "\\pi" in answer:
            gold = rf"\frac{{\pi}}{{180}}({gold})"
        elif other == "degree" and not unit and "\\pi" in gold:
            answer = rf"\frac{{\pi}}{{180}}({answer})"
        if gold == answer:
            return True
        ours, theirs = number(gold), number(answer)
        if ours and theirs:
            if self.rel_tol and abs(ours.value - theirs.value) <= self.rel_tol * abs(ours.value):
                return True
            if terminates(ours.value) and terminates(theirs.value):
                return _same_number(ours, theirs)
            return _same_number(ours, theirs) or rounds(gold, theirs.value) or rounds(answer, ours.value)
        words = plain_text(gold), plain_text(answer)
        if all(words) or any(
            word and "\\text" in text for word, text in zip(words, (gold, answer), strict=True)
        ):
            return plain_text(gold, short=True) == plain_text(answer, short=True)
        return self.leaf(gold, answer)


def _about_others(golds: Sequence[Statement], answers: Sequence[Statement]) -> bool:
    """Whether both sides have names, none of which, but for its index, is the other side's too."""
    ours, theirs = ({s.name.split("_")[0] for s in side if s.name} for side in (golds, answers))
    return bool(ours and theirs) and not ours & theirs


def _says(one: Statement, name: str) -> bool:
    """Whether an equation has a name in its value: y = 2x may be x = y/2."""
    return any(name in spelled(value) for value in one.values)


def _ratio(text: str, parts: list[str]) -> list[str]:
    """The parts of a ratio, or of a fraction that is written as one."""
    fraction = _FRACTION.fullmatch(text) if len(parts) == 1 else None
    return [part for part in fraction.groups() if part] if fraction else parts


def _unlabelled(text: str) -> str:
    """The coordinates of a point that is written with its name, as in ``P(1,2)``."""
    return re.sub(r"^[A-Z](?=\(.*\)$)", "", text)


def _rounding(decimal: str, exact: str) -> bool:
    """Whether a decimal is an exact number rounded, as in x = 1/3 = 0.33."""
    ours, theirs = number(decimal), number(exact)
    match = re.fullmatch(r"-?\d*\.(\d{2,})", decimal)
    if match is None or ours is None or theirs is None:
        return False
    return abs(ours.value - theirs.value) <= Fraction(1, 2 * 10 ** len(match[1]))


def _same_number(gold: Number, answer: Number) -> bool:
    """28% is 0.28; it is 28 too where the answer leaves out the gold one's unit, or adds it to an integer."""
    if gold.value == answer.value:
        return True
    if gold.percent:
        return not answer.percent and gold.value * 100 == answer.value
    return answer.percent and gold.value.denominator == 1 and gold.value == answer.value * 100
