r"""One way to write what can be written in many: LaTeX variants, Unicode, plain text."""

import functools
import re
import unicodedata
from collections.abc import Callable

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
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho varsigma sigma "
    "tau upsilon phi chi psi omega"
).split()
_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2212\u2013\u2014\u2010\u2011", "-")
    | dict.fromkeys("\t\u00a0\u2009\u202f\u2007\u2002\u2003", " ")
    | dict.fromkeys("\u201c\u201d\u2018\u2019\u2032", "'")
    | dict.fromkeys("\u00f7\u2215\u2044", "/")
    | {letter: rf"\mathbb{{{unicodedata.normalize('NFKC', letter)}}}" for letter in "\u2102\u2115\u211a\u211d\u2124"}
    | {character: rf"\{command} " for character, command in _COMMANDS.items()}
    | {chr(0x3B1 + i): rf"\{name} " for i, name in enumerate(_GREEK)}
    | {chr(0x391 + i): rf"\{name.title()} " for i, name in enumerate(_GREEK)}
)
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+")
_FONT = r"text(?:normal|bf|it|rm|tt|sf)?|math(?:rm|bf|it|sf)|mbox|operatorname\*?|boldsymbol|bold|bm|rm"
_SPACING = (
    r"[,;:> ]|(?:q?quad|displaystyle|textstyle|scriptstyle|(?:no)?limits|n|bf|it|sf|tt|large|Large|hfill"
    r"|ensuremath|underline)(?![A-Za-z])|hspace\*?\{[^{}]*\}|(?:text)?color *\{[A-Za-z]+\}"
)
_PERCENT = r"(?:percent(?:age)?|pct)"
_FUNCTIONS = "pi|sqrt|exp|(?:arc)?(?:sin|cos|tan|cot|sec|csc)|(?:sin|cos|tan)h|log|ln"
_RUSSIAN = {"tg": "tan", "ctg": "cot", "arctg": "arctan", "arcctg": "arccot", "sh": "sinh", "ch": "cosh"}
_BASES = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_BASE = rf"(\d+|{'|'.join(_BASES)})"
_COUNTS = ["zero", "one", *_BASES[:11]]
_NUMBER_WORD = re.compile(rf"(?:\\text\{{)?({'|'.join(_COUNTS)})\}}?", re.IGNORECASE)

_Replacement = str | Callable[[re.Match[str]], str]
_REWRITES: list[tuple[str, _Replacement]] = [
    # What is only looks
    (r"^\s*\*\*(.*)\*\*\s*$", r"\1"),
    (r"(?<=\d),\s*\\!\s*(?=\d{3})", ","),
    (
        r"\\left\s*\\(?:\{|lbrace)\s*\\begin\{array\}\s*\{[^{}]*\}(.*?)\\end\{array\}\s*\\right\s*\.",
        r"\\begin{cases}\1\\end{cases}",
    ),
    (r"\\begin\{cases\}([^&]*?)[;,\s]*\\end\{cases\}", r"\1"),
    (r"\\(?:boxed|fbox)(?=\s*\{)", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?|middle)(?![A-Za-z])\.?|\\!", ""),
    (rf"\\(?:{_SPACING})|~", " "),
    (r"(?<!\\)\$|\\[()]|^\s*\\\[|\\\[(?!\d)|(?<!\\)\\\]", " "),
    (r"\s*\{\s*,\s*\}\s*", ","),
    (r"\\(?:begin|end)\{(?:align|equation|gather)(?:ed)?\*?\}", " "),
    (r"\{\{([^{}]*)\}\}", r"{\1}"),
    # Commands of one meaning
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\math(?:rm|bf) ?\{ ?R ?\}(?=$|\^|_|\\setminus)", r"\\mathbb{R}"),
    (r"\\(?:mathrm|mathbf|mathit|boldsymbol|bm) ?\{ ?([A-Za-z]) ?\}", r" \1"),
    (rf"\\(?:{_FONT})\s*(?=\{{)", r"\\text"),
    (r"\{\\rm ([^{}]*)\}", r"{\\text{\1}}"),
    (r"^\s*\\text\{ ?([A-Z](?:(?:, ?(?:and )?| and )[A-Z])+) ?\}\s*$", r"\1"),
    (rf"\\text\{{ ?({_FUNCTIONS}|lcm|gcd|max|min) ?\}}", r"\\\1 "),
    (
        rf"\\(?:text\{{ ?)?({'|'.join(_RUSSIAN)})(?![A-Za-z]) ?\}}?",
        lambda m: rf"\{_RUSSIAN[m[1]]} ",
    ),
    (r"\\lg(?![a-z])", r"\\log_{10}"),
    (r"\\[dt]binom(?![a-z])", r"\\binom"),
    (r"\{([^{}]*)\\(over|choose)(?![a-z])([^{}]*)\}", lambda m: _infix(m)),
    (r"\\geq(?:slant)?(?![a-z])|>=", r"\\ge "),
    (r"\\leq(?:slant)?(?![a-z])|<=", r"\\le "),
    (r"\\neq(?![a-z])|!=|\\not\s*=", r"\\ne "),
    (r"\\var(epsilon|phi|theta|rho|sigma)(?![a-z])", r"\\\1"),
    (r"\\gt(?![a-z])", ">"),
    (r"\\lt(?![a-z])", "<"),
    (r"\\approxeq|\\simeq(?![a-z])|\\doteq", r"\\approx "),
    (r"\\bigcup(?![a-z])|(?<=[)\]}])\s*U\s*(?=[(\[\\{])", r"\\cup "),
    (r"\\colon(?![a-z])", ":"),
    (r"\+/-", r"\\pm "),
    (r"\^\s*\{?\s*\\prime\s*\}?|\\prime(?![a-z])", "'"),
    (rf"\(?\s*(?:\\[pb]?mod(?![a-z])|\bmod\b)\s*\{{?\s*([^(){{}}]+?)\s*\}}?\s*\)?[\s.]*$", r"\\pmod{\1}"),
    (r"\\varnothing|\\\{\s*\\\}|^\s*(?:\\text\{ ?)?[Nn]o solutions?[ .]*\}?\s*$", r"\\emptyset "),
    (r"^\s*(?:\\text\{ ?)?[Aa]ll real(?:s| numbers| values)[ .]*\}?\s*$", r"\\mathbb{R}"),
    (r"\\(?:mathbb|text) ?(?:\{ ?R ?\}|R(?![A-Za-z]))|\\R(?:eals?)?(?![A-Za-z])", r"\\mathbb{R}"),
    (r"\\c?dots[a-z]?(?![a-z])|\.\.\.", r"\\ldots "),
    (r"\\mathbb\{R\}\s*(?:\^\s*\{?\s*\+\s*\}?|_\s*\{\s*> ?0\s*\})", r"(0,\\infty)"),
    (r"(?<=\\mathbb\{R\})\s*(?:-|\\backslash)\s*(?=\\\{|[(\[])", r"\\setminus "),
    (r"\\lbrack(?![a-z])", "["),
    (r"\\rbrack(?![a-z])", "]"),
    (r"(?:(?<![\w}\])])|(?<=\\in)|(?<=\\cup))([\[\]])([^\[\]()]+[,;][^\[\]()]+)([\[\]])", lambda m: _outward(m)),
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
    (r"(?<![\\A-Za-z])(?:np|numpy|math)\.(?=[a-z])", ""),
    (r"(?<![\\A-Za-z])a(?=(?:sin|cos|tan)(?![A-Za-z]))", "arc"),
    (r"(?<![A-Za-z\\_^{])([A-Z]) (?=[A-Z](?![A-Za-z]))", r"\1"),
    (
        rf"\\text\{{[ (]*base[ -]*{_BASE}[ )]*\}}|\\text\{{ *base *\}} *{_BASE}|\( *base[ -]*{_BASE} *\)"
        rf"|(?<![A-Za-z\\])base[ -]{_BASE}|_\{{?(?:\\text\{{)? *({'|'.join(_BASES)}) *\}}?\}}?",
        lambda m: _base(m),
    ),
    (
        r"^\s*\\text\{ ?(?:approximately|about|roughly|exactly|(?:the )?answer is|answer:)[ :]*\}(?=\s*[-+\d\\$.])",
        "",
    ),
    (r"^\s*(\d+) to (\d+)\s*$", r"\1:\2"),
    (rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])", r"\\\1"),
    (r"(?<![\\A-Za-z])(?:inf|infinity|infty|oo)(?![A-Za-z])", r"\\infty "),
    (r"(?<![\w)}\]])\+\s*(?=\\infty)|\+\s*(?=-)", ""),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"([_^])\s*(-?\d+|[A-Za-z](?![A-Za-z])|\\(?!circ|text|frac|sqrt|math)[A-Za-z]+)", r"\1{\2}"),
    (r"_\{\\text\{([A-Za-z0-9]+)\}\}", r"_{\1}"),
    (r"\\(?:frac|binom|sqrt|text)(?![a-z]).*", lambda m: _braced(m[0])),
    (r"\\((?:d{1,3}ot|vec|hat|bar|tilde|overline))\s*(\\[A-Za-z]+|[A-Za-z])", r"\\\1{\2}"),
    (r"(?<=\d)\{(\\frac\{\d+\}\{\d+\})\}", r"\1"),
    (r"\.(\d*)\\dot *\{?(\d)\}?(\d*)\\dot *\{?(\d)\}?", r".\1\\overline{\2\3\4}"),
    (r"\.(\d*)\\(?:bar|dot) *(?:\{(\d+)\}|(\d))", r".\1\\overline{\2\3}"),
    (r"\.(\d{0,20}?)(?:(\d)\2\2+|(?<=\.)(\d{2,15}?)\3+)\d{0,0}\s*\\ldots", r".\1\\overline{\2\3}"),
    (r"(\.\d+)\s*\\ldots", r"\1"),
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
_BACKSLASHES = re.compile(r"\\\\(?=[a-zA-Z(){}\[\]$%!,;:])")
_AROUND = re.compile(r"^\s*\$*\s*|(?:(?<!\\)\$|[\s.])+$")
_ROW_END = re.compile(r"\\\\(?:\[[^\]]*\])?")
_CONTINUED = re.compile(r";\s*=")
_TAKES_ARGUMENTS = re.compile(r"(\\frac|\\binom|\\sqrt|\\text)(?![a-z])\s*")
_WORDS = re.compile(r"[A-Za-z .,'/()\-]*")
_INDEX = re.compile(r"\[[^\[\]]*\]\s*")
_BRACES = re.compile(r"\\[{}]|[{}()]")
_TOKEN = re.compile(r"(\\[A-Za-z]+|[A-Za-z0-9])\s*")
_DIGITS = re.compile(r"(\\[A-Za-z]+|[A-Za-z]|\d+(?:\.\d+)?)\s*")
_SPACES = re.compile(r"\s+")
_LOOSE_SPACE = re.compile(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) ")


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


def _infix(match: re.Match[str]) -> str:
    r"""``{a \over b}`` and ``{a \choose b}``, of plain TeX, as commands with arguments."""
    return rf"\{'frac' if match[2] == 'over' else 'binom'}{{{match[1]}}}{{{match[3]}}}"


def _outward(match: re.Match[str]) -> str:
    """An interval that is open where its square bracket faces outward, as in ``]0,1]``."""
    left, inner, right = match.groups()
    return ("[" if left == "[" else "(") + inner + ("]" if right == "]" else ")")


def _base(match: re.Match[str]) -> str:
    word = next(filter(None, match.groups()))
    return f"_{{{_BASES.index(word) + 2 if word in _BASES else word}}}"


def _braced(text: str) -> str:
    r"""Give ``\frac 1 2`` and ``\sqrt 13`` their braces, and take formulas out of ``\text{}``.

    A root takes all digits or the parenthesis that follow, a fraction or binomial one each.
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
        for _ in range(1 if match[1] == "\\sqrt" else 2):
            argument, place = _argument(text, place, digits=match[1] == "\\sqrt")
            if argument is None:
                break
            out.append("{" + _braced(argument) + "}")
    return "".join(out) + text[place:]


def _argument(text: str, place: int, *, digits: bool) -> tuple[str | None, int]:
    """What a command takes at a place, without braces, and where it ends; None where there is nothing."""
    place += len(text[place:]) - len(text[place:].lstrip())
    pair = {"{": "{}", "(": "()" if digits else ""}.get(text[place : place + 1], "")
    if pair:
        depth = 0
        for match in _BRACES.finditer(text, place):
            depth += {pair[0]: 1, pair[1]: -1}.get(match[0], 0)
            if depth == 0:
                return text[place + 1 : match.start()], match.end()
        return None, place
    token = (_DIGITS if digits else _TOKEN).match(text, place)
    return (token[1], token.end()) if token else (None, place)


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
    while text.startswith("{") and "\\choose" not in text and "\\over" not in text and _argument(text, 0, digits=False)[1] == len(text):
        text = text[1:-1].strip()
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    text = _SPACES.sub(" ", text).rstrip(" .,;:\"").lstrip(" ,;:'\"")
    text = _LOOSE_SPACE.sub("", text)
    word = _NUMBER_WORD.fullmatch(text)
    return str(_COUNTS.index(word[1].lower())) if word else text


_WHERE = r"(?:[,;:]|\(|\\text\{,? ?|(?= (?:where|with|for)))+ ?(?:(?:where|with|for)(?![a-z]))? ?\}? ?\(?"
_CONDITION = re.compile(
    rf"(?<=\S){_WHERE}(?P<letter>[A-Za-z](?:,[A-Za-z])*) ?(?:\\in ?(?P<set>\\mathbb\{{[A-Z]\}}[^,;\\]*?)\)?"
    r"|(?:\\text\{ ?)?(?:is|are) (?:an |any |integers?)+\}?)$"
    r"|(?<=\S)[,;:]? ?(?:\(|\\text\{,? ?)?(?:for (?:all|any|every|each)|\\forall)(?![a-z])(?P<all>[^=]*)$"
)


def split_condition(text: str) -> tuple[str, str]:
    r"""Part an answer in normal form from the condition after it: "for all n", ``k \in \mathbb{Z}``, "k is an integer".

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
