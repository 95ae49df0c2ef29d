"""One rank, two with replicas (DDP), with shards (FSDP2) or in a group train alike, fail, and resume."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from models import shared_keys
from ranks import train_ranks
from runs import SMALL, rows, train
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlvr.export import export
from rlvr.sources import facts_of

ALIKE = (
    "policy.dtype=float64",
    "data.num_prompts=5",  # 3 and 2 for two ranks
    "data.minibatches=5",  # of one prompt each: one rank has nothing of it
    "data.micro_batch_size=3",
    "data.max_new_tokens=8",
    "trainer.max_epochs=3",
    "evaluation.num_prompts=3",
    "export=true",
)
OWN_COPY = ("engine.own_copy=true",)
SHARED = (
    "engine._target_=rlvr.engines.shared.SharedEngine",
    "~engine.own_copy",
    "~engine.max_num_seqs",
    "+engine.ranks=2",
    "+engine.engine._target_=rlvr.engines.transformers.TransformersEngine",
    "+engine.engine._partial_=true",
    "+engine.engine.own_copy=true",
)
CASES = {
    # OD starts below its corridor and raises entropy at once, by thresholds that depend on probability.
    "od": ("clip=od", "clip.initial_entropy=10", "+callbacks.probe._target_=rlvr.callbacks.EntropyProbe",
           "+callbacks.probe.every=1", "algorithm.kl_coef=0.01"),
    # Mini-batches of three prompts, two on one rank and one on the other: gradients of both are summed.
    "clip_cov": ("algorithm=clip_cov", "algorithm.loss.fraction=0.2", "data.lookahead=1",
                 "data.num_prompts=6", "data.minibatches=2",
                 "correction=token_truncation", "algorithm.loss.low=-1.0",
                 "data.max_prompt_tokens=32", "data.tokens_per_micro_batch=40"),
    # Whole sequences' statistics, in micro-batches whose rows are of both ranks, of one, or of none.
    "context": ("algorithm=gspo", "algorithm.kl_coef=0.01", "data.num_prompts=15", "data.group_size=2",
                "data.max_prompt_tokens=24", "data.tokens_per_micro_batch=60",
                "+callbacks.probe._target_=rlvr.callbacks.EntropyProbe", "+callbacks.probe.every=1"),
}  # fmt: skip
KINDS = {
    "od": {
        "ddp": ("trainer=ddp", *OWN_COPY, "engine.max_num_seqs=5"),
        "fsdp": ("trainer=fsdp", *SHARED, "policy.activation_checkpointing=true"),
    },
    "clip_cov": {"fsdp": ("trainer=fsdp", *OWN_COPY, "trainer.strategy.offload=true")},
    "context": {
        "context": (
            "trainer=fsdp",
            *OWN_COPY,
            "policy.activation_checkpointing=true",
            "trainer.strategy.context_parallel_size=2",
        )
    },
}


class Run:
    """What a finished run left."""

    def __init__(self, folder: Path) -> None:
        self.rows = [{key: float(value or "nan") for key, value in row.items()} for row in rows(folder)]
        self.weights = load_file(folder / "policy" / "model.safetensors")
        self.seen = [
            [json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted(folder.glob("rank-*.jsonl"))
        ]


@pytest.fixture(scope="module", params=CASES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    case = request.param
    folder = tmp_path_factory.mktemp(case)
    done = {}
    # The embedded policy's three heads are not to be shared by two ranks.
    model = (f"policy.path={shared_keys(folder / 'model')}", "threads=1") if case == "context" else ()
    for kind, overrides in {"one": OWN_COPY, **KINDS[case]}.items():
        place = folder / kind
        witness = ("+callbacks.witness._target_=ranks.Witness", f"+callbacks.witness.folder={place}")
        arguments = (*ALIKE, *CASES[case], *model, *overrides, *witness)
        if kind == "one":
            assert train(place, *arguments) == 0
        else:
            codes = train_ranks(place, 2, *arguments, "logger=tensorboard")
            assert codes == [0, 0], (place / "0" / "err.txt").read_text() + (
                place / "1" / "err.txt"
            ).read_text()
        done[kind] = Run(place)
    return done


def test_metrics_are_those_of_one_rank(runs: dict[str, Run]) -> None:
    """Every key: sums over tokens, sequences, prompts, updates, and the gradient norm."""
    one, *others = runs.values()
    for other in others:
        assert len(other.rows) == len(one.rows) == 3
        for theirs, ours in zip(other.rows, one.rows, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-9, abs=1e-12, nan_ok=True)


def test_weights_are_those_of_one_rank(runs: dict[str, Run]) -> None:
    one, *others = runs.values()
    for other in others:
        assert other.weights.keys() == one.weights.keys()
        assert max(_gap(other.weights[name], one.weights[name]) for name in one.weights) < 1e-11


def test_the_run_moved_and_decided(runs: dict[str, Run]) -> None:
    """Otherwise sameness says nothing."""
    rows = runs["one"].rows
    assert all(row["train/grad_norm"] > 1e-3 for row in rows)
    assert any(row["train/kept_frac"] < 1 for row in rows)
    assert len({row["rollout/entropy"] for row in rows}) == len(rows)


def test_ranks_decide_alike(runs: dict[str, Run]) -> None:
    """Entropy, the schedule's thresholds and every denominator."""
    for kind, run in runs.items():
        if kind == "one":
            continue
        first, second = (
            [{key: line[key] for key in ("facts", "totals", "clip_range")} for line in lines]
            for lines in run.seen
        )
        assert first == second
        assert len(first) == len(runs["one"].seen[0])


def test_ranks_share_the_prompts(runs: dict[str, Run]) -> None:
    """Disjoint within an iteration, together those of one rank, mini-batch by mini-batch."""
    one = runs["one"].seen[0]
    for kind, run in runs.items():
        if kind == "one":
            continue
        for first, second, alone in zip(*run.seen, one, strict=True):
            assert not set(first["prompts"]) & set(second["prompts"])
            assert sorted(first["prompts"] + second["prompts"]) == alone["prompts"]


def test_ranks_share_minibatches_unequally(runs: dict[str, Run]) -> None:
    """One rank has nothing of some mini-batches; of others, each has something, one more."""
    shares = {
        tuple(sorted(len(line["prompts"]) for line in lines))
        for kind, run in runs.items()
        if kind != "one"
        for lines in zip(*run.seen, strict=True)
    }
    assert shares in ({(0, 1)}, {(1, 2)}, {(0, 3), (1, 2)})


def test_gradients_are_reduced_once_a_minibatch(runs: dict[str, Run]) -> None:
    """A mini-batch has up to two micro-batches; FSDP has two layers and a root, each reduced by itself."""
    for kind, run in runs.items():
        updates = [line["sent"] for line in run.seen[0] if line["iteration"] == 0]
        if kind in ("fsdp", "context"):
            assert {sent["c10d::_reduce_scatter_base_"] for sent in updates} == {3}
        elif kind == "ddp":
            assert len({sent["c10d::allreduce_"] for sent in updates[1:]}) == 1
            assert updates[1]["c10d::allreduce_"] <= 3
        else:
            assert not any(updates)


def test_only_groups_exchange_states(runs: dict[str, Run]) -> None:
    for kind, run in runs.items():
        updates = [line["sent"] for line in run.seen[0] if line["iteration"] == 0]
        exchanges = [sent.get("c10d::alltoall_base_", 0) for sent in updates]
        assert all(exchanges) if kind == "context" else not any(exchanges)


def _gap(theirs: Tensor, ours: Tensor) -> float:
    assert theirs.dtype == ours.dtype == torch.float64
    return (theirs - ours).abs().max().item()


FAST = ("trainer.max_epochs=4", "evaluation.every=100", "evaluation.num_prompts=2", *OWN_COPY)


def launched(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """``rlvr-train`` on two ranks that Lightning starts."""
    code = "from rlvr.train import main; main()"
    arguments = [*SMALL, *FAST, f"hydra.run.dir={folder}", "trainer=fsdp", "trainer.devices=2", *overrides]
    # Lightning starts the others by the script's path, so it must be one.
    script = folder.parent / "train.py"
    script.write_text(code + "\n")
    tests = str(Path(__file__).parent)
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(("rank", "phase"), [(1, "rollout"), (1, "save"), (0, "update")])
def test_a_rank_that_is_killed_ends_the_run(tmp_path: Path, rank: int, phase: str) -> None:
    """Within a minute, with its cause, no process left, and the checkpoint before it intact."""
    folder = tmp_path / "run"
    kill = (f"+callbacks.kill.rank={rank}", f"+callbacks.kill.phase={phase}")
    begin = time.monotonic()
    run = launched(folder, "+callbacks.kill._target_=faults.Kill", *kill)
    assert time.monotonic() - begin < 60
    if rank:
        assert run.returncode == 3
        assert "stopped: rank 1 (process " in run.stdout
        assert "was killed by SIGKILL; saved in" in run.stdout
        assert "Traceback" not in run.stderr
    else:
        assert run.returncode == -9
    deadline = time.monotonic() + 30
    while (left := _processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    facts = facts_of(folder / "checkpoints" / "last.ckpt")
    assert len(facts["rlvr"]["ledger"]["rows"]) == 1, "the iteration that was not finished is not in it"

    # By one rank, from the shards of two, to the same end as a run that nobody killed.
    codes = train_ranks(folder, 1, *FAST, "trainer=fsdp", "ckpt_path=last", "export=true")
    assert codes == [0], (folder / "0" / "err.txt").read_text()
    export(folder, tmp_path / "exported", file_size="300KB")
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 1
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(folder / "policy").state_dict().items():
        assert torch.equal(exported[name], weight)
    whole = tmp_path / "whole"
    assert train(whole, *FAST, "export=true") == 0
    ours, theirs = (Run(place).rows for place in (folder, whole))
    assert len(ours) == len(theirs) == 4
    # float32: two ranks add up in another order than one.
    for key in ("rollout/entropy", "train/grad_norm", "train/loss"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-3, abs=1e-4)


def test_a_rank_that_dies_before_they_meet_ends_the_run(tmp_path: Path) -> None:
    """The others wait for it where no process group is there yet to notice."""
    kill = ("+callbacks.kill._target_=faults.Kill", "+callbacks.kill.rank=1", "+callbacks.kill.phase=start")
    run = launched(tmp_path / "run", *kill)
    assert run.returncode == 1
    assert "rank 1 (process " in run.stderr
    assert "was killed by SIGKILL; all ranks end" in run.stderr


def test_an_exception_on_one_rank_ends_all(tmp_path: Path) -> None:
    """At once: neither waits for the other while it cleans up."""
    fault = ("+callbacks.kill._target_=faults.Kill", "+callbacks.kill.rank=1", "+callbacks.kill.phase=raise")
    codes = train_ranks(tmp_path, 2, *FAST, "trainer=ddp", *fault)
    assert codes == [1, 1]
    assert "ValueError: a planted fault" in (tmp_path / "1" / "err.txt").read_text()
    assert len(facts_of(tmp_path / "checkpoints" / "last.ckpt")["rlvr"]["ledger"]["rows"]) == 1


def shared(engine: str) -> list[str]:
    return [
        "trainer=fsdp",
        *(o.replace("rlvr.engines.transformers.TransformersEngine", engine) for o in SHARED),
    ]


def test_a_shared_engine_that_dies_has_died_for_all(tmp_path: Path) -> None:
    """It is synced and asked again by all, who end where a run without its death does."""
    short = [override for override in FAST if override not in OWN_COPY]
    for folder, engine in (
        ("died", "faults.Mortal"),
        ("whole", "rlvr.engines.transformers.TransformersEngine"),
    ):
        assert train_ranks(tmp_path / folder, 2, *short, *shared(engine)) == [0, 0]
    assert "the engine of a test; starting it again" in (tmp_path / "died" / "1" / "err.txt").read_text()
    assert rows(tmp_path / "died") == rows(tmp_path / "whole")


def test_an_engine_that_fails_on_one_rank_ends_all(tmp_path: Path) -> None:
    """Both ranks have gathered all the weights by then, or the other would wait in the middle of them."""
    short = [override for override in FAST if override not in OWN_COPY]
    codes = train_ranks(tmp_path, 2, *short, *shared("faults.Stale"))
    assert codes == [3, 0]
    assert (
        "stopped: a planted fault of the engine; nothing was saved yet"
        in (tmp_path / "0" / "out.txt").read_text()
    )


def _processes_of(folder: Path) -> list[int]:
    """Running processes whose command line speaks of the run."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE
        and str(folder) in " ".join(process.info["cmdline"] or [])
    ]
