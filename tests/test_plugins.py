"""What is not ours plugs in by its dotted path on the command line, and acts."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs

from rlvr.errors import ConfigError

OUTSIDE = '''
"""Somebody else's package."""
from dataclasses import replace
import torch
from lightning import Callback
from rlvr.batch import Prompt, Verdict
from rlvr.callbacks import ClipScheduler
from rlvr.clipping import ClipRange
from rlvr.losses import LossInputs, LossOutputs

class Counter(Callback):
    def __init__(self, start=0):
        self.updates = start
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.updates += 1
        pl_module.ledger.add("mine/tokens", outputs["mask"].sum())
    def state_dict(self):
        return {"updates": self.updates}
    def load_state_dict(self, state_dict):
        self.updates = state_dict["updates"]

class Narrowing(ClipScheduler):
    """Thresholds that follow progress and reward."""
    def __init__(self, start=0.4):
        super().__init__()
        self.start = start
    def clip_range(self, progress, facts):
        return ClipRange.fixed(self.start * (1 - progress), facts.reward_mean)

class Plain(Callback):
    """No scheduler of ours: one call of the setter."""
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            pl_module.set_clip_range(ClipRange.fixed(0.01, 0.02 * (1 + trainer.current_epoch)), writer=self)

def squared(inputs: LossInputs, *, scale: float = 1.0) -> LossOutputs:
    loss = scale * (inputs.logprobs - inputs.old_logprobs).square()
    return LossOutputs(loss, torch.ones_like(inputs.mask), {"mine": torch.full_like(loss.detach(), scale)})

class Always:
    def __init__(self, reward):
        self.reward = reward
    def __call__(self, prompt, completion):
        return Verdict(self.reward, correct=True, answer="yes", reason="always")

class Greetings:
    chat = False
    def __init__(self, number):
        self.number = number
    def train(self):
        return [Prompt(i, f"hello-{i}", "2:" + chr(97 + i) + "z>", "az", {"letters": "az", "asked": 2})
                for i in range(self.number)]
    def heldout(self):
        return self.train()[:2]

def token_sum(mask, totals):
    return mask.double()
'''


@pytest.fixture(autouse=True)
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package that only ``sys.path`` knows."""
    package = tmp_path / "site" / "somebody"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield "somebody"
    sys.modules.pop("somebody", None)


TWO = "trainer.max_epochs=2"


def test_a_callback_with_state(tmp_path: Path) -> None:
    mine = ["+callbacks.mine._target_=somebody.Counter", "+callbacks.mine.start=10"]
    state = runs.train_only(tmp_path, TWO, *mine)
    assert state["callbacks"]["Counter"] == {"updates": 14}
    assert all(tokens > 0 for tokens in runs.column(tmp_path, "mine/tokens"))


def test_a_callback_s_state_survives_a_resume(tmp_path: Path) -> None:
    mine = "+callbacks.mine._target_=somebody.Counter"
    runs.train_only(tmp_path, mine, until=2)
    state = runs.train_only(tmp_path, mine, "ckpt_path=last")
    assert state["callbacks"]["Counter"] == {"updates": 8}


def test_a_clip_scheduler(tmp_path: Path) -> None:
    runs.train_only(tmp_path, TWO, "~clip", "+clip={_target_:somebody.Narrowing,start:0.5}")
    assert runs.column(tmp_path, "clip/lower_intercept") == [0.5, 0.25]
    assert runs.column(tmp_path, "clip/upper_intercept") == runs.column(tmp_path, "rollout/reward_mean")


def test_a_plain_callback_that_writes_the_clip_range(tmp_path: Path) -> None:
    runs.train_only(tmp_path, TWO, "+callbacks.mine._target_=somebody.Plain")
    assert runs.column(tmp_path, "clip/upper_intercept") == [0.02, 0.04]
    assert runs.column(tmp_path, "train/clip_high_mean") == pytest.approx([0.02, 0.04])


def test_a_loss(tmp_path: Path) -> None:
    """``algorithm.loss={...}`` alone may not add a key (Hydra: struct), hence the plus signs."""
    loss = "++algorithm.loss={_target_:somebody.squared,_partial_:true,scale:3}"
    runs.train_only(tmp_path, TWO, loss)
    assert runs.column(tmp_path, "train/mine") == [3.0, 3.0]


def test_a_loss_by_its_target_alone(tmp_path: Path) -> None:
    runs.train_only(tmp_path, TWO, "algorithm.loss._target_=somebody.squared")
    assert runs.column(tmp_path, "train/mine") == [1.0, 1.0]


def test_an_aggregation(tmp_path: Path) -> None:
    """A sum of the tokens' losses has a gradient as many times larger."""
    runs.train_only(tmp_path / "mean", "trainer.max_epochs=1", "data.minibatches=1")
    summed = "algorithm.aggregation._target_=somebody.token_sum"
    runs.train_only(tmp_path / "sum", "trainer.max_epochs=1", "data.minibatches=1", summed)
    tokens = 16 * runs.column(tmp_path / "sum", "rollout/length_mean")[0]
    norms = [runs.column(tmp_path / name, "train/grad_norm")[0] for name in ("sum", "mean")]
    assert norms[0] == pytest.approx(tokens * norms[1], rel=1e-4)


def test_a_verifier(tmp_path: Path) -> None:
    runs.train_only(tmp_path, TWO, "verifier._target_=somebody.Always", "+verifier.reward=0.7")
    assert runs.column(tmp_path, "rollout/reward_mean") == pytest.approx([0.7, 0.7])
    assert runs.column(tmp_path, "rollout/zero_variance_frac") == [1.0, 1.0]
    assert runs.column(tmp_path, "train/grad_norm") == [0.0, 0.0]


def test_a_task(tmp_path: Path) -> None:
    others = [f"~task.{key}" for key in ("train", "heldout", "levels", "seed")]
    runs.train_only(tmp_path, TWO, "task._target_=somebody.Greetings", "+task.number=4", *others)
    assert "hello-" in (tmp_path / "samples.jsonl").read_text()


def test_two_writers_of_the_clip_range_are_both_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="two writers .*, IncreaseThenDecrease and Plain"):
        runs.train_only(tmp_path, "clip=id", "+callbacks.mine._target_=somebody.Plain")


def test_two_schedulers_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="IncreaseThenDecrease, Narrowing"):
        runs.train_only(
            tmp_path, "clip=id", "+callbacks.mine._target_=somebody.Narrowing", "policy.path=/no/policy"
        )


def test_an_argument_that_the_plugin_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"callbacks.mine.stop=3: expected an argument of somebody.Counter"):
        runs.train_only(tmp_path, "+callbacks.mine={_target_:somebody.Counter,stop:3}")


def test_an_argument_that_the_plugin_needs(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"verifier: expected a value for reward; try \+verifier.reward=VALUE"
    ):
        runs.train_only(tmp_path, "verifier._target_=somebody.Always")


def test_in_a_process_of_its_own_by_pythonpath(tmp_path: Path) -> None:
    """The forked command finds the package where Python looks for packages."""
    folder = tmp_path / "run"
    process = runs.start(folder, TWO, "+callbacks.mine._target_=somebody.Counter")
    process.join(120)
    assert process.exitcode == 0, (folder / "err.txt").read_text()
    assert runs.checkpoint(folder)["callbacks"]["Counter"] == {"updates": 4}
