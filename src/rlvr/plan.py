"""``plan=true``: what a run would take, printed and written down instead of running it; nothing is loaded."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig

from rlvr.errors import ConfigError
from rlvr.instantiate import build, plain
from rlvr.losses import needs_of
from rlvr.planning import (
    GIB,
    PHASES,
    EngineSizes,
    Hardware,
    Job,
    Part,
    concurrent_rows,
    memory,
    peaks,
    plain_logits,
    seconds,
    shapes_of,
    warnings,
)
from rlvr.settings import DataConfig


def job_of(cfg: DictConfig, hardware: Hardware) -> Job:
    """Read a composed configuration.

    Raises:
        ConfigError: for a trainer or a machine that the plan knows nothing of, or sizes that cannot work.
    """
    if cfg.trainer.get("accelerator") == "cpu" and hardware.accelerator != "cpu":
        raise ConfigError(
            "trainer.accelerator=cpu", f"the device planned for, {hardware.name}", "hardware=cpu"
        )
    strategy = cfg.trainer.get("strategy")
    target = str(strategy.get("_target_", "")) if isinstance(strategy, DictConfig) else str(strategy)
    asked = cfg.trainer.get("devices", 1)
    devices = (
        hardware.devices if asked in ("auto", -1, "-1") else asked if isinstance(asked, int) else len(asked)
    )
    nodes = int(cfg.trainer.get("num_nodes", 1))
    kinds: dict[str, Any] = {"rlvr.strategies.FSDP": "fsdp", "rlvr.strategies.DDP": "ddp", "None": "one"}
    if target not in kinds or (kinds[target] == "one" and devices * nodes > 1):
        raise ConfigError(
            f"trainer.strategy={target}", "one of this package's", "trainer=default, ddp or fsdp"
        )
    sizes = DataConfig(**plain(cfg.data))
    if sizes.num_prompts < devices * nodes:
        fix = f"data.num_prompts={devices * nodes}"
        raise ConfigError(
            f"data.num_prompts={sizes.num_prompts}", f"a prompt for each of {devices * nodes} ranks", fix
        )
    policy = plain(cfg.policy)
    dtype = policy.get("dtype", "float32")
    engine = _engine_of(plain(cfg.engine), dtype)
    if kinds[target] == "fsdp" and engine.kind == "transformers" and not engine.own_weights:
        raise ConfigError(
            "engine.own_copy=false beside trainer=fsdp", "whole weights", "engine.own_copy=true"
        )
    options = strategy if isinstance(strategy, DictConfig) else {}
    algorithm = build(cfg, "algorithm")
    return Job(
        shapes=shapes_of(policy.get("path")),
        sizes=sizes,
        engine=engine,
        dtype=dtype,
        bf16="bf16" in str(cfg.trainer.get("precision")),
        checkpointing=bool(policy.get("activation_checkpointing", False)),
        packed=policy.get("packing") is not False and policy.get("attention") != "eager",
        chunk_size=int(policy.get("chunk_size", 128)),
        strategy=kinds[target],
        devices=devices,
        nodes=nodes,
        offload=bool(options.get("offload", False)),
        reduce_every_micro_batch=bool(options.get("reduce_every_micro_batch", False)),
        context=int(options.get("context_parallel_size", 1)),
        reference=algorithm.kl_coef > 0,
        two_passes=needs_of(algorithm.loss).sequence_stats,
    )


def _devices(asked: Any, hardware: Hardware) -> int:
    """Ranks of a node: a number, a list of devices, or all that the hardware has."""
    if asked in ("auto", -1):
        return hardware.devices
    if isinstance(asked, bool) or not isinstance(asked, int | ListConfig) or not asked:
        raise ConfigError(f"trainer.devices={asked}", "a number, a list or auto", "trainer.devices=8")
    return asked if isinstance(asked, int) else len(asked)


def _engine_of(node: dict[str, Any], dtype: str) -> EngineSizes:
    """The engine's sizes from its node; one of another class is not known."""
    target = node["_target_"]
    if target == "rlvr.engines.shared.SharedEngine":
        return replace(_engine_of(node["engine"], dtype), ranks=node["ranks"])
    if target == "rlvr.engines.transformers.TransformersEngine":
        own = bool(node.get("own_copy", False))
        return EngineSizes(
            "transformers", dtype, own_weights=own, beside=own, max_num_seqs=node.get("max_num_seqs", 256)
        )
    if target == "rlvr.engines.vllm.VllmEngine":
        return EngineSizes(
            "vllm",
            node.get("dtype", "float32"),
            own_weights=True,
            max_num_seqs=node.get("max_num_seqs", 256),
            devices=node.get("tensor_parallel_size", 1),
            beside=node.get("device") not in (None, "cpu"),
            memory_share=node.get("memory_share", 0.4),
            kv_cache_gib=node.get("kv_cache_gib"),
        )
    return EngineSizes("other", dtype)


def write_plan(cfg: DictConfig, folder: Path) -> int:
    """Print the plan of a run and write it to ``plan.json``; nothing is loaded.

    Returns:
        Exit status 0, fit or not.

    Raises:
        ConfigError: as :func:`job_of`.
    """
    if cfg.threads is not None or cfg.policy.get("path") is None:
        torch.set_num_threads(cfg.threads or 1)  # as in training
    hardware: Hardware = build(cfg, "hardware")
    job = job_of(cfg, hardware)
    parts, times, said = memory(job, hardware), seconds(job, hardware), warnings(job, hardware)
    if cfg.policy.get("attention") == "eager":
        said.append("the probabilities that eager attention keeps are not counted; try policy.attention=sdpa")
    if job.engine.kind == "other":
        said.append("nothing is known of this engine: neither its memory nor its seconds are counted")
    device, host = peaks(parts), peaks(parts, on_host=True)
    total = sum(value for name, value in times.items() if name != "optimizer")
    plan = {
        "hardware": vars(hardware),
        "parameters": job.shapes.parameters,
        "ranks": job.ranks,
        "micro_batch": {
            "rows": job.micro_rows,
            "tokens": round(job.micro_rows * job.length),
            "of_minibatch": job.micro_batches,
        },
        "bytes": [
            {"part": p.name, "on_host": p.on_host, "bytes": round(p.bytes), "phases": p.phases} for p in parts
        ],
        "peak_bytes": {"device": device, "host": host},
        "plain_logits_bytes": plain_logits(job),
        "concurrent_rows": concurrent_rows(job, hardware),
        "seconds": {**times, "iteration": total},
        "warnings": said,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
    print("\n".join(_lines(job, hardware, parts, times, said)), flush=True)
    print(f"run folder: {folder}", flush=True)
    return 0


def _lines(
    job: Job, hardware: Hardware, parts: list[Part], times: dict[str, float], said: list[str]
) -> Iterator[str]:
    """The plan for people."""
    sizes = job.sizes
    yield (
        f"plan: {job.shapes.parameters:,} parameters, {job.strategy} on {job.nodes} x {job.devices} "
        f"{hardware.name}; "
        f"{sizes.num_prompts} x {sizes.group_size} responses, {job.length} tokens with their prompts; "
        f"{sizes.minibatches} mini-batches, on each rank {job.micro_batches} micro-batches of "
        f"{job.micro_rows:g} rows = {round(job.micro_rows * job.length):,} tokens"
    )
    for on_host, title in ((False, "GiB a device"), (True, "GiB a node's host")):
        listed = [part for part in parts if part.on_host == on_host]
        if not listed:
            continue
        yield f"\n{title:<28}" + "".join(f"{phase:>9}" for phase in PHASES)
        for part in listed:
            cells = [f"{part.bytes / GIB:9.2f}" if phase in part.phases else " " * 9 for phase in PHASES]
            yield f"{part.name:<28}" + "".join(cells).rstrip()
        sums = peaks(parts, on_host=on_host)
        yield f"{'together':<28}" + "".join(f"{sums[phase] / GIB:9.2f}" for phase in PHASES)
    yield f"\nnot taken: {plain_logits(job) / GIB:.2f} GiB that plain logits of a micro-batch would"
    rows = concurrent_rows(job, hardware)
    yield f"\nseconds an iteration, every response at full length, {rows} at one time in an engine"
    for name, value in times.items():
        yield f"{('  of which ' if name == 'optimizer' else '') + name:<28}{value:9.3g}"
    yield f"{'together':<28}{sum(value for name, value in times.items() if name != 'optimizer'):9.3g}"
    yield from (f"WARNING: {warning}" for warning in said)
