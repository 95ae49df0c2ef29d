"""Formulas compared by value, through math-verify's parser; the only importer of sympy and math-verify.

Runs in a worker process: what a model wrote may take sympy any time and any memory. Nothing is evaluated as
Python: the parser reads LaTeX by a grammar (ANTLR), and the plain-text reader of math-verify, which calls
``eval``, is not used.

Where math-verify compares two numbers by an absolute tolerance (1/2004! is then 1/2006!), this compares them
exactly where they are rational, and else to 50 significant digits; formulas with variables are compared at
random points.
"""

import functools
import logging
import random
import re
from collections.abc import Iterator
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from rlvr.answers.quantities import number, rounds

_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=False, nits=False, boxed="none"
)
_CONVERSION = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
_JUXTAPOSED = re.compile(
    r"(?<=[\d)])\s*(?=[(\[{]|\\\{|\\binom|\\frac)|(?<=\})\s*(?=\\binom)|(?<=\))\s*(?=\d)|(?<=\d)\s+(?=\d)"
)
_BRACED = re.compile(r"(?<![\w\]}^*])\{(\d+(?:\.\d+)?)\}")
_CAPITAL_E = re.compile(r"(?<![\\A-Za-z])E(?![A-Za-z])")
_GAMMA = re.compile(r"\\gamma(?![a-z])")
_SIGN_INDEX = re.compile(r"_\{\\([A-Za-z]+)\}")
_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_PRIMED = re.compile(r"(\\[A-Za-z]+|[A-Za-z])(?:_\{([^{}]*)\})?('+)(?:_\{([^{}]*)\})?")
_LETTER_NUMBER = re.compile(r"(?<![A-Za-z\\])[A-Za-z]\d")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\^\\circ")
_IMPROPER = re.compile(r"(?<![\w.\\^}])\d+(?: ?\\frac\{\d+\}\{\d+\}| \d+/\d+)")
_ENDLESS = re.compile(r"\^ ?\{? ?-?\d{6}|\d{6}!")
_DIGITS = 60
_AGREEMENT = sympy.Float(10) ** -50
_POINTS = 8

# Without a time limit of its own, verify() says so in the log of every worker.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def same_formula(gold: str, answer: str, *, rel_tol: float = 0.0) -> bool:
    """Compare two formulas in normal form by value; one that cannot be read is like no other.

    Args:
        gold: the right answer.
        answer: a response's.
        rel_tol: how far a number may be from the gold one, as a share of it.

    Raises:
        MemoryError: where the worker's limit is reached.
    """
    try:
        ours, theirs = _parse(gold), _parse(answer)
    except MemoryError:
        raise
    except Exception:  # whatever parser and constructors raise for what is no formula
        return False
    scalars = [isinstance(x, sympy.Expr) and not isinstance(x, sympy.MatrixExpr) for x in (ours, theirs)]
    if all(scalars):
        return (
            _same_value(ours, theirs, max(_AGREEMENT, rel_tol))
            or _rounded(gold, theirs)
            or _rounded(answer, ours)
        )
    if isinstance(ours, Relational) and isinstance(theirs, Relational):
        return _same_relation(ours, theirs)
    if any(scalars):
        return False  # a number or a formula is no set; math-verify would take the 7 out of x = 7
    return bool(verify(ours, theirs, timeout_seconds=None, allow_set_relation_comp=True, raise_on_error=True))


@functools.lru_cache(maxsize=256)  # one gold answer meets many responses
def _parse(text: str) -> Any:
    if _ENDLESS.search(text):
        raise ValueError("a number of 100 000 digits or more")
    if _IMPROPER.search(text):
        raise ValueError("a mixed number that is none")
    if _LETTER_NUMBER.search(text):
        raise ValueError("a product, an index or a power")
    exact = number(text)
    if exact is not None:
        return sympy.Rational(exact.value.numerator, exact.value.denominator)
    if "matrix}" in text:
        text = text.replace("{matrix}", "{pmatrix}").replace(";", r" \\ ")
    # The parser takes an integer before a number, as in 2(3), for a mixed number: 5.
    text = _JUXTAPOSED.sub(r"\\cdot ", _BRACED.sub(r"\1", text))
    if _ANGLE.search(text):
        text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    # It drops primes.
    text = _PRIMED.sub(lambda m: f"{m[1]}_{{{m[2] or m[4] or ''}{'prime' * len(m[3])}}}", text)
    if "'" in text:
        raise ValueError("a prime that is no letter's")
    text = _SIGN_INDEX.sub(r"_{\1}", text)  # of a symbol, such as R_{\odot}
    # It takes E for Euler's number, and then no index, and gamma for the function.
    text = _GAMMA.sub(r"\\upsilon ", _CAPITAL_E.sub(r"\\Xi ", text))
    latex = normalize_latex(text, _NORMALIZATION)
    parsed = latex2sympy(
        latex,
        is_real=not should_treat_as_complex(latex),
        convert_degrees=False,
        normalization_config=None,
        conversion_config=_CONVERSION,
    )
    if not isinstance(parsed, sympy.Basic):
        return parsed
    # Decimals are exact: 0.1 is 1/10, as it was written. Symbols are what their names say, and i is no index.
    exactly: dict[Any, Any] = {f: sympy.Rational(str(f)) for f in parsed.atoms(sympy.Float)}
    exactly |= {symbol: sympy.Symbol(symbol.name) for symbol in parsed.atoms(sympy.Symbol)}
    if not parsed.has(sympy.Sum, sympy.Product):
        exactly |= {symbol: sympy.I for symbol in exactly if str(symbol) == "i"}
    parsed = parsed.xreplace(exactly)
    return parsed if parsed.has(sympy.I) else parsed.replace(_is_odd_root, _real_root)


def _is_odd_root(formula: sympy.Basic) -> bool:
    power = (
        formula.is_Pow and formula.base.is_Rational and formula.base.is_negative and formula.exp.is_Rational
    )
    return bool(power) and formula.exp.q % 2 == 1 and formula.exp.q > 1


def _real_root(power: sympy.Pow) -> sympy.Expr:
    """The cube root of -8 is -2, as it is written, and not the principal one."""
    return (-1) ** power.exp.p * (-power.base) ** power.exp


def _rounded(decimal: str, formula: sympy.Expr) -> bool:
    value = None if formula.free_symbols or formula.is_Rational else _value(formula.doit())
    return value is not None and value.is_real and rounds(decimal, value)


def _same_value(gold: sympy.Expr, answer: sympy.Expr, rel_tol: Any) -> bool:
    gold, answer = _evaluated(gold), _evaluated(answer)
    if gold.has(sympy.zoo, sympy.nan) or answer.has(sympy.zoo, sympy.nan):
        return False  # without a value, which two formulas of any kind may share
    if gold == answer:
        return True
    if gold.is_Rational and answer.is_Rational and rel_tol == _AGREEMENT:
        return False
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if not symbols:
        ours, theirs = _value(gold), _value(answer)
        return ours is not None and theirs is not None and _close(ours, theirs, rel_tol)
    points = 0
    for ours, theirs in _sampled([gold, answer], symbols):
        if not _close(ours, theirs):
            return False
        points += 1
    return points == _POINTS


def _evaluated(formula: sympy.Expr) -> sympy.Expr:
    """Sums, integrals and derivatives done.

    What has no value is one more variable, one and the same where it is written so: u(t), and dx/dt, which
    sympy takes for the derivative of a constant.
    """
    rates = [d for d in formula.atoms(sympy.Derivative) if not d.expr.has(*d.variables)]
    formula = formula.xreplace({d: sympy.Symbol(f"{d}") for d in rates}).doit()
    unknown = formula.atoms(AppliedUndef, sympy.Derivative)
    return formula.xreplace({f: sympy.Symbol(f"{f}") for f in unknown})


def _close(ours: Any, theirs: Any, rel_tol: Any = _AGREEMENT) -> bool:
    return bool(abs(ours - theirs) <= rel_tol * abs(ours))


def _value(formula: sympy.Expr) -> Any:
    """The number to 60 digits, or None where it is none."""
    value = formula.evalf(_DIGITS)
    if not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        return None
    real, imaginary = value.as_real_imag()
    return value if real.is_Float or imaginary.is_Float or value.is_Rational or value == 0 else None


def _sampled(formulas: list[sympy.Expr], symbols: list[sympy.Symbol]) -> Iterator[list[Any]]:
    """Values of the formulas at eight points where each has one; fewer where too few such points are found.

    The points are keyed, so that a verdict does not depend on chance.
    """
    draw = random.Random(2602)
    found = 0
    for _ in range(4 * _POINTS):
        # Every other one of integers: there (-1)^n is real, and rounding is seen.
        scale = 997 if found % 2 else 1
        point = {s: sympy.Rational(draw.randrange(-3 * scale, 12 * scale) or 1, scale) for s in symbols}
        values = [_value(formula.subs(point)) for formula in formulas]
        if all(value is not None for value in values):
            found += 1
            yield values
        if found == _POINTS:
            return


def _same_relation(gold: Relational, answer: Relational) -> bool:
    """Whether one is the other times a constant, a positive one for inequalities written in one direction."""
    ours, theirs = _forward(gold), _forward(answer)
    if ours[0] is not theirs[0]:
        return False
    symbols = sorted(ours[1].free_symbols | theirs[1].free_symbols, key=str)
    sampled = list(_sampled([ours[1], theirs[1]], symbols))
    values = [pair for pair in sampled if any(abs(value) > _AGREEMENT for value in pair)]  # a point of both
    if (
        len(sampled) < _POINTS
        or len(values) < 3
        or any(abs(value) <= _AGREEMENT for pair in values for value in pair)
    ):
        return False
    ratios = [a / b for a, b in values]
    ordered = ours[0] not in (sympy.Eq, sympy.Ne)
    return all(_close(ratio, ratios[0]) for ratio in ratios) and not (ordered and not ratios[0].is_positive)


def _forward(relation: Relational) -> tuple[type, sympy.Expr]:
    """The kind and left less right side, with > and >= turned round."""
    kind, difference = type(relation), _evaluated(relation.lhs - relation.rhs)
    turned = {sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le}
    return (turned[kind], -difference) if kind in turned else (kind, difference)
