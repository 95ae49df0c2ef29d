"""What does not fit, and the overrides that mend it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rlvr.planning.hardware import GIB, SIZES, Hardware
from rlvr.planning.job import Job
from rlvr.planning.memory import concurrent_rows, memory, peaks


def warnings(job: Job, hardware: Hardware) -> list[str]:
    """What does not fit, with the overrides that mend it."""
    found = []
    limit = _limit(job, hardware)
    over = _over(job, hardware)
    if over is not None:
        phase, size = over
        mended = _mend(job, hardware)
        found.append(
            f"{phase}: {size / GIB:.1f} GiB of a device's {limit / GIB:.1f} that may be filled; "
            + (
                f"try {' '.join(mended)}"
                if mended
                else "smaller sizes, a smaller model, or more nodes: no override here mends it"
            )
        )
    host = peaks(memory(job, hardware), on_host=True)
    phase = max(host, key=lambda name: host[name])
    if host[phase] > hardware.host_memory_gib * GIB * hardware.usable:
        fix = "trainer.strategy.offload=false or trainer.num_nodes=" + str(2 * job.nodes)
        found.append(
            f"{phase}: {host[phase] / GIB:.1f} GiB of a host's {hardware.host_memory_gib:g}; try {fix}"
        )
    if job.engine.kind == "vllm" and concurrent_rows(job, hardware) == 0:
        need = math.ceil(job.length * job.shapes.kv_bytes(SIZES[job.engine.dtype]) / job.engine.devices / GIB)
        fix = f"{job.engine.node}.kv_cache_gib={need}"
        found.append(f"the engine's KV cache holds no response of {job.length} tokens; try {fix}")
    return found


def _limit(job: Job, hardware: Hardware) -> float:
    """Bytes that one rank may fill; the ranks of a CPU share its memory."""
    ranks = job.devices if hardware.accelerator == "cpu" else 1
    return hardware.memory_gib * GIB * hardware.usable / ranks


def _over(job: Job, hardware: Hardware) -> tuple[str, float] | None:
    """The fullest phase of a device and its bytes, where they are too many."""
    sizes = peaks(memory(job, hardware))
    phase = max(sizes, key=lambda name: sizes[name])
    return (phase, sizes[phase]) if sizes[phase] > _limit(job, hardware) else None


def _mend(job: Job, hardware: Hardware) -> list[str]:
    """Overrides that make the run fit: one if one does, else several, the cheapest first; none if none do."""
    ways = list(_ways(job, hardware))
    for override, change in ways:
        if _over(replace(job, **change), hardware) is None:
            return [override]
    chosen: dict[str, str] = {}
    for override, change in ways:
        changed = replace(job, **change)
        if max(peaks(memory(changed, hardware)).values()) >= max(peaks(memory(job, hardware)).values()):
            continue
        job = replace(job, **change)
        chosen[override.split("=")[0]] = override
        if _over(job, hardware) is None:
            return list(chosen.values())
    return []


def _ways(job: Job, hardware: Hardware) -> Iterator[tuple[str, dict[str, Any]]]:
    """Overrides that lower memory, with what they change of a job; what costs least comes first."""
    engine, sizes = job.engine, job.sizes
    if engine.kind == "vllm" and not engine.beside:
        for share in (0.3, 0.2):
            if engine.kv_cache_gib is None and share < engine.memory_share:
                yield f"{engine.node}.memory_share={share}", {"engine": replace(engine, memory_share=share)}
    if engine.kind == "transformers":
        for rows in (engine.max_num_seqs // 2, engine.max_num_seqs // 4):
            if rows:
                yield f"{engine.node}.max_num_seqs={rows}", {"engine": replace(engine, max_num_seqs=rows)}
    together = round(min(job.rows_at_once, job.rows) * job.context)
    if not job.checkpointing:
        yield "policy.activation_checkpointing=true", {"checkpointing": True}
    while together > 1:
        together //= 2
        if sizes.tokens_per_micro_batch is None:
            yield f"data.micro_batch_size={together}", {"sizes": replace(sizes, micro_batch_size=together)}
        else:
            budget = together * job.length
            changed = replace(sizes, tokens_per_micro_batch=budget)
            yield f"data.tokens_per_micro_batch={budget}", {"sizes": changed}
    if job.strategy == "fsdp" and not job.reduce_every_micro_batch:
        yield "trainer.strategy.reduce_every_micro_batch=true", {"reduce_every_micro_batch": True}
    devices = hardware.devices if job.strategy == "one" else job.devices
    if job.strategy != "fsdp" and devices * job.nodes > 1 and job.sizes.num_prompts >= devices * job.nodes:
        change = {"strategy": "fsdp", "devices": devices}
        if engine.kind == "transformers" and not engine.own_weights:
            own = replace(engine, own_weights=True, beside=True)
            yield "trainer=fsdp engine.own_copy=true", {**change, "engine": own}
        else:
            yield "trainer=fsdp", change
    if job.strategy == "fsdp" and not job.offload:
        yield "trainer.strategy.offload=true", {"offload": True}
