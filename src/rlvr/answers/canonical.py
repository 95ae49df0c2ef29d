"""One spelling an answer, for majority votes."""

import re

from rlvr.answers.notation import normal_form, split_condition
from rlvr.answers.quantities import number, plain_text, split_unit
from rlvr.answers.structure import (
    alternatives,
    as_relation,
    brackets,
    elements,
    in_tuples,
    interval,
    matrix,
    split,
    statement,
)

_MOST_BRACKETS = 64
_BETWEEN = re.compile(r"(\\[A-Za-z]+ )| ")


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
    if not all(brackets(part)[0] for part in elements(text)):
        text = alternatives(text)
    statements = [statement(part) for part in elements(text)]
    if len(statements) == 1:
        (one,) = statements
        return _value(one.values[-1]) if one.name or len(one.values) == 1 else one.text
    statements, _ = in_tuples(statements, statements)
    return ", ".join(sorted({s.text if s.equation else _value(s.values[-1]) for s in statements}))


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
    if exact := number(bare):
        return str(exact.value)
    words = None if bare.isupper() else plain_text(bare)
    return words or _BETWEEN.sub(r"\1", bare)
