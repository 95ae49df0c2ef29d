r"""Mathematical answers in LaTeX or plain text."""

import importlib.util
import re
from concurrent.futures import Future
from typing import get_args

from rlvr.answers.canonical import canonical
from rlvr.answers.comparison import equivalent
from rlvr.answers.extraction import Extraction, final_answer, gold_answer
from rlvr.batch import Prompt, Verdict
from rlvr.errors import ConfigError
from rlvr.verifiers.pool import WorkerPool, then

_INTEGER = re.compile(r"-?\d{1,40}|-?\d{1,3}(?:,\d{3}){1,12}")
_LONGEST = 2000
"""Characters of an answer; longer ones are wrong without a look."""


class _UndecidedError(Exception):
    """The comparison needs sympy."""


class MathVerifier:
    r"""Compares the final answer of a response with the gold answer by value: reward 1 for the same, else 0.

    Integers, exact numbers, words, and lists, tuples, sets and intervals of them are decided in this process;
    formulas by sympy in a worker process, see :class:`rlvr.verifiers.pool.WorkerPool`. What has no verdict
    there - out of time or memory, a crash - gets reward 0 and a reason that starts with "verifier error".

    What graders differ in is decided so, and is no option but for the last:

    - Per cent: 28% is 0.28. It is 28 too where the gold answer has the sign and the response leaves it out,
      or adds it to an integer; it is 28 of no other unit.
    - Rounding: a decimal is a fraction or a root from six significant digits on.
    - Units: one on one side is left out; two must be one, and none is converted. So with currencies, and with
      a base that the response leaves out; one that it adds counts. Letters alone in the gold answer (``2s``,
      not ``2\text{ s}``) may be variables: 2 is another answer.
    - Order: lists, also of tuples, and sets match in any order; tuples, intervals, matrices and ratios in
      theirs. A list without brackets may be a tuple. What is said twice is said once, unless both sides
      repeat something.
    - Form: unsimplified is right (2/4 is 1/2), and so is an equation times a constant. Of a ratio each
      part counts: 1:2 is the fraction 1/2 written so, and neither 2:4 nor 0.5.
    - Names: ``x = 5`` is 5 and not ``y = 5``; so with sets, tuples and intervals. Of
      ``x = 2 + 3 = 5`` the last counts; of ``2 + 3 = 5`` all must be right.
    - Boxes joined by a comma, "and" or "or" are one list; others are revisions, of which the last counts.
    - Commas group thousands, ``1,234``; else, a single one in a response may be a decimal comma, ``0,5``.
    - Conditions ("for all n", ``k \in \mathbb{Z}``) may be left out by one side. Of "(C) 12" the gold answer
      tells which is meant; where both sides have a letter, it must be one.
    - Tolerance: none, but by ``rel_tol``.

    Args:
        extract: where the answer stands, see :func:`rlvr.answers.extraction.final_answer`: ``boxed``,
            ``stated`` or ``last``.
        workers: processes at a time; none is started before a formula needs one.
        deadline_s: seconds for one comparison, after which its worker is killed.
        memory_mib: address space of one worker, MiB.
        rel_tol: how far a number may be from the gold one, as a share of it: 0 for exactly, 0.01 for physics
            (Minerva). Holds in lists and tuples too, and never for formulas with variables.

    Raises:
        ConfigError: for an unknown ``extract``, a size or share out of range, or where math-verify is not
            installed.
    """

    def __init__(
        self,
        *,
        extract: Extraction = "last",
        workers: int = 2,
        deadline_s: float = 3.0,
        memory_mib: int = 1024,
        rel_tol: float = 0.0,
    ) -> None:
        if extract not in get_args(Extraction):
            raise ConfigError(
                f"verifier.extract={extract}",
                f"one of {', '.join(get_args(Extraction))}",
                "verifier.extract=last",
            )
        if workers < 1:
            raise ConfigError(f"verifier.workers={workers}", "at least 1", "verifier.workers=2")
        if not deadline_s > 0:
            raise ConfigError(f"verifier.deadline_s={deadline_s}", "seconds above 0", "verifier.deadline_s=3")
        if memory_mib < 256:
            raise ConfigError(
                f"verifier.memory_mib={memory_mib}",
                "at least 256, which sympy takes",
                "verifier.memory_mib=1024",
            )
        if not 0 <= rel_tol < 1:
            raise ConfigError(
                f"verifier.rel_tol={rel_tol}", "a share from 0, exact, to below 1", "verifier.rel_tol=0.01"
            )
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "verifier: math",
                "the extra that reads formulas: pip install 'rlvr[math]'",
                "verifier=integer",
            )
        self.extract: Extraction = extract
        self.rel_tol = rel_tol
        self._pool = WorkerPool(workers, deadline_s=deadline_s, memory_mib=memory_mib, rel_tol=rel_tol)

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        """Judge one response and wait for the verdict."""
        return self.submit(prompt, completion).result()

    def submit(self, prompt: Prompt, completion: str) -> Future[Verdict]:
        """Judge one response while the caller goes on, for instance with the next one.

        Returns:
            The verdict; never an error.
        """
        gold = gold_answer(prompt.answer)
        answer = final_answer(completion, self.extract)
        if not gold:
            return _done(_error(None, f"the answer of prompt {prompt.id} is empty"))
        if answer is None or not answer.strip():
            return _done(Verdict(0.0, correct=False, answer=None, reason="no answer"))
        if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
            value, right = int(answer.replace(",", "")), int(gold.replace(",", ""))
            return _done(_verdict(abs(value - right) <= self.rel_tol * abs(right), str(value)))
        if len(answer) > _LONGEST:
            return _done(Verdict(0.0, correct=False, answer=None, reason="answer too long"))
        found = canonical(answer)
        try:
            return _done(_verdict(equivalent(gold, answer, _undecided, rel_tol=self.rel_tol), found))
        except _UndecidedError:
            compared = self._pool.submit(gold, answer)

        def verdict(done: Future[bool]) -> Verdict:
            error = done.exception()
            return _verdict(done.result(), found) if error is None else _error(found, str(error))

        return then(compared, verdict)

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


def _undecided(gold: str, answer: str) -> bool:
    raise _UndecidedError


def _done(verdict: Verdict) -> Future[Verdict]:
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future


def _verdict(correct: bool, answer: str) -> Verdict:
    return Verdict(float(correct), correct=correct, answer=answer, reason="right" if correct else "wrong")


def _error(answer: str | None, why: str) -> Verdict:
    return Verdict(0.0, correct=False, answer=answer, reason=f"verifier error: {why}")
