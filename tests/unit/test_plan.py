"""Memory and seconds of a run: by hand, against what torch keeps, and from the command line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from rlvr.attention import PACKED_SDPA
from rlvr.errors import ConfigError
from rlvr.instantiate import build
from rlvr.plan import job_of
from rlvr.planning import (
    GIB,
    PHASES,
    EngineSizes,
    Hardware,
    Job,
    Shapes,
    concurrent_rows,
    memory,
    peaks,
    plain_logits,
    seconds,
    shapes_of,
    this_cpu,
    warnings,
)
from rlvr.policy import Policy
from rlvr.settings import DataConfig

QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
SMALL = Shapes(
    parameters=1000,  # 2 layers of 300, an embedding of 40 x 8, tied, and 80 others
    layer_parameters=300,
    layers=2,
    hidden=8,
    intermediate=20,
    heads=4,
    kv_heads=2,
    head_dim=2,
    vocabulary=40,
    tied=True,
)
CARD = Hardware(
    name="card",
    accelerator="cuda",
    devices=4,
    memory_gib=1.0,
    host_memory_gib=8.0,
    flops={"float32": 1e9, "bfloat16": 2e9},
    memory_bytes_s=1e6,
    link_bytes_s=1e5,
    network_bytes_s=1e4,
    host_link_bytes_s=1e4,
    host_memory_bytes_s=1e6,
)


def job(**changes: Any) -> Job:
    """8 rows of 4 + 6 tokens in 2 mini-batches, 2 rows a micro-batch."""
    sizes = DataConfig(
        num_prompts=4, group_size=2, minibatches=2, micro_batch_size=2, max_prompt_tokens=4, max_new_tokens=6
    )
    engine = EngineSizes("transformers", max_num_seqs=8)
    return replace(Job(shapes=SMALL, sizes=sizes, engine=engine, chunk_size=5), **changes)


def sizes_of(job: Job, hardware: Hardware = CARD, *, on_host: bool = False) -> dict[str, float]:
    return {part.name: part.bytes for part in memory(job, hardware) if part.on_host == on_host}


def test_the_embedded_policy_has_as_many_parameters_as_planned() -> None:
    shapes, policy = shapes_of(None), Policy()
    layer = policy.model.get_decoder().layers[0]
    assert shapes.parameters == sum(p.numel() for p in policy.parameters())
    assert shapes.layer_parameters == sum(p.numel() for p in layer.parameters())
    assert shapes.tied == policy.model.config.tie_word_embeddings


def test_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    """Qwen2.5-7B: no weights, no tokenizer, nothing allocated."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    shapes = shapes_of(str(tmp_path))
    assert shapes.parameters == 7_615_616_512
    assert shapes.root == 2 * 152064 * 3584 + 3584
    assert (shapes.layers, shapes.heads, shapes.kv_heads, shapes.head_dim) == (28, 28, 4, 128)
    assert not shapes.tied


@pytest.mark.parametrize(
    ("path", "said"),
    [
        pytest.param("./nowhere", "existing folder", id="no folder"),
        pytest.param("EMPTY", "a model's configuration", id="no configuration in it"),
        pytest.param("GPT2", "Llama-like", id="another kind of model"),
    ],
)
def test_what_is_no_model_of_the_kind_is_refused(path: str, said: str, tmp_path: Path) -> None:
    if path == "GPT2":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1}))
    with pytest.raises(ConfigError, match=said):
        shapes_of(str(tmp_path) if path.isupper() else path)


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("packed", [pytest.param(False, id="padded"), pytest.param(True, id="packed")])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        pytest.param("float32", False, id="float32"),
        pytest.param("float32", True, id="float32 weights under autocast"),
        pytest.param("bfloat16", True, id="bfloat16 weights, as FSDP gathers them"),
    ],
)
def test_saved_activations_are_what_autograd_keeps(
    family: Any, dtype: str, autocast: bool, packed: bool
) -> None:
    """The difference between three layers and two, byte by byte, weights left out."""

    def kept(layers: int) -> int:
        config = family(
            hidden_size=32,
            intermediate_size=72,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=64,
            num_hidden_layers=layers,
        )
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=PACKED_SDPA
        )
        weights = {tuple(p.shape) for p in model.parameters()} | {
            tuple(p.shape)[::-1] for p in model.parameters()
        }
        storages: dict[int, tuple[int, object]] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tuple(tensor.shape) not in weights:  # nor their casts
                storage = tensor.untyped_storage()
                storages[storage._cdata] = storage.nbytes(), storage  # kept, or its number comes again
            return tensor

        ids = torch.arange(2 * length).view(2, length) % 64
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}
        inputs["attention_mask"][0, :3] = False
        if packed:
            positions = torch.arange(length).repeat(2)[None]
            inputs = {"input_ids": ids.view(1, -1), "position_ids": positions}
            inputs |= {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
            inputs |= {"sequence_lengths": [length, length]}
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            model.get_decoder()(**inputs, use_cache=False)
        return sum(size for size, _ in storages.values())

    length = 24
    shapes = replace(SMALL, hidden=32, intermediate=72, heads=4, kv_heads=2, head_dim=16)
    computed, residual = (2 if autocast else 4), (4 if dtype == "float32" else 2)
    padded = None if packed else length
    planned = shapes.saved_bytes(computed=computed, residual=residual, padded=padded)
    assert kept(3) - kept(2) == planned * 2 * length


def test_parts_by_hand() -> None:
    sizes = sizes_of(job())
    assert sizes["parameters"] == sizes["gradients"] == 4000
    assert sizes["AdamW, m and v"] == 8000
    # A token and layer: 4 (2 D + 2 + H) + 8 D + 4 (2 D + 4 A + 4 I + S); D 8, H 4, A 8, I 20, S 10.
    layer = 4 * 22 + 64 + 4 * (16 + 32 + 80 + 10)
    outside = 4 * 9 + 4 * (8 + 4) + 8
    assert sizes["saved activations"] == 2 * 10 * (2 * layer + outside)
    assert sizes["head: a chunk's logits"] == (5 * 8 + 12 * 4) * 40
    assert sizes["head: its gradient"] == 40 * 8 * 4
    # 8 rows of 10 tokens, 2 layers x 2 (keys, values) x 2 heads x 2 numbers; and one layer's again.
    assert sizes["engine: KV cache"] == 8 * 10 * 16 * 4 * 1.5
    assert "engine: weights" not in sizes
    assert plain_logits(job()) == 4 * (2 * 6 * 40 * 4)


def test_a_phase_holds_what_its_parts_hold() -> None:
    parts = memory(job(), CARD)
    found = peaks(parts)
    assert found["start"] == 4000
    assert found["step"] == 4000 + 4000 + 8000 + 4000
    assert set(found) == set(PHASES)
    assert not any(peaks(parts, on_host=True).values())


def test_checkpointing_keeps_a_layer_and_the_inputs_of_all() -> None:
    kept = sizes_of(job())["saved activations"] - sizes_of(job(checkpointing=True))["saved activations"]
    tokens, layer = 20, job().saved_bytes
    assert kept == tokens * (2 * layer - layer - 2 * 4 * 8)


def test_tokens_of_a_micro_batch_count_instead_of_rows() -> None:
    budget = job(sizes=replace(job().sizes, micro_batch_size=4, tokens_per_micro_batch=25))
    assert (budget.micro_rows, budget.micro_batches) == (2, 2)
    assert sizes_of(budget)["saved activations"] == sizes_of(job())["saved activations"]


def test_packed_sequences_need_no_mask() -> None:
    """Per token: 3 A + 2 K for 4 A + S, A 8, K 4, S 10; and half of attention's operations."""
    padded, packed = job(), job(packed=True)
    assert padded.saved_bytes - packed.saved_bytes == 4 * (4 * 8 + 10 - 3 * 8 - 2 * 4)
    quick = replace(CARD, memory_bytes_s=1e30)
    took = [seconds(each, quick)["old log-probs"] for each in (padded, packed)]
    assert took[0] - took[1] == pytest.approx(80 * 4 * 2 * 8 * 5 / 1e9)


def test_sharding_divides_by_the_ranks() -> None:
    fsdp = job(strategy="fsdp", devices=4, engine=EngineSizes("transformers", own_weights=True))
    sizes = sizes_of(fsdp)
    assert sizes["parameters"] == sizes["gradients"] == 1000
    assert sizes["AdamW, m and v"] == 2000
    assert sizes["engine: weights"] == 4000  # generates with whole ones
    assert sizes_of(job(strategy="ddp", devices=4))["parameters"] == 4000
    assert sizes_of(job(strategy="ddp", devices=4))["DDP's buckets"] == 4000


def test_whole_gradients_wait_for_the_last_of_several_micro_batches() -> None:
    """On every rank, in float32; not where there is one micro-batch, or each is reduced."""
    fsdp = job(strategy="fsdp", devices=2, bf16=True)
    assert fsdp.micro_batches == 1
    assert "whole gradients" not in sizes_of(fsdp)
    two = replace(fsdp, sizes=replace(fsdp.sizes, micro_batch_size=1))
    assert sizes_of(two)["whole gradients"] == 4000
    assert "whole gradients" not in sizes_of(replace(two, reduce_every_micro_batch=True))


def test_ranks_that_compute_rows_together_hold_a_part_each() -> None:
    alone = job(strategy="fsdp", devices=4)
    shared = replace(alone, context=4)
    assert sizes_of(shared)["saved activations"] == sizes_of(alone)["saved activations"] / 2
    assert shared.micro_batches == 2 * alone.micro_batches


def test_offload_moves_shards_of_all_ranks_to_the_host() -> None:
    fsdp = job(strategy="fsdp", devices=4, nodes=2, sizes=replace(job().sizes, num_prompts=8), offload=True)
    moved = ("parameters", "gradients", "AdamW, m and v")
    here, there = sizes_of(fsdp), sizes_of(fsdp, on_host=True)
    assert not set(moved) & set(here)
    # 4 of the 8 ranks are on a node.
    assert [there[name] for name in moved] == [2000, 2000, 4000]
    assert there["weights read by rank 0"] == 4000


def test_autocast_copies_weights_and_sharding_does_not() -> None:
    assert sizes_of(job(bf16=True))["autocast's weights"] == 2 * 300 * 2
    assert sizes_of(job(bf16=True))["head: its weight in bf16"] == 40 * 8 * 2
    sharded = sizes_of(job(bf16=True, strategy="fsdp", devices=2))
    assert not {"autocast's weights", "head: its weight in bf16"} & set(sharded)


def test_a_reference_is_another_policy() -> None:
    assert sizes_of(job(reference=True))["reference policy"] == 4000


def test_vllm_takes_its_share_of_a_card() -> None:
    engine = EngineSizes("vllm", "bfloat16", own_weights=True, memory_share=0.5)
    sizes = sizes_of(job(engine=engine))
    assert sizes["engine: weights"] + sizes["engine: KV cache and work"] == 0.5 * GIB
    given = replace(engine, kv_cache_gib=0.25)
    assert sizes_of(job(engine=given))["engine: KV cache and work"] == 0.25 * GIB
    assert "engine: KV cache and work" not in sizes_of(job(engine=replace(engine, beside=True)))


def test_a_cpu_has_one_memory() -> None:
    """vLLM's process, weights read at the start, and what offloading moves are beside the trainer's."""
    cpu = replace(CARD, accelerator="cpu")
    engine = EngineSizes("vllm", own_weights=True)
    ranks = job(strategy="fsdp", devices=2, offload=True, engine=engine)
    assert not sizes_of(ranks, cpu, on_host=True)
    found = sizes_of(ranks, cpu)
    assert (found["parameters"], found["engine: weights"], found["engine: KV cache"]) == (2000, 4000, GIB)
    # The two ranks and their engines share it.
    assert warnings(ranks, replace(cpu, memory_gib=2.0))
    assert not warnings(ranks, replace(cpu, memory_gib=3.0))


def test_a_cache_bounds_the_responses_at_one_time() -> None:
    one = 10 * 16 * 2  # bytes of a response's cache in bfloat16
    engine = EngineSizes("vllm", "bfloat16", own_weights=True, kv_cache_gib=3.5 * one / GIB)
    assert concurrent_rows(job(engine=engine), CARD) == 3
    none = job(engine=replace(engine, kv_cache_gib=0.5 * one / GIB))
    assert concurrent_rows(none, CARD) == 0
    assert "try engine.kv_cache_gib=1" in warnings(none, CARD)[0]
    shared = replace(none, engine=replace(none.engine, ranks=2))
    assert "try engine.engine.kv_cache_gib=1" in warnings(shared, CARD)[0]


def test_seconds_by_hand() -> None:
    """80 tokens in all, 48 of them responses: products, then memory traffic."""
    layers = 80 * (2 * 600 + 4 * 2 * 8 * 10) / 1e9 + 2 * 80 * 2 * job().saved_bytes / 1e6
    head = 2 * 48 * 320 / 1e9 + 48 * 40 * 80 / 1e6
    assert seconds(job(), CARD)["old log-probs"] == pytest.approx(layers + head)
    assert seconds(job(), CARD)["optimizer"] == pytest.approx(2 * 23 * 4000 / 1e6)
    assert seconds(job(), CARD)["weight sync"] == 0
    # 6 steps that read weights and caches of 8 rows; the cache is read and written again to grow.
    step = ((600 + 320) * 4 + 8 * 7 * 64 * 9) / 1e6 + 8 * 40 * 100 / 1e6
    assert seconds(job(), CARD)["rollout: decode"] == pytest.approx(6 * step)


def test_ranks_share_the_work_and_wait_for_links() -> None:
    one, four = job(), job(strategy="ddp", devices=4)
    assert seconds(four, CARD)["old log-probs"] == pytest.approx(seconds(one, CARD)["old log-probs"] / 4)
    slow = replace(CARD, link_bytes_s=1.0)
    # An all-reduce a mini-batch: 2 x 3/4 of 4000 bytes.
    waits = seconds(four, slow)["update"] - seconds(four, slow)["optimizer"]
    assert waits == pytest.approx(2 * 2 * 4000 * 0.75)


@pytest.mark.parametrize(
    ("changes", "share", "fix"),
    [
        pytest.param({}, 0.8, "try policy.activation_checkpointing=true", id="activations"),
        pytest.param({"checkpointing": True}, 0.8, "try data.micro_batch_size=2", id="rows"),
        pytest.param({}, 0.23, "checkpointing=true data.micro_batch_size=2", id="both"),
        pytest.param({}, 0.01, "no override here mends it", id="none"),
    ],
)
def test_what_does_not_fit_comes_with_its_override(changes: dict[str, Any], share: float, fix: str) -> None:
    shapes = replace(SMALL, layers=20, parameters=20 * 300 + 400)
    sizes = replace(job().sizes, micro_batch_size=4)
    engine = EngineSizes("vllm", own_weights=True, beside=True)
    full = job(shapes=shapes, sizes=sizes, engine=engine, **changes)
    needed = max(peaks(memory(full, CARD)).values())
    assert warnings(full, replace(CARD, memory_gib=needed / GIB)) == []
    assert fix in warnings(full, replace(CARD, memory_gib=share * needed / GIB))[0]


def test_a_host_that_is_too_small_is_named() -> None:
    offloaded = job(strategy="fsdp", devices=4, offload=True)
    assert "trainer.num_nodes=2" in warnings(offloaded, replace(CARD, host_memory_gib=1000 / GIB))[0]


def test_this_cpu_is_measured() -> None:
    found = this_cpu(size=64, repeat=2)
    assert all(1e6 < rate < 1e14 for rate in found.flops.values())
    assert 1e7 < found.memory_bytes_s < 1e13


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        pytest.param(["trainer.accelerator=cpu"], "hardware=cpu", id="a card's plan of a CPU's run"),
        pytest.param(
            ["trainer=fsdp", "data.num_prompts=8"], "engine.own_copy=true", id="shards to generate with"
        ),
        pytest.param(
            ["trainer=ddp", "data.num_prompts=4"], "data.num_prompts=8", id="a rank without a prompt"
        ),
        pytest.param(["+trainer.strategy=deepspeed"], "trainer=default, ddp or fsdp", id="another strategy"),
        pytest.param(["~hardware.flops.float32"], "hardware.flops.float32", id="no rate for the dtype"),
    ],
)
def test_what_cannot_be_planned_is_refused(overrides: list[str], said: str) -> None:
    cfg = runs.config("trainer.accelerator=auto", *overrides)
    hardware = build(cfg, "hardware")
    with pytest.raises(ConfigError, match=said):
        seconds(job_of(cfg, hardware), hardware)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="hardware.memory_bytes_s=0"):
        replace(CARD, memory_bytes_s=0)


def test_the_command_line_prints_and_writes_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On eight cards, from a folder without weights or tokenizer."""
    model, folder = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(QWEN_7B))
    overrides = (
        *("plan=true", f"policy.path={model}", "trainer=fsdp", "trainer.precision=bf16-mixed"),
        *("engine=vllm", "engine.dtype=bfloat16", "data.num_prompts=512", "data.group_size=8"),
        *("data.minibatches=8", "data.micro_batch_size=8", "data.max_prompt_tokens=1024"),
        *("data.max_new_tokens=3072", "trainer.accelerator=auto"),
    )
    assert runs.train(folder, *overrides) == 0
    assert [path.name for path in folder.iterdir()] == ["plan.json"]
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["parameters"] == 7_615_616_512
    assert plan["ranks"] == 8
    parts = {part["part"]: part["bytes"] for part in plan["bytes"]}
    assert parts["parameters"] == 7_615_616_512 * 4 / 8
    assert plan["seconds"]["iteration"] > 0
    said = capsys.readouterr().out
    assert "7,615,616,512 parameters" in said
    # 0.4 x 79.1 GiB less the weights, by 224 MiB a response.
    assert plan["concurrent_rows"] == 79
    assert "79 at one time" in said
    assert "WARNING: update" in said
    assert "policy.activation_checkpointing=true" in said


def test_a_cpu_is_planned_by_what_it_measures(tmp_path: Path) -> None:
    assert runs.train(tmp_path, "experiment=demo", "hardware=cpu", "plan=true") == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["hardware"]["accelerator"] == "cpu"
    assert plan["warnings"] == []
