"""Benchmarks: the paper's sets as configured, and how they are asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import shared_data
from hydra import compose, initialize_config_dir

from rlvr.batch import Prompt, Verdict
from rlvr.benchmarks import Benchmark, heldout, problem_set
from rlvr.errors import ConfigError
from rlvr.instantiate import CONF, build_benchmarks
from rlvr.policy import Policy
from rlvr.settings import EvaluationConfig
from rlvr.tasks import LettersTask, ProblemFormat, WordProblemsTask
from rlvr.verifiers import IntegerVerifier, LettersVerifier

TEMPLATE = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
PAPER = {"aime24": 32, "aime25": 32, "amc": 32, "math500": 4, "gsm8k": 2, "olympiad": 4}
"""Samples a problem, method.md, section 5."""
SIZES = {
    **{"aime24": 30, "aime25": 30, "amc": 83, "math500": 500, "gsm8k": 1319, "olympiad": 675},
    **{"minerva": 272, "hmmt": 196, "svamp": 1000},
}


def configured(*names: str) -> list[Benchmark]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", overrides=[f"benchmark=[{','.join(names)}]"])
    return build_benchmarks(cfg, None, None)


def file(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_benchmark_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the files of RLVR_DATA, with the paper's samples and template; its own answer is right."""
    shared_data.rows("eval/aime24.jsonl")
    monkeypatch.setenv("RLVR_DATA", str(shared_data.FOLDER))
    found = configured(*SIZES)
    assert {each.name: len(each.problems) for each in found} == SIZES
    assert {each.name: each.samples for each in found if each.name in PAPER} == PAPER
    assert len({id(each.verifier) for each in found}) < len(found), "equal verifiers are one"
    for benchmark in found:
        first = benchmark.problems[0]
        assert first.text.endswith(TEMPLATE)
        assert benchmark.verifier(first, f"So it is \\boxed{{{first.answer}}}.").correct, benchmark.name
    for verifier in {id(each.verifier): each.verifier for each in found}.values():
        verifier.close()  # type: ignore[attr-defined]


def test_without_a_folder_they_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLVR_DATA", raising=False)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", overrides=["benchmark=[aime24,olympiad]"])
    assert cfg.benchmark.aime24.path == "HuggingFaceH4/aime_2024:train"
    assert cfg.benchmark.olympiad.form.template.endswith(TEMPLATE)
    assert cfg.benchmark.olympiad.path == "Hothan/OlympiadBench:OE_TO_maths_en_COMP:train"


@pytest.mark.parametrize(
    ("name", "folder", "says"),
    [
        pytest.param("hmmt", None, "RLVR_DATA=FOLDER", id="no folder, and none on the hub"),
        pytest.param(
            "aime24", "/nowhere", "benchmark.aime24.path=/nowhere/eval/aime24.jsonl", id="no such file"
        ),
    ],
)
def test_problems_that_are_not_there(
    name: str, folder: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if folder is None:
        monkeypatch.delenv("RLVR_DATA", raising=False)
    else:
        monkeypatch.setenv("RLVR_DATA", folder)
    with pytest.raises(ConfigError, match=says) as refused:
        configured(name)
    assert "\n" not in str(refused.value)


def test_a_benchmark_s_form_is_checked_by_its_own_names(tmp_path: Path) -> None:
    path = file(tmp_path, {"prompt": "1 + 1?", "answer": "2"})
    for form, says in (
        (ProblemFormat(template="Solve it."), "try benchmark.mine.form.template='{prompt}'"),
        (ProblemFormat(answer_key=None), "try benchmark.mine.form.answer_key=NAME"),
    ):
        with pytest.raises(ConfigError, match=says):
            problem_set("mine", path, verifier=LettersVerifier(), form=form)


def test_a_policy_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    """As base models are."""
    mine = problem_set("mine", file(tmp_path, {"prompt": "ab", "answer": "a"}), verifier=LettersVerifier())
    task = heldout(WordProblemsTask(train=1, heldout=1), IntegerVerifier())
    for benchmark, fix in ((mine, "benchmark.mine.chat=false"), (task, "task.chat=false")):
        with pytest.raises(ConfigError, match=f"; try {fix}"):
            benchmark.prompts(Policy(), EvaluationConfig(), max_prompt_tokens=30, max_new_tokens=4)


def test_heldout_needs_a_task() -> None:
    with pytest.raises(ConfigError, match="benchmark=heldout: expected the task .*; try task=letters"):
        configured("heldout")


def test_several_answers_are_one_list(tmp_path: Path) -> None:
    """As OlympiadBench has them on the hub."""
    rows = [{"question": "x?", "final_answer": answers} for answers in (["$69$", "$84$"], ["$(2,4)$"])]
    form = ProblemFormat(answer_key=["answer", "final_answer"])
    found = problem_set("mine", file(tmp_path, *rows), verifier=LettersVerifier(), form=form)
    assert [problem.answer for problem in found.problems] == ["$69$, $84$", "$(2,4)$"]


def test_two_problems_of_one_name_are_refused(tmp_path: Path) -> None:
    path = file(tmp_path, *[{"id": "x", "prompt": f"{i}", "answer": "1"} for i in range(2)])
    with pytest.raises(ConfigError, match="two problems named 'x'"):
        problem_set("mine", path, verifier=LettersVerifier())


def test_prompts_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The template, the first few, those that fit; n is the benchmark's own unless asked for."""
    rows = [{"prompt": prompt, "answer": "a"} for prompt in ("2:ab>", "3:abcdefghij>", "2:cd>", "2:ef>")]
    form = ProblemFormat(template="{prompt}a")
    mine = problem_set(
        "mine", file(tmp_path, *rows), verifier=LettersVerifier(), form=form, samples=5, chat=False
    )
    evaluation = EvaluationConfig(samples=None, num_prompts=3, temperature=0.5, top_p=0.9)
    prompts = mine.prompts(Policy(), evaluation, max_prompt_tokens=8, max_new_tokens=4)
    assert [(prompt.index, prompt.text) for prompt in prompts] == [(0, "2:ab>a"), (2, "2:cd>a")]
    assert "left out 1 of 3 mine prompts" in capsys.readouterr().err
    sampling = mine.sampling(evaluation, max_new_tokens=4, seed=7)
    assert (sampling.samples, sampling.temperature, sampling.top_p) == (5, 0.5, 0.9)
    assert (sampling.seed, sampling.purpose, sampling.iteration) == (7, "mine", 0)
    assert mine.sampling(EvaluationConfig(samples=3), max_new_tokens=4, seed=7).samples == 3


def test_heldout_problems_are_the_task_s() -> None:
    task = LettersTask(train=8, heldout=6)
    benchmark = heldout(task, LettersVerifier())
    assert benchmark.problems == task.heldout()
    assert (benchmark.name, benchmark.chat) == ("heldout", False)


class SameLetters:
    """An outside verifier."""

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        right = sorted(completion) == sorted(prompt.answer)
        return Verdict(float(right), correct=right, answer=completion, reason="")


def test_training_scores_benchmarks_too(tmp_path: Path) -> None:
    """Beside the held-out problems, at the start and whenever they are scored, by n samples of its own."""
    path = file(tmp_path, *[{"prompt": f"2:{two}>", "answer": two} for two in ("ab", "cd", "ef")])
    mine = (
        "{_target_:rlvr.benchmarks.problem_set,name:mine,samples:4,chat:false,"
        f"path:'{path}',verifier:{{_target_:test_benchmarks.SameLetters}}}}"
    )
    state = runs.train_only(tmp_path / "run", f"+benchmark.mine={mine}", "evaluation.samples=null")
    first, *_ = state["rlvr"]["ledger"]["rows"][1::2]
    for row in (first, state["rlvr"]["ledger"]["start"]):
        assert {"val/mine/mean_at_4", "val/mine/pass_at_4", "val/heldout/mean_at_8"} <= set(row)
    assert 0 < first["time/mine_s"] < first["time/iteration_s"]
    assert first["val/mine/verifier_errors"] == 0
