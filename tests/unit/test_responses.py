"""The file of responses: each once and whole, whatever killed the writer, and of one policy and settings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlvr.batch import Prompt, Verdict
from rlvr.errors import ConfigError
from rlvr.responses import (
    Response,
    ResponseFile,
    claim,
    differences,
    prompts_digest,
    read_responses,
    weights_digest,
)

FIRST = Response(
    "b", 0, "p0", 0, "1 + 1?", "2", "it is 2", 5, "stop", correct=True, answer="2", reason="right"
)
SECOND = replace(FIRST, index=1, problem="p1", response="\ud800 é", correct=False, answer=None)


def written(folder: Path, *responses: Response) -> ResponseFile:
    kept = ResponseFile(folder)
    for response in responses:
        kept.add(response)
    return kept


def test_what_is_added_is_read_and_nothing_twice(tmp_path: Path) -> None:
    kept = written(tmp_path, SECOND, FIRST, FIRST)
    assert read_responses(tmp_path / "responses.jsonl") == [SECOND, FIRST], "at once, not when it is closed"
    kept.add(replace(FIRST, response="something else"))
    kept.close()
    assert len((tmp_path / "responses.jsonl").read_text().splitlines()) == 2
    again = ResponseFile(tmp_path)
    assert again.of("b") == [FIRST, SECOND]
    again.close()


def test_a_verdict_is_amended(tmp_path: Path) -> None:
    """The last line of a response counts, when it is read again too."""
    failed = replace(FIRST, correct=False, answer=None, reason="verifier error: gone")
    assert (failed.unjudged, FIRST.unjudged) == (True, False)
    kept = written(tmp_path, failed, SECOND)
    kept.amend(failed.judged(Verdict(1.0, correct=True, answer="2", reason="right")))
    assert kept.of("b") == [FIRST, SECOND]
    kept.close()
    assert read_responses(tmp_path / "responses.jsonl") == [FIRST, SECOND]
    again = ResponseFile(tmp_path)
    assert again.of("b") == [FIRST, SECOND]
    again.close()


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_a_half_written_last_line_is_dropped(cut: int, tmp_path: Path) -> None:
    written(tmp_path, FIRST, SECOND).close()
    path = tmp_path / "responses.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert read_responses(path) == [FIRST]
    kept = written(tmp_path, SECOND)
    kept.close()
    assert path.read_bytes() == whole


def test_a_whole_line_that_is_no_response_is_named(tmp_path: Path) -> None:
    (tmp_path / "responses.jsonl").write_text('{"benchmark": "b"}\n')
    with pytest.raises(ConfigError, match=r"responses.jsonl:1: expected a response"):
        ResponseFile(tmp_path)


def test_a_prompt_is_missing_until_it_has_every_sample(tmp_path: Path) -> None:
    prompts = [Prompt(index, f"p{index}", "", "") for index in range(3)]
    kept = written(tmp_path, FIRST, replace(FIRST, sample=1), SECOND)
    assert kept.missing("b", prompts, 1) == prompts[2:]
    assert kept.missing("b", prompts, 2) == prompts[1:]
    assert kept.missing("other", prompts, 1) == prompts
    kept.close()


# Whose they are
# ------------------------------------------------------------

FACTS = {"policy": "a" * 64, "temperature": 1.0, "benchmarks": {"b": {"samples": 2}}}


def test_a_folder_is_claimed_once_and_may_be_claimed_again(tmp_path: Path) -> None:
    claim(tmp_path, FACTS)
    before = (tmp_path / "evaluation.json").read_bytes()
    claim(tmp_path, json.loads(json.dumps(FACTS)))
    assert (tmp_path / "evaluation.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        pytest.param({"policy": "b" * 64}, "policy: aaaaaaaaaaaa... and bbbbbbbbbbbb...", id="the policy"),
        pytest.param({"temperature": 0.6}, "temperature: 1.0 and 0.6", id="a setting"),
        pytest.param(
            {"benchmarks": {"b": {"samples": 4}}}, "benchmarks.b.samples: 2 and 4", id="a benchmark's"
        ),
        pytest.param({"benchmarks": {}}, r"benchmarks.b: {'samples': 2} and None", id="a benchmark less"),
        pytest.param({"seed": 1}, "seed: None and 1", id="one more"),
    ],
)
def test_another_policy_or_setting_is_refused(changed: dict[str, object], says: str, tmp_path: Path) -> None:
    claim(tmp_path, FACTS)
    with pytest.raises(ConfigError) as refused:
        claim(tmp_path, {**FACTS, **changed})
    assert says in str(refused.value)
    assert f"hydra.run.dir={tmp_path}: expected" in str(refused.value)


def test_responses_of_nobody_are_refused(tmp_path: Path) -> None:
    written(tmp_path, FIRST).close()
    with pytest.raises(ConfigError, match="evaluation.json beside its responses.jsonl"):
        claim(tmp_path, FACTS)


def test_equal_facts_have_no_differences() -> None:
    assert differences(FACTS, json.loads(json.dumps(FACTS))) == []


@pytest.mark.parametrize(
    "other",
    [
        pytest.param([("w", torch.tensor([1.0, 2.5]))], id="one value"),
        pytest.param([("v", torch.tensor([1.0, 2.0]))], id="the name"),
        pytest.param([("w", torch.tensor([[1.0, 2.0]]))], id="the shape"),
        pytest.param([("w", torch.tensor([1.0, 2.0]).bfloat16())], id="the dtype"),
        pytest.param([("w", torch.tensor([1.0, 2.0])), ("x", torch.zeros(0))], id="one more"),
    ],
)
def test_a_digest_tells_weights_apart_by(other: list[tuple[str, torch.Tensor]]) -> None:
    weights = [("w", torch.tensor([1.0, 2.0]))]
    assert weights_digest(weights) == weights_digest([("w", torch.tensor([1.0, 0.0, 2.0])[::2])])
    assert weights_digest(weights) != weights_digest(other)


def test_a_digest_tells_problems_apart() -> None:
    prompt = Prompt(0, "p", "1 + 1?", "2", token_ids=(1, 2))
    assert prompts_digest([prompt]) == prompts_digest([replace(prompt)])
    for change in ({"id": "q"}, {"answer": "3"}, {"token_ids": (1, 3)}, {"index": 1}):
        assert prompts_digest([prompt]) != prompts_digest([replace(prompt, **change)])
