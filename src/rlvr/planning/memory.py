"""Bytes by part, of every device and of every node's host, and the phases in which they are there.

Every response counts as ``data.max_new_tokens`` long and every prompt as ``data.max_prompt_tokens``: an upper
bound. Gradients count as whole from an update's first micro-batch on, as they are from its second.

Not counted: what a process takes with its libraries imported, CUDA contexts and fragments (``usable`` leaves
room for them), rollouts and batches on the host, evaluation, checkpoints.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rlvr.engines.vllm import CPU_KV_CACHE_GIB
from rlvr.logprobs import ROW_BLOCK
from rlvr.planning.hardware import GIB, SIZES, Hardware
from rlvr.planning.job import Job

PHASES = ("start", "rollout", "sync", "logprob", "update", "step")
"""Loading; generating; handing weights over; old log-probs; gradients; AdamW."""
TRAINING = ("logprob", "update", "step")
WEIGHT_BUFFER = 128 << 20
"""Bytes of :class:`rlvr.engines.weight_stream.WeightBuffer`."""


@dataclass(frozen=True)
class Part:
    """Something that takes memory.

    Args:
        name: for the table.
        bytes: on each device, or on each node's host.
        phases: of :data:`PHASES`, in which it is there.
        on_host: in host memory.
    """

    name: str
    bytes: float
    phases: tuple[str, ...] = PHASES
    on_host: bool = False


def memory(job: Job, hardware: Hardware) -> list[Part]:
    """What every device holds, and every node's host beside it; a CPU's device is its host."""
    return [
        part
        for parts in (_state(job, hardware), _passes(job), _rollout(job, hardware))
        for part in parts
        if part.bytes
    ]


def _state(job: Job, hardware: Hardware) -> Iterator[Part]:
    """Parameters, gradients, AdamW, whole or sharded or on the host."""
    shapes, weight = job.shapes, SIZES[job.dtype]
    whole = shapes.parameters * weight
    sharded = job.strategy == "fsdp"
    apart = hardware.accelerator == "cuda"
    offload = sharded and job.offload and apart
    shard = whole / job.ranks if sharded else whole
    # What waits on the host is there for every rank of the node.
    here = shard * job.devices if offload else shard
    updating = ("update", "step")
    yield Part("parameters", here, on_host=offload)
    yield Part("gradients", here, updating, on_host=offload)
    yield Part("AdamW, m and v", 2 * here, PHASES[1:], on_host=offload)
    if job.reference:
        yield Part("reference policy", here, PHASES[1:], on_host=offload)
    # The foreach AdamW of GPUs forms sqrt(v) of all parameters at once, that of CPUs of one.
    largest = max(shapes.head, shapes.hidden * shapes.intermediate) * weight
    foreach = apart and not offload
    yield Part("AdamW, sqrt(v)", shard if foreach else min(shard, largest), ("step",), on_host=offload)
    if job.strategy == "ddp":
        yield Part("DDP's buckets", whole, PHASES[1:])
    if sharded:
        computed, summed = SIZES[job.computed_in], max(weight, 4)
        yield Part("weights read by rank 0", whole, ("start",), on_host=apart)
        gathered = shapes.root + 2 * shapes.layer_parameters
        yield Part("gathered: root, 2 layers", gathered * computed, ("logprob", "update"))
        if job.micro_batches > 1 and not job.reduce_every_micro_batch:
            yield Part("whole gradients", shapes.parameters * summed, ("update",))
        reduced = max(shapes.root, 2 * shapes.layer_parameters)
        yield Part("gradients in reduction", reduced * (computed + summed), ("update",))
    elif job.bf16 and weight > 2:
        products = shapes.layers * shapes.layer_parameters
        yield Part("autocast's weights", products * 2, TRAINING)


def _passes(job: Job) -> Iterator[Part]:
    """Activations and head of one micro-batch."""
    shapes, computed, residual = job.shapes, SIZES[job.computed_in], job.residual
    wide = max(4, computed)
    scored = min(job.rows_at_once, job.rows) * job.length
    tokens, responses = job.micro_rows * job.length, job.micro_rows * job.sizes.max_new_tokens
    # Beside the layers: inputs of the last norm, cosines and sines, token ids.
    outside = tokens * (wide * (shapes.hidden + 1) + residual * (shapes.hidden + 2 * shapes.head_dim) + 8)
    if job.checkpointing:
        kept = tokens * (shapes.layers * residual * shapes.hidden + job.saved_bytes)
    else:
        kept = tokens * shapes.layers * job.saved_bytes
    yield Part("saved activations", kept + outside, ("update",))
    working = 3 * shapes.intermediate * computed + 2 * shapes.hidden * residual
    if not job.packed:
        working += job.length * (1 + computed)  # the padding mask, and its bias
    yield Part("a layer at work", scored * working, ("logprob",))
    yield Part("a layer at work, backward", tokens * working, ("update",))
    cast = computed if computed < 4 else 0
    chunk = min(job.chunk_size, responses) * (2 * wide + cast) + min(ROW_BLOCK, responses) * wide
    yield Part("head: a chunk's logits", chunk * shapes.vocabulary, ("logprob", "update"))
    # The sum over chunks, and once more in the dtype of the products.
    yield Part("head: its gradient", shapes.head * (wide + cast), ("update",))
    if residual != computed:
        yield Part("head: its weight in bf16", shapes.head * computed, ("logprob", "update"))
    states = 2 * computed + (residual if residual != computed else 0)
    yield Part("head: hidden states", responses * shapes.hidden * states, ("logprob", "update"))


def _rollout(job: Job, hardware: Hardware) -> Iterator[Part]:
    """The engine, and weights on their way to it."""
    shapes, engine = job.shapes, job.engine
    size = SIZES[engine.dtype]
    if engine.kind == "transformers":
        if engine.own_weights:
            yield Part("engine: weights", shapes.parameters * size)
        rows = min(engine.max_num_seqs, job.rows)
        # torch.cat makes a layer's cache anew before the old one goes.
        cache = rows * job.length * shapes.kv_bytes(size) * (1 + 1 / shapes.layers)
        yield Part("engine: KV cache", cache, ("rollout",))
        # Logits, scaled, their log-softmax, and two float64 vectors of the cumulative sum.
        yield Part("engine: logits", rows * shapes.vocabulary * (12 + 16), ("rollout",))
    elif engine.kind == "vllm":
        weights = shapes.parameters * size / engine.devices
        cache = _cache_bytes(job, hardware)
        apart = hardware.accelerator == "cuda"
        if not apart:
            yield Part("engine: weights", weights, PHASES[1:])
            yield Part("engine: KV cache", cache, PHASES[1:])
            yield Part("engine: weight buffer", WEIGHT_BUFFER, PHASES[1:])
        elif not engine.beside:
            yield Part("engine: weights", weights, ("rollout", "sync"))
            yield Part("engine: KV cache and work", cache, ("rollout",))
        if apart and (engine.beside or job.devices > 1):
            engines = max(job.devices // engine.ranks, 1)
            yield Part("engine: weight buffers", WEIGHT_BUFFER * engines, on_host=True)
    if engine.own_weights:
        largest = max(shapes.head, shapes.hidden * shapes.intermediate)
        gathered = SIZES[job.dtype] if job.strategy == "fsdp" else 0
        cast = size if engine.dtype != job.dtype else 0
        yield Part("sync: one tensor", largest * (gathered + cast), ("sync",))


def _cache_bytes(job: Job, hardware: Hardware) -> float:
    """Of vLLM's KV cache on one device; what ``memory_share`` leaves includes the engine's own work."""
    engine = job.engine
    if engine.kv_cache_gib is not None:
        return engine.kv_cache_gib * GIB
    if hardware.accelerator == "cpu":
        return CPU_KV_CACHE_GIB * GIB
    weights = job.shapes.parameters * SIZES[engine.dtype] / engine.devices
    return max(engine.memory_share * hardware.memory_gib * GIB - weights, 0.0)


def concurrent_rows(job: Job, hardware: Hardware) -> int:
    """Responses of full length that an engine generates at one time; 0 where its cache holds not one."""
    engine = job.engine
    rows = min(engine.max_num_seqs, job.rows * engine.ranks)
    if engine.kind != "vllm":
        return rows
    one = job.length * job.shapes.kv_bytes(SIZES[engine.dtype]) / min(engine.devices, job.shapes.kv_heads)
    return min(rows, int(_cache_bytes(job, hardware) / one))


def peaks(parts: list[Part], *, on_host: bool = False) -> dict[str, float]:
    """Bytes in every phase, of one device or one node's host."""
    return {
        phase: sum(part.bytes for part in parts if part.on_host == on_host and phase in part.phases)
        for phase in PHASES
    }


def plain_logits(job: Job) -> float:
    """Bytes that the fused head avoids in an update: logits, their log-softmax, and the gradients of both."""
    computed = SIZES[job.computed_in]
    logits = job.micro_rows * job.sizes.max_new_tokens * job.shapes.vocabulary
    return logits * 2.0 * (computed + max(4, computed))
