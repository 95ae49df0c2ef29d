r"""The rules by which commands of one meaning become one: LaTeX variants, plain TeX, plain text, numbers."""

import re
from collections.abc import Callable

_FONT = r"text(?:normal|bf|it|rm|tt|sf)?|math(?:rm|bf|it|sf)|mbox|operatorname\*?|boldsymbol|bold|bm|rm"
_SPACING = (
    r"[,;:> ]|(?:q?quad|displaystyle|textstyle|scriptstyle|(?:no)?limits|n|bf|it|sf|tt|large|Large|hfill"
    r"|ensuremath|underline)(?![A-Za-z])|hspace\*?\{[^{}]*\}|(?:text)?color *\{[A-Za-z]+\}"
)
_PERCENT = r"(?:per ?cent(?:age)?|pct)"
_FUNCTIONS = "pi|sqrt|exp|(?:arc)?(?:sin|cos|tan|cot|sec|csc)|(?:sin|cos|tan)h|log|ln"
_RUSSIAN = {"tg": "tan", "ctg": "cot", "arctg": "arctan", "arcctg": "arccot", "sh": "sinh", "ch": "cosh"}
_BASES = [
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen",
]  # fmt: skip
_BASE = rf"(\d+|{'|'.join(_BASES)})"

_Replacement = str | Callable[[re.Match[str]], str]
_RULES: list[tuple[str, _Replacement]] = [
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
    (r"(?<=[\d}])\s*\\mathrm ?\{ ?([mgshLNJWVKCFT]) ?\}", r"\\text{\1}"),  # upright, a unit
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
    (r"\(?\s*(?:\\[pb]?mod(?![a-z])|\bmod\b)\s*\{?\s*([^(){}]+?)\s*\}?\s*\)?[\s.]*$", r"\\pmod{\1}"),
    (r"\\varnothing|\\\{\s*\\\}|^\s*(?:\\text\{ ?)?[Nn]o solutions?[ .]*\}?\s*$", r"\\emptyset "),
    (r"^\s*(?:\\text\{ ?)?[Aa]ll real(?:s| numbers| values)[ .]*\}?\s*$", r"\\mathbb{R}"),
    (r"\\(?:mathbb|text) ?(?:\{ ?R ?\}|R(?![A-Za-z]))|\\R(?:eals?)?(?![A-Za-z])", r"\\mathbb{R}"),
    (r"\\c?dots[a-z]?(?![a-z])|\.\.\.", r"\\ldots "),
    (r"\\mathbb\{R\}\s*(?:\^\s*\{?\s*\+\s*\}?|_\s*\{\s*> ?0\s*\})", r"(0,\\infty)"),
    (r"(?<=\\mathbb\{R\})\s*(?:-|\\backslash)\s*(?=\\\{|[(\[])", r"\\setminus "),
    (r"\\lbrack(?![a-z])", "["),
    (r"\\rbrack(?![a-z])", "]"),
    (
        r"(?:(?<![\w}\])])|(?<=\\in)|(?<=\\cup))([\[\]])([^\[\]()]+[,;][^\[\]()]+)([\[\]])",
        lambda m: _outward(m),
    ),
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
        r"^\s*\\text\{ ?(?:approximately|about|roughly|exactly|(?:[Tt]he )?answer is|[Aa]nswer)[ :]*\}"
        r"(?=\s*[-+\d\\$.])",
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
    (r"\.(\d{0,20}?)(?:(\d)\2\2+|(?<=\.)(\d{2,15}?)\3+)\s*\\ldots", r".\1\\overline{\2\3}"),
    (r"(\.\d+)\s*\\ldots", r"\1"),
    (r"(\d*)\.(\d*)\\overline ?\{(\d+)\}", lambda m: _repeating(m)),
    (r"(?<=\d) ?x ?(?=10\^)", r"\\times "),
    # Numbers
    (r"(\d)\s*million(?![a-z])", r"\1\\times 10^{6}"),
    (r"(\d)\s*billion(?![a-z])", r"\1\\times 10^{9}"),
    (r"(?<![\w.}])(\d+(?:\.\d+)?)[eE]\+?(-?)(\d+)(?!\w|\.\d)", r"\1\\times 10^{\2\3}"),
    (r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", "")),
    (r"(?<![\d.,'])\d{1,3}(?:'\d{3})+(?![\d'])", lambda m: m[0].replace("'", "")),
    (r"(?<![\d.,] )(?<![\d.,/\w])\d{1,3}(?: \d{3})+(?![\d,])", lambda m: m[0].replace(" ", "")),
    (r"(?<![\w.])(\d+) *\\frac\{(\d+)\}\{(\d+)\}", lambda m: _mixed(m)),
    (r"(?<![\w./)}\n])(\d+) +(\d+) ?/ ?(\d+)(?!\w|\.\d)", lambda m: _mixed(m)),
]
REWRITES = [(re.compile(pattern, re.DOTALL), replacement) for pattern, replacement in _RULES]
"""What replaces what, in this order."""
_TAKES_ARGUMENTS = re.compile(r"(\\frac|\\binom|\\sqrt|\\text)(?![a-z])\s*")
_WORDS = re.compile(r"[A-Za-z .,'/()\-]*")
_INDEX = re.compile(r"\[[^\[\]]*\]\s*")
_BRACES = re.compile(r"\\[{}]|[{}()]")
_TOKEN = re.compile(r"(\\[A-Za-z]+|[A-Za-z0-9])\s*")
_DIGITS = re.compile(r"(\\[A-Za-z]+|[A-Za-z]|\d+(?:\.\d+)?)\s*")


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
    """The base of a number, also in words, as its index."""
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
            content, after = argument(text, place, digits=False)
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
            taken, place = argument(text, place, digits=match[1] == "\\sqrt")
            if taken is None:
                break
            out.append("{" + _braced(taken) + "}")
    return "".join(out) + text[place:]


def argument(text: str, place: int, *, digits: bool) -> tuple[str | None, int]:
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
