r"""One way to write what can be written in many: LaTeX variants, Unicode, plain text; and exact numbers."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2060-\u2064\ufeff\u0300-\u036f\ud800-\udfff]"
)
_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2212\u2013\u2014\u2010\u2011", "-")
    | dict.fromkeys("\u00a0\u2009\u202f\u2007\u2002\u2003", " ")
    | dict.fromkeys("\u201c\u201d\u2018\u2019\u2032", "'")
    | dict.fromkeys("\u00f7\u2215", "/")
    | {"\u211d": r"\mathbb{R}"}
    | {
        character: rf"\{command} "
        for character, command in [
            *[
                ("\u00d7", "times"),
                ("\u22c5", "cdot"),
                ("\u00b7", "cdot"),
                ("\u00b1", "pm"),
                ("\u2248", "approx"),
            ],
            *[("\u2264", "le"), ("\u2265", "ge"), ("\u2260", "ne"), ("\u221e", "infty"), ("\u222a", "cup")],
            *[("\u2229", "cap"), ("\u2208", "in"), ("\u2205", "emptyset"), ("\u00b0", "degree")],
            *[("\u2026", "ldots"), ("\u03c0", "pi"), ("\u03b8", "theta"), ("\u03b1", "alpha")],
            *[("\u03b2", "beta"), ("\u03bb", "lambda")],
        ]
    }
)
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+")
_ROOT = re.compile("\u221a\\s*(?:(\\d+(?:\\.\\d+)?|[A-Za-z])|\\(([^()]*)\\))")

_FONT = r"text(?:normal|bf|it|rm|tt|sf)|math(?:rm|bf|it|sf)|mbox|operatorname\*?|boldsymbol|bold|bm|rm"
_SPACING = r"[,;:> ]|(?:q?quad|displaystyle|textstyle|limits|n)(?![A-Za-z])"
_PERCENT = r"(?:percent(?:age)?|pct)"
_FUNCTIONS = "pi|sqrt|exp|sin|cos|tan|log|ln|arcsin|arccos|arctan"

_Replacement = str | Callable[[re.Match[str]], str]
_REWRITES: list[tuple[str, _Replacement]] = [
    # What is only looks
    (r"\\(?:boxed|fbox)(?=\s*\{)", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?|middle)(?![A-Za-z])\.?|\\!", ""),
    (rf"\\(?:{_SPACING})|~", " "),
    (r"\\\$|\$|\\[()]|\\\[(?!\d)|(?<!\\)\\\]", " "),
    (r"\s*\{\s*,\s*\}\s*", ","),
    (r"\\(?:begin|end)\{(?:align|equation|gather)(?:ed)?\*?\}", " "),
    (r"\{\{([^{}]*)\}\}", r"{\1}"),
    # Commands of one meaning
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\(?:mathrm|mathbf|mathit|boldsymbol|bm) ?\{ ?([A-Za-z]) ?\}", r" \1"),
    (rf"\\(?:{_FONT})(?=\s*\{{)", r"\\text"),
    (rf"\\text ?\{{ ?({_FUNCTIONS}|lcm|gcd|max|min) ?\}}", r"\\\1 "),
    (r"\\[dt]binom(?![a-z])", r"\\binom"),
    (r"\\geq(?:slant)?(?![a-z])|>=", r"\\ge "),
    (r"\\leq(?:slant)?(?![a-z])|<=", r"\\le "),
    (r"\\neq(?![a-z])|!=|\\not\s*=", r"\\ne "),
    (r"\\gt(?![a-z])", ">"),
    (r"\\lt(?![a-z])", "<"),
    (r"\\approxeq|\\simeq(?![a-z])|\\doteq", r"\\approx "),
    (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\(?:mathbb|text) ?(?:\{ ?R ?\}|R(?![A-Za-z]))|\\R(?:eals?)?(?![A-Za-z])", r"\\mathbb{R}"),
    (r"\\c?dots[a-z]?(?![a-z])|\.\.\.", r"\\ldots "),
    (r"\\lbrace(?![a-z])", r"\\{"),
    (r"\\rbrace(?![a-z])", r"\\}"),
    (r"\\mid(?![a-z])|\\[lr]?vert(?![a-z])", "|"),
    (r"\\langle", "("),
    (r"\\rangle", ")"),
    (r"\\begin\{array\}\s*\{[^{}]*\}", r"\\begin{matrix}"),
    (r"\\end\{array\}", r"\\end{matrix}"),
    (r"[\[(]?\s*\\begin\{[bp]?(?:small)?matrix\}", r"\\begin{matrix}"),
    (r"\\end\{[bp]?(?:small)?matrix\}\s*[\])]?", r"\\end{matrix}"),
    (rf"\\%|\s*\\text\s*\{{\s*{_PERCENT}\s*\}}|\s*(?<![A-Za-z]){_PERCENT}(?![A-Za-z])", "%"),
    (r"\^\s*\{?\s*(?:\\circ|\\text\s*\{\s*o\s*\})\s*\}?|\\degrees?(?![a-z])", r"^\\circ "),
    (r"\\text\s*\{\s*,?\s*(and|or|,)\s*,?\s*\}", r" \1 "),
    # Plain text and half LaTeX
    (r"\*\*", "^"),
    (rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])", r"\\\1"),
    (r"(?<![\\A-Za-z])(?:inf|infinity|infty|oo)(?![A-Za-z])", r"\\infty "),
    (r"(?<![\w)}\]])\+\s*(?=\\infty)|\+\s*(?=-)", ""),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"([_^])\s*(-?\d+|[A-Za-z](?![A-Za-z])|\\(?!circ|text|frac|sqrt|math)[A-Za-z]+)", r"\1{\2}"),
    (r"_\{\\text\{([A-Za-z0-9]+)\}\}", r"_{\1}"),
    (r"\\(?:frac|sqrt|text)(?![a-z]).*", lambda m: _braced(m[0])),
    (r"(\d*)\.(\d*)\\overline ?\{(\d+)\}", lambda m: _repeating(m)),
    (r"(?<=\d) ?x ?(?=10\^)", r"\\times "),
    # Numbers
    (r"(\d)\s*million(?![a-z])", r"\1\\times 10^{6}"),
    (r"(\d)\s*billion(?![a-z])", r"\1\\times 10^{9}"),
    (r"(?<![\w.}])(\d+(?:\.\d+)?)[eE]\+?(-?)(\d+)(?!\w|\.\d)", r"\1\\times 10^{\2\3}"),
    (r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", "")),
    (r"(?<![\d.,] )(?<![\d.,/\w])\d{1,3}(?: \d{3})+(?![\d,])", lambda m: m[0].replace(" ", "")),
    (r"(?<![\w.])(\d+) *\\frac\{(\d+)\}\{(\d+)\}", lambda m: _mixed(m)),
    (r"(?<![\w./)}\n])(\d+) +(\d+) ?/ ?(\d+)(?!\w|\.\d)", lambda m: _mixed(m)),
]
_COMPILED = [(re.compile(pattern, re.DOTALL), replacement) for pattern, replacement in _REWRITES]
_BACKSLASHES = re.compile(r"\\\\(?=[a-zA-Z(){}\[\]$%])")
_ROW_END = re.compile(r"\\\\(?:\[[^\]]*\])?")
_CONTINUED = re.compile(r";\s*=")
_TAKES_ARGUMENTS = re.compile(r"(\\frac|\\sqrt|\\text)(?![a-z])\s*")
_WORDS = re.compile(r"[A-Za-z .,'/()\-]*")
_INDEX = re.compile(r"\[[^\[\]]*\]\s*")
_BRACES = re.compile(r"\\[{}]|[{}]")
_TOKEN = re.compile(r"(\\[A-Za-z]+|[A-Za-z0-9])\s*")
_DIGITS = re.compile(r"(\\[A-Za-z]+|[A-Za-z]|\d+(?:\.\d+)?)\s*")
_SPACES = re.compile(r"\s+")
_LOOSE_SPACE = re.compile(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) ")

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(
    r"(?P<sign>[-+]?)(?:"
    rf"(?P<number>{_DECIMAL})(?:(?:\\times|\\cdot|\*) ?10\^\{{(?P<exponent>-?\d+)\}})?"
    rf"|\\frac\{{(?P<over>-?{_DECIMAL})\}}\{{(?P<under>-?{_DECIMAL})\}}|(?P<num>{_DECIMAL})/(?P<den>{_DECIMAL})"
    r"|\((?P<whole>\d+)\+\\frac\{(?P<part>\d+)\}\{(?P<of>\d+)\}\))(?P<percent>%?)"
)
_LONGEST_NUMBER = 1000
_LARGEST_EXPONENT = 400


def _mixed(match: re.Match[str]) -> str:
    """A mixed number as a sum; an improper one (4 7/6) has no agreed value and stays as it is."""
    whole, part, of = match.groups()
    if len(of) < 20 and int(of) and len(part) < 20 and int(part) < int(of):
        return rf"({whole}+\frac{{{part}}}{{{of}}})"
    return rf"{whole} \frac{{{part}}}{{{of}}}"


def _repeating(match: re.Match[str]) -> str:
    """A repeating decimal as a fraction."""
    whole, once, again = match.groups()
    if len(once) + len(again) > 30:
        return match[0]
    over = int((whole or "0") + once + again) - int((whole or "0") + once)
    return rf"\frac{{{over}}}{{{10 ** (len(once) + len(again)) - 10 ** len(once)}}}"


def _braced(text: str) -> str:
    r"""Give ``\frac 1 2`` and ``\sqrt 13`` their braces, and take formulas out of ``\text{}``.

    A root takes all digits that follow, a fraction one each.
    """
    out, place = [], 0
    while match := _TAKES_ARGUMENTS.search(text, place):
        out.append(text[place : match.start()])
        place = match.end()
        if match[1] == "\\text":
            content, after = _argument(text, place, digits=False)
            if content is not None and not _WORDS.fullmatch(content):
                out.append(_braced(content))
                place = after
            else:
                out.append(match[1])
            continue
        out.append(match[1])
        if match[1] == "\\sqrt" and (index := _INDEX.match(text, place)):
            out.append(index[0])
            place = index.end()
        for _ in range(2 if match[1] == "\\frac" else 1):
            argument, place = _argument(text, place, digits=match[1] == "\\sqrt")
            if argument is None:
                break
            out.append("{" + _braced(argument) + "}")
    return "".join(out) + text[place:]


def _argument(text: str, place: int, *, digits: bool) -> tuple[str | None, int]:
    """What a command takes at a place, without braces, and where it ends; None where there is nothing."""
    place += len(text[place:]) - len(text[place:].lstrip())
    if text[place : place + 1] == "{":
        depth = 0
        for match in _BRACES.finditer(text, place):
            depth += {"{": 1, "}": -1}.get(match[0], 0)
            if depth == 0:
                return text[place + 1 : match.start()], match.end()
        return None, place
    token = (_DIGITS if digits else _TOKEN).match(text, place)
    return (token[1], token.end()) if token else (None, place)


def normal_form(text: str) -> str:
    r"""Write an answer in the one way that the other functions here read.

    Invisible characters and dollar signs go; Unicode becomes LaTeX; commands of one meaning become one;
    thousands are not grouped; ``a \frac{b}{c}`` between numbers becomes a sum in parentheses.
    """
    text = _INVISIBLE.sub("", text).translate(_CHARACTERS)
    text = _VULGAR.sub(_fraction, text)
    text = _SUPERSCRIPT.sub(
        lambda m: "^{" + unicodedata.normalize("NFKC", m[0]).replace("\u2212", "-") + "}", text
    )
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    text = unicodedata.normalize("NFKC", text)
    if "\\begin" not in text or "\\\\begin" in text:
        text = _BACKSLASHES.sub(r"\\", text)
    text = _ROW_END.sub(";", text)
    if "matrix" not in text and "array" not in text:  # aligned steps: one chain
        text = _CONTINUED.sub("=", text.replace("&", ""))
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    text = _SPACES.sub(" ", text).rstrip(" .,;:'\"").lstrip(" ,;:'\"")
    return _LOOSE_SPACE.sub("", text)


def _fraction(match: re.Match[str]) -> str:
    over, under = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return rf"\frac{{{over}}}{{{under}}}"


@dataclass(frozen=True)
class Number:
    """An exact number as written.

    Args:
        value: what it is; of ``28%`` 28/100.
        percent: whether it was written as a percentage.
    """

    value: Fraction
    percent: bool


def number(text: str) -> Number | None:
    """Read an integer, decimal, fraction, mixed number, power of ten or percentage in normal form."""
    if len(text) > _LONGEST_NUMBER or not (match := _PLAIN.fullmatch(text)):
        return None
    exponent = match["exponent"] or "0"
    if len(exponent) > 4 or abs(int(exponent)) > _LARGEST_EXPONENT:
        return None
    if match["number"]:
        value = Fraction(match["number"]) * Fraction(10) ** int(exponent)
    elif match["whole"]:
        value = int(match["whole"]) + Fraction(int(match["part"]), int(match["of"]))
    else:
        under = Fraction(match["under"] or match["den"])
        if not under:
            return None
        value = Fraction(match["over"] or match["num"]) / under
    percent = bool(match["percent"])
    return Number((-value if match["sign"] == "-" else value) / (100 if percent else 1), percent)


_UNIT_TEXT = re.compile(r"(?<=[\d})a-zA-Z|])((?: ?(?:\\cdot|/)? ?\\text\{[^{}]*\}(?:\^\{-?\d\})?)+)$")
_DEGREES = re.compile(r"(?<=[\d})])\^\\circ ?(?:[CF]|\\text\{[CF]\})?$")
_UNIT_WORD = re.compile(r"(?<=[\d})]) ?([A-Za-z][A-Za-z/. ]*?)\.?(?:\^\{?(\d)\}?)?$")
_BASE = re.compile(r"(?<=[0-9A-Za-z)])_\{?(\d+)\}?$")
_UNITS = {  # a letter that is a variable at least as often as a unit is none: 5d, 3t
    "mm", "cm", "m", "km", "in", "ft", "yd", "mi", "g", "kg", "mg", "lb", "oz", "s", "ms", "min", "h", "hr",
    "L", "ml", "mL", "N", "J", "W", "V", "Pa", "Hz", "K", "C", "F", "T", "eV", "mol", "mph", "kmh", "km/h",
    "m/s", "rpm", "am", "pm", "AM", "PM", "sq", "cu",
}  # fmt: skip
_UNIT_NAMES = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "inch": "in", "inche": "in", "feet": "ft", "foot": "ft", "gram": "g", "kilogram": "kg", "pound": "lb",
    "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "mile": "mi", "yard": "yd",
    "millimeter": "mm", "liter": "l", "litre": "l",
}  # fmt: skip
_NO_UNIT = {
    "and", "or", "not", "mod", "if", "for", "where", "with", "hundred", "thousand", "million", "billion",
    "trillion", "dozen", "half",
}  # fmt: skip


def split_unit(text: str) -> tuple[str, str]:
    r"""Part an answer in normal form from its unit.

    A unit is a trailing ``\text{}``, an abbreviation, a degree sign, a number's base, or a word of three
    letters or more after a number: what is counted.

    Returns:
        The rest and the unit, spelled one way; empty where there is none.
    """
    text = text.strip("\u20ac\u00a3")
    if (match := _DEGREES.search(text)) and not re.search(r"\\(?:sin|cos|tan)", text):
        return text[: match.start()], "degree"
    if match := _UNIT_TEXT.search(text):
        unit = re.sub(r"\\text|\\cdot|[{}]", " ", match[1])
        if not _NO_UNIT & set(unit.lower().split()):
            power = re.search(r"\^ *(\d) *$", unit)
            return text[: match.start()], _unit(unit[: power.start()] if power else unit, power and power[1])
    if match := _BASE.search(text):
        head = text[: match.start()]
        if re.fullmatch(r"\(?[0-9A-F]*\d[0-9A-F]*\)?", head):
            return head.strip("()"), "base " + match[1]
    if match := _UNIT_WORD.search(text):
        words = match[1].split()
        known = all(word in _UNITS or (len(word) > 2 and word.islower()) for word in words)
        if words and known and not _NO_UNIT & set(words):
            return text[: match.start()], _unit(match[1], match[2])
    return text, ""


def _unit(words: str, power: str | None) -> str:
    names = []
    for word in re.split(r"[\s.]+", words.strip()):
        singular = word.lower().removesuffix("s") if len(word) > 3 else word
        names.append(_UNIT_NAMES.get(singular, singular))
    unit = " ".join(name for name in names if name)
    if unit.startswith(("square ", "sq ")):
        unit, power = unit.split(" ", 1)[1], "2"
    elif unit.startswith(("cubic ", "cu ")):
        unit, power = unit.split(" ", 1)[1], "3"
    return unit + (power if power and unit else "")


def plain_text(text: str, *, short: bool = False) -> str | None:
    r"""The words of an answer that is no formula, in lower case: ``\text{Evelyn}``, ``no solution``, ``(C)``.

    Two letters are a product unless they stand in ``\text{}`` or ``short`` is given.

    Returns:
        The words, or None for a formula.
    """
    bare = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    bare = _SPACES.sub(" ", bare).strip(" .()'\"")
    if not re.fullmatch(r"[A-Za-z][A-Za-z '\-]*", bare):
        return None
    if len(bare) == 1:
        return bare  # a variable or a choice: case tells
    return bare.lower() if short or "\\text" in text or len(bare) > 2 else None
