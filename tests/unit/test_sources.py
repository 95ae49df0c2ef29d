"""A policy from every place its weights may be in."""

from pathlib import Path

import pytest
import runs
import torch

from rlvr.errors import ConfigError
from rlvr.export import export
from rlvr.policy import Policy
from rlvr.sources import checkpoint_of, load_policy, run_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One iteration."""
    folder = tmp_path_factory.mktemp("sources") / "run"
    runs.train_only(folder, "trainer.max_epochs=1")
    return folder


def loaded(path: str | Path | None) -> Policy:
    return load_policy(None if path is None else str(path), Policy)


def trained(run: Path) -> dict[str, torch.Tensor]:
    state = runs.checkpoint(run)["state_dict"]
    return {key.removeprefix("policy."): value for key, value in state.items()}


def assert_same(policy: Policy, weights: dict[str, torch.Tensor]) -> None:
    found = policy.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_a_run_folder_and_its_checkpoint(run: Path) -> None:
    weights = trained(run)
    assert any(not torch.equal(value, weights[key]) for key, value in Policy().state_dict().items())
    assert_same(loaded(run), weights)
    assert_same(loaded(run / "checkpoints" / "last.ckpt"), weights)
    assert loaded(run).source is None, "shape and tokenizer are the embedded policy's"


def test_an_exported_folder(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    assert_same(loaded(tmp_path / "out"), trained(run))


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    """A folder of shards: what a run exports at its end is what is read from it."""
    process = runs.start(
        tmp_path / "run",
        *("trainer=fsdp", "trainer.devices=1", "engine.own_copy=true"),
        *("trainer.max_epochs=1", "export=true"),
    )
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "run" / "err.txt").read_text()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_dir()
    weights = Policy(str(tmp_path / "run" / "policy")).state_dict()
    assert not torch.equal(Policy().state_dict()["model.lm_head.weight"], weights["model.lm_head.weight"])
    assert_same(loaded(tmp_path / "run"), weights)


@pytest.mark.parametrize("path", [None, "org/model", "/models/folder", "/models/file.gguf"])
def test_other_paths_are_the_policy_s_own(path: str | None) -> None:
    """A hub id, a folder and a .gguf file go on as they are."""
    asked: list[str | None] = []
    policy = Policy()

    def make(path: str | None) -> Policy:
        asked.append(path)
        return policy

    assert load_policy(path, make) is policy
    assert asked == [path]
    assert run_folder(path) is None


def test_the_run_of_a_checkpoint(run: Path, tmp_path: Path) -> None:
    assert run_folder(str(run)) == run
    assert run_folder(str(run / "checkpoints" / "last.ckpt")) == run
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes((run / "checkpoints" / "last.ckpt").read_bytes())
    assert checkpoint_of(str(alone)) == alone
    assert run_folder(str(alone)) is None
    assert_same(loaded(alone), trained(run))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        pytest.param("x.ckpt", None, "expected a checkpoint at", id="nothing there"),
        pytest.param(
            "x.ckpt", b"half", "expected a checkpoint that rlvr-train has written", id="no checkpoint"
        ),
        pytest.param(
            "run/metrics.csv", b"iteration\n", "expected a checkpoint at .*last.ckpt", id="none saved yet"
        ),
        pytest.param(
            "x.ckpt/meta.pt", b"half", "that rlvr-train has written", id="a folder of something else"
        ),
    ],
)
def test_what_is_no_checkpoint(name: str, content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        loaded(path if path.suffix == ".ckpt" else path.parent)


def test_another_framework_s_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"policy.w": torch.zeros(1)}}, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="that rlvr-train has written"):
        loaded(tmp_path / "x.ckpt")
