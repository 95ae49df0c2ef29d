"""Integer answers."""

import re

from rlvr.batch import Prompt, Verdict

# Thousands are grouped by commas or not at all; a decimal part of zeros is still the same integer.
# Possessive where it must not give digits back: 2.5x is no 2.
_NUMBER = re.compile(r"(?<![\w.])[-−+]?(?:\d{1,3}(?:,\d{3})+|\d++)(?:\.\d++)?+(?![\w])")
_LONGEST = 40


class IntegerVerifier:
    """Compares the last number of a response with the answer, as integers, for tasks such as GSM8K.

    Reward 1 where they are equal, else 0. Numbers of more than 40 characters are no answer.
    """

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        """Judge one response; the gold answer must be an integer."""
        gold = _integer(prompt.answer.strip())
        if gold is None:
            raise ValueError(f"the answer of prompt {prompt.id}, {prompt.answer!r}, is no integer")
        found = _NUMBER.findall(completion)
        answer = _integer(found[-1]) if found else None
        if answer is None:
            return Verdict(0.0, correct=False, answer=None, reason="no integer answer")
        correct = answer == gold
        return Verdict(
            float(correct), correct=correct, answer=str(answer), reason="right" if correct else "wrong"
        )


def _integer(text: str) -> int | None:
    text = text.replace(",", "").replace("−", "-")
    whole, _, decimals = text.partition(".")
    if len(text) > _LONGEST or decimals.strip("0") or not re.fullmatch(r"[-+]?\d+", whole):
        return None
    return int(whole)
