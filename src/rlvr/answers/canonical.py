"""One spelling an answer, for majority votes."""

from rlvr.answers.notation import normal_form, split_condition
from rlvr.answers.quantities import number, plain_text, split_unit
from rlvr.answers.structure import as_relation, brackets, elements, interval, matrix, split, statement

_MOST_BRACKETS = 64


def canonical(answer: str) -> str:
    r"""Write an answer so that what is the same by structure and exact numbers is spelled the same.

    Numbers become fractions, inequalities intervals; names, units and conditions go; lists and sets are in
    order. Formulas stay in normal form: :math:`2\sqrt 3` and :math:`\sqrt{12}` are two votes.
    """
    text, _ = split_condition(normal_form(answer))
    if sum(map(text.count, "([{")) > _MOST_BRACKETS:
        return text
    return _list(as_relation(text))


def _list(text: str) -> str:
    parts = elements(text)
    if len(parts) == 1:
        one = statement(parts[0])
        return one.text if one.equation else _value(one.values[-1])
    return ", ".join(sorted(set(map(_list, parts))))


def _value(text: str) -> str:
    if exact := number(text):
        return str(exact.value)
    if len(elements(text)) > 1:
        return _list(text)
    if rows := matrix(text):
        return "; ".join(", ".join(map(_list, row)) for row in rows)
    _, found = interval(as_relation(text))
    if found and found != text:
        return _value(found)
    if len(sets := split(text, {"\\cup"})) > 1:
        return " \\cup ".join(sorted(map(_value, sets)))
    kind, parts = brackets(text)
    if kind:
        return kind[0] + ", ".join(map(_list, parts)) + kind[1]
    if parts[0] != text:
        return _list(parts[0])
    bare, _ = split_unit(text)
    exact = number(bare)
    return str(exact.value) if exact else plain_text(bare) or bare
