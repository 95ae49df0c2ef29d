"""Rollouts with verdicts: order, refilling of equal groups, what a checkpoint keeps, what an engine owes."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch

from rlvr.advantages import overlong_penalty
from rlvr.batch import Prompt, Rollout, Verdict
from rlvr.engines import SamplingParams
from rlvr.engines.scripted import ScriptedEngine
from rlvr.policy import Policy
from rlvr.rollouts import Ahead, JudgedRollouts, RolloutSource

SAMPLING = SamplingParams(samples=2, max_new_tokens=4)
EVEN = {1, 2, 11}
"""Prompts whose responses are all wrong."""


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy()


def prompts_of(*numbers: int) -> list[Prompt]:
    return [Prompt(i, str(i), f"2:ab{i}>", "ab", token_ids=(3, 4)) for i in numbers]


def source_of(policy: Policy) -> RolloutSource:
    def script(prompt: Prompt, iteration: int, sample: int) -> str:
        return "z" if prompt.index in EVEN or sample else "ab"

    def verifier(prompt: Prompt, completion: str) -> Verdict:
        right = completion == prompt.answer
        return Verdict(float(right), correct=right, answer=completion, reason="")

    return RolloutSource(ScriptedEngine(policy, script), verifier)


def groups(judged: list[tuple[Rollout, Verdict]]) -> list[int]:
    assert [rollout.sample for rollout, _ in judged] == [0, 1] * (len(judged) // 2)
    return [rollout.prompt.index for rollout, _ in judged[::2]]


@pytest.mark.parametrize(
    ("rounds", "spares", "chosen", "left_out", "taken"),
    [
        pytest.param(0, (10, 11, 12), [0, 1, 2, 3], [], 0, id="off"),
        pytest.param(3, (10, 12, 13), [0, 3, 10, 12], [1, 2], 1, id="one round is enough"),
        pytest.param(3, (10, 11, 12, 13), [0, 3, 10, 12], [1, 2, 11], 2, id="a spare is equal too"),
        pytest.param(1, (10, 11, 12, 13), [0, 3, 10, 1], [2, 11], 1, id="capped, and filled up"),
        pytest.param(9, (10,), [0, 3, 10, 1], [2], 1, id="no more spares"),
    ],
)
def test_groups_of_equal_rewards_are_replaced(
    policy: Policy, rounds: int, spares: Sequence[int], chosen: list[int], left_out: list[int], taken: int
) -> None:
    judged = source_of(policy).generate(
        prompts_of(0, 1, 2, 3), SAMPLING, 5, spares=prompts_of(*spares), rounds=rounds
    )
    assert groups(judged.pairs) == chosen
    assert groups(judged.left_out) == left_out
    assert (judged.rounds, judged.version) == (taken, 5)


class Later:
    """Judges nothing before it is told to."""

    def __init__(self) -> None:
        self.asked: list[Future[Verdict]] = []

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        raise AssertionError("asked to judge while the engine waits")

    def submit(self, prompt: Prompt, completion: str) -> Future[Verdict]:
        self.asked.append(Future())
        return self.asked[-1]

    def close(self) -> None:
        """Nothing to close."""


def test_a_stream_yields_in_the_engine_s_order_as_soon_as_that_can_be(policy: Policy) -> None:
    """The second verdict waits for the first, then both come; one that fails is an error with a reason."""
    verifier, verdict = Later(), Verdict(1.0, correct=True, answer="ab", reason="right")

    def script(prompt: Prompt, iteration: int, sample: int) -> str:
        if prompt.index == 2:
            verifier.asked[1].set_result(verdict)
        if prompt.index == 3:
            verifier.asked[0].set_result(verdict)
        return "ab"

    source = RolloutSource(ScriptedEngine(policy, script), verifier)
    stream = source.stream(prompts_of(0, 1, 2, 3), replace(SAMPLING, samples=1))
    assert [next(stream)[0].prompt.index for _ in range(2)] == [0, 1]
    assert len(verifier.asked) == 4, "the engine went on meanwhile"
    verifier.asked[2].set_exception(OSError("gone"))
    verifier.asked[3].set_result(verdict)
    rest = list(stream)
    assert [rollout.prompt.index for rollout, _ in rest] == [2, 3]
    assert [said.reason for _, said in rest] == ["verifier error: OSError: gone", "right"]


def test_a_checkpoint_gives_back_the_same(policy: Policy, tmp_path: Path) -> None:
    """As plain data, for the same prompts only."""
    asked = prompts_of(0, 1, 2, 3, 10, 12)
    judged = source_of(policy).generate(asked[:4], SAMPLING, 5, spares=asked[4:], rounds=2)
    torch.save(judged.plain(), tmp_path / "state")
    restored = torch.load(tmp_path / "state", weights_only=True)
    assert JudgedRollouts.of_plain(restored, asked[:4], asked[4:], 2) == judged
    other = [replace(prompt, token_ids=(9,)) for prompt in asked]
    for prompts, spares, group_size in (
        (asked[1:5], asked[5:], 2),  # another iteration's
        (asked[:4], [], 2),  # replaced ones, where nothing is to be replaced now
        (other[:4], other[4:], 2),  # another task's under the same numbers
        (asked[:4], asked[4:], 4),
    ):
        assert JudgedRollouts.of_plain(restored, prompts, spares, group_size) is None


def test_verdicts_become_plain_values(policy: Policy, tmp_path: Path) -> None:
    """A verifier may compute with NumPy; a checkpoint of its verdicts must still load."""
    source = source_of(policy)
    source.judge.verifier = lambda prompt, completion: Verdict(np.float64(0.5), np.bool_(True), None, "right")
    torch.save(source.generate(prompts_of(0), SAMPLING, 0).plain(), tmp_path / "state")
    verdict = torch.load(tmp_path / "state", weights_only=True)["pairs"][0]["verdict"]
    assert [type(verdict[key]) for key in ("reward", "correct")] == [float, bool]


class Incomplete(ScriptedEngine):
    """Loses the last response."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        yield from list(super().generate(prompts, sampling))[:-1]


def test_a_missing_response_is_an_error(policy: Policy) -> None:
    source = source_of(policy)
    source.engine = Incomplete(policy, lambda *_: "ab")
    with pytest.raises(
        RuntimeError, match=r"Incomplete returned 3 responses, expected each of 2 prompts x 2"
    ):
        source.generate(prompts_of(0, 3), SAMPLING, 0)


def test_what_goes_wrong_ahead_is_raised_where_it_is_wanted() -> None:
    def fails() -> JudgedRollouts:
        raise OSError("gone")

    ahead = Ahead(1, fails)
    assert ahead.wait() is None
    with pytest.raises(OSError, match="gone"):
        ahead.result()


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0.0), (12, 0.0), (13, -0.125), (16, -0.5), (20, -1.0)],
)
def test_overlong_penalty_by_hand(length: int, penalty: float) -> None:
    """Nothing up to 12 of 20 tokens, then linearly to the factor."""
    assert overlong_penalty(torch.tensor(length), longest=20, buffer=8, factor=1.0).item() == penalty
    assert overlong_penalty(torch.tensor(length), longest=20, buffer=8, factor=0.5).item() == penalty / 2


# Runs
# ------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["data.dynamic_sampling=3", "task.levels=[1,4]"], id="dynamic sampling"),
        pytest.param(["data.overlong_buffer=4", "data.mask_truncated=true"], id="overlong responses"),
        pytest.param(
            ["data.lookahead=1", "engine.own_copy=true", "correction=token_truncation"], id="lookahead"
        ),
        pytest.param(
            [
                *("data.lookahead=1", "engine.own_copy=true", "data.old_logprobs=engine"),
                *("data.dynamic_sampling=2", "task.levels=[1,4]"),
            ],
            id="lookahead and dynamic sampling",
        ),
    ],
)
def test_goes_on_exactly_with(overrides: list[str], tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    runs.train_only(straight, *overrides)
    runs.train_only(broken, *overrides, until=2)
    runs.train_only(broken, *overrides, "ckpt_path=last")
    assert runs.rows(straight) == runs.rows(broken)


def test_lookahead_trains_on_weights_one_iteration_old(tmp_path: Path) -> None:
    """The last iteration launches none, and a checkpoint holds the responses that are waiting."""
    ahead = ["data.lookahead=1", "engine.own_copy=true", "correction=token_truncation"]
    state = runs.train_only(tmp_path / "half", *ahead, until=2)["RolloutDataModule"]
    assert state["iteration"] == 2
    assert state["rollouts"][0]["version"] == 1
    assert len(state["rollouts"][0]["pairs"]) == 16
    assert "RolloutDataModule" not in runs.train_only(tmp_path / "whole", *ahead)
    assert runs.column(tmp_path / "whole", "rollout/staleness") == [0.0, 1.0, 1.0, 1.0]


def test_dynamic_sampling_leaves_no_equal_group(tmp_path: Path) -> None:
    dynamic = ["data.dynamic_sampling=20", "data.num_prompts=8", "data.group_size=2", "trainer.max_epochs=2"]
    runs.train_only(tmp_path, *dynamic)
    assert runs.column(tmp_path, "rollout/filled_up_frac") == [0.0, 0.0]
    assert max(runs.column(tmp_path, "rollout/refill_rounds")) >= 1
    assert max(runs.column(tmp_path, "rollout/left_out_frac")) > 0


def test_truncated_responses_do_not_train(tmp_path: Path) -> None:
    """With every response truncated, no weight moves but by decay, which is off here."""
    cut = ["task.levels=[4]", "data.max_new_tokens=2", "trainer.max_epochs=1", "algorithm.weight_decay=0"]
    state = runs.train_only(tmp_path, *cut, "data.mask_truncated=true")["state_dict"]
    initial = Policy().state_dict()
    assert runs.column(tmp_path, "rollout/truncated_frac") == [1.0]
    assert all(torch.equal(initial[name.removeprefix("policy.")], value) for name, value in state.items())


class SometimesEmpty(ScriptedEngine):
    """Returns nothing at all for every other sample."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy, lambda prompt, iteration, sample: prompt.answer)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        for rollout in super().generate(prompts, sampling):
            if rollout.sample % 2:
                yield Rollout(rollout.prompt, rollout.sample, (), (), "stop", "")
            else:
                yield rollout


def test_empty_responses_are_judged_and_do_not_train(tmp_path: Path) -> None:
    engine = ["~engine", "+engine._target_=test_rollouts.SometimesEmpty"]
    runs.train_only(tmp_path, *engine, "trainer.max_epochs=2", "data.micro_batch_size=1")
    assert runs.column(tmp_path, "rollout/empty_frac") == [0.5, 0.5]
    assert runs.column(tmp_path, "rollout/reward_mean") == [0.5, 0.5]
    assert runs.column(tmp_path, "train/skipped") == [0.0, 0.0]


class AlwaysEmpty(SometimesEmpty):
    """Returns nothing at all."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        for rollout in super().generate(prompts, sampling):
            yield Rollout(rollout.prompt, rollout.sample, (), (), "stop", "")


def test_nothing_but_empty_responses_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.train(tmp_path, "~engine", "+engine._target_=test_rollouts.AlwaysEmpty") == 3
    said = "stopped: every response of iteration 0 is empty"
    assert said in capsys.readouterr().out
