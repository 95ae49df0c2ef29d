"""Tables of an evaluation, and two evaluations compared, from fixed files and by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlvr.comparison import compare, comparison_table
from rlvr.errors import ConfigError
from rlvr.responses import Response, ResponseFile, claim
from rlvr.results import Scored, results, results_table

SAMPLES = 2


def responses(benchmark: str, *rows: str, first: int = 0) -> list[Response]:
    """Problems with two responses each, "1" for a right one, "0" for a wrong one, "x" for a cut one."""
    return [
        Response(
            benchmark,
            index=first + index,
            problem=f"p{first + index}",
            sample=sample,
            prompt="?",
            gold="2",
            response="",
            tokens=10 + sample,
            finish_reason="length" if mark == "x" else "stop",
            correct=mark == "1",
            answer={"1": "2", "0": "3", "x": None}[mark],
            reason="verifier error: timeout" if mark == "x" else "",
        )
        for index, row in enumerate(rows)
        for sample, mark in enumerate(row)
    ]


def folder(at: Path, temperature: float = 1.0, **benchmarks: list[Response]) -> Path:
    at.mkdir()
    claim(
        at,
        {
            "policy": at.name,
            "temperature": temperature,
            "benchmarks": {name: {"samples": SAMPLES} for name in benchmarks},
        },
    )
    kept = ResponseFile(at)
    for each in (response for found in benchmarks.values() for response in found):
        kept.add(each)
    kept.close()
    return at


def test_results_by_hand() -> None:
    """2, 1, 0 and 0 right of 2; the majority of "01" is its first answer, "xx" has none."""
    found = results(
        [
            Scored.of("a", responses("a", "11", "01", "00", "xx"), SAMPLES),
            Scored.of("b", responses("b", "11", "11"), SAMPLES),
        ],
        seed=0,
    )
    a, b = found["benchmarks"]["a"], found["benchmarks"]["b"]
    values = {name: of["value"] for name, of in a["scores"].items()}
    assert values == {"mean_at_2": 3 / 8, "maj_at_2": 1 / 4, "pass_at_1": 3 / 8, "pass_at_2": 1 / 2}
    assert (a["problems"], a["samples"], a["length_mean"]) == (4, 2, 10.5)
    assert (a["truncated_frac"], a["verifier_errors"]) == (1 / 4, 2)
    assert b["scores"]["mean_at_2"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    average = {name: of["value"] for name, of in found["average"].items()}
    assert average == {"mean": (3 / 8 + 1) / 2, "pass": 3 / 4, "maj": 5 / 8}, "of benchmarks, not of problems"
    low, high = found["average"]["mean"]["low"], found["average"]["mean"]["high"]
    assert low == pytest.approx((a["scores"]["mean_at_2"]["low"] + 1) / 2)
    assert high == pytest.approx((a["scores"]["mean_at_2"]["high"] + 1) / 2)
    assert json.loads(json.dumps(found)) == found


def test_the_table_shows_them() -> None:
    scored = [
        Scored.of("a", responses("a", "11", "11", "00", "00"), SAMPLES),
        Scored.of("none", responses("none", "0", "0", "0"), 1),
    ]
    lines = results_table(results(scored, seed=0)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["a", "4", "2", *["50.0 [0.0, 100.0]"] * 3, "10", "0.0", "0"]
    assert cells[3] == ["none", "3", "1", *["0.0 [0.0, 0.0]"] * 3, "10", "0.0", "0"]
    assert cells[4][:4] == ["average", "", "", "25.0 [0.0, 50.0]"]
    assert [cells[6], *cells[8:]] == [["pass@k", "1", "2"], ["a", "50.0", "50.0"], ["none", "0.0", ""]]
    assert len({len(line) for line in lines[:5]}) == 1, "it lines up"


# Two evaluations
# ------------------------------------------------------------


def test_differences_are_of_pairs(tmp_path: Path) -> None:
    """The second solves one sample more of every problem: a difference without spread, whatever their own."""
    first = folder(tmp_path / "first", a=responses("a", "00", "01", "00", "01"))
    second = folder(tmp_path / "second", a=responses("a", "01", "11", "10", "11"))
    found = compare(first, second)
    assert found["settings"] == []
    a = found["benchmarks"]["a"]
    assert (a["pairs"], a["unpaired"]) == (4, 0)
    assert (a["first"]["mean_at_2"], a["second"]["mean_at_2"]) == (0.25, 0.75)
    assert a["differences"]["mean_at_2"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert a["differences"]["pass_at_2"]["value"] == 0.5
    assert found["average"]["pass_at_1"]["value"] == 0.5
    swapped = compare(second, first)["benchmarks"]["a"]["differences"]
    assert swapped["mean_at_2"]["value"] == -0.5
    table = comparison_table(found)
    assert "| a         | 4     | mean_at_2 | 25.0  | 75.0   | 50.0 [50.0, 50.0] *" in table
    assert "WARNING" not in table


def test_only_common_problems_count_and_what_differs_is_said(tmp_path: Path) -> None:
    first = folder(tmp_path / "first", a=responses("a", "00", "11", "11"), b=responses("b", "11"))
    shifted = [*responses("a", "11", "11", first=1), *responses("a", "1", first=0)]
    second = folder(tmp_path / "second", temperature=0.6, a=shifted)
    found = compare(first, second)
    assert found["settings"] == ["temperature: 1.0 and 0.6", "benchmarks.b: {'samples': 2} and None"]
    assert list(found["benchmarks"]) == ["a"]
    a = found["benchmarks"]["a"]
    assert (a["pairs"], a["unpaired"]) == (2, 1), "p1 and p2; p0 has one of its two responses in the second"
    assert a["differences"]["mean_at_2"]["value"] == 0.0
    table = comparison_table(found)
    assert table.startswith("WARNING: settings differ in temperature: 1.0 and 0.6\n")
    assert "WARNING: a: 1 problems without the same one, answered in full, in the other, left out\n" in table
    assert " *" not in table


def test_another_problem_of_the_same_name_is_no_pair(tmp_path: Path) -> None:
    """As where names are row numbers, and the file was another."""
    first = folder(tmp_path / "first", a=responses("a", "00", "01"))
    other = [replace(each, gold="3") if each.index == 1 else each for each in responses("a", "11", "11")]
    a = compare(first, folder(tmp_path / "second", a=other))["benchmarks"]["a"]
    assert (a["pairs"], a["unpaired"]) == (1, 2)
    assert (a["first"]["mean_at_2"], a["second"]["mean_at_2"]) == (0.0, 1.0)


@pytest.mark.parametrize("facts", ["[]", "{}", '{"benchmarks": []}', '{"benchmarks": {"a": {}}}', "{"])
def test_facts_that_are_none_are_refused(facts: str, tmp_path: Path) -> None:
    first = folder(tmp_path / "first", a=responses("a", "00"))
    (first / "evaluation.json").write_text(facts)
    with pytest.raises(ConfigError, match="a folder that rlvr-eval has written") as refused:
        compare(first, first)
    assert "\n" not in str(refused.value)


def test_results_files_stand_for_their_folders(tmp_path: Path) -> None:
    first = folder(tmp_path / "first", a=responses("a", "00", "01"))
    (first / "results.json").write_text("{}")
    assert compare(first / "results.json", first) == compare(first, first)


@pytest.mark.parametrize("there", [True, False])
def test_what_cannot_be_compared_is_refused(there: bool, tmp_path: Path) -> None:
    first = folder(tmp_path / "first", a=responses("a", "00"))
    second = folder(tmp_path / "second", b=responses("b", "00")) if there else tmp_path / "nowhere"
    says = "a problem that both have answered" if there else "a folder that rlvr-eval has written"
    with pytest.raises(ConfigError, match=says):
        compare(first, second)
