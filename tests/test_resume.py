"""A run that was broken off, killed or stopped goes on to the very numbers of one that was not."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from lightning import Callback, LightningModule, Trainer

from rlvr.batch import Prompt, Verdict
from rlvr.instantiate import CONF
from rlvr.verifiers import LettersVerifier

CLIPS = sorted(path.stem for path in (CONF / "clip").glob("*.yaml"))
RESUME = "ckpt_path=last"


def clockless(state: Any) -> Any:
    """A checkpoint without what the clock says, and without the loops' bookkeeping of how fit was entered."""
    if isinstance(state, dict):
        return {
            key: clockless(value)
            for key, value in state.items()
            if not str(key).startswith(("time/", "perf/")) and key != "loops"
        }
    return [clockless(item) for item in state] if isinstance(state, list | tuple) else state


def assert_equal(left: Any, right: Any, path: str = "") -> None:
    """Equal to the bit, NaN with NaN."""
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_equal(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), path
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_equal(one, other, f"{path}/{number}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    else:
        assert left == right or (left != left and right != right), path


def assert_same_run(one: Path, other: Path) -> None:
    assert_equal(clockless(runs.checkpoint(one)), clockless(runs.checkpoint(other)))
    assert runs.rows(one) == runs.rows(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()


@pytest.mark.parametrize("clip", CLIPS)
def test_a_run_broken_off_after_two_iterations_goes_on_exactly(clip: str, tmp_path: Path) -> None:
    """Weights, moments, learning rate, callbacks, rows and samples."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    whole = runs.train_only(straight, f"clip={clip}")
    half = runs.train_only(broken, f"clip={clip}", until=2)
    assert half["epoch"] < whole["epoch"]
    runs.train_only(broken, f"clip={clip}", RESUME)
    assert len(runs.rows(broken)) == 4
    assert_same_run(straight, broken)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            ["algorithm.lr_schedule=cosine", "algorithm.warmup=0.3"], id="a learning rate that moves"
        ),
        pytest.param(
            ["algorithm.kl_coef=0.1"], id="a reference policy, which is the initial one, not the resumed"
        ),
        pytest.param(["engine.own_copy=true"], id="an engine with a copy of the weights"),
        pytest.param(["regions.keep=[E1,E4]", "regions.mode=drop"], id="a region ablation"),
        pytest.param(["data.epochs=2", "task.train=10"], id="two passes over responses and over few prompts"),
    ],
)
def test_a_run_broken_off_goes_on_exactly_with(overrides: list[str], tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    runs.train_only(straight, *overrides)
    runs.train_only(broken, *overrides, until=2)
    runs.train_only(broken, *overrides, RESUME)
    assert_same_run(straight, broken)


class StopAfterTwo(Callback):
    """Asks for an early stop, as any callback of Lightning's may."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.should_stop = True


def test_an_early_stop_saves_reports_and_goes_on_exactly(tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    runs.train_only(straight, "clip=od", "checkpoint.every=3")
    early = "+callbacks.early._target_=test_resume.StopAfterTwo"
    assert runs.train(stopped, "clip=od", "checkpoint.every=3", early) == 0
    assert len(runs.rows(stopped)) == 2
    assert (stopped / "summary.json").exists()
    runs.train_only(stopped, "clip=od", "checkpoint.every=3", RESUME)
    assert_same_run(straight, stopped)


# Kills
# ------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DiesInRollout(LettersVerifier):
    """Dies among the third iteration's 16 responses; the held-out ones, 8 x 2, are judged twice by then."""

    def __init__(self) -> None:
        self.judged = 0

    def __call__(self, prompt: Prompt, completion: str) -> Verdict:
        self.judged += 1
        if self.judged > 16 * 4 + 7:
            die()
        return super().__call__(prompt, completion)


class DiesInUpdate(Callback):
    """Dies between the two updates of the third iteration."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 2 and batch_idx == 1:
            die()


class DiesInCheckpoint(Callback):
    """Makes the third checkpoint a large one, and dies when some of it is on the disk."""

    def state_dict(self) -> dict[str, Any]:
        if self.trainer.current_epoch < 2:
            return {}
        threading.Thread(target=self._die_when_some_is_written, daemon=True).start()
        return {"ballast": torch.zeros(1 << 25)}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer = trainer

    def _die_when_some_is_written(self) -> None:
        folder = Path(self.trainer.default_root_dir) / "checkpoints"
        while not any(part.stat().st_size > 1 << 20 for part in folder.glob(".*.part")):
            time.sleep(0.001)
        die()


@pytest.mark.parametrize(
    "plugin",
    [
        pytest.param("verifier._target_=test_resume.DiesInRollout", id="among the rollouts"),
        pytest.param("+callbacks.killer._target_=test_resume.DiesInUpdate", id="between two updates"),
        pytest.param(
            "+callbacks.killer._target_=test_resume.DiesInCheckpoint", id="in a half-written checkpoint"
        ),
    ],
)
def test_a_killed_process_goes_on_exactly(plugin: str, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    process = runs.start(killed, "clip=od", plugin)
    runs.train_only(straight, "clip=od")
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, (killed / "err.txt").read_text()
    assert len(runs.checkpoint(killed)["rlvr"]["ledger"]["rows"]) == 2
    assert len(list((killed / "checkpoints").glob(".*.part"))) == ("Checkpoint" in plugin)
    runs.train_only(killed, "clip=od", RESUME)
    assert_same_run(straight, killed)


def test_a_stray_half_of_a_checkpoint_is_never_picked_up(tmp_path: Path) -> None:
    """Nothing but last.ckpt counts, neither for `last` nor for `auto`."""
    (tmp_path / "checkpoints").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".abc.part").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(ValueError, match="ckpt_path=last: expected a checkpoint"):
        runs.train(tmp_path, RESUME)
    runs.train_only(tmp_path, "ckpt_path=auto")
    assert len(runs.rows(tmp_path)) == 4


def test_lines_written_after_the_last_checkpoint_are_written_once(tmp_path: Path) -> None:
    """Between two checkpoints, rows and samples are ahead of what a resumed run knows."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    runs.train_only(straight, "checkpoint.every=2")
    runs.train_only(broken, "checkpoint.every=2", until=3)
    assert len(runs.rows(broken)) == 3
    with (broken / "samples.jsonl").open("a") as file:
        file.write('{"iteration": 3, "half a li')
    runs.train_only(broken, "checkpoint.every=2", RESUME)
    assert_same_run(straight, broken)


# Signals
# ------------------------------------------------------------


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGTERM, 143, id="SIGTERM"), pytest.param(signal.SIGINT, 130, id="SIGINT")],
)
def test_a_signal_stops_after_the_iteration_and_saves(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    endless = "trainer.max_epochs=5000"
    process = runs.start(tmp_path, endless)
    wait_for((tmp_path / "checkpoints" / "last.ckpt").exists)
    os.kill(process.pid, number)
    process.join(60)
    said = (tmp_path / "out.txt").read_text()
    assert process.exitcode == code, (tmp_path / "err.txt").read_text()
    assert f"{number.name}: finishing this iteration, then saving" in said
    assert (
        f"stopped: {number.name}; saved in {tmp_path}/checkpoints/last.ckpt; ckpt_path=last continues" in said
    )
    assert "Traceback" not in (tmp_path / "err.txt").read_text()
    done = len(runs.rows(tmp_path))
    assert len(runs.checkpoint(tmp_path)["rlvr"]["ledger"]["rows"]) == done
    runs.train_only(tmp_path, endless, RESUME, until=done + 1)
    assert runs.column(tmp_path, "iteration") == list(range(done + 1))


# Refusals
# ------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "overrides", "says"),
    [
        pytest.param(False, [RESUME], "ckpt_path=last: expected a checkpoint at", id="nothing to continue"),
        pytest.param(
            False,
            ["ckpt_path=/nowhere/x.ckpt"],
            "ckpt_path=/nowhere/x.ckpt: expected a checkpoint",
            id="no such file",
        ),
        pytest.param(True, [], "expected a folder without a run in it", id="a fresh run over a run"),
        pytest.param(
            True,
            [RESUME, "trainer.max_epochs=8"],
            "trainer.max_epochs=8: expected 4, as in the checkpoint",
            id="another length under a schedule",
        ),
    ],
)
def test_refused_in_one_line_and_nothing_is_overwritten(
    there: bool, overrides: list[str], says: str, tmp_path: Path
) -> None:
    if there:
        runs.train_only(tmp_path, "clip=id", until=2)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    process = runs.start(tmp_path, "clip=id", *overrides)
    process.join(60)
    error = (tmp_path / "err.txt").read_text()
    assert process.exitcode == 2, error
    assert error.count("\n") == 1
    assert says in error
    assert "; try " in error
    assert {path: path.read_bytes() for path in files} == before


def test_another_length_under_a_schedule_may_be_asked_for(tmp_path: Path) -> None:
    runs.train_only(tmp_path, "clip=id", until=2)
    runs.train_only(tmp_path, "clip=id", RESUME, "trainer.max_epochs=5", "++clip.allow_new_length=true")
    assert len(runs.rows(tmp_path)) == 5


def test_constant_thresholds_may_go_on_for_longer(tmp_path: Path) -> None:
    """They are no function of the run's length, and neither is a constant learning rate."""
    straight, longer = tmp_path / "straight", tmp_path / "longer"
    runs.train_only(straight, "trainer.max_epochs=5")
    runs.train_only(longer)
    runs.train_only(longer, RESUME, "trainer.max_epochs=5")
    assert runs.rows(straight)[4]["train/loss"] == runs.rows(longer)[4]["train/loss"]


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    """Nothing is exported or reported; the last checkpoint is whole."""
    process = runs.start(tmp_path, "trainer.max_epochs=5000", "export=true")
    wait_for((tmp_path / "checkpoints" / "last.ckpt").exists)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 130
    assert "stopped at once: SIGINT; ckpt_path=auto continues" in (tmp_path / "out.txt").read_text()
    assert not (tmp_path / "policy").exists()
    assert not (tmp_path / "summary.json").exists()
    assert runs.checkpoint(tmp_path)["rlvr"]["ledger"]["rows"]
