r"""Exact numbers, units and words in normal form."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(
    r"(?P<sign>[-+]?)(?:"
    rf"(?P<number>{_DECIMAL})(?:(?:\\times|\\cdot|\*) ?10\^\{{(?P<exponent>-?\d+)\}})?"
    r"|(?P<root>\d{1,6})\^\{(?P<power>-?\d{1,3})\}"
    rf"|\\frac\{{(?P<over>-?{_DECIMAL})\}}\{{(?P<under>-?{_DECIMAL})\}}|(?P<num>{_DECIMAL})/(?P<den>{_DECIMAL})"
    r"|\((?P<whole>\d+)\+\\frac\{(?P<part>\d+)\}\{(?P<of>\d+)\}\))(?P<percent>%?)"
)
COUNTS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
]  # fmt: skip
"""Numbers in words, each at its own place."""
_LONGEST_NUMBER = 1000
_LARGEST_EXPONENT = 400


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
    elif match["root"]:
        if int(match["power"]) < 0 and not int(match["root"]):
            return None
        value = Fraction(match["root"]) ** int(match["power"])
    elif match["whole"]:
        value = int(match["whole"]) + Fraction(int(match["part"]), int(match["of"]))
    else:
        under = Fraction(match["under"] or match["den"])
        if not under:
            return None
        value = Fraction(match["over"] or match["num"]) / under
    percent = bool(match["percent"])
    return Number((-value if match["sign"] == "-" else value) / (100 if percent else 1), percent)


_DEGREES = re.compile(r"(?<=[\d})])\^\\circ ?(?:\\text\{ ?)?([CF]?)\}?$")
_BASE = re.compile(r"(?<=[0-9A-Za-z)])_\{?([1-9]\d?)\}?$")
_CURRENCIES = {
    r"\$": "dollar", "USD": "dollar", "\u20ac": "euro", "EUR": "euro", "\u00a3": "pound", "GBP": "pound",
    "\u00a5": "yen", "\u20b9": "rupee", "Rs": "rupee", "INR": "rupee", "\u00a2": "cent",
}  # fmt: skip
_SIGNS = "|".join(map(re.escape, _CURRENCIES))
_BEFORE = re.compile(rf"^(-?)(?:US ?)?(?:({_SIGNS})|\\text\{{ ?({_SIGNS})\.? ?\}})\.? ?(?=[-\d.(\\])")
_AFTER = re.compile(rf"(?<=[\d}})]) ?({_SIGNS})$")
_WORD = r"(?:\\text\{[^{}]*\}|[A-Za-z]++\.?)(?:\^\{?-?\d\}?)?"
_UNIT = re.compile(
    rf"(?:(?<=[\d}})|])|(?<=\\pi)) ?{_WORD}(?: ?(?:\\cdot|[/*.])? ?{_WORD})*+$"
    r"|(?<=[A-Za-z])(?: ?(?:\\cdot|/)? ?\\text\{[^{}]*\}(?:\^\{-?\d\})?)+$"
)
# Of single letters alone, which may all be variables: m, m/s^2
_LETTERS = re.compile(r"(?:(?:\\cdot|[ /*.])*[A-Za-z](?![A-Za-z])(?:\^\{?-?\d\}?)?)+")
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_UNIT_FRACTION = re.compile(r"\\frac\{(\\text\{[^{}]*\}(?:\^\{\d\})?)\}\{(\\text\{[^{}]*\}(?:\^\{\d\})?)\}$")
_UNIT_PART = re.compile(r"(/)|([A-Za-z]+)|\^ *(-?\d)")
_UNITS = {  # a letter that is a variable at least as often as a unit is none: 5d, 3t
    "mm", "cm", "m", "km", "in", "ft", "yd", "mi", "g", "kg", "mg", "lb", "oz", "s", "ms", "min", "h", "hr",
    "L", "ml", "mL", "N", "J", "W", "V", "Pa", "Hz", "K", "C", "F", "T", "eV", "mol", "mph", "kmh",
    "rpm", "am", "pm", "AM", "PM", "sq", "cu",
}  # fmt: skip
_UNIT_NAMES = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "inch": "in", "inche": "in", "feet": "ft", "foot": "ft", "yard": "yd", "mile": "mi",
    "gram": "g", "kilogram": "kg", "lb": "pound", "ounce": "oz", "liter": "l", "litre": "l", "second": "s",
    "sec": "s", "minute": "min", "hour": "h", "hr": "h", "usd": "dollar",
}  # fmt: skip
_RATES = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h"}
_NO_UNIT = {
    "and", "or", "not", "mod", "if", "for", "where", "with", "hundred", "thousand", "million", "billion",
    "trillion", "dozen", "half", "more", "less", "fewer", "least", "most", "than", "base", "lakh", "crore",
    "tenth", "hundredth", "squared", "cubed", "factorial", "root", "plus", "minus", "is", "isn", "wrong",
    "false", "really", *COUNTS,
}  # fmt: skip


def split_unit(text: str, *, letters: bool = True) -> tuple[str, str]:
    r"""Part an answer in normal form from its unit.

    A unit is a trailing ``\text{}``, an abbreviation, a degree sign, a number's base, or a word of three
    letters or more after a number: what is counted; and a currency before or after it.

    Args:
        text: the answer.
        letters: whether single letters may be a unit, as in ``2 m``, or are variables.

    Returns:
        The rest and the unit, spelled one way; empty where there is none.
    """
    if match := _BEFORE.match(text):
        return match[1] + text[match.end() :], _CURRENCIES[match[2] or match[3]]
    if match := _AFTER.search(text):
        return text[: match.start()], _CURRENCIES[match[1]]
    if (match := _DEGREES.search(text)) and not re.search(r"\\(?:sin|cos|tan)", text):
        return text[: match.start()], "degree" + match[1]
    if match := _UNIT_FRACTION.search(text):
        return text[: match.start()], _unit(f"{match[1]}/{match[2]}")
    if match := _BASE.search(text):
        head = text[: match.start()]
        if re.fullmatch(r"\(?[0-9A-F]*\d[0-9A-F]*\)?", head):
            return head.strip("()"), "base " + match[1]
    if (match := _UNIT.search(text)) and _is_unit(match[0]):
        head = text[: match.start()]
        if not _LETTERS.fullmatch(match[0]) or (letters and not _VARIABLE.search(head)):
            return head, _unit(match[0])
    return text, ""


def _is_unit(text: str) -> bool:
    r"""Whether words after a number count or measure: any in ``\text{}``, of bare ones the known or long."""
    words = re.findall(r"[a-z]+", text.lower().replace("\\text", ""))
    if "," in text or _NO_UNIT & {*words, *(word.removesuffix("s") for word in words)}:
        return False
    if "times" in words[:-1]:  # 5 times is a count, 5 times ten another number
        return False
    bare = re.findall(r"[A-Za-z]+", re.sub(r"\\text\{[^{}]*\}|\\cdot", "", text))
    if not all(word in _UNITS or (len(word) > 2 and word.islower()) for word in bare):
        return False
    # 4 m g is a product of variables, m s^{-1} is none.
    return len(bare) < 2 or any(len(word) > 1 for word in bare) or "/" in text or "^" in text


def _unit(text: str) -> str:
    """One spelling a unit: names with their powers, in the order of the alphabet."""
    powers: dict[str, int] = {}
    sign, factor, last = 1, 1, ""
    text = re.sub(r"[A-Za-z]+", lambda word: _RATES.get(word[0], word[0]), text)
    for match in _UNIT_PART.finditer(re.sub(r"\\text|\\cdot|[{}]", " ", text)):
        slash, word, power = match.groups()
        if slash or word == "per":
            sign = -1
        elif power:
            powers[last] = powers.get(last, 0) + sign * (int(power) - 1) if last else 0
        elif word in ("square", "sq", "cubic", "cu"):
            factor = 2 if word.startswith("s") else 3
        else:
            singular = word.lower().removesuffix("s") if len(word) > 3 else word
            last = _UNIT_NAMES.get(singular, singular)
            powers[last] = powers.get(last, 0) + sign * factor
            factor = 1
    return " ".join(f"{name}{powers[name] if powers[name] != 1 else ''}" for name in sorted(powers))


def plain_text(text: str, *, short: bool = False) -> str | None:
    r"""The words of an answer that is no formula, in lower case: ``\text{Evelyn}``, ``no solution``, ``(C)``.

    Letters are a product where none of them make a word of three, unless they stand in ``\text{}`` or
    ``short`` is given. An article before a word is left out.

    Returns:
        The words, or None for a formula.
    """
    bare = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    bare = unquoted(re.sub(r"\s+", " ", bare).strip(' .()"'))
    if not re.fullmatch(r"[A-Za-z][A-Za-z '\-]*", bare):
        return None
    if len(bare) == 1:
        return bare  # a variable or a choice: case tells
    if not (short or "\\text" in text or re.search(r"[A-Za-z]{3}", bare)):
        return None
    return re.sub(r"^(?:an?|the) (?=[a-z])", "", bare.lower())


def unquoted(text: str) -> str:
    """What stands in a pair of quotes; a single one is a prime."""
    return re.sub(r"^('{1,2})(.*[^'])\1$", r"\2", text)


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


def terminates(value: Fraction) -> bool:
    """Whether a number is a decimal of its own, so that no other decimal is it, rounded."""
    under = value.denominator
    for prime in (2, 5):
        while under % prime == 0:
            under //= prime
    return under == 1
