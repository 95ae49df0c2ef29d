r"""One way to write what can be written in many: LaTeX variants, Unicode, plain text."""

import functools
import re
import unicodedata

from rlvr.answers.quantities import COUNTS, unquoted
from rlvr.answers.rewrites import REWRITES, argument

_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2060-\u2064\ufeff\u0300-\u036f\ud800-\udfff]"
)
_COMMANDS = {
    "\u00d7": "times", "\u22c5": "cdot", "\u00b7": "cdot", "\u00b1": "pm", "\u2213": "mp", "\u2248": "approx",
    "\u2264": "le", "\u2265": "ge", "\u2a7d": "le", "\u2a7e": "ge", "\u2260": "ne", "\u2261": "equiv",
    "\u221e": "infty", "\u222a": "cup", "\u2229": "cap", "\u2216": "setminus", "\u2208": "in",
    "\u2205": "emptyset", "\u00b0": "degree", "\u2026": "ldots", "\u2220": "angle", "\u25b3": "triangle",
    "\u230a": "lfloor", "\u230b": "rfloor", "\u2308": "lceil", "\u2309": "rceil", "\u2200": "forall",
    "\u221a": "sqrt", "\u221b": "sqrt[3]", "\u221c": "sqrt[4]",
}  # fmt: skip
_GREEK = [
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu",
    "nu", "xi", "omicron", "pi", "rho", "varsigma", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega",
]  # fmt: skip
_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2212\u2013\u2014\u2010\u2011", "-")
    | dict.fromkeys("\t\u00a0\u2009\u202f\u2007\u2002\u2003", " ")
    | dict.fromkeys("\u201c\u201d\u2018\u2019\u2032", "'")
    | dict.fromkeys("\u00f7\u2215\u2044", "/")
    | {
        letter: rf"\mathbb{{{unicodedata.normalize('NFKC', letter)}}}"
        for letter in "\u2102\u2115\u211a\u211d\u2124"
    }
    | {character: rf"\{command} " for character, command in _COMMANDS.items()}
    | {chr(0x3B1 + i): rf"\{name} " for i, name in enumerate(_GREEK)}
    | {chr(0x391 + i): rf"\{name.title()} " for i, name in enumerate(_GREEK)}
)
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+")
_BACKSLASHES = re.compile(r"\\\\(?=[a-zA-Z(){}\[\]$%!,;:])")
_AROUND = re.compile(r"^\s*\$*\s*|(?:(?<!\\)\$|\s|(?<!\.)\.(?!\.))+$")
_ROW_END = re.compile(r"\\\\(?:\[[^\]]*\])?")
_CONTINUED = re.compile(r";\s*=")
_SPACES = re.compile(r"\s+")
_LOOSE_SPACE = re.compile(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) ")
_NUMBER_WORD = re.compile(rf"(?:\\text\{{)?({'|'.join(COUNTS)})\}}?", re.IGNORECASE)
_WHERE = r"(?:[,;:]|\(|\\text\{,? ?|(?= (?:where|with|for)))+ ?(?:(?:where|with|for)(?![a-z]))? ?\}? ?\(?"
_CONDITION = re.compile(
    rf"(?<=\S){_WHERE}(?P<letter>[A-Za-z](?:,[A-Za-z])*) ?(?:\\in ?(?P<set>\\mathbb\{{[A-Z]\}}[^,;\\]*?)\)?"
    r"|(?:\\text\{ ?)?(?:is|are) (?:an |any |integers?)+\}?)$"
    r"|(?<=\S)[,;:]? ?(?:\(|\\text\{,? ?)?(?:for (?:all|any|every|each)|\\forall)(?![a-z])(?P<all>[^=]*)$"
)


@functools.lru_cache(maxsize=1024)  # one gold answer meets many responses
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
    text = unicodedata.normalize("NFKC", text)
    if "\\begin" not in text or "\\\\begin" in text:
        text = _BACKSLASHES.sub(r"\\", text)
    text = _ROW_END.sub(";", text)
    if "matrix" not in text and "array" not in text:  # aligned steps: one chain
        text = _CONTINUED.sub("=", text.replace("&", ""))
    text = _AROUND.sub("", text)
    infix = "\\choose" in text or "\\over" in text  # {n \choose k} needs its braces
    while not infix and text.startswith("{") and argument(text, 0, digits=False)[1] == len(text):
        text = text[1:-1].strip()
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = _SPACES.sub(" ", text).rstrip(' .,;:"').lstrip(' ,;:"')
    text = unquoted(_LOOSE_SPACE.sub("", text))
    word = _NUMBER_WORD.fullmatch(text)
    return str(COUNTS.index(word[1].lower())) if word else text


def split_condition(text: str) -> tuple[str, str]:
    r"""Part an answer in normal form from what follows: "for all n", ``k \in \mathbb{Z}``, "k is an integer".

    Returns:
        The rest and the condition; empty where there is none.
    """
    match = _CONDITION.search(text)
    if match is None:
        return text, ""
    return text[: match.start()], match["all"] or match["letter"] + (match["set"] or r"\mathbb{Z}")


def _fraction(match: re.Match[str]) -> str:
    over, under = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return rf"\frac{{{over}}}{{{under}}}"
