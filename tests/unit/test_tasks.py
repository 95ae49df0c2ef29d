"""Prompts: disjoint, the same every time, errors by line number; verdicts by brute force and by hand."""

import itertools
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import datasets
import pyarrow.parquet
import pytest
import shared_data
from hydra import compose, initialize_config_dir

from rlvr.batch import Prompt
from rlvr.errors import ConfigError
from rlvr.instantiate import CONF, build
from rlvr.policy import Policy
from rlvr.prompts import encode
from rlvr.tasks import LettersTask, ProblemFile, ProblemFormat, prompts_from, read_rows
from rlvr.tasks.letters import LEVELS
from rlvr.verifiers import IntegerVerifier, LettersVerifier


def test_letters_are_the_same_every_time_and_others_under_another_seed() -> None:
    first, second, other = LettersTask(train=50), LettersTask(train=50), LettersTask(train=50, seed=1)
    assert first.train() == second.train()
    assert first.heldout() == second.heldout()
    assert first.train() != other.train()


def test_letters_held_out_do_not_move_with_the_number_of_training_prompts() -> None:
    assert LettersTask(train=10).heldout() == LettersTask(train=500).heldout()


def test_no_letters_prompt_is_there_twice() -> None:
    task = LettersTask(train=1000, heldout=100)
    texts = [prompt.text for prompt in (*task.train(), *task.heldout())]
    assert len(set(texts)) == len(texts) == 1100
    assert [prompt.index for prompt in task.train()] == list(range(1000))


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_letters_prompts_state_their_level(level: int) -> None:
    prompt = LettersTask(train=5, levels=[level]).train()[3]
    assert prompt.text == f"{LEVELS[level - 1].asked}:{prompt.meta['letters']}>"
    assert len(set(prompt.meta["letters"])) == LEVELS[level - 1].given
    assert LettersVerifier()(prompt, prompt.answer).correct


def test_letters_verdicts_by_brute_force() -> None:
    """Every string of up to four of five letters, two of them not given."""
    prompt = Prompt(0, "0", "2:qbz>", "bq", {"letters": "qbz", "asked": 2})
    right = {"bq", "bz", "qz"}
    for length in range(5):
        for letters in itertools.product("abqyz", repeat=length):
            verdict = LettersVerifier()(prompt, "".join(letters))
            assert verdict.correct == ("".join(letters) in right)
            assert verdict.reward == float(verdict.correct)


@pytest.mark.parametrize(("given", "asked", "number"), [(6, 3, 20), (8, 4, 70), (10, 5, 252), (12, 6, 924)])
def test_number_of_right_letters_answers(given: int, asked: int, number: int) -> None:
    prompt = Prompt(0, "0", "", "", {"letters": ascii_lowercase[:given][::-1], "asked": asked})
    answers = itertools.combinations(ascii_lowercase[:given], asked)
    assert sum(LettersVerifier()(prompt, "".join(answer)).correct for answer in answers) == number
    assert math.comb(given, asked) == number


@pytest.mark.parametrize(
    "hostile", ["", " ", "a" * 100_000, "\ud800", "\x00\x00", "ab\n", "ＡＢ", "2:qbz>bq"]
)
def test_letters_verifier_takes_anything(hostile: str) -> None:
    prompt = Prompt(0, "0", "2:qbz>", "bq", {"letters": "qbz", "asked": 2})
    assert LettersVerifier()(prompt, hostile).reward == 0.0


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"train": 0}, id="no training prompts"),
        pytest.param({"heldout": 0}, id="no held-out prompts"),
        pytest.param({"levels": []}, id="no levels"),
        pytest.param({"levels": [5]}, id="a level that is not there"),
        pytest.param({"train": 10**12}, id="more prompts than are ever drawn"),
    ],
)
def test_letters_refuses(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="="):
        LettersTask(**settings)


# Integers
# ------------------------------------------------------------


def judged(answer: str, completion: str) -> tuple[bool, str | None]:
    verdict = IntegerVerifier()(Prompt(0, "0", "", answer), completion)
    assert verdict.reward == float(verdict.correct)
    return verdict.correct, verdict.answer


@pytest.mark.parametrize(
    ("gold", "completion", "correct", "answer"),
    [
        pytest.param("42", "The answer is 42.", True, "42", id="with a full stop"),
        pytest.param("42", "42", True, "42", id="alone"),
        pytest.param("42", "6 times 7 is 42", True, "42", id="the last of several"),
        pytest.param("42", "42, not 43", False, "43", id="the last is wrong"),
        pytest.param("1234", "1,234", True, "1234", id="thousands"),
        pytest.param("1,234", "1234", True, "1234", id="thousands in the gold answer"),
        pytest.param("12345678", "12,345,678 km", True, "12345678", id="millions"),
        pytest.param("5", "$5.00", True, "5", id="cents of nothing"),
        pytest.param("5", "5.5", False, None, id="no integer"),
        pytest.param("-3", "-3", True, "-3", id="negative"),
        pytest.param("-3", "−3", True, "-3", id="negative by the minus sign proper"),
        pytest.param("3", "+3", True, "3", id="plus"),
        pytest.param("7", "007", True, "7", id="leading zeros"),
        pytest.param("0", "-0", True, "0", id="minus zero"),
        pytest.param("42", "\\boxed{42}", True, "42", id="boxed"),
        pytest.param("42", "**42**", True, "42", id="bold"),
        pytest.param("42", "x42", False, None, id="part of a name"),
        pytest.param("42", "42x", False, None, id="a letter behind"),
        pytest.param("2", "2.5x", False, None, id="a decimal with a letter behind is not its whole part"),
        pytest.param("3", "45-3", True, "3", id="a difference is no negative number"),
        pytest.param("1", "1e9", False, None, id="an exponent: neither 1 nor 9"),
        pytest.param("42", "42, no, 3.5", False, None, id="the last counts, though it is no integer"),
        pytest.param("42", "", False, None, id="empty"),
        pytest.param("42", "forty-two", False, None, id="a word"),
        pytest.param("18", "#### 18\n", True, "18", id="after GSM8K's mark"),
    ],
)
def test_integer_verdicts(gold: str, completion: str, correct: bool, answer: str | None) -> None:
    assert judged(gold, completion) == (correct, answer)


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param("9" * 100_000, id="100 kB of digits"),
        pytest.param("1," * 50_000, id="100 kB of commas"),
        pytest.param("1,111" * 20_000, id="100 kB of thousands"),
        pytest.param("1." * 50_000, id="100 kB of decimal points"),
        pytest.param("-" * 100_000, id="100 kB of signs"),
        pytest.param("\ud800\udfff", id="surrogates"),
        pytest.param("\x00", id="a zero byte"),
        pytest.param("1e999999999", id="a huge exponent"),
        pytest.param("²", id="a superscript"),
    ],
)
def test_integer_verifier_takes_anything(hostile: str) -> None:
    assert not judged("42", hostile)[0]


def test_other_scripts_digits_are_digits() -> None:
    assert judged("42", "٤٢") == (True, "42")


def test_a_gold_answer_that_is_no_integer_is_an_error_with_its_prompt() -> None:
    with pytest.raises(ValueError, match="prompt 0, 'x', is no integer"):
        judged("x", "42")


# Files
# ------------------------------------------------------------


def written(path: Path, rows: list[Any]) -> str:
    """A JSONL file; a row that is a text stands in it as it is."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def pairs(prompts: Iterable[Prompt]) -> list[tuple[str, str]]:
    return [(prompt.text, prompt.answer) for prompt in prompts]


GOOD = [{"prompt": f"{i} + {i}?", "answer": 2 * i} for i in range(10)]
ALL = [(f"{i} + {i}?", str(2 * i)) for i in range(10)]
VERL = [
    {
        "prompt": [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": "0 + 0?"},
            {"role": "assistant", "content": "0"},
            {"role": "user", "content": f"{i} + {i}?"},
        ],
        "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
    }
    for i in range(10)
]


@pytest.mark.parametrize("rows", [pytest.param(GOOD, id="plain"), pytest.param(VERL, id="verl's nesting")])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "split", "saved"])
def test_every_source_gives_the_same_problems(
    kind: str, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder goes through ``load_dataset``, as a hub id does."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    if kind == "jsonl":
        path = written(folder / "problems.jsonl", rows)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "problems.parquet")
        path = str(folder / "problems.parquet")
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
        path = str(folder / "saved")
    else:
        written(folder / ("train.jsonl" if kind == "folder" else "test.jsonl"), rows)
        path = str(folder) if kind == "folder" else f"{folder}:default:test"
    prompts = prompts_from(read_rows(path), path, ProblemFormat())
    assert pairs(prompts) == ALL
    assert [(prompt.index, prompt.id) for prompt in prompts] == [(i, str(i + 1)) for i in range(10)]


@pytest.mark.parametrize(
    ("row", "form", "read"),
    [
        pytest.param({"question": "q", "answer": "1"}, {}, ("2", "q", "1"), id="the second of the names"),
        pytest.param(
            {"prompt": None, "problem": "p", "solution": r"so \boxed{7}.", "id": "x"},
            {},
            ("x", "p", "7"),
            id="null is as good as missing, and a solution's box counts",
        ),
        pytest.param(
            {"prompt": "p", "answer": "2\n#### 3"}, {"answer_after": "####"}, ("2", "p", "3"), id="mark"
        ),
        pytest.param({"prompt": "p", "answer": "4"}, {"answer_after": "####"}, ("2", "p", "4"), id="no mark"),
        pytest.param(
            {"prompt": "p Think. Go. Think.", "answer": 1},
            {"prompt_until": "Think."},
            ("2", "p Think. Go.", "1"),
            id="the last mark ends the problem",
        ),
        pytest.param(
            {"prompt": "a {b}", "answer": 1.5},
            {"template": r"Q: {prompt} \boxed{} {x}"},
            ("2", r"Q: a {b} \boxed{} {x}", "1.5"),
            id="a template's other braces stay",
        ),
        pytest.param(
            {"prompt": "{prompt}", "answer": 1}, {}, ("2", "{prompt}", "1"), id="not filled in twice"
        ),
        pytest.param(
            {"a.b": "p", "c": {"d": [0]}, "answer": 1}, {"prompt_key": "a.b"}, ("2", "p", "1"), id="dot"
        ),
        pytest.param(
            {"prompt": "p", "answer": 1, "extra": {"index": 5}},
            {"id_key": "extra.index"},
            ("5", "p", "1"),
            id="a nested id",
        ),
        pytest.param({"prompt": "p", "answer": 1, "id": "x"}, {"id_key": None}, ("2", "p", "1"), id="no id"),
        pytest.param({"prompt": " p\n", "answer": " 1 "}, {}, ("2", "p", "1"), id="white space at the ends"),
    ],
)
def test_how_a_row_is_read(
    row: dict[str, Any], form: dict[str, Any], read: tuple[str, str, str], tmp_path: Path
) -> None:
    path = written(tmp_path / "x.jsonl", ["", row])
    (prompt,) = prompts_from(read_rows(path), path, ProblemFormat(**form))
    assert (prompt.id, prompt.text, prompt.answer) == read


MALFORMED = [
    pytest.param("{", "no JSON (", id="half a line"),
    pytest.param("[1]", "no JSON object but a list", id="a list"),
    pytest.param("[" * 100_000, "no JSON (", id="nested without end"),
    pytest.param('{"prompt": "x"}', "nothing under answer or solution or", id="no answer"),
    pytest.param('{"prompt": null, "answer": "1"}', "nothing under prompt or question", id="no prompt"),
    pytest.param('{"prompt": ["x"], "answer": "1"}', "prompt is no text: ['x']", id="a list for a prompt"),
    pytest.param('{"prompt": "x", "answer": true}', "answer is no text: True", id="a truth value"),
    pytest.param('{"prompt": "x", "answer": NaN}', "answer is no number: nan", id="not a number"),
    pytest.param('{"prompt": "x", "answer": -Infinity}', "answer is no number: -inf", id="infinity"),
    pytest.param('{"prompt": " \\n", "answer": "1"}', "prompt is empty", id="a blank prompt"),
    pytest.param('{"prompt": "x", "answer": ""}', "answer is empty", id="an empty answer"),
    pytest.param('{"prompt": "x", "answer": "\\\\boxed{}"}', "no answer in", id="an empty box"),
    pytest.param(
        '{"prompt": "x\\ud800", "answer": "1"}',
        "prompt holds half a surrogate pair, at character 1",
        id="surrogate",
    ),
    pytest.param('{"prompt": [], "answer": "1"}', "prompt is no text: []", id="no messages"),
    pytest.param('{"prompt": "x", "answer": "1", "id": []}', "id is no text: []", id="a list for a name"),
]


@pytest.mark.parametrize(("line", "says"), MALFORMED)
def test_a_malformed_row_is_named_by_its_line(
    line: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "bad.jsonl", [GOOD[0], "", line, *GOOD[1:]])
    with pytest.raises(ConfigError) as refused:
        ProblemFile(path, heldout=2)
    assert f"1 malformed row of 11: {path}:3: {says}" in str(refused.value)
    assert "task.on_error=skip" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000

    task = ProblemFile(path, heldout=2, on_error="skip")
    assert sorted(pairs([*task.train(), *task.heldout()])) == sorted(ALL)
    assert f"left out 1 malformed row of 11: {path}:3: {says}" in capsys.readouterr().err


def test_all_malformed_rows_are_reported_at_once(tmp_path: Path) -> None:
    """Those that are no JSON and those that are no problem, in order; the first five by name."""
    lines = [line for parameter in MALFORMED[:4] for line in (parameter.values[0], GOOD[0])]
    path = written(tmp_path / "bad.jsonl", lines)
    with pytest.raises(ConfigError) as refused:
        ProblemFile(path)
    said = str(refused.value)
    assert "4 malformed rows of 8" in said
    assert [said.index(f"bad.jsonl:{number}: ") for number in (1, 3, 5, 7)] == sorted(
        said.index(f"bad.jsonl:{number}: ") for number in (1, 3, 5, 7)
    )
    with pytest.raises(ConfigError, match=r"bad.jsonl:5: .*; and 95 more: expected"):
        ProblemFile(written(tmp_path / "bad.jsonl", ["{"] * 100))


def test_nothing_left_of_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected at least one problem"):
        ProblemFile(written(tmp_path / "bad.jsonl", ["{"]), on_error="skip")
    with pytest.raises(ConfigError, match="expected at least one problem"):
        ProblemFile(written(tmp_path / "empty.jsonl", []))


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": 1}\n{"prompt": "\xe9", "answer": 1}\n')
    with pytest.raises(ConfigError, match=r"1 malformed row of 2: .*latin.jsonl:2: no JSON \('utf-8' codec"):
        ProblemFile(str(path))


def test_bytes_that_are_no_text_in_parquet_are_named_by_their_row(tmp_path: Path) -> None:
    prompts = pyarrow.array([b"a", b"\xe9", b"c"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": prompts, "answer": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "latin.parquet")
    path = str(tmp_path / "latin.parquet")
    with pytest.raises(ConfigError, match=r"1 malformed row of 3: .*latin.parquet:2: no UTF-8"):
        ProblemFile(path)
    assert pairs(ProblemFile(path, on_error="skip", heldout=1).train()) in ([("a", "1")], [("c", "3")])


@pytest.mark.parametrize(
    ("path", "says"),
    [
        pytest.param("nosuch.jsonl", "task.path=.*nosuch.jsonl: expected an existing file", id="no JSONL"),
        pytest.param("nosuch.parquet", "nosuch.parquet: expected an existing file", id="no Parquet"),
        pytest.param("broken.parquet", "broken.parquet: expected a Parquet file", id="broken Parquet"),
        pytest.param("folder:nosplit", "expected a file or a data set", id="no such split"),
        pytest.param("a:b:c:d", "expected a file, or a data set as SET, SET:SPLIT or", id="too many colons"),
        pytest.param("", "task.path=: expected a file, or a data set", id="nothing"),
    ],
)
def test_what_is_not_there_is_said(
    path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    Path("broken.parquet").write_bytes(b"PAR1 no")
    Path("folder").mkdir()
    written(Path("folder/train.jsonl"), GOOD)
    with pytest.raises(ConfigError, match=says) as refused:
        ProblemFile(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("module", "path"), [("pyarrow", "x.parquet"), ("datasets", "openai/gsm8k")])
def test_a_missing_extra_is_named(
    module: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    Path("x.parquet").touch()
    with pytest.raises(ConfigError, match=r"pip install 'rlvr\[hub\]'"):
        ProblemFile(path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        pytest.param(
            {"template": "Solve it."}, r"try task.template='\{prompt\}'", id="a template without the problem"
        ),
        pytest.param({"prompt_key": []}, "try task.prompt_key=NAME", id="no name for the problem"),
        pytest.param({"answer_key": ""}, "try task.answer_key=NAME", id="no name for the answer"),
        pytest.param(
            {"on_error": "ignore"}, "refuse, skip; try task.on_error=skip", id="another way with errors"
        ),
        pytest.param(
            {"system": "Go.", "chat": False}, "task.chat=true", id="a system message without a place"
        ),
        pytest.param({"heldout": 0}, "from 1 to fewer than the 10 problems", id="none held out"),
        pytest.param({"heldout": 10}, "from 1 to fewer than the 10 problems", id="all held out"),
        pytest.param({"heldout": None}, "from 1 to fewer than the 10 problems", id="all of no other file"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        ProblemFile(written(tmp_path / "problems.jsonl", GOOD), **settings)


def test_a_file_is_split_once_and_for_all(tmp_path: Path) -> None:
    path = written(tmp_path / "problems.jsonl", GOOD)
    task, again, other = (ProblemFile(path, heldout=3, split_seed=seed) for seed in (0, 0, 1))
    assert task.train() == again.train()
    assert task.heldout() == again.heldout()
    assert task.heldout() != other.heldout()
    assert sorted(pairs([*task.train(), *task.heldout()])) == sorted(ALL)
    for prompts in (task.train(), task.heldout()):
        assert [prompt.index for prompt in prompts] == list(range(len(prompts)))
        assert [int(prompt.id) for prompt in prompts] == sorted(int(prompt.id) for prompt in prompts)


def test_a_problem_that_stands_twice_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """White space and notation aside; the first copy stays."""
    copies = [{"prompt": f" {i}  +{i}?\n", "answer": f"{2 * i}.", "id": f"copy {i}"} for i in range(10)]
    halves = [{"prompt": "1/2?", "answer": answer} for answer in (r"\frac12", r"\dfrac{1}{2}", "0.5")]
    task = ProblemFile(written(tmp_path / "problems.jsonl", [*GOOD, *copies, *halves]), heldout=5)
    assert sorted(pairs([*task.train(), *task.heldout()])) == sorted([*ALL, ("1/2?", r"\frac12")])
    assert "problems.jsonl: left out: copies of other problems, 12\n" in capsys.readouterr().err


def test_a_problem_with_two_answers_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*GOOD, {"prompt": "3 + 3 ?", "answer": 7}, {"prompt": "5 + 5?", "answer": -10}, GOOD[3]]
    task = ProblemFile(written(tmp_path / "problems.jsonl", rows), heldout=4)
    left = [pair for i, pair in enumerate(ALL) if i not in (3, 5)]
    assert sorted(pairs([*task.train(), *task.heldout()])) == sorted(left)
    said = capsys.readouterr().err
    assert "left out: copies of other problems, 3\n" in said
    assert "left out: problems whose copies have different answers, 2 (4, 6)\n" in said


def test_two_problems_of_one_name_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "problems.jsonl", [{**row, "id": i % 9} for i, row in enumerate(GOOD)])
    with pytest.raises(
        ConfigError, match="two problems named '0': expected one name each; try task.id_key=null"
    ):
        ProblemFile(path, heldout=2)
    assert len(ProblemFile(path, heldout=2, id_key=None).train()) == 8


def test_problems_held_out_in_a_file_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands in it is kept from training, drawn or not."""
    path = written(tmp_path / "problems.jsonl", GOOD)
    others = [{"problem": f"{i}+{i} ?", "solution": rf"\boxed{{{2 * i}}}"} for i in range(7, 12)]
    other = written(tmp_path / "test.jsonl", others)
    task = ProblemFile(path, heldout_path=other, heldout=None, template="{prompt}!")
    assert pairs(task.train()) == [(f"{i} + {i}?!", str(2 * i)) for i in range(7)]
    assert pairs(task.heldout()) == [(f"{i}+{i} ?!", str(2 * i)) for i in range(7, 12)]
    assert f"{path}: left out: problems that stand in {other}, 3\n" in capsys.readouterr().err

    drawn, again, seeded = (
        ProblemFile(path, heldout_path=other, heldout=2, split_seed=seed) for seed in (0, 0, 2)
    )
    assert len(drawn.train()) == 7
    assert len(drawn.heldout()) == 2
    assert drawn.heldout() == again.heldout() != seeded.heldout()

    with pytest.raises(ConfigError, match="task.heldout=6: expected from 1 to the 5 problems of"):
        ProblemFile(path, heldout_path=other, heldout=6)
    with pytest.raises(ConfigError, match="expected not every problem"):
        ProblemFile(path, heldout_path=path, heldout=2)
    with pytest.raises(ConfigError, match="task.heldout_path=nosuch.jsonl"):
        ProblemFile(path, heldout_path="nosuch.jsonl")


@pytest.mark.parametrize(
    "dropped",
    [
        pytest.param([{"prompt": "3+3?", "answer": 6}, {"prompt": "3+3?", "answer": 7}], id="in conflict"),
        pytest.param([{"prompt": "3+3?", "id": []}], id="malformed"),
        pytest.param(["{", {"prompt": "3+3?", "answer": ""}], id="without an answer"),
    ],
)
def test_what_another_file_holds_badly_is_kept_from_training_too(dropped: list[Any], tmp_path: Path) -> None:
    path = written(tmp_path / "problems.jsonl", GOOD)
    other = written(tmp_path / "test.jsonl", [*dropped, {"prompt": "another?", "answer": 1}])
    task = ProblemFile(path, heldout_path=other, heldout=None, on_error="skip")
    assert pairs(task.heldout()) == [("another?", "1")]
    assert pairs(task.train()) == [pair for i, pair in enumerate(ALL) if i != 3]


# As the policy reads them
# ------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "chat", "read"),
    [
        pytest.param("", True, "u:3:abc>>a:", id="chat"),
        pytest.param("go", True, "s:go>u:3:abc>>a:", id="with a system message"),
        pytest.param("", False, "3:abc>", id="plain"),
    ],
)
def test_prompts_go_through_the_chat_template(system: str, chat: bool, read: str, tmp_path: Path) -> None:
    policy = Policy()
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}>{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    rows = [{"prompt": "3:abc>", "answer": "abc"}, {"prompt": "x", "answer": "x"}]
    path = written(tmp_path / "x.jsonl", rows)
    other = written(tmp_path / "y.jsonl", rows[1:])
    task = ProblemFile(path, heldout_path=other, heldout=1, system=system, chat=chat)
    limits = {"max_prompt_tokens": 1024, "max_new_tokens": 4}
    (prompt,) = encode(task.train(), policy, **limits, chat=task.chat, split="training")
    assert policy.tokenizer.decode(prompt.token_ids, skip_special_tokens=True) == read


# The data sets that are shipped as choices
# ------------------------------------------------------------


def shipped(choice: str, path: Path | str) -> tuple[ProblemFile, Any]:
    """Task and verifier as ``task=choice task.path=path`` makes them."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"task={choice}", f"task.path={path}", "task.heldout=1"])
    return build(cfg, "task"), build(cfg, "verifier")


BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
PLAIN = "\nPlease reason step by step, and end with the answer as a plain number."
TAIL = "Let's think step by step and output the final answer within \\boxed{}."


@pytest.mark.parametrize(
    ("choice", "row", "read", "response"),
    [
        pytest.param(
            "gsm8k",
            {"question": "Six and 4?", "answer": "6 + 4 = <<6+4=10>>10\n#### 10"},
            ("2", f"Six and 4?{PLAIN}", "10"),
            "That is 10.",
            id="gsm8k",
        ),
        pytest.param(
            "math",
            {
                "problem": "$1/2$?",
                "level": "Level 1",
                "type": "Algebra",
                "solution": r"It is $\boxed{\frac12}$.",
            },
            ("2", f"$1/2$?{BOXED}", r"\frac12"),
            r"\boxed{0.5}",
            id="math",
        ),
        pytest.param(
            "dapo_math_17k",
            {
                "prompt": "Find $a$.",
                "solution": "34",
                "source_prompt": [{"role": "user", "content": "Solve ... Find $a$."}],
                "reward_model": {"ground_truth": "34", "style": "rule"},
            },
            ("2", f"Find $a$.{BOXED}", "34"),
            r"\boxed{34}",
            id="dapo_math_17k",
        ),
        pytest.param(
            "dsr_sub",
            {
                "prompt": [{"role": "user", "content": f"Find $a$. {TAIL}"}],
                "reward_model": {"ground_truth": r"\frac{3}{7}", "style": "rule"},
                "extra_info": {"index": 0, "split": "train"},
            },
            ("2", f"Find $a$.{BOXED}", r"\frac{3}{7}"),
            r"\boxed{3/7}",
            id="dsr_sub",
        ),
        pytest.param(
            "svamp",
            {
                "ID": "chal-1",
                "Body": "Dan had 4.",
                "Question": "Left?",
                "Answer": "3.0",
                "question_concat": "Dan?",
            },
            ("chal-1", f"Dan?{PLAIN}", "3.0"),
            "So 3 are left.",
            id="svamp",
        ),
    ],
)
def test_rows_as_the_hub_has_them(
    choice: str, row: dict[str, Any], read: tuple[str, str, str], response: str, tmp_path: Path
) -> None:
    """Their columns, from the sets' own pages; with the verifier that the choice brings."""
    task, verifier = shipped(choice, written(tmp_path / "x.jsonl", [{**GOOD[0], "id": "a"}, row]))
    prompt = next(p for p in (*task.train(), *task.heldout()) if p.id != "a")
    assert (prompt.id, prompt.text, prompt.answer) == read
    assert verifier(prompt, response).correct
    assert not verifier(prompt, r"\boxed{99}").correct


@pytest.mark.parametrize(
    ("choice", "name", "rows", "copies", "conflicts"),
    [
        ("gsm8k", "train/gsm8k_train.jsonl", 7473, 0, 0),
        ("math", "train/math_train.jsonl", 7470, 2, 0),
        ("dapo_math_17k", "train/dapo_math_17k.jsonl", 17917, 17917 - 16921, 15),
        ("dsr_sub", "train/dsr_sub.jsonl", 1208, 2, 0),
        ("svamp", "eval/svamp.jsonl", 1000, 0, 0),
        ("problem_file", "train/oneshot_rlvr_pi.jsonl", 4, 0, 0),
    ],
)
def test_training_files_load_without_further_settings(
    choice: str, name: str, rows: int, copies: int, conflicts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    shared_data.rows(name)
    task, _ = shipped(choice, shared_data.FOLDER / name)
    assert len(task.train()) + len(task.heldout()) == rows - copies - conflicts
    said = capsys.readouterr().err
    assert (f"copies of other problems, {copies}\n" in said) == (copies > 0)
    assert (f"different answers, {conflicts} (" in said) == (conflicts > 0)


def test_the_embedded_tokenizer_keeps_the_task_s_alphabet() -> None:
    tokenizer = Policy().tokenizer
    for prompt in LettersTask(train=50).train():
        assert tokenizer.decode(tokenizer.encode(prompt.text), skip_special_tokens=True) == prompt.text
    every = ascii_lowercase + "0123456789:>"
    ids = tokenizer.encode(every, add_special_tokens=False)
    assert len(ids) == len(set(ids)) == len(every)
