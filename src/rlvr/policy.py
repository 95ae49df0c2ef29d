"""The policy: a causal language model, read through a fused head that never holds all its logits."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlvr.attention import PACKED_SDPA, share
from rlvr.batch import Sequences
from rlvr.context import ContextGroup
from rlvr.errors import ConfigError
from rlvr.logprobs import Objective, TokenStats, token_objective, token_stats

TINY = Path(__file__).parent / "assets" / "tiny"
"""The embedded base policy, in Hugging Face format."""

_HEAD_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.25}
_PACKING_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest mean gap of hidden states between packed and padded rows, as a share of their mean size."""
_SHARING = "trainer.strategy.context_parallel_size"


class Policy(nn.Module):
    """A causal language model from a hub id, a Hugging Face folder, or a ``.gguf`` file.

    Args:
        path: hub id, folder or ``.gguf`` file; None is the embedded base policy.
        dtype: of the weights, ``float32``, ``bfloat16`` or ``float64``. Train with float32 weights: in
            bfloat16 an update of 1e-6 is lost to rounding; bf16 arithmetic is
            ``trainer.precision=bf16-mixed``.
        attention: attention implementation of transformers, such as ``sdpa`` or ``flash_attention_2``.
        packing: compute sequences one after the other in a single row, each seeing itself alone, instead of
            padding them to one length; the same numbers without the padding's work. None: where the model
            can, which takes ``sdpa`` or ``flash_attention_*``.
        activation_checkpointing: recompute each layer in the backward pass instead of storing it.
        chunk_size: tokens whose logits are held at one time.
        deferred: make the model without its weights, on the meta device; :func:`rlvr.sharding.shard` loads
            them.

    Attributes:
        compute_dtype: what the weights are gathered as where they are sharded; None: their own.
        context: ranks that compute each packed row together; None: this one alone.

    Raises:
        ConfigError: where there is no such model, its logits are not hidden states times a head, or it is to
            pack and cannot.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        dtype: str = "float32",
        attention: str = "sdpa",
        packing: bool | None = None,
        activation_checkpointing: bool = False,
        chunk_size: int = 128,
        deferred: bool = False,
    ) -> None:
        super().__init__()
        if dtype not in ("float32", "bfloat16", "float64"):
            raise ConfigError(f"policy.dtype={dtype}", "float32, bfloat16 or float64", "policy.dtype=float32")
        if not (packing is None or isinstance(packing, bool)):
            raise ConfigError(f"policy.packing={packing}", "true, false or null", "policy.packing=null")
        flash = attention.startswith("flash_attention")
        if packing and not (flash or attention == "sdpa"):
            raise ConfigError(
                f"policy.packing=true beside policy.attention={attention}",
                "attention by sdpa or flash_attention_2",
                "policy.attention=sdpa",
            )
        self.path = str(TINY) if path is None else path
        # None for the embedded policy, wherever it is installed; a folder whole, for a checkpoint moves.
        self.source = None if path is None else str(Path(path).resolve()) if Path(path).exists() else path
        self.chunk_size = chunk_size
        self.model: Any
        self.tokenizer: Any
        self.compute_dtype: torch.dtype | None = None
        self.context: ContextGroup | None = None
        self._as_read = (self.path, getattr(torch, dtype), attention)
        self.model, self.tokenizer = _load(*self._as_read, empty=deferred)
        # Old and new log-probs must come from one function of the weights: no dropout anywhere.
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        if activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.config.use_cache = False
        self.model.train()  # activation checkpointing works in training mode only
        if flash or (attention == "sdpa" and packing is not False):
            # The checks run where the model is loaded, on the CPU, and flash attention does not.
            self.model.set_attn_implementation(PACKED_SDPA)
        self._check_tokenizer()
        self._packing, self._flash = packing, attention if flash else None
        self.packing = False
        if not deferred:
            self.check(torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = next(self.parameters()).dtype
        return dtype

    @property
    def needs_half(self) -> bool:
        """Whether the attention takes half precision alone."""
        return self._flash is not None

    @property
    def pad_id(self) -> int:
        """Token that fills rows up; never attended to."""
        token = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if token is None else token)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: the model's and the tokenizer's, sorted."""
        config = self.model.generation_config
        ids = config.eos_token_id if config is not None else None
        ids = ids if isinstance(ids, list) else [ids]
        return tuple(sorted({int(i) for i in (*ids, self.tokenizer.eos_token_id) if i is not None}))

    @property
    def max_length(self) -> int:
        """Longest prompt and response together that the model takes, in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", 1 << 30))

    def check_sharing(self, size: int, ranks: int) -> None:
        """Refuse to compute rows on ``size`` ranks together, of ``ranks`` in all; needs no weights.

        Raises:
            ConfigError: where rows are padded, where heads cannot be shared out, or where rotary frequencies
                depend on the row.
        """
        if self._packing is False or self.model.config._attn_implementation != PACKED_SDPA:
            raise ConfigError(
                f"{_SHARING}={size}",
                "a policy that packs: policy.packing not false, attention by sdpa or flash_attention_2",
                "policy.packing=null policy.attention=sdpa",
            )
        heads = int(self.model.config.get_text_config().num_attention_heads)
        if heads % size:
            sizes = [each for each in range(1, ranks + 1) if heads % each == 0 == ranks % each]
            raise ConfigError(
                f"{_SHARING}={size}",
                f"a divisor of the policy's {heads} attention heads and of the {ranks} ranks: "
                + ", ".join(map(str, sizes)),
                f"{_SHARING}={sizes[-1]}",
            )
        kinds = {str(getattr(module, "rope_type", "")) for module in self.model.modules()}
        if any(grows in kind for kind in kinds for grows in ("dynamic", "longrope")):
            raise ConfigError(
                f"{_SHARING}={size} beside policy.path={self.path}",
                "rotary frequencies that do not depend on how long a row is, of which each rank sees a chunk",
                f"{_SHARING}=1",
            )

    def check(self, device: torch.device) -> None:
        """Refuse a model that the fused head, or packing where it is wanted, would change; needs the weights.

        Raises:
            ConfigError: for such a model.
        """
        self._check_head(device)
        packs = self.model.config._attn_implementation == PACKED_SDPA
        self.packing = packs and self._keeps_apart(device)
        if not self.packing and (self._packing or self.context is not None):
            wanted, off = "policy.packing=true", "policy.packing=null"
            if self.context is not None:
                wanted, off = f"{_SHARING}={self.context.size}", f"{_SHARING}=1"
            raise ConfigError(
                f"{wanted} beside policy.path={self.path}",
                "a model whose tokens meet in attention alone: this one carries other states along",
                off,
            )
        if self._flash is not None:
            self.model.set_attn_implementation(self._flash)
            if self.context is not None:
                share(self.model.config._attn_implementation)

    def logprobs(self, sequences: Sequences, *, temperature: float = 1.0) -> TokenStats:
        """Log-prob, entropy and eq. 5 moments of the response tokens.

        Args:
            sequences: B rows, N response tokens in all.
            temperature: logits are divided by it.

        Returns:
            Vectors [N] in row order; log-prob and entropy carry gradient.
        """
        hidden, weight, bias = self._head_inputs(sequences)
        return token_stats(
            hidden, weight, sequences.targets, bias=bias, temperature=temperature, chunk_size=self.chunk_size
        )

    def objective(
        self,
        sequences: Sequences,
        objective: Objective,
        *,
        temperature: float = 1.0,
        first: Callable[[TokenStats], None] | None = None,
    ) -> tuple[Tensor, TokenStats, dict[str, Tensor]]:
        """A token-local objective and its gradients in one pass over the head: :func:`token_objective`.

        ``first`` sees every token's statistics before the objective sees any, for objectives that need whole
        sequences: a pass over the head of its own, without gradient, on the same hidden states.
        """
        hidden, weight, bias = self._head_inputs(sequences)
        if first is not None:
            with torch.no_grad():
                first(
                    token_stats(
                        hidden,
                        weight,
                        sequences.targets,
                        bias=bias,
                        temperature=temperature,
                        chunk_size=self.chunk_size,
                    )
                )
        return token_objective(
            hidden,
            weight,
            sequences.targets,
            objective,
            bias=bias,
            temperature=temperature,
            chunk_size=self.chunk_size,
        )

    def read(self) -> nn.Module:
        """The model with the weights that ``path`` holds, apart from this policy."""
        model: nn.Module = _load(*self._as_read)[0]
        return model

    def padding(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """How many tokens of a forward pass are padding, and how many it computes: two scalars."""
        real = sequences.attention_mask.sum()
        computed = real if self.packing else torch.full_like(real, sequences.attention_mask.numel())
        return computed - real, computed

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Stream ``(name, weight)`` under the model's own names, tied weights once; shards where sharded."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write a Hugging Face folder that ``AutoModelForCausalLM.from_pretrained`` loads.

        ``weights`` are full tensors by the model's own names, where its own are sharded.
        """
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)

    def _head_inputs(self, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden = self._predicting(sequences)
        weight, bias = self._head()
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)

    def _predicting(self, sequences: Sequences) -> Tensor:
        """Final hidden states [N, D] at which the response tokens are predicted, in row order."""
        ids, attended, mask = sequences.input_ids, sequences.attention_mask, sequences.loss_mask
        if not len(ids) and self.context is None:
            # A sharded model's ranks need each other in every pass: one token goes through and is not read.
            lone = ids.new_full((1, 1), self.pad_id)
            return self._hidden(lone, torch.ones_like(lone, dtype=torch.bool))[0, :0]
        # The state at position t predicts token t + 1.
        predicts = nn.functional.pad(mask, (ids.shape[1] - mask.shape[1] - 1, 1))
        if self.packing:
            return self._packed_hidden(ids, attended)[predicts[attended]]
        return self._hidden(ids, attended)[predicts]

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Final hidden states of padded rows: [B, W, D]."""
        # Counted along each row, so that padding on the left changes nothing.
        position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        return self._body(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    def _packed_hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Final hidden states of the attended tokens, in row order, computed without padding: [N, D]."""
        ids, lengths = input_ids[attention_mask], attention_mask.sum(dim=-1).tolist()
        if self.context is not None:
            chunk = self.context.cut(ids, lengths, self.pad_id)
            return chunk.home(self._row(chunk.ids, chunk.positions, chunk.lengths, context=self.context))
        return self._row(ids, (attention_mask.long().cumsum(dim=-1) - 1)[attention_mask], lengths)

    def _row(self, ids: Tensor, positions: Tensor, lengths: list[int], **among: Any) -> Tensor:
        """Final hidden states [n, D] of a row of sequences with these lengths, or of a chunk of it."""
        if self.model.config._attn_implementation == PACKED_SDPA:
            # A mask of four dimensions is taken for a finished one: transformers makes none of N x N.
            nothing = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
            among |= {"attention_mask": nothing, "sequence_lengths": lengths}
        else:
            starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=ids.device)
            among |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
            among |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return self._body(input_ids=ids[None], position_ids=positions[None], **among)[0]

    def _body(self, **inputs: Any) -> Tensor:
        hidden: Tensor = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        return hidden

    def _head(self) -> tuple[Tensor, Tensor | None]:
        head = self.model.get_output_embeddings()
        return head.weight, getattr(head, "bias", None)

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer with tokens that the model has no embedding for."""
        vocabulary = self.model.config.get_text_config().vocab_size
        if (largest := max(self.tokenizer.get_vocab().values())) >= vocabulary:
            raise ConfigError(
                f"policy.path={self.path}",
                f"a tokenizer of the model's: its token {largest} exceeds the vocabulary of {vocabulary}",
                "policy.path=<a folder whose tokenizer and model belong together>",
            )

    @torch.no_grad()
    def _check_head(self, device: torch.device) -> None:
        """Refuse models that scale or cap their logits: the fused head would train another policy."""
        ids = torch.arange(8, device=device)[None] % self.model.config.get_text_config().vocab_size
        logits = self.model(input_ids=ids).logits.float()
        weight, bias = self._head()
        ours = nn.functional.linear(self._hidden(ids, torch.ones_like(ids)), weight, bias).float()
        gap = (ours - logits).abs().max().item()
        if ours.shape != logits.shape or not gap <= _HEAD_TOLERANCE[weight.dtype] * max(
            1.0, logits.abs().max().item()
        ):
            raise ConfigError(
                f"policy.path={self.path}",
                f"logits = hidden states x head (they differ by {gap:.2g}: scaled or capped?)",
                "policy.path=<a Llama-, Qwen- or SmolLM-like model>",
            )

    @torch.no_grad()
    def _keeps_apart(self, device: torch.device) -> bool:
        """Whether packed sequences do not see each other: others than attention may carry a state along."""
        ids = torch.arange(16, device=device).view(2, 8) % self.model.config.get_text_config().vocab_size
        attended = torch.ones_like(ids, dtype=torch.bool)
        attended[0, :3] = False
        try:
            packed = self._packed_hidden(ids, attended).float()
        except TypeError:  # a model that hands nothing on to its attention
            return False
        padded = self._hidden(ids, attended)[attended]
        gap = (packed - padded.float()).abs().mean() / padded.float().abs().mean()
        return bool(gap <= _PACKING_TOLERANCE[padded.dtype])


def _load(path: str, dtype: torch.dtype, attention: str, *, empty: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer; ``empty``: the model on the meta device, as its configuration says."""
    source = Path(path)
    gguf = {"gguf_file": source.name} if source.suffix == ".gguf" else {}
    place = str(source.parent) if gguf else path
    fix = "policy.path=<hub id, folder or .gguf file>"
    if (gguf or path.startswith((".", "/", "~"))) and not source.expanduser().exists():
        raise ConfigError(f"policy.path={path}", "an existing folder or file", fix)
    model: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **gguf)
        if empty:
            config = AutoConfig.from_pretrained(place, **gguf)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
            with suppress(OSError):  # few folders lack it; the configuration has given one then
                model.generation_config = GenerationConfig.from_pretrained(place)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                place, dtype=dtype, attn_implementation=attention, **gguf
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"policy.path={path}", f"a causal language model that loads ({reason})", fix
        ) from error
    if gguf:
        # The weights are dequantised by now; drop the marks that forbid training and saving.
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model, tokenizer
