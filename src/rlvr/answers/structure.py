r"""How an answer in normal form is built: lists, tuples, matrices, intervals, equations under a name."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from rlvr.answers.quantities import number

RELATIONS = {"<", ">", "\\le", "\\ge", "\\ne"}

_TOKEN = re.compile(r"\\begin\{[a-z]*\}|\\end\{[a-z]*\}|\\[{}]|\\[a-zA-Z]+|[A-Za-z]+|.", re.DOTALL)
_DEPTH = {"(": 1, "[": 1, "{": 1, "\\{": 1, ")": -1, "]": -1, "}": -1, "\\}": -1}
_SEPARATORS = {",", ";", "and", "or"}
_LETTER = (
    r"(?:\\text\{[^{}]*\}|\\[A-Za-z]+|[A-Z]+[a-z]*|[a-z](?![a-z])|[a-z]{4,})"
    r"(?:_(?:\{[^{}]*\}|\\?[A-Za-z0-9]+))?'*"
)
_NAME = re.compile(
    rf"(?:(?:\\(?:Delta|delta|angle|triangle) ?|\\text\{{[^{{}}]*\}} ?)?{_LETTER}(?:\^\{{-1\}})?"
    rf"|\\frac\{{[A-Z]+\}}\{{[A-Z]+\}}|\|(?:[A-Z]+|\\[a-z]+\{{?[A-Za-z]+\}}?)\||\[[A-Z]{{3,}}\]|\\[a-z]+\{{?[A-Za-z]+\}}?)"
    rf"(?:\([A-Za-z0-9_,\\{{}} ]*\)|:{_LETTER})?|\({_LETTER}(?:,{_LETTER})+\)"
    r"|(?:P|Pr|E|\\Pr)\([^()]*\)|\\(?:sum|prod|int|lim|max|min|gcd|det)(?![a-z]).*"
)
_FUNCTION = re.compile(
    r"\\(?:pi|infty|sqrt|frac|binom|exp|log|ln|lg|(?:arc)?(?:sin|cos|tan|cot|sec|csc)|sinh|cosh|tanh"
    r"|times|cdot|div|circ|[lr]floor|[lr]ceil|text\{[^{}]*\})(?![a-z])"
    r"|(?<![A-Za-z\\])[ei](?![A-Za-z])"
)
_PLUS_MINUS = re.compile(r"\\pm(?![a-z]) ?")  # and no \pmod
_MINUS_PLUS = re.compile(r"\\mp(?![a-z]) ?")


def depth(token: str) -> int:
    """By how many brackets a token opens more than it closes."""
    if token[0] != "\\":
        return _DEPTH.get(token, 0)
    return _DEPTH.get(token, 0) + token.startswith("\\begin{") - token.startswith("\\end{")


def split(text: str, separators: set[str]) -> list[str]:
    """Split where a separator stands outside all brackets."""
    if not any(separator in text for separator in separators):  # the usual case
        return [text.strip()]
    parts, level, begin = [], 0, 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        level += depth(token)
        if level <= 0 and token in separators:
            parts.append(text[begin : match.start()].strip())
            begin = match.end()
    parts.append(text[begin:].strip())
    return parts


def words(text: str) -> set[str]:
    """The tokens of a text: commands, runs of letters, single characters."""
    return {match.group() for match in _TOKEN.finditer(text)}


def elements(text: str) -> list[str]:
    """The elements of a list or of finite sets, a plus-minus as two of them."""
    sets = [inside(part, "{}") for part in split(text, {"\\cup"})]
    parts = [part for inner in sets for part in split(text if inner is None else inner, _SEPARATORS) if part]
    if len(sets) > 1 and None in sets:
        parts = [text]
    signed: list[str] = []
    for part in parts:
        if _PLUS_MINUS.search(part):
            both = [_PLUS_MINUS.sub(sign, _MINUS_PLUS.sub(other, part)) for sign, other in ("+-", "-+")]
            signed += [re.sub(r"(^|[=({])\+", r"\1", one) for one in both]
        else:
            signed.append(part)
    return signed or [text]


def inside(text: str, kind: str) -> str | None:
    """What stands between one pair of brackets that holds the whole text."""
    if not text.startswith((kind[0], "\\" + kind[0])):
        return None
    level = 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        level += depth(token)
        if level <= 0:
            whole = match.end() == len(text) and token.lstrip("\\") == kind[1]
            return text[1 + text.startswith("\\") : match.start()] if whole else None
    return None


def brackets(text: str) -> tuple[str, list[str]]:
    """The kind and the parts of a tuple or an interval; what stands in brackets alone is no tuple."""
    for kind in ("()", "[]", "[)", "(]"):
        inner = inside(text, kind)
        if inner is not None:
            parts = split(inner, {",", ";"})
            return (kind, parts) if len(parts) > 1 else ("", [inner])
    return "", [text]


def matrix(text: str) -> list[list[str]] | None:
    """The rows of a matrix."""
    body = text.removeprefix("\\begin{matrix}").removesuffix("\\end{matrix}")
    if len(body) + len("\\begin{matrix}\\end{matrix}") != len(text) or "matrix" in body:
        return None
    return [[cell.strip() for cell in row.split("&")] for row in body.strip("; ").split(";")]


def variables(text: str) -> bool:
    """Whether letters are left when constants and functions are taken away."""
    return re.search(r"[A-Za-z]", _FUNCTION.sub("", text)) is not None


# Relations and the intervals that they stand for


def set_like(text: str) -> bool:
    """Whether a text is a tuple, an interval, a relation, or sets joined."""
    return bool(brackets(text)[0] or split(text, RELATIONS | {"\\cup", "\\cap", "\\setminus"})[1:])


def as_relation(text: str) -> str:
    """What a set-builder demands of its variable, and the real line as an interval."""
    if text == "\\mathbb{R}":
        return "(-\\infty,\\infty)"
    if size := re.fullmatch(rf"\|({_LETTER})\|(<|\\le) ?([\d./]+)", text):
        return f"-{size[3]}{size[2]} {size[1]}{size[2]} {size[3]}"
    builder = re.fullmatch(rf"\\\{{({_LETTER})(?:\\in ?\\mathbb\{{R\}})?[|:](.+)\\\}}", text)
    if builder is None or not split(builder[2], RELATIONS)[1:]:
        return text
    return re.sub(rf"^{_LETTER}\\in ?\\mathbb\{{R\}}(?:,|and) ?", "", builder[2])


def interval(text: str) -> tuple[str, str | None]:
    r"""The variable and the interval of ``a < x \le b`` or ``x \ge a``; a set has no variable."""
    sides = split(text, RELATIONS)
    signs = [m.group() for m in _TOKEN.finditer(text) if m.group() in RELATIONS]
    if len(sides) == 1:
        return "", text
    if set(signs) <= {">", "\\ge"}:
        turned = {">": "<", "\\ge": "\\le"}
        sides, signs = sides[::-1], [turned[sign] for sign in signs[::-1]]
    places = [i for i, side in enumerate(sides) if variables(side)]
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


def _bracket(sign: str, kinds: str) -> str:
    return kinds[sign == "\\le"]


def alternatives(text: str) -> str:
    """Several relations of one variable as one set: a union, or where all must hold an interval.

    A comma stands for "and" between a lower and an upper bound that leave room between them, else for "or".
    """
    parts = split(text, _SEPARATORS)
    if len(parts) < 2:
        return text
    if all(brackets(part)[0] for part in parts):
        return "\\cup ".join(parts) if words(text) & {"or", "and"} else text
    intervals = [_solution(part) for part in parts]
    if len({name for name, _ in intervals}) > 1 or any(not name for name, _ in intervals):
        return text
    sets = [str(found) for _, found in intervals]
    joined = words(text)
    if len(sets) == 2 and "or" not in joined:
        both = _both(*sets)
        if both or "and" in joined:
            return both or text
    return text if "and" in joined else "\\cup ".join(sets)


def _solution(text: str) -> tuple[str, str | None]:
    sides = split(text, {"="})
    if len(sides) == 2 and re.fullmatch(_LETTER, sides[0]):
        return sides[0], rf"\{{{sides[1]}\}}"
    return interval(text)


def _both(one: str, other: str) -> str | None:
    """The interval of a lower and an upper bound; None where they are something else or leave no room."""
    if one.startswith("(-\\infty,"):
        one, other = other, one
    if not (one.endswith(",\\infty)") and other.startswith("(-\\infty,")):
        return None
    low, high = one.removesuffix(",\\infty)"), other.removeprefix("(-\\infty,")
    ours, theirs = number(low[1:]), number(high[:-1])
    return f"{low},{high}" if ours and theirs and ours.value < theirs.value else None


# Elements of a list, some of them under names


@dataclass(frozen=True)
class Statement:
    """An element of a list: an equation, or one value under a name or none, with the steps that led to it."""

    text: str
    name: str | None
    values: tuple[str, ...]
    equation: bool

    @property
    def nameless(self) -> "Statement":
        """The value alone; an equation is its own."""
        if self.equation:
            return self
        return Statement(self.values[-1], None, self.values, equation=False)


def statement(text: str) -> Statement:
    """Read one element: what precedes the sign of equality or of membership may be a name."""
    before, *_ = about = split(text, {"\\approx"})
    if len(about) > 1:
        text = f"{before}={about[1]}" if _NAME.fullmatch(before) else before or about[1]
    sides = [side for side in split(text, {"=", "\\in"}) if side]
    if len(sides) > 1 and _NAME.fullmatch(sides[0]):
        return Statement(text, spelled(sides[0]), tuple(sides[1:]), equation=False)
    equation = len(sides) == 2 and any(map(variables, sides))
    return Statement(text, None, tuple(sides) or (text,), equation)


def spelled(name: str) -> str:
    r"""One spelling a name: without the braces and the ``\text`` of its index."""
    return re.sub(r"\\text|[{} ]", "", name)


def variable(one: Statement) -> str | None:
    """What a statement is about: its name, or the variable of its inequality."""
    return one.name or spelled(interval(as_relation(one.text))[0]) or None


def by_coordinates(statements: Iterable[Statement]) -> list[Statement]:
    """``(x, y) = (1, 2)`` as ``x = 1, y = 2``; all else as it is."""
    spread: list[Statement] = []
    for one in statements:
        (kind, names), (other, parts) = brackets(one.name or ""), brackets(one.values[-1])
        if kind == other == "()" and len(names) == len(parts):
            spread += [
                Statement(f"{name}={part}", name, (part,), equation=False)
                for name, part in zip(names, parts, strict=True)
            ]
        else:
            spread.append(one)
    return spread


def distinct(statements: Iterable[Statement]) -> list[Statement]:
    """Solutions are a set: one that is said twice, also as another number of the same value, is one."""
    found: dict[tuple[str | None, str | Fraction], Statement] = {}
    for one in statements:
        exact = None if one.equation or len(one.values) > 1 else number(one.values[0])
        found.setdefault((one.name, exact.value if exact else one.text), one)
    return list(found.values())


def in_tuples(golds: list[Statement], answers: list[Statement]) -> tuple[list[Statement], list[Statement]]:
    """Tuples of what comes under several names in turn, as in ``p=5, q=2; p=7, q=2``.

    Where both sides have names, these order the places; where one has, plain values are taken in its order.
    """
    period, other = _period(golds), _period(answers)
    if period and other:
        if {s.name for s in golds} != {s.name for s in answers}:
            return golds, answers
        return _grouped(golds, period, _by_name), _grouped(answers, other, _by_name)
    plain = len(golds) == len(answers) and not any(brackets(s.text)[0] for s in (*golds, *answers))
    if period or plain and other:
        golds = _grouped(golds, period or other)
    if other or plain and period:
        answers = _grouped(answers, period or other)
    return golds, answers


def _period(statements: list[Statement]) -> int:
    names = [s.name for s in statements]
    period = len(set(names))
    whole = None not in names and period > 1 and len(names) % period == 0
    return period if whole and names == names[:period] * (len(names) // period) else 0


def _grouped(
    statements: list[Statement], period: int, order: Callable[[Statement], str] | None = None
) -> list[Statement]:
    groups = [statements[i : i + period] for i in range(0, len(statements), period)]
    return [_tuple(sorted(group, key=order) if order else group) for group in groups]


def _by_name(one: Statement) -> str:
    return str(one.name)


def _tuple(statements: Sequence[Statement]) -> Statement:
    text = "(" + ",".join(s.values[-1] for s in statements) + ")"
    return Statement(text, None, (text,), equation=False)
