"""``rlvr-eval``: real evaluations of the embedded policy, killed, continued, and compared."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import runs
from hydra import compose, initialize_config_dir

from rlvr.batch import Prompt, Verdict
from rlvr.engines import SamplingParams
from rlvr.engines.transformers import TransformersEngine
from rlvr.errors import ConfigError, EngineDiedError
from rlvr.evaluate import main
from rlvr.evaluation import follow_run
from rlvr.export import export
from rlvr.instantiate import CONF
from rlvr.responses import read_responses
from rlvr.tasks import LettersTask


def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


def lines(folder: Path) -> list[str]:
    """Responses in one order, whenever each came."""
    return sorted((folder / "responses.jsonl").read_text().splitlines())


def scores(folder: Path, benchmark: str = "heldout") -> dict[str, float]:
    return {name: of["value"] for name, of in results(folder)["benchmarks"][benchmark]["scores"].items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of two iterations by the command, with its configuration beside it."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    process = runs.start(folder, "trainer.max_epochs=2")
    process.join(60)
    assert process.exitcode == 0, (folder / "err.txt").read_text()
    return folder


def test_a_run_s_policy_on_its_heldout_problems(run: Path, tmp_path: Path) -> None:
    """Task, verifier, lengths and draws are the run's: the scores are those of its last row."""
    process = runs.start_evaluation(tmp_path, f"policy.path={run}", "evaluation.samples=2")
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "err.txt").read_text()
    last = {key: value for key, value in runs.rows(run)[-1].items() if key.startswith("val/heldout/")}
    found = scores(tmp_path)
    assert found.keys() >= {"mean_at_2", "maj_at_2", "pass_at_1", "pass_at_2"}
    for name, value in found.items():
        assert value == pytest.approx(float(last[f"val/heldout/{name}"])), name
    said = (tmp_path / "out.txt").read_text()
    assert (tmp_path / "results.md").read_text() in said
    assert len(lines(tmp_path)) == 8 * 2


def test_what_a_run_does_not_say_alone_is_its_own(tmp_path: Path) -> None:
    """Seed and sampling are the run's too, and what is given beside it counts, one by one."""
    theirs = ["seed=3", "evaluation.temperature=0.5", "evaluation.top_p=0.9"]
    process = runs.start(tmp_path / "run", "trainer.max_epochs=1", *theirs)
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "run" / "err.txt").read_text()
    source = [f"policy.path={tmp_path}/run", "evaluation.samples=2"]
    assert runs.evaluate(tmp_path / "same", *source, small=()) == 0
    last = runs.rows(tmp_path / "run")[-1]
    for name, value in scores(tmp_path / "same").items():
        assert value == pytest.approx(float(last[f"val/heldout/{name}"])), name
    facts = json.loads((tmp_path / "same" / "evaluation.json").read_text())
    assert (facts["seed"], facts["temperature"], facts["top_p"]) == (3, 0.5, 0.9)

    judge = "+verifier._target_=test_evaluate.SameLetters"
    assert runs.evaluate(tmp_path / "judged", *source, "seed=0", judge, small=()) == 0
    facts = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert facts["benchmarks"]["heldout"]["verifier"] == {"_target_": "test_evaluate.SameLetters"}
    assert (facts["seed"], facts["temperature"]) == (0, 0.5)
    for response in read_responses(tmp_path / "judged" / "responses.jsonl"):
        assert response.correct == (sorted(response.response) == sorted(response.gold))


def test_without_a_run_what_nobody_says_is_the_paper_s() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate")
    follow_run(cfg)
    assert (cfg.seed, cfg.evaluation.temperature, cfg.evaluation.top_p) == (0, 1.0, 1.0)
    assert (cfg.data.max_prompt_tokens, cfg.data.max_new_tokens) == (1024, 3072)
    assert (cfg.task, cfg.verifier) == (None, None)


def test_a_run_folder_is_no_folder_of_an_evaluation(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its configuration, which says what it was, is left alone."""
    before = (run / ".hydra" / "config.yaml").read_bytes()
    monkeypatch.setattr(sys, "argv", ["rlvr-eval", f"policy.path={run}", f"hydra.run.dir='{run}'"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "expected a folder of its own, not a training run's" in capsys.readouterr().err
    assert (run / ".hydra" / "config.yaml").read_bytes() == before


def test_every_source_gives_the_same(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "policy")
    for name, source in (
        ("run", run),
        ("file", run / "checkpoints/last.ckpt"),
        ("folder", tmp_path / "policy"),
    ):
        assert runs.evaluate(tmp_path / name, f"policy.path={source}", "evaluation.samples=2") == 0
    assert lines(tmp_path / "run") == lines(tmp_path / "file") == lines(tmp_path / "folder")
    assert runs.evaluate(tmp_path / "base", "evaluation.samples=2") == 0
    assert lines(tmp_path / "base") != lines(tmp_path / "run")


def test_what_is_kept_is_what_was_said(tmp_path: Path) -> None:
    """Two benchmarks, the second from a file; the answers are judged against its own golds."""
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "".join(json.dumps({"id": t, "prompt": f"2:{t}>", "answer": t}) + "\n" for t in ("ab", "xc"))
    )
    mine = (
        "{_target_:rlvr.benchmarks.problem_set,name:mine,samples:3,chat:false,"
        f"path:'{path}',verifier:{{_target_:test_evaluate.SameLetters}}}}"
    )
    assert runs.evaluate(tmp_path / "out", f"+benchmark.mine={mine}") == 0
    found = read_responses(tmp_path / "out" / "responses.jsonl")
    heldout = {prompt.id: prompt for prompt in LettersTask(train=8, heldout=8).heldout()}
    assert len(found) == 8 * 8 + 2 * 3
    for response in found:
        assert response.tokens >= len(response.response)
        if response.benchmark == "mine":
            assert response.correct == (sorted(response.response) == sorted(response.gold))
        else:
            assert response.prompt == heldout[response.problem].text
    table = results(tmp_path / "out")
    assert [of["samples"] for of in table["benchmarks"].values()] == [8, 3]
    share = sum(response.correct for response in found if response.benchmark == "mine") / 6
    assert scores(tmp_path / "out", "mine")["mean_at_3"] == pytest.approx(share)
    assert table["average"]["mean"]["value"] == pytest.approx(
        (share + scores(tmp_path / "out")["mean_at_8"]) / 2
    )


class SameLetters:
    """An outside verifier."""

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        right = sorted(completion) == sorted(prompt.answer)
        return Verdict(float(right), correct=right, answer=completion, reason="")


# Kills
# ------------------------------------------------------------


class Asked(TransformersEngine):
    """Notes what it is asked; slow in a process of its own, so that a kill finds it at work."""

    calls: list[list[int]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Any:
        self.calls.append([prompt.index for prompt in prompts])
        for rollout in super().generate(prompts, sampling):
            time.sleep(0.005 if multiprocessing.parent_process() else 0)
            yield rollout


SLOW = (
    *("task=letters", "task.train=8", "task.heldout=60", "data.max_new_tokens=10"),
    *("engine._target_=test_evaluate.Asked", "engine.max_num_seqs=8"),
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_evaluation_goes_on_exactly(number: signal.Signals, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    process = runs.start_evaluation(killed, *SLOW)
    file, deadline = killed / "responses.jsonl", time.monotonic() + 60
    while not file.exists() or file.stat().st_size < 20_000:
        assert time.monotonic() < deadline, (killed / "err.txt").read_text()
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert not (killed / "results.json").exists()
    with file.open("ab") as half:
        half.write(b'{"benchmark": "heldout", "ind')
    before = read_responses(file)
    assert 8 <= len(before) < 60 * 8
    counts = [sum(response.index == index for response in before) for index in range(60)]
    Asked.calls.clear()
    assert runs.evaluate(killed, small=SLOW) == 0
    assert Asked.calls == [[index for index in range(60) if counts[index] < 8]]
    assert read_responses(file)[: len(before)] == before
    assert runs.evaluate(straight, small=SLOW) == 0
    assert lines(killed) == lines(straight)
    assert results(killed) == results(straight)
    assert (killed / "results.md").read_text() == (straight / "results.md").read_text()


def test_a_finished_evaluation_asks_nothing_again(tmp_path: Path) -> None:
    assert runs.evaluate(tmp_path, "engine._target_=test_evaluate.Asked") == 0
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    Asked.calls.clear()
    assert runs.evaluate(tmp_path, "engine._target_=test_evaluate.Asked") == 0
    assert not Asked.calls
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


class Dying(TransformersEngine):
    """Dies in the middle, twice."""

    deaths = 0

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Any:
        for number, rollout in enumerate(super().generate(prompts, sampling)):
            if type(self).deaths < 2 and number == 20:
                type(self).deaths += 1
                raise EngineDiedError("the engine died")
            yield rollout


def test_an_engine_that_dies_is_started_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Dying.deaths = 0
    assert runs.evaluate(tmp_path / "dying", "engine._target_=test_evaluate.Dying") == 0
    assert Dying.deaths == 2
    assert "starting it again, and going on" in capsys.readouterr().err
    assert runs.evaluate(tmp_path / "straight") == 0
    assert lines(tmp_path / "dying") == lines(tmp_path / "straight")


# Verifiers that fail
# ------------------------------------------------------------


class Failing(SameLetters):
    """Fails on the answers that have one of ``letters`` in them."""

    letters: str = ""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        if set(completion) & set(self.letters):
            raise OSError("out of order")
        return super().__call__(prompt, completion)


@pytest.mark.parametrize(
    ("letters", "code"), [pytest.param("abc", 0, id="some"), pytest.param(ascii_lowercase, 3, id="all")]
)
def test_what_a_verifier_failed_on_is_judged_again(
    letters: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And not generated again; how the verifier works may change meanwhile."""
    settings = ("verifier._target_=test_evaluate.Failing", "engine._target_=test_evaluate.Asked")
    monkeypatch.setattr(Failing, "letters", letters)
    for _ in range(2):  # nothing gets better by itself, and nothing is final
        assert runs.evaluate(tmp_path / "out", *settings, "+verifier.workers=1") == code
    assert ("the verifier failed on every response" in capsys.readouterr().err) == (code == 3)
    before = read_responses(tmp_path / "out" / "responses.jsonl")
    failed = sum(response.unjudged for response in before)
    assert 0 < failed < 64 if code == 0 else failed == 64

    monkeypatch.setattr(Failing, "letters", "")
    Asked.calls.clear()
    assert runs.evaluate(tmp_path / "out", *settings, "+verifier.workers=8") == 0
    assert not Asked.calls
    after = read_responses(tmp_path / "out" / "responses.jsonl")
    assert [each.response for each in after] == [each.response for each in before]
    assert runs.evaluate(tmp_path / "straight", *settings) == 0
    assert sorted(after, key=str) == sorted(
        read_responses(tmp_path / "straight" / "responses.jsonl"), key=str
    )
    assert results(tmp_path / "out") == results(tmp_path / "straight")


# Refusals
# ------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        pytest.param(["seed=1"], "seed: 0 and 1", id="another seed"),
        pytest.param(["evaluation.temperature=0.6"], "temperature: 1.0 and 0.6", id="another temperature"),
        pytest.param(["data.max_new_tokens=9"], "max_new_tokens: 10 and 9", id="another length"),
        pytest.param(["evaluation.samples=4"], "benchmarks.heldout.samples: 8 and 4", id="another n"),
        pytest.param(["task.seed=1"], "benchmarks.heldout.asked", id="other problems"),
        pytest.param(["verifier=integer"], "benchmarks.heldout.verifier._target_", id="another verifier"),
        pytest.param(["policy.dtype=bfloat16"], "policy: ", id="other weights"),
    ],
)
def test_a_folder_of_another_evaluation_is_refused(overrides: list[str], says: str, finished: Path) -> None:
    files = {path: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(ConfigError) as refused:
        runs.evaluate(finished, *overrides)
    assert says in str(refused.value)
    assert "try another hydra.run.dir" in str(refused.value)
    assert {path: path.read_bytes() for path in finished.iterdir()} == files


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "finished"
    assert runs.evaluate(folder) == 0
    return folder


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        pytest.param(["benchmark=nosuch"], "nosuch", id="no such benchmark"),
        pytest.param(["benchmark=[]"], "expected at least one benchmark", id="no benchmark"),
        pytest.param(["benchmark=aime24,nosuch"], "nosuch", id="one of several that is not there"),
        pytest.param([], "try task=letters", id="held-out problems without a task"),
        pytest.param(["data.max_new_tokens=0"], "data.max_new_tokens=0", id="no tokens"),
        pytest.param(["task=letters"], "data.max_new_tokens=3072", id="more than the policy takes"),
        pytest.param(["evaluation.top_p=2"], "evaluation.top_p=2", id="an impossible top-p"),
        pytest.param(["policy.path=/nowhere/x.ckpt", "task=letters"], "/nowhere/x.ckpt", id="no checkpoint"),
        pytest.param(["+algorithm.lr=1"], "algorithm", id="a node of training"),
        pytest.param(["benchmark=hmmt"], "try RLVR_DATA=FOLDER", id="problems that are in no folder"),
        pytest.param(["benchmark=,"], "expected at least one benchmark", id="a comma alone"),
        pytest.param(["benchmark=nosuch,"], "nosuch", id="a comma at the end"),
        pytest.param(["--compare", "/nowhere", "/nowhere"], "/nowhere", id="nothing to compare"),
    ],
)
def test_refused_in_one_line(
    overrides: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = [] if "--compare" in overrides else [f"hydra.run.dir={tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", ["rlvr-eval", *overrides, *folder])
    monkeypatch.delenv("RLVR_DATA", raising=False)
    with pytest.raises(SystemExit) as left:
        main()
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert error.startswith("rlvr-eval: ")
    assert error.count("\n") == 1, error
    assert says in error
    assert "expected" in error
    assert not list(tmp_path.rglob("responses.jsonl"))


# Two evaluations
# ------------------------------------------------------------


def test_two_evaluations_are_compared(
    run: Path,
    tmp_path: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command's table, and its last line for programs."""
    assert runs.evaluate(tmp_path / "trained", f"policy.path={run}") == 0
    monkeypatch.setattr(sys, "argv", ["rlvr-eval", "--compare", str(finished), str(tmp_path / "trained")])
    capsys.readouterr()
    main()
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0].split("|")[1].strip() == "benchmark"
    found = json.loads(last)
    assert found["settings"] == []
    differences = found["benchmarks"]["heldout"]["differences"]
    for name, value in scores(finished).items():
        assert differences[name]["value"] == pytest.approx(scores(tmp_path / "trained")[name] - value)
        assert differences[name]["low"] <= differences[name]["value"] <= differences[name]["high"]
