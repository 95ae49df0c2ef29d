"""One rank, two with replicas (DDP) and two with shards (FSDP2) train alike, fail together, and resume."""

import json
from pathlib import Path

import pytest
import torch
from ranks import train_ranks
from runs import rows, train
from safetensors.torch import load_file
from torch import Tensor

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
    "clip_cov": ("algorithm=clip_cov", "algorithm.loss.fraction=0.2", "data.lookahead=1",
                 "correction=token_truncation", "algorithm.loss.low=-1.0"),
}  # fmt: skip
KINDS = {
    "od": {
        "ddp": ("trainer=ddp", *OWN_COPY, "engine.max_num_seqs=5"),
        "fsdp": ("trainer=fsdp", *SHARED, "policy.activation_checkpointing=true"),
    },
    "clip_cov": {"fsdp": ("trainer=fsdp", *OWN_COPY, "trainer.strategy.offload=true")},
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
    for kind, overrides in {"one": OWN_COPY, **KINDS[case]}.items():
        place = folder / kind
        witness = ("+callbacks.witness._target_=ranks.Witness", f"+callbacks.witness.folder={place}")
        arguments = (*ALIKE, *CASES[case], *overrides, *witness)
        if kind == "one":
            assert train(place, *arguments) == 0
        else:
            codes = train_ranks(place, 2, *arguments)
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
        assert len(first) == 15


def test_ranks_share_the_prompts(runs: dict[str, Run]) -> None:
    """Disjoint within an iteration, together those of one rank, mini-batch by mini-batch."""
    one = runs["one"].seen[0]
    for kind, run in runs.items():
        if kind == "one":
            continue
        for first, second, alone in zip(*run.seen, one, strict=True):
            assert not set(first["prompts"]) & set(second["prompts"])
            assert sorted(first["prompts"] + second["prompts"]) == alone["prompts"]
        assert any(not line["prompts"] for lines in run.seen for line in lines), (
            "a rank had nothing now and then"
        )


def test_gradients_are_reduced_once_a_minibatch(runs: dict[str, Run]) -> None:
    """A mini-batch has up to two micro-batches; FSDP has two layers and a root, each reduced by itself."""
    for kind, run in runs.items():
        updates = [line["sent"] for line in run.seen[0] if line["iteration"] == 0]
        if kind == "fsdp":
            assert [sent["c10d::_reduce_scatter_base_"] for sent in updates] == [3] * 5
        elif kind == "ddp":
            assert len({sent["c10d::allreduce_"] for sent in updates[1:]}) == 1
            assert updates[1]["c10d::allreduce_"] <= 3
        else:
            assert not any(updates)


def _gap(theirs: Tensor, ours: Tensor) -> float:
    assert theirs.dtype == ours.dtype == torch.float64
    return (theirs - ours).abs().max().item()
