"""Prompts: disjoint, the same every time, errors by line number; verdicts by brute force and by hand."""

import itertools
import json
import math
from pathlib import Path
from string import ascii_lowercase

import pytest

from rlvr.batch import Prompt
from rlvr.errors import ConfigError
from rlvr.policy import Policy
from rlvr.tasks import LettersTask, ProblemFile
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


def written(path: Path, lines: list[str]) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


GOOD = [json.dumps({"prompt": f"{i} + {i}?", "answer": 2 * i}) for i in range(10)]


def test_a_problem_that_stands_twice_is_never_on_both_sides(tmp_path: Path) -> None:
    task = ProblemFile(written(tmp_path / "problems.jsonl", GOOD * 2), heldout=5)
    assert not {prompt.text for prompt in task.train()} & {prompt.text for prompt in task.heldout()}
    assert [prompt.index for prompt in task.train()] == list(range(len(task.train())))


def test_a_file_is_split_once_and_for_all(tmp_path: Path) -> None:
    path = written(tmp_path / "problems.jsonl", GOOD)
    task, again, other = (ProblemFile(path, heldout=3, split_seed=seed) for seed in (0, 0, 1))
    assert task.train() == again.train()
    assert task.heldout() == again.heldout()
    assert task.heldout() != other.heldout()
    texts = [prompt.text for prompt in (*task.train(), *task.heldout())]
    assert sorted(texts) == sorted(f"{i} + {i}?" for i in range(10))
    assert [prompt.index for prompt in task.heldout()] == [0, 1, 2]


def test_fields_mark_and_instruction(tmp_path: Path) -> None:
    rows = [json.dumps({"q": f"{i} + 3?", "a": f"first\n#### {i + 3}", "id": f"p{i}"}) for i in range(2)]
    path = written(tmp_path / "x.jsonl", [rows[0], "", rows[1]])
    task = ProblemFile(
        path, prompt_key="q", answer_key="a", answer_after="####", instruction="Go.", heldout=1
    )
    read = {prompt.id: (prompt.text, prompt.answer) for prompt in (*task.train(), *task.heldout())}
    assert read == {"p0": ("0 + 3?\nGo.", "3"), "p1": ("1 + 3?\nGo.", "4")}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        pytest.param("{", "bad.jsonl:3: expected one JSON object a line", id="half a line"),
        pytest.param("[1]", "bad.jsonl:3: expected a JSON object, got list", id="a list"),
        pytest.param("[" * 100_000, "bad.jsonl:3: expected one JSON object a line", id="nested without end"),
        pytest.param('{"prompt": "x"}', "row 3: answer=None: expected a text under 'answer'", id="no answer"),
        pytest.param('{"prompt": null, "answer": "1"}', "row 3: prompt=None", id="no prompt"),
        pytest.param('{"prompt": ["x"], "answer": "1"}', "row 3: prompt=", id="a list for a prompt"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(line: str, says: str, tmp_path: Path) -> None:
    path = written(tmp_path / "bad.jsonl", [GOOD[0], "", line, *GOOD])
    with pytest.raises(ConfigError) as refused:
        ProblemFile(path, heldout=2)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("heldout", [0, 10, 99])
def test_a_split_that_leaves_nothing_is_refused(heldout: int, tmp_path: Path) -> None:
    path = written(tmp_path / "problems.jsonl", GOOD)
    with pytest.raises(ConfigError, match=f"task.heldout={heldout}: expected from 1 to fewer than the 10"):
        ProblemFile(path, heldout=heldout)


def test_bytes_that_are_no_text_are_named_by_their_file(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "\xe9", "answer": 1}\n')
    with pytest.raises(ConfigError, match="latin.jsonl:1: expected one JSON object a line"):
        ProblemFile(str(path))


def test_the_embedded_tokenizer_keeps_the_task_s_alphabet() -> None:
    tokenizer = Policy().tokenizer
    for prompt in LettersTask(train=50).train():
        assert tokenizer.decode(tokenizer.encode(prompt.text), skip_special_tokens=True) == prompt.text
    every = ascii_lowercase + "0123456789:>"
    ids = tokenizer.encode(every, add_special_tokens=False)
    assert len(ids) == len(set(ids)) == len(every)
