"""What of a configuration memory and seconds depend on."""

import math
from dataclasses import dataclass
from typing import Literal

from rlvr.planning.hardware import SIZES
from rlvr.planning.shapes import Shapes
from rlvr.settings import DataConfig


@dataclass(frozen=True)
class EngineSizes:
    """What an engine takes; ``engine``.

    Args:
        kind: ``transformers``, ``vllm``, or ``other``, of which nothing is known.
        dtype: of its weights and arithmetic.
        own_weights: besides the trainer's.
        max_num_seqs: responses generated at one time.
        ranks: that share one engine.
        devices: that share each of its layers.
        beside: on devices of its own, and at work while the trainer trains.
        memory_share: of a device, for weights and cache.
        kv_cache_gib: instead, of the cache; None: what ``memory_share`` leaves.
    """

    kind: Literal["transformers", "vllm", "other"]
    dtype: str = "float32"
    own_weights: bool = False
    max_num_seqs: int = 256
    ranks: int = 1
    devices: int = 1
    beside: bool = False
    memory_share: float = 0.4
    kv_cache_gib: float | None = None

    @property
    def node(self) -> str:
        """Where its settings stand; a shared engine's in a node within."""
        return "engine.engine" if self.ranks > 1 else "engine"


@dataclass(frozen=True)
class Job:
    """What of a configuration the plan depends on.

    Args:
        shapes: of the policy.
        sizes: of an iteration; the ``data`` node.
        engine: who generates.
        dtype: of the weights; ``policy.dtype``.
        bf16: whether arithmetic is in bfloat16, by ``trainer.precision``.
        checkpointing: ``policy.activation_checkpointing``.
        packed: whether the trainer computes sequences without padding; ``policy.packing``.
        chunk_size: tokens whose logits exist at one time.
        strategy: ``one``, ``ddp`` or ``fsdp``.
        devices: ranks of a node.
        nodes: how many.
        offload: ``trainer.strategy.offload``.
        reduce_every_micro_batch: the strategy's.
        context: ranks that make a forward pass together; ``trainer.strategy.context_parallel_size``.
        reference: whether there is a reference policy.
        two_passes: whether the loss needs a pass over the head of its own.
    """

    shapes: Shapes
    sizes: DataConfig
    engine: EngineSizes
    dtype: str = "float32"
    bf16: bool = False
    checkpointing: bool = False
    packed: bool = False
    chunk_size: int = 128
    strategy: Literal["one", "ddp", "fsdp"] = "one"
    devices: int = 1
    nodes: int = 1
    offload: bool = False
    reduce_every_micro_batch: bool = False
    context: int = 1
    reference: bool = False
    two_passes: bool = False

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.devices * self.nodes

    @property
    def computed_in(self) -> str:
        """Dtype of matrix products."""
        return "bfloat16" if self.bf16 else self.dtype

    @property
    def residual(self) -> int:
        """Bytes of a number in the residual stream."""
        return SIZES[self.computed_in if self.strategy == "fsdp" else self.dtype]

    @property
    def length(self) -> int:
        """Longest prompt and response together, in tokens."""
        return self.sizes.max_prompt_tokens + self.sizes.max_new_tokens

    @property
    def rows(self) -> int:
        """Responses of an iteration on the rank that has most."""
        return math.ceil(self.sizes.num_prompts / self.ranks) * self.sizes.group_size

    @property
    def rows_per_minibatch(self) -> int:
        """Of one rank."""
        return max(math.ceil(self.rows / self.sizes.minibatches), 1)

    @property
    def rows_at_once(self) -> float:
        """Rows of a forward pass, by number or by tokens; a rank's share, where several make it together."""
        budget = self.sizes.tokens_per_micro_batch
        rows = self.sizes.micro_batch_size if budget is None else max(budget // self.length, 1)
        return rows / self.context

    @property
    def micro_rows(self) -> float:
        """Rows of a forward pass of the update."""
        return min(self.rows_at_once, self.rows_per_minibatch)

    @property
    def micro_batches(self) -> int:
        """Of a mini-batch."""
        return math.ceil(self.rows_per_minibatch / self.rows_at_once)

    @property
    def saved_bytes(self) -> int:
        """What autograd keeps of one layer for one token."""
        padded = None if self.packed else self.length
        return self.shapes.saved_bytes(
            computed=SIZES[self.computed_in], residual=self.residual, padded=padded
        )
