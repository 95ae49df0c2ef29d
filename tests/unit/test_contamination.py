"""Contamination: words by hand, overlaps by brute force, the command on real files."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import shared_data
from hypothesis import given
from hypothesis import strategies as st

from rlvr.batch import Prompt
from rlvr.contamination import main, overlaps, words
from rlvr.tasks import ProblemFormat, prompts_from, read_rows


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(index, f"p{index}", text, "1") for index, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("What is  Two?\n", "what is two", id="case, spacing, punctuation"),
        pytest.param(r"$\left(x - \dfrac{1}{2}\right)$", r"\(x-\frac{1}{2}\)", id="LaTeX layout"),
        pytest.param(r"$x^{2}\,y \le 3$", "$ x^2 y \\leqslant 3.$", id="braces, thin spaces, spellings"),
        pytest.param("a $6$-sided die", "a 6 sided die", id="a hyphen is no minus"),
        pytest.param("a − b", "a-b", id="the minus sign proper"),
        pytest.param(r"\text{area of }\mathrm{ABC}", "area of ABC", id="fonts"),
        pytest.param("\\begin{align*}x\\\\y\\end{align*}", "x, y", id="an environment"),
        pytest.param("ｆ（１）", "f(1)", id="full width"),
        pytest.param("求 x", "求x", id="Chinese"),
    ],
)
def test_the_same_problem_in_other_words(one: str, other: str) -> None:
    assert words(one) == words(other) != []
    (overlap,) = overlaps(prompts(one), prompts(other))
    assert overlap.exact


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("$x^2 + 1$", "$x^2 - 1$", id="a sign"),
        pytest.param("1.5", "15", id="a decimal point"),
        pytest.param("$x^2$", "$x2$", id="a power"),
        pytest.param("2 apples", "3 apples", id="a number"),
        pytest.param("$a < b$", "$a > b$", id="a relation"),
        pytest.param(r"\sin x", r"\cos x", id="a function"),
        pytest.param("求 x", "求 y", id="Chinese"),
    ],
)
def test_another_problem(one: str, other: str) -> None:
    assert words(one) != words(other)
    assert overlaps(prompts(one), prompts(other)) == []


def test_shares_by_hand() -> None:
    """12 words have three 10-grams: the first ten share one of them, the first eleven two, nine none."""
    asked = "a b c d e f g h i j k l"
    train = prompts(f"zz {asked[:19]} x", f"{asked[:21]} x", asked.upper(), f"so {asked} so", asked[:17])
    found = overlaps(train, prompts("q r s", asked), n=10, threshold=0.3)
    assert [(o.train.id, o.evaluation.id, o.share, o.exact) for o in found] == [
        ("p0", "p1", pytest.approx(1 / 3), False),
        ("p1", "p1", pytest.approx(2 / 3), False),
        ("p2", "p1", 1.0, True),
        ("p3", "p1", 1.0, False),
    ]
    assert [o.train.id for o in overlaps(train, prompts(asked), threshold=2 / 3)] == ["p1", "p2", "p3"]
    assert [o.train.id for o in overlaps(train, prompts(asked), threshold=1.0)] == ["p2", "p3"]
    assert [o.train.id for o in overlaps(train, prompts(asked), n=13)] == ["p2"], "shorter: as a whole"


def test_a_share_counts_distinct_n_grams() -> None:
    """A repeated phrase weighs once, wherever it is repeated."""
    (overlap,) = overlaps(prompts("a b a b a b z"), prompts("a b c a b a b"), n=2, threshold=0.1)
    assert overlap.share == pytest.approx(2 / 4)  # ab, ba of ab, bc, ca, ba


SMALL = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=8).map(" ".join), max_size=5)


@given(SMALL, SMALL, st.integers(1, 4), st.sampled_from([0.1, 0.5, 1.0]))
def test_overlaps_by_brute_force(train: list[str], evaluation: list[str], n: int, threshold: float) -> None:
    expected = []
    for i, ours in enumerate(train):
        for j, theirs in enumerate(evaluation):
            grams = {theirs[k : k + 2 * n - 1] for k in range(0, len(theirs) - 2 * n + 2, 2)}
            shared = sum(f" {gram} " in f" {ours} " for gram in grams)
            share = shared / len(grams) if grams else float(ours == theirs)
            if share >= threshold or ours == theirs:
                expected.append((i, j, share, ours == theirs))
    found = overlaps(prompts(*train), prompts(*evaluation), n=n, threshold=threshold)
    assert [(o.train.index, o.evaluation.index, o.share, o.exact) for o in found] == expected


# The command
# ------------------------------------------------------------


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_reports_and_writes_clean_rows(tmp_path: Path) -> None:
    asked = "How many of the 30 pupils play both chess and football, if 12 play neither of them?"
    train = written(
        tmp_path / "train.jsonl",
        [
            {"prompt": "What is 1 + 1?", "answer": 2, "id": "a", "kept": [1, {"é": "\ud800"}]},
            {"prompt": asked.replace("?", " at all?"), "answer": 3, "id": "b"},
            {"prompt": "What is 2 + 2?", "answer": 4, "id": "c"},
            {"prompt": asked.upper(), "answer": 3, "id": "d"},
        ],
    )
    test = written(
        tmp_path / "test.jsonl",
        [{"problem": asked, "id": "x"}, {"problem": "what is 2+2", "answer": "", "id": "y"}],
    )
    other = written(tmp_path / "other.jsonl", [{"problem": "Nothing of that.", "answer": 0}])
    out, clean = tmp_path / "found.json", tmp_path / "clean.jsonl"
    options = ["--train", train, "--eval", test, other, "--json", out, "--write-clean", clean]
    command = [sys.executable, "-m", "rlvr.contamination", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert lines[2] == ["train", "test", "2", "2", "2", "3"]
    assert lines[3] == ["train", "other", "1", "0", "0", "0"]
    found = json.loads(out.read_text())
    assert (found["n"], found["threshold"]) == (10, 0.5)
    assert [(o["train_id"], o["eval_id"], o["share"], o["exact"]) for o in found["pairs"][0]["overlaps"]] == [
        ("b", "x", 1.0, False),
        ("c", "y", 1.0, True),
        ("d", "x", 1.0, True),
    ]
    assert [json.loads(line) for line in clean.read_text().splitlines()] == [
        {"prompt": "What is 1 + 1?", "answer": 2, "id": "a", "kept": [1, {"é": "\ud800"}]}
    ]
    path = str(clean)
    left = prompts_from(read_rows(path), path, ProblemFormat())
    asked_again = prompts_from(read_rows(str(test)), str(test), ProblemFormat(answer_key=None))
    assert overlaps(left, asked_again) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(
            ["--eval", "nosuch.jsonl"], "--eval=nosuch.jsonl: expected an existing file", id="no file"
        ),
        pytest.param(["--n", "0"], "--n 0: expected at least one word", id="no words"),
        pytest.param(["--threshold", "0"], "--threshold 0.0: expected a share", id="no threshold"),
        pytest.param(["--prompt-key", "q"], "nothing under q", id="no such field"),
        pytest.param(["--json", "problems.jsonl"], "problems.jsonl: expected a new file", id="in the way"),
        pytest.param(
            ["--write-clean", "no/such.jsonl"], "no/such.jsonl: expected a new file", id="no folder"
        ),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("problems.jsonl"), [{"prompt": "1?", "answer": 1}])
    options = ["--train", "problems.jsonl", "--eval", "problems.jsonl", *arguments]
    monkeypatch.setattr(sys, "argv", ["rlvr-contamination", *options])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not said.out


# The paper's training set against the paper's benchmarks
# ------------------------------------------------------------


@pytest.fixture(scope="module")
def dapo() -> list[Prompt]:
    rows = shared_data.rows("train/dapo_math_17k.jsonl")
    return [Prompt(i, row["id"], row["prompt"], row["answer"]) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("name", "exact", "found"),
    [("aime24", 0, 0), ("aime25", 0, 0), ("amc23", 8, 25), ("olympiadbench_maths_en", 7, 70)],
)
def test_dapo_math_17k_shares_problems_with_amc_and_olympiadbench_only(
    name: str, exact: int, found: int, dapo: list[Prompt]
) -> None:
    rows = shared_data.rows(f"eval/{name}.jsonl")
    evaluation = [Prompt(i, row["id"], row["prompt"], row["answer"]) for i, row in enumerate(rows)]
    begin = time.perf_counter()
    pairs = overlaps(dapo, evaluation)
    assert time.perf_counter() - begin < 30
    assert len({o.evaluation.id for o in pairs if o.exact}) == exact
    assert len({o.evaluation.id for o in pairs}) == found
