r"""The final answer in a response: the last ``\boxed{}``, a stated answer, the last formula or number.

Every search is linear in the text or looks at a bounded tail of it: responses are hostile input.
"""

import re
from itertools import pairwise
from typing import Literal

Extraction = Literal["boxed", "stated", "last"]

_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
_BRACELESS = re.compile(r"\\(?:boxed|fbox)\s*([-+]?[\w./,]*\w)")
_TAGGED = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_BETWEEN = re.compile(r"\\(?:q?quad|text|mathrm|textbf|[()\[\],;! ])|[\s${}*.]")
_JOINED = re.compile(r"(?:[,;]|and|or|&)+")
_STATED = re.compile(
    r"(?:^####|\b(?P<final>final\s+)?(?:answers?|correct (?:option|choice))\b\W{0,4}?"
    r"(?:(?:to|of|for)\b[^.\n]{0,80}?)?(?:\s*\b(?:is|are|should be|will be|would be)\b|\s*[:=]))"
    r"[:\s*\"\\]*?(?=[^\s:*\"])",
    re.IGNORECASE | re.MULTILINE,
)
_CHOICE = re.compile(r"\W*(?:(?:option|choice) )?\(?([A-H])\)?(?=[\s.,;:)*]|$)(?! ?[-=+/^<>])")
_SENTENCE_END = re.compile(r"[.!?][\"'*]*(?:\s+(?=[A-Z<])|\s*$)|\n|<\|")
_SPAN = re.compile(
    r"(?<!\\)\$\$(.+?)\$\$|(?<![\\$])\$((?:[^$\\]|\\.)+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_NUMBER = re.compile(
    r"(?<![\w.,/{^\\])[-−+]?[$€£]?(?:"
    r"(?:(?:\d{1,3}(?:[, ]\d{3})+|\d+) +)?\d++ ?/ ?\d++"
    r"|\d{1,3}(?: \d{3})+(?!\d)(?:\.\d++)?|\d++(?:[.,]\d++)*+(?:[eE][-+]?\d++)?"
    r"|\.\d++)(?:\s?(?:\\?%|percent\b|pct\b))?"
)
_IN_WORDS = re.compile(r"[A-Za-z]{2}")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_TEXT = re.compile(r"\\(?:text\w*|mathrm|mbox|operatorname|begin|end)\s*\{[^{}]*\}")
_MATH_WORDS = {
    *(
        "and",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "exp",
        "sqrt",
        "inf",
        "infinity",
        "mod",
        "percent",
    ),
    *("pct", "max", "min", "gcd", "lcm", "det", "arcsin", "arccos", "arctan", "theta", "alpha", "beta"),
}
_QUOTES = re.compile(r"^(?:[\s*\"':}]|\\\")+|(?:[\s*\"':]|\\\")+$")
_TAIL = 2000
"""Characters at the end of a response in which fallbacks look."""
_BARE = 300
"""Longest response, in characters, that may as a whole be an answer."""


def final_answer(text: str, how: Extraction = "last") -> str | None:
    r"""Find the final answer of a response.

    Args:
        text: the response.
        how: where to look. ``boxed``: in the last balanced ``\boxed{}`` alone; those joined by commas, "and"
            or "or" count as one list. ``stated``: there too, unless a "final answer is" follows with a
            formula or a number and no more; without a box after the last "the answer is" or "answer:".
            ``last``: else the whole response where it is a bare formula, else what comes last of its formulas
            between dollar signs and its numbers.

    Returns:
        The answer as written, or None.
    """
    boxed, end = _boxed(text)
    if how == "boxed":
        return boxed
    tail = text[max(end, len(text) - _TAIL) :]
    if boxed is not None:
        return _stated(tail, final=True) or boxed
    if tagged := list(_TAGGED.finditer(tail)):
        return tagged[-1][1].strip()
    stated = _stated(tail, final=False)
    if stated is not None or how == "stated":
        return stated
    bare = text.strip(" \n\t*#")
    if is_formula(bare) and not _around(bare):
        return bare.rsplit("\n", 1)[-1] if "\\" not in bare and "$" not in bare else bare
    return _last(tail)


def gold_answer(text: str) -> str:
    """The answer in a data set's answer field, which may also hold a whole solution."""
    text = text.strip()
    boxed, _ = _boxed(text)
    if boxed is not None:
        return boxed
    if len(text) <= _BARE:
        return text
    return _stated(text[-_TAIL:], final=False) or text


def is_formula(text: str) -> bool:
    """Whether a text is a formula, a number with a unit, or a word or two, and no prose."""
    if not text or len(text) > _BARE:
        return False
    words = [w for w in _WORD.findall(_TEXT.sub(" ", text)) if w.lower() not in _MATH_WORDS]
    if not words:
        return True
    if not any(c.isdigit() or c in "$\\=" for c in text):
        return len(text.split()) <= 2  # "Evelyn", "no solution"
    return bool(re.fullmatch(r"[^A-Za-z]*\d[^A-Za-z]*(?:\s[a-z]{3,}){1,2}[.]?", text))  # "125 miles"


def _around(text: str) -> bool:
    """Whether words stand around what is between dollar signs, as in "So $x=1$"."""
    rest = _SPAN.sub(" ", text)
    return rest != text and re.search(r"[A-Za-z]", _JOINED.sub(" ", rest)) is not None


def _boxed(text: str) -> tuple[str | None, int]:
    r"""The last box, or the last boxes where they are joined, or ``\boxed 5``; and where it ends."""
    boxes: list[tuple[int, int, int]] = []
    stack: list[tuple[int, int] | None] = []
    first = min((at for at in (text.find("\\boxed"), text.find("\\fbox")) if at >= 0), default=len(text))
    for match in _BRACE.finditer(text, first):
        token = match.group()
        if token == "{":
            stack.append(None)
        elif token == "}" and stack:
            opened = stack.pop()
            if opened is not None:
                while boxes and boxes[-1][0] > opened[0]:  # a box in a box is no second answer
                    boxes.pop()
                boxes.append((*opened, match.start()))
        elif token.endswith("{") and len(token) > 2:
            stack.append((match.start(), match.end()))
    if not boxes:
        bare = list(_BRACELESS.finditer(text, first))
        return (bare[-1][1], bare[-1].end()) if bare else (None, 0)
    contents = [text[boxes[-1][1] : boxes[-1][2]]]
    end = boxes[-1][2] + 1
    if text.startswith(("%", "\\%"), end):
        contents[0] += "%"
    for before, after in zip(boxes[-2::-1], boxes[:0:-1], strict=False):
        if not _joined(text[before[2] + 1 : after[0]]):
            break
        contents.append(text[before[1] : before[2]])
    return ", ".join(reversed(contents)), end


def _joined(between: str) -> bool:
    """Whether only a comma, "and" or "or" stands between two answers, so that they are one list."""
    return len(between) <= 80 and _JOINED.fullmatch(_BETWEEN.sub("", between)) is not None


def _stated(text: str, *, final: bool) -> str | None:
    """What follows the last "answer is"; after a box only a "final answer" that is a formula or a number.

    Prose after a box is about the box: "the final answer is given to 2 decimal places" states no other.
    """
    matches = [match for match in _STATED.finditer(text) if match["final"] or not final]
    if not matches:
        return None
    rest = text[matches[-1].end() :].strip()
    if rest.startswith(("$$", "\\[")) and (span := _SPAN.match(rest)):
        return _inside(span)
    end = _SENTENCE_END.search(rest)
    sentence = _QUOTES.sub("", rest[: end.start()] if end else rest)
    if choice := _CHOICE.match(sentence):
        return None if final else choice[1]
    if (
        sentence.startswith(("$", "\\("))
        and _around(sentence)
        and (spans := _joined_spans(sentence, last=False))
    ):
        return spans
    if final:
        stated = is_formula(sentence) and not _IN_WORDS.match(sentence)
        return sentence if stated and any(c.isdigit() or c in "$\\" for c in sentence) else None
    if is_formula(sentence) or (sentence.startswith(("$", "\\(", "(")) and not _prose(sentence)):
        return sentence
    if matches[-1].group().rstrip(' *"').endswith((":", "=")) and (answer := _last(sentence)):
        return answer  # "Answer: the largest $n$ is 34"
    if span := _SPAN.search(sentence):
        return _inside(span)
    number = _NUMBER.search(sentence)
    return number.group() if number else sentence or None


def _last(text: str) -> str | None:
    spans = list(_SPAN.finditer(text))
    numbers = list(_NUMBER.finditer(text))
    if spans and not _prose(_inside(spans[-1])) and not (numbers and numbers[-1].start() >= spans[-1].end()):
        return _joined_spans(text, last=True)
    return numbers[-1].group() if numbers else None


def _joined_spans(text: str, *, last: bool) -> str | None:
    """The last formula between dollar signs, or the first, with those that are joined to it."""
    spans = list(_SPAN.finditer(text))
    runs = [[span] for span in spans[:1]]
    for before, after in pairwise(spans):
        if _joined(text[before.end() : after.start()]):
            runs[-1].append(after)
        else:
            runs.append([after])
    return ", ".join(map(_inside, runs[-1 if last else 0])) if runs else None


def _prose(text: str) -> bool:
    words = [w for w in _WORD.findall(_TEXT.sub(" ", text)) if w.lower() not in _MATH_WORDS]
    return len(words) > 1


def _inside(span: re.Match[str]) -> str:
    return next(group for group in span.groups() if group is not None)
