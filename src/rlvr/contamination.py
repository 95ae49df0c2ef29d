"""``rlvr-contamination``: which problems of an evaluation set stand in a training set, whole or in part."""

import argparse
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlvr.batch import Prompt
from rlvr.errors import ConfigError
from rlvr.files import write_whole
from rlvr.results import table
from rlvr.tasks import ProblemFormat, prompts_from, read_rows
from rlvr.tasks.rows import PROMPT_KEYS, Row

# LaTeX that says how something looks.
_LAYOUT = re.compile(
    r"\\(?:(?:left|right|middle|bigg?[lrm]?|(?:display|text)style|(?:no)?limits|q?quad|text[a-z]*|mbox"
    r"|math(?:rm|bf|it|sf|tt|bb|cal)|operatorname)(?![a-z])|(?:begin|end)\{[a-z]+\*?\}|[^a-z])|[$~]"
)
_HYPHEN = re.compile(r"(?<=[a-z\d\s])-(?=[a-z]{3})")
_SAME = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("ldots", "cdots", "dotsb", "dotsc", "dotsm"), "dots"),
    **dict.fromkeys(("leq", "leqslant"), "le"),
    **dict.fromkeys(("geq", "geqslant"), "ge"),
    **{"neq": "ne", "rightarrow": "to", "cdot": "*", "times": "*"},
}
# A Chinese or Japanese character is a word; operators are words, for a sign makes another problem.
_CHARACTER = r"\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_CHARACTER}]|\d+(?:\.\d+)?|[^\W\d_{_CHARACTER}]+|[-+*/^=<>|!]")


@dataclass(frozen=True)
class Overlap:
    """A training problem and an evaluation problem that it repeats.

    Args:
        train: the training problem.
        evaluation: the evaluation problem.
        share: of the evaluation problem's n-grams that the training problem has, in (0, 1].
        exact: whether both have the same words in the same order.
    """

    train: Prompt
    evaluation: Prompt
    share: float
    exact: bool


def words(text: str) -> list[str]:
    r"""Words, numbers and operators of a problem, without case, spacing, punctuation and LaTeX layout.

    ``$\left(x - \dfrac{1}{2}\right)$`` and ``\(x-\frac{1}{2}\)`` are both ``x - frac 1 2``.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2212", "-")
    found = _WORD.findall(_HYPHEN.sub(" ", _LAYOUT.sub(" ", text)))
    return [_SAME.get(word, word) for word in found]


def overlaps(
    train: Sequence[Prompt], evaluation: Sequence[Prompt], *, n: int = 10, threshold: float = 0.5
) -> list[Overlap]:
    """Find the evaluation problems that training problems repeat.

    A problem of fewer than ``n`` words is compared as a whole alone.

    Args:
        train: training problems.
        evaluation: evaluation problems.
        n: words of an n-gram.
        threshold: least share of an evaluation problem's distinct n-grams in one training problem, in (0, 1].

    Returns:
        Every pair at or above the threshold or with the same words, in the training problems' order.
    """
    wholes: dict[tuple[str, ...], list[int]] = defaultdict(list)
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes = []
    for place, prompt in enumerate(evaluation):
        sequence = words(prompt.text)
        grams = _ngrams(sequence, n)
        sizes.append(len(grams))
        wholes[tuple(sequence)].append(place)
        for gram in grams:
            holders[gram].append(place)
    found = []
    for prompt in train:
        sequence = words(prompt.text)
        common = Counter(place for gram in _ngrams(sequence, n) for place in holders.get(gram, ()))
        shares = {place: count / sizes[place] for place, count in common.items()}
        exact = set(wholes.get(tuple(sequence), ()))
        found += [
            Overlap(prompt, evaluation[place], shares.get(place, 1.0), place in exact)
            for place in sorted(exact | {place for place, share in shares.items() if share >= threshold})
        ]
    return found


def _ngrams(sequence: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)}


def main() -> None:
    """Entry point of ``rlvr-contamination``."""
    parser = argparse.ArgumentParser(
        prog="rlvr-contamination", description="Find problems of evaluation sets in training sets."
    )
    source = ".jsonl or .parquet files, or hub ids as SET, SET:SPLIT or SET:CONFIGURATION:SPLIT"
    parser.add_argument("--train", nargs="+", required=True, metavar="FILE", help=source)
    parser.add_argument("--eval", nargs="+", required=True, metavar="FILE", help="the same")
    parser.add_argument("--n", type=int, default=10, help="words of an n-gram (10)")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="least share of a problem's n-grams in one training problem (0.5)",
    )
    parser.add_argument("--prompt-key", nargs="+", default=PROMPT_KEYS, metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every pair found")
    parser.add_argument(
        "--write-clean", type=Path, metavar="OUT.jsonl", help="write the training rows without those found"
    )
    try:
        _run(parser.parse_args())
    except ConfigError as error:
        print(f"rlvr-contamination: {error}", file=sys.stderr)
        sys.exit(2)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.n < 1:
        raise ConfigError(f"--n {arguments.n}", "at least one word", "--n 10")
    if not 0 < arguments.threshold <= 1:
        raise ConfigError(f"--threshold {arguments.threshold}", "a share in (0, 1]", "--threshold 0.5")
    for out in (arguments.json, arguments.write_clean):
        if out is not None and (out.exists() or not out.parent.is_dir()):
            raise ConfigError(f"{out}", "a new file in a folder that is there", "another OUT")
    form = ProblemFormat(prompt_key=arguments.prompt_key, answer_key=None)
    evaluations = [(path, _read(path, "--eval", form)[1]) for path in arguments.eval]
    results: list[dict[str, Any]] = []
    clean: list[Any] = []
    for path in arguments.train:
        rows, train = _read(path, "--train", form)
        dirty: set[int] = set()
        for name, evaluation in evaluations:
            found = overlaps(train, evaluation, n=arguments.n, threshold=arguments.threshold)
            dirty |= {overlap.train.index for overlap in found}
            results.append(_result(path, name, len(evaluation), found))
        clean += [row for index, (_, row) in enumerate(rows) if index not in dirty]
    print(_table(results, arguments.threshold), end="")
    if arguments.json is not None:
        settings = {"n": arguments.n, "threshold": arguments.threshold}
        write_whole(arguments.json, json.dumps({**settings, "pairs": results}, indent=1) + "\n")
    if arguments.write_clean is not None:
        # ASCII: half a surrogate pair, which JSON may hold, is no UTF-8.
        write_whole(arguments.write_clean, "".join(json.dumps(row, default=str) + "\n" for row in clean))
        print(f"{arguments.write_clean}: {len(clean)} training rows without those above")


def _read(path: str, option: str, form: ProblemFormat) -> tuple[list[Row], list[Prompt]]:
    """Rows and the prompts made of them, place by place."""
    rows = read_rows(path, setting=option)
    return rows, prompts_from(rows, path, form, fix="other rows, or --prompt-key NAME")


def _result(train: str, evaluation: str, problems: int, found: list[Overlap]) -> dict[str, Any]:
    return {
        "train": train,
        "eval": evaluation,
        "problems": problems,
        "exact": len({overlap.evaluation.index for overlap in found if overlap.exact}),
        "shared": len({overlap.evaluation.index for overlap in found}),
        "training_problems": len({overlap.train.index for overlap in found}),
        "overlaps": [
            {
                "train_id": overlap.train.id,
                "eval_id": overlap.evaluation.id,
                "share": round(overlap.share, 4),
                "exact": overlap.exact,
            }
            for overlap in found
        ],
    }


def _table(results: list[dict[str, Any]], threshold: float) -> str:
    """One line a pair of sets: evaluation problems, those found, and the training problems they are in."""
    head = ["train", "eval", "problems", "exact", f">= {threshold:g}", "in training problems"]
    rows = [
        [
            Path(result["train"]).stem,
            Path(result["eval"]).stem,
            *(result[key] for key in ("problems", "exact", "shared", "training_problems")),
        ]
        for result in results
    ]
    return table(head, rows)


if __name__ == "__main__":
    main()
