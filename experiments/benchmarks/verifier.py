r"""Speed, accuracy and behaviour under hostile input of the math verifier.

    .venv/bin/python experiments/benchmarks/verifier.py

Reads ``train/gsm8k_train.jsonl``, ``verifier/cases.jsonl`` and ``verifier/adversarial_inputs.jsonl`` from
``../shared/data`` next to the checkout, or from the folder in the environment variable ``RLVR_DATA``; what is
not there is left out, and integers are generated.

The cases are compared with math-verify alone: its ``parse`` and ``verify`` as they come, with its own time
limit, answers without dollar signs or a box put into ``\boxed{}``. In an order drawn with seed 0, the first
half was looked at while the verifier was written, the third quarter after a first count and the last quarter
after a second; the lab book has what each was before anyone had looked.
"""

import argparse
import json
import logging
import os
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from math_verify import parse, verify

from rlvr.batch import Prompt
from rlvr.verifiers import MathVerifier

DATA = Path(os.environ.get("RLVR_DATA", Path(__file__).parents[3] / "shared" / "data"))
FORMULAS = [
    (rf"{a}+\sqrt{{{b}}}", rf"\sqrt{{{b}}}+\frac{{{2 * a}}}{{2}}") for a in range(2, 27) for b in (2, 3, 5, 7)
]


def rows(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    return [json.loads(line) for line in path.open()] if path.exists() else []


def prompt(answer: str) -> Prompt:
    return Prompt(index=0, id="0", text="", answer=answer)


def rate(verifier: MathVerifier, pairs: Iterable[tuple[str, str]]) -> tuple[float, float]:
    """Calls a second, and the share judged right."""
    begin = time.perf_counter()
    futures = [verifier.submit(prompt(gold), answer) for gold, answer in pairs]
    right = [future.result().correct for future in futures]
    return len(right) / (time.perf_counter() - begin), sum(right) / len(right)


def speed(verifier: MathVerifier) -> None:
    golds = [row["answer"] for row in rows("train/gsm8k_train.jsonl")] or [str(7 * i) for i in range(7000)]
    steps = "Each of them has 12 apples, so 12 * 4 = 48 in all, and 48 / 2 = 24 remain. " * 8
    for name, pairs in [
        ("integers, boxed", [(gold, rf"\boxed{{{gold}}}") for gold in golds]),
        ("integers, boxed, after 600 characters", [(gold, rf"{steps}\boxed{{{gold}}}") for gold in golds]),
        ('integers, "the answer is"', [(gold, f"The answer is {gold}.") for gold in golds]),
        ("fractions, sets, intervals", [(r"\frac{1}{2}, [0,3)", r"\boxed{[0, 3.0), 0.5}")] * 5000),
        (
            "formulas, first ones (workers start)",
            [(gold, rf"\boxed{{{answer}}}") for gold, answer in FORMULAS[:2]],
        ),
        ("formulas", [(gold, rf"\boxed{{{answer}}}") for gold, answer in FORMULAS]),
    ]:
        calls, right = rate(verifier, pairs)
        print(f"{name:<40} {calls:>10.0f} calls/s  {right:>6.1%} right")


def alone(gold: str, answer: str) -> bool:
    """math-verify without us."""
    boxed = [
        text if any(mark in text for mark in ("$", "\\boxed", "\\(", "\\[")) else rf"\boxed{{{text}}}"
        for text in (gold, answer)
    ]
    try:
        return bool(verify(parse(boxed[0]), parse(boxed[1])))
    except BaseException as error:  # its time limit raises one
        if isinstance(error, KeyboardInterrupt):
            raise
        return False


def accuracy(verifier: MathVerifier) -> None:
    cases = rows("verifier/cases.jsonl")
    if not cases:
        print("no verifier/cases.jsonl: no accuracy")
        return
    order = list(range(len(cases)))
    random.Random(0).shuffle(order)
    half = len(cases) // 2
    quarter = half + (len(cases) - half) // 2
    ours = [verifier(prompt(case["gold"]), case["pred"]).correct for case in cases]
    theirs = [alone(case["gold"], case["pred"]) for case in cases]
    print(f"\n{'cases':<22} {'n':>4} {'ours':>7} {'alone':>7}   false positives: {'ours':>4} {'alone':>5}")
    for name, chosen in [
        ("plain, first half", [i for i in order[:half] if cases[i]["label"] == "plain"]),
        ("plain, third quarter", [i for i in order[half:quarter] if cases[i]["label"] == "plain"]),
        ("plain, last quarter", [i for i in order[quarter:] if cases[i]["label"] == "plain"]),
        ("plain, all", [i for i in order if cases[i]["label"] == "plain"]),
        ("convention", [i for i in order if cases[i]["label"] == "convention"]),
        ("all, doubtful too", order),
    ]:
        cells = []
        for verdicts in (ours, theirs):
            right = sum(verdicts[i] == cases[i]["expected"] for i in chosen)
            cells.append((right / len(chosen), sum(verdicts[i] and not cases[i]["expected"] for i in chosen)))
        (right, false), (other, others) = cells
        print(f"{name:<22} {len(chosen):>4} {right:>7.1%} {other:>7.1%}   {false:>21} {others:>5}")


def hostile(verifier: MathVerifier, deadline_s: float) -> None:
    inputs = rows("verifier/adversarial_inputs.jsonl")
    if not inputs:
        print("no verifier/adversarial_inputs.jsonl: no hostile input")
        return
    times, errors = [], 0
    for case in inputs:
        begin = time.perf_counter()
        verdict = verifier(prompt(case["gold"]), case["pred"])
        times.append((time.perf_counter() - begin, case["id"]))
        errors += verdict.reason.startswith("verifier error")
    slowest, name = max(times)
    print(
        f"\n{len(inputs)} hostile inputs, deadline {deadline_s:g} s: slowest {slowest:.2f} s ({name}), "
        f"{errors} without a verdict, all counted"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=3.0, help="seconds")
    args = parser.parse_args()
    logging.disable(logging.ERROR)  # math-verify reports every time-out of its own
    verifier = MathVerifier(workers=args.workers, deadline_s=args.deadline)
    try:
        speed(verifier)
        accuracy(verifier)
        hostile(verifier, args.deadline)
    finally:
        verifier.close()


if __name__ == "__main__":
    main()
