r"""Seconds of an iteration by phase: operations over rates, bytes over bandwidths.

Operations, two a multiply-add: for each token 2 a parameter of the layers, and 4 x heads x head size x length
a layer for attention (half of it for packed sequences: beside a mask no kernel leaves out what is ahead); for
each response token 2 a parameter of the head. The backward pass takes twice that, and checkpointing runs the
layers again.

Between the products every saved activation crosses the memory bus :data:`LAYER_TRAFFIC` times, and the head's
logits as often as :mod:`rlvr.logprobs` touches them. Communication runs beside arithmetic; the longer counts.

Not counted: verification, evaluation, checkpoints, what tensor parallelism communicates.
"""

import math

from rlvr.planning.hardware import SIZES, Hardware
from rlvr.planning.job import Job
from rlvr.planning.memory import concurrent_rows

LOGIT_BYTES = (80, 12)
"""Memory traffic for a float32 logit in :mod:`rlvr.logprobs`: of its statistics, and of its gradient."""
SAMPLED_LOGIT_BYTES = 100
"""And in drawing a token: scaling, log-softmax, cumulative sum in float64."""
STEP_ACCESSES = 23
"""Reads and writes of a parameter's size in gradient clipping and AdamW, one operation after the other."""
LAYER_TRAFFIC = (2, 4)
"""Times that a saved activation's bytes cross the memory bus, forward and backward."""


def seconds(job: Job, hardware: Hardware) -> dict[str, float]:
    """Of one iteration, by phase, every response at full length.

    A decoding step reads the weights and every row's cache, or is bound by arithmetic. The optimizer's
    seconds are a share of the update's.
    """
    prefill, decode = _generation(job, hardware)
    return {
        "rollout: prefill": prefill,
        "rollout: decode": decode,
        "weight sync": _sync(job, hardware),
        "old log-probs": _scoring(job, hardware) * (2 if job.reference else 1),
        "update": _updates(job, hardware),
        "optimizer": _optimizer(job, hardware),
    }


def _generation(job: Job, hardware: Hardware) -> tuple[float, float]:
    shapes, engine, sizes = job.shapes, job.engine, job.sizes
    rows = concurrent_rows(job, hardware)
    if engine.kind == "other" or rows == 0:
        return 0.0, 0.0
    size, rate, split = SIZES[engine.dtype], hardware.rate(engine.dtype), engine.devices
    prompts = job.rows * engine.ranks / sizes.group_size
    flops = shapes.forward_flops(1, sizes.max_prompt_tokens) * sizes.max_prompt_tokens + 2 * shapes.head
    prefill = prompts * flops / rate / split
    context = sizes.max_prompt_tokens + sizes.max_new_tokens / 2
    # The transformers cache is read and written to grow, and read and repeated for every query head.
    touched = 1 if engine.kind == "vllm" else 3 + 3 * shapes.heads / shapes.kv_heads
    weights = (shapes.layers * shapes.layer_parameters + shapes.head) * size
    cache = rows * context * shapes.kv_bytes(size) * touched
    read = (weights + cache) / split / hardware.memory_rate
    computed = (shapes.forward_flops(rows, context) + 2.0 * rows * shapes.head) / split / rate
    sampled = rows * shapes.vocabulary * SAMPLED_LOGIT_BYTES / hardware.memory_rate
    # vLLM refills its batch as responses end; the transformers engine goes by whole batches.
    batches = job.rows * engine.ranks / rows
    batches = batches if engine.kind == "vllm" else math.ceil(batches)
    step = max(read, computed) + sampled + hardware.step_overhead_s
    return prefill, batches * sizes.max_new_tokens * step


def _sync(job: Job, hardware: Hardware) -> float:
    engine, parameters = job.engine, job.shapes.parameters
    if not engine.own_weights:
        return 0.0
    sent = parameters * SIZES[engine.dtype]
    taken = _gather(job, hardware, parameters * SIZES[job.dtype]) if job.strategy == "fsdp" else 0.0
    if hardware.accelerator == "cuda" and engine.kind == "vllm" and (engine.beside or job.devices > 1):
        # Through the buffer: down, up again, written and read on a host that all of its engines share.
        engines = max(job.devices // engine.ranks, 1)
        host = 4 * sent * engines / (hardware.host_memory_bytes_s * hardware.memory_efficiency)
        return taken + max(2 * sent / (hardware.host_link_bytes_s * hardware.link_efficiency), host)
    copies = 4 if engine.kind == "vllm" else 2
    return taken + copies * sent / hardware.memory_rate


def _gather(job: Job, hardware: Hardware, whole: float) -> float:
    """Seconds of an all-gather, or a reduce-scatter, of ``whole`` bytes over the ranks."""
    link = hardware.link_bytes_s if job.nodes == 1 else min(hardware.link_bytes_s, hardware.network_bytes_s)
    return whole * (job.ranks - 1) / job.ranks / (link * hardware.link_efficiency)


def _head(job: Job, hardware: Hardware, tokens: float, *, gradient: bool) -> float:
    """Seconds of the fused head: one product forward, two more for gradients, and passes over the logits."""
    products = 2.0 * tokens * job.shapes.head * (3 if gradient else 1) / hardware.rate(job.computed_in)
    traffic = LOGIT_BYTES[0] + (LOGIT_BYTES[1] if gradient else 0)
    again = _head(job, hardware, tokens, gradient=False) if gradient and job.two_passes else 0.0
    return products + tokens * job.shapes.vocabulary * traffic / hardware.memory_rate + again


def _layers(job: Job, hardware: Hardware, tokens: int, *, passes: int, crossings: int) -> float:
    """Seconds of the layers: products, and the memory traffic of everything between them."""
    products = (
        passes
        * job.shapes.forward_flops(tokens, job.length / 2 if job.packed else job.length)
        / hardware.rate(job.computed_in)
    )
    traffic = crossings * tokens * job.shapes.layers * job.saved_bytes / hardware.memory_rate
    return products + traffic


def _gathered(job: Job, hardware: Hardware, micro_batches: int, times: int) -> float:
    """Seconds of bringing sharded parameters to every rank ``times`` in each micro-batch."""
    if job.strategy != "fsdp":
        return 0.0
    parameters = job.shapes.parameters
    each = _gather(job, hardware, parameters * SIZES[job.computed_in])
    if job.offload:
        shard = parameters * SIZES[job.dtype] / job.ranks
        each += shard / (hardware.host_link_bytes_s * hardware.link_efficiency)
    return micro_batches * times * each


def _scoring(job: Job, hardware: Hardware) -> float:
    sizes = job.sizes
    computed = _layers(job, hardware, job.rows * job.length, passes=1, crossings=LAYER_TRAFFIC[0])
    computed += _head(job, hardware, job.rows * sizes.max_new_tokens, gradient=False)
    # Gathering runs ahead of the layers that wait for it.
    return max(computed, _gathered(job, hardware, math.ceil(job.rows / job.rows_at_once), 1))


def _updates(job: Job, hardware: Hardware) -> float:
    """Forward and backward passes of all mini-batches, beside them communication, and the optimizer."""
    sizes = job.sizes
    forward, backward = LAYER_TRAFFIC
    passes, crossings = (4, 2 * forward + backward) if job.checkpointing else (3, forward + backward)
    tokens, responses = job.rows * job.length, job.rows * sizes.max_new_tokens
    computed = _layers(job, hardware, tokens, passes=passes, crossings=crossings)
    computed += _head(job, hardware, responses, gradient=True)
    micro_batches = job.micro_batches * sizes.minibatches
    moved = _gathered(job, hardware, micro_batches, 2)
    summed = job.shapes.parameters * max(SIZES[job.dtype], 4)
    if job.strategy == "fsdp":
        reductions = micro_batches if job.reduce_every_micro_batch else sizes.minibatches
        moved += reductions * _gather(job, hardware, summed)
    elif job.strategy == "ddp":
        moved += sizes.minibatches * 2 * _gather(job, hardware, summed)
    return sizes.epochs * max(computed, moved) + _optimizer(job, hardware)


def _optimizer(job: Job, hardware: Hardware) -> float:
    touched = STEP_ACCESSES * job.shapes.parameters * SIZES[job.dtype] * job.sizes.updates
    if job.strategy == "fsdp" and job.offload:
        return touched / job.nodes / (hardware.host_memory_bytes_s * hardware.memory_efficiency)
    return touched / (job.ranks if job.strategy == "fsdp" else 1) / hardware.memory_rate
